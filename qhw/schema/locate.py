# SPDX-License-Identifier: Apache-2.0
"""The line of a field in a TOML text, for messages. Best effort: a place it cannot find has no line, never an error."""

import contextlib
import re

from qhw.schema.base import Path

__all__ = ["Lines"]

BARE = re.compile(r"[A-Za-z0-9_-]+")
SCALAR = re.compile(r"[^,\]}#\n]+")
STRINGS = ('"""', "'''", '"', "'")


class Lines:
    """Line numbers of the key paths of one TOML text.

    Example:
        >>> Lines('name = "acme/tiny"\\nformats.a8 = { bits = 8 }').of(("formats", "a8", "bits"))
        2
    """

    def __init__(self, text: str) -> None:
        self._text = text.replace("\r\n", "\n")
        self._at = 0
        self._line = 1
        self._found: dict[Path, int] = {}
        self._array_tables: dict[Path, int] = {}
        self._is_read = False

    def of(self, path: Path) -> int | None:
        """Line of a path; None where the text does not write it."""
        return self._lines().get(path)

    def nearest(self, path: Path) -> tuple[int, int | None]:
        """How much of a path the text writes, and the line of that part."""
        found = self._lines()
        for count in range(len(path), 0, -1):
            line = found.get(path[:count])
            if line is not None:
                return count, line
        return 0, None

    def _lines(self) -> dict[Path, int]:
        """All lines, looked for at the first question: most files are never asked about."""
        if not self._is_read:
            self._is_read = True
            # What was found before a place that cannot be read stands; the rest has no line.
            with contextlib.suppress(IndexError, RecursionError, ValueError):
                self._document()
            self._text = ""
        return self._found

    def _document(self) -> None:
        table: Path = ()
        while self._skip(newlines=True):
            if self._text[self._at] == "[":
                table = self._header()
            else:
                self._pair(table)

    def _header(self) -> Path:
        is_array = self._text.startswith("[[", self._at)
        self._advance(2 if is_array else 1)
        table = self._resolved(self._key())
        self._advance(2 if is_array else 1)
        if is_array:
            index = self._array_tables.get(table, -1) + 1
            self._array_tables[table] = index
            self._mark(table)
            table = (*table, index)
        self._mark(table)
        return table

    def _resolved(self, key: Path) -> Path:
        path: Path = ()
        for part in key:
            path = (*path, part)
            if path in self._array_tables and len(path) < len(key):
                path = (*path, self._array_tables[path])
        return path

    def _pair(self, table: Path) -> None:
        line = self._line
        path = (*table, *self._key())
        for count in range(len(table) + 1, len(path) + 1):
            self._found.setdefault(path[:count], line)
        self._expect("=")
        self._value(path)

    def _key(self) -> Path:
        parts: list[str] = []
        while True:
            self._skip()
            if self._text[self._at] in "\"'":
                parts.append(self._string())
            else:
                match = BARE.match(self._text, self._at)
                if match is None:
                    raise ValueError("no key here")
                parts.append(match.group())
                self._advance(len(match.group()))
            self._skip()
            if self._text[self._at] != ".":
                return tuple(parts)
            self._advance(1)

    def _value(self, path: Path) -> None:
        self._skip()
        start = self._text[self._at]
        if start == "{":
            self._inline(path)
        elif start == "[":
            self._array(path)
        elif start in "\"'":
            self._string()
        else:
            match = SCALAR.match(self._text, self._at)
            self._advance(len(match.group()) if match else 1)

    def _inline(self, path: Path) -> None:
        self._advance(1)
        while self._skip(newlines=True) and self._text[self._at] != "}":
            if self._text[self._at] == ",":
                self._advance(1)
            else:
                self._pair(path)
        self._expect("}")

    def _array(self, path: Path) -> None:
        self._advance(1)
        index = 0
        while self._skip(newlines=True) and self._text[self._at] != "]":
            if self._text[self._at] == ",":
                self._advance(1)
            else:
                self._mark((*path, index))
                self._value((*path, index))
                index += 1
        self._expect("]")

    def _string(self) -> str:
        quote = next(mark for mark in STRINGS if self._text.startswith(mark, self._at))
        end = self._at + len(quote)
        while not self._text.startswith(quote, end):
            if end >= len(self._text):
                raise ValueError("string without an end")
            end += 2 if self._text[end] == "\\" and quote[0] == '"' else 1
        held = self._text[self._at + len(quote) : end]
        self._advance(end + len(quote) - self._at)
        return held

    def _skip(self, *, newlines: bool = False) -> bool:
        while self._at < len(self._text):
            char = self._text[self._at]
            if char == "#":
                end = self._text.find("\n", self._at)
                self._advance((end if end >= 0 else len(self._text)) - self._at)
            elif char in " \t" or (newlines and char == "\n"):
                self._advance(1)
            else:
                return True
        return False

    def _expect(self, mark: str) -> None:
        self._skip()
        if self._text[self._at] != mark:
            raise ValueError(f"no {mark} here")
        self._advance(1)

    def _mark(self, path: Path) -> None:
        self._found.setdefault(path, self._line)

    def _advance(self, count: int) -> None:
        self._line += self._text.count("\n", self._at, self._at + count)
        self._at += count
