# SPDX-License-Identifier: Apache-2.0
"""Unfinished folders: locked while their process lives, cleared away by the next run once it is gone.

A process that is killed cleans nothing up, and a process number may be another's by then. The system releases a lock
when its holder ends, however it ends.
"""

import errno
import logging
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

__all__ = ["set_aside", "unfinished_folder"]

_HELD = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)
_log = logging.getLogger("qhw")


@contextmanager
def unfinished_folder(parent: Path, stem: str) -> Iterator[Path]:
    """A new folder `.<stem>.<random>.partial`, removed when the block ends; what killed runs left is removed first.

    Args:
        parent: Where; exists.
        stem: What the folder is to become, or a word of the caller's.

    Raises:
        OSError: the place cannot be written.
    """
    _clear(parent, stem)
    with _locked(parent, stem) as lock:
        inside = lock.with_suffix(".partial")
        inside.mkdir(mode=0o700)
        try:
            yield inside
        finally:
            shutil.rmtree(inside, ignore_errors=True)


def set_aside(inside: Path) -> Path:
    """Where a finished folder is put aside while an unfinished one takes its place; given back after a kill."""
    return inside.with_suffix(".old")


def _clear(parent: Path, stem: str) -> None:
    """Remove what runs that are gone left; a folder that one of them had set aside goes back where it was."""
    ours = re.compile(rf"\.{re.escape(stem)}\.[a-z0-9_]{{8}}\.lock")
    for lock in [path for path in parent.iterdir() if ours.fullmatch(path.name)]:
        with suppress(OSError):  # another run clears it, or the place is not ours to write
            with lock.open("rb+") as file:
                if not _lock(file):
                    continue
                partial, aside, place = lock.with_suffix(".partial"), lock.with_suffix(".old"), parent / stem
                if aside.is_dir() and not place.exists():
                    aside.replace(place)
                    _log.warning("%s: a run was killed while it replaced this folder; the earlier one is back.", place)
                for left in (partial, aside):
                    if left.is_dir():
                        shutil.rmtree(left, ignore_errors=True)
                        _log.info("%s: was left by a run that was killed, and is removed.", left)
            lock.unlink()


@contextmanager
def _locked(parent: Path, stem: str) -> Iterator[Path]:
    """A new lock file, held until the block ends; gone at once where the file system knows no locks."""
    file, path = _new_lock(parent, stem)
    try:
        yield path
    finally:
        file.close()
        path.unlink(missing_ok=True)


def _new_lock(parent: Path, stem: str) -> tuple[IO[bytes], Path]:
    while True:
        handle, name = tempfile.mkstemp(prefix=f".{stem}.", suffix=".lock", dir=parent)
        file, path = os.fdopen(handle, "wb"), Path(name)
        try:
            if _lock(file) and path.exists():  # else another run cleared it between its making and its locking
                return file, path
            file.close()
        except OSError:  # no locks here: an unlocked file would look like a dead run's
            with suppress(OSError):
                path.unlink()
            return file, path


def _lock(file: IO[bytes]) -> bool:
    """Whether the file's lock is ours now; False where another process holds it.

    Raises:
        OSError: files cannot be locked here.
    """
    try:
        if sys.platform == "win32":
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
