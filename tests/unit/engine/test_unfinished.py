# SPDX-License-Identifier: Apache-2.0
"""What a run that is killed leaves: cleared away by the next one, and never while the run lives."""

import errno
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from qhw.engine import unfinished
from qhw.engine.unfinished import set_aside, unfinished_folder

KILLED = """
import os, sys
from pathlib import Path
from qhw.engine.unfinished import set_aside, unfinished_folder
place = Path(sys.argv[1])
with unfinished_folder(place.parent, place.name) as inside:
    (inside / "half.bin").write_bytes(b"half")
    if sys.argv[2] != "writing":
        place.replace(set_aside(inside))
    if sys.argv[2] == "replaced":
        place.mkdir()
        (place / "new.txt").write_text("new")
    os._exit(9)  # as a kill: nothing is cleaned up
"""


def killed(place: Path, when: str) -> list[str]:
    """What lies beside a place when a run that writes there was killed."""
    done = subprocess.run([sys.executable, "-c", KILLED, str(place), when], check=False)
    assert done.returncode == 9
    return names(place.parent)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def suffixes(found: list[str]) -> list[str]:
    return [Path(name).suffix for name in found]


def test_the_next_run_clears_what_a_killed_one_left(tmp_path: Path) -> None:
    assert suffixes(killed(tmp_path / "net", "writing")) == [".lock", ".partial"]
    with unfinished_folder(tmp_path, "net") as inside:
        assert names(tmp_path) == [inside.with_suffix(".lock").name, inside.name]
        assert names(inside) == []
    assert names(tmp_path) == []


def test_a_run_that_lives_keeps_its_folder(tmp_path: Path) -> None:
    with unfinished_folder(tmp_path, "net") as first:
        (first / "half.bin").write_bytes(b"half")
        with unfinished_folder(tmp_path, "net") as second:
            assert first != second
            assert (first / "half.bin").is_file()
        code = "import sys; from pathlib import Path; from qhw.engine.unfinished import unfinished_folder\n"
        code += "with unfinished_folder(Path(sys.argv[1]), 'net'): pass"
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
        assert (first / "half.bin").is_file()
    assert names(tmp_path) == []


def test_a_folder_that_a_killed_run_had_set_aside_is_given_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = tmp_path / "net"
    place.mkdir()
    (place / "old.txt").write_text("old")
    assert suffixes(killed(place, "between")) == [".lock", ".old", ".partial"]
    with caplog.at_level(logging.WARNING, logger="qhw"), unfinished_folder(tmp_path, "net"):
        assert (place / "old.txt").read_text() == "old"
    assert f"{place}: a run was killed while it replaced this folder; the earlier one is back." in caplog.text
    assert names(tmp_path) == ["net"]


def test_a_folder_that_was_replaced_before_the_kill_stays_replaced(tmp_path: Path) -> None:
    place = tmp_path / "net"
    place.mkdir()
    (place / "old.txt").write_text("old")
    killed(place, "replaced")
    with unfinished_folder(tmp_path, "net"):
        assert names(place) == ["new.txt"]
    assert names(tmp_path) == ["net"]


def test_nothing_else_is_touched(tmp_path: Path) -> None:
    theirs = [".net.partial", ".net.diary.partial", ".net.abcdefgh.partial", ".other.abcdefgh.partial", "net.lock"]
    for name in theirs:
        (tmp_path / name).mkdir()
    (tmp_path / ".other.abcdefgh.lock").touch()
    with unfinished_folder(tmp_path, "net"):
        pass
    assert names(tmp_path) == sorted([*theirs, ".other.abcdefgh.lock"])


def test_where_files_cannot_be_locked_nothing_is_marked_and_nothing_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = killed(tmp_path / "net", "writing")

    def refuse(file: object) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(unfinished, "_lock", refuse)
    with unfinished_folder(tmp_path, "net") as inside:
        assert names(tmp_path) == sorted([*left, inside.name])
    assert names(tmp_path) == left


def test_a_lock_that_another_run_cleared_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = unfinished._lock
    seen: list[object] = []

    def lock(file: object) -> bool:
        if not seen:  # as if another run had found the file before it was locked
            next(tmp_path.glob("*.lock")).unlink()
        seen.append(file)
        return real(file)  # type: ignore[arg-type]

    monkeypatch.setattr(unfinished, "_lock", lock)
    with unfinished_folder(tmp_path, "net") as inside:
        assert len(seen) == 2
        assert inside.with_suffix(".lock").is_file()


def test_set_aside_lies_beside(tmp_path: Path) -> None:
    assert set_aside(tmp_path / ".net.abcdefgh.partial") == tmp_path / ".net.abcdefgh.old"
