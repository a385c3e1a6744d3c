# SPDX-License-Identifier: Apache-2.0
"""Numbers and lists in reports, as people write them."""

from collections.abc import Sequence
from pathlib import Path

__all__ = ["argument", "counted", "listed"]


def argument(path: Path) -> str:
    """A path as one argument of a command to copy: in quotes where it holds a space."""
    return f'"{path}"' if " " in str(path) else str(path)


def counted(number: int, noun: str, plural: str | None = None) -> str:
    """A number and its noun, as `1 layer`, `2 layers`.

    Args:
        number: How many.
        noun: In the singular.
        plural: Absent: the noun with an s.
    """
    return f"{number} {noun if number == 1 else plural or noun + 's'}"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first names, and how many more there are, as `a, b and 3 more`."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
