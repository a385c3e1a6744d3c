# SPDX-License-Identifier: Apache-2.0
"""Pieces of a benchmark page that separate processes measure, kept in a folder until all are there."""

import json
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Piece", "gather", "load", "measured", "save"]


@dataclass
class Piece:
    """What one process measured of a page.

    Attributes:
        key: Its place in the page.
        lines: Markdown.
        made_with: Versions and CPU; pieces of one page have the same.
        cpu_seconds: What it took.
    """

    key: str
    lines: list[str]
    made_with: str
    cpu_seconds: float


def measured(key: str, lines: Iterable[str], made_with: str) -> Piece:
    """A piece with the CPU time that its lines take to be made."""
    started = time.process_time()
    made = list(lines)
    return Piece(key, made, made_with, time.process_time() - started)


def gather(keys: Iterable[str], measure: Callable[[str], Piece], folder: Path | None) -> list[Piece]:
    """Pieces measured one after the other, each kept in a folder, where there is one, once it is there."""
    pieces = []
    for key in keys:
        pieces.append(measure(key))
        if folder is not None:
            save(pieces[-1], folder)
    return pieces


def save(piece: Piece, folder: Path) -> None:
    """Write a piece, over an earlier one with its key."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{piece.key}.json").write_text(json.dumps(asdict(piece), indent=1) + "\n", encoding="utf-8")


def load(folder: Path, keys: list[str], may_miss: bool = False) -> list[Piece]:
    """The pieces of a page in its order; exits with one line where one is missing or was made elsewhere.

    Args:
        folder: Where `save` wrote them.
        keys: Those of the page, in its order.
        may_miss: Leave out what is missing, if something is there.
    """
    missing = [key for key in keys if not (folder / f"{key}.json").is_file()]
    if may_miss and len(missing) < len(keys):
        keys = [key for key in keys if key not in missing]
    elif missing:
        sys.exit(f"error: {folder}: {', '.join(missing)} not there. Measure them with --part and --save.")
    found = [Piece(**json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))) for key in keys]
    made = sorted({piece.made_with for piece in found})
    if len(made) > 1:
        sys.exit(f"error: {folder}: pieces were made with {' and with '.join(made)}. Measure the older ones again.")
    return found
