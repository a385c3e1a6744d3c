# SPDX-License-Identifier: Apache-2.0
"""Printing: colour and box lines on a terminal, plain text in a pipe, JSON where asked for."""

import json
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

__all__ = ["heading", "one_document", "paragraph", "print_document", "print_json", "print_table", "warn", "width"]

_LEFT = 22


def width() -> int:
    """Columns to fill: the terminal's, or 120 in a pipe."""
    return shutil.get_terminal_size((120, 24)).columns if sys.stdout.isatty() else 120


def _console() -> Console:
    return Console(width=width(), highlight=False, soft_wrap=True)


def heading(text: str) -> None:
    """A line that stands out on a terminal."""
    _console().print(Text(text, style="bold"))


def paragraph(label: str, text: str, left: int = _LEFT, indent: int = 0) -> None:
    """A label, and text beside it that wraps under itself."""
    room = max(width() - left - indent, 30)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False) or [""]
    head = " " * indent + label
    first = (
        f"{head:<{left + indent - 1}} {lines[0]}"
        if len(head) < left + indent
        else f"{head}\n{' ' * (left + indent)}{lines[0]}"
    )
    print("\n".join([first.rstrip(), *(" " * (left + indent) + line for line in lines[1:])]))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns as wide as their content, two spaces apart; the last one is not padded."""
    listed = [list(map(str, row)) for row in rows]
    widths = [max(len(cell) for cell in column) for column in zip(columns, *listed, strict=True)]
    heading("  ".join(c.ljust(w) for c, w in zip(columns, widths, strict=True)).rstrip())
    for row in listed:
        print("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip())


_kept: list[TextIO] = []  # standard output, while it is kept for one document


@contextmanager
def one_document() -> Iterator[None]:
    """Keep standard output for `print_document`; what others print meanwhile goes to standard error."""
    _kept.append(sys.stdout)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        _kept.pop()


def print_document(text: str) -> None:
    """A whole document, as JSON, on standard output."""
    print(text, end="", file=_kept[-1] if _kept else None)


def print_json(data: Any) -> None:
    """Facts as JSON on standard output."""
    print_document(json.dumps(data, indent=1) + "\n")


def warn(text: str) -> None:
    """A remark on standard error."""
    print(text, file=sys.stderr)
