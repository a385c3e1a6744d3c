# SPDX-License-Identifier: Apache-2.0
"""Reading a FlatBuffer that may be hostile: every offset and length is checked before it is followed.

A table is a position in the file. Two bytes of its vtable per field say where the field lies, 0 that it is absent.
Reference: FlatBuffers' description of its binary format.
"""

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["BrokenFile", "FlatTable", "root_table"]

_MOST_ENTRIES = 200_000


class BrokenFile(ValueError):
    """An offset or a length that leaves the file."""


def root_table(raw: bytes) -> "FlatTable":
    """The table that a file starts with.

    Raises:
        BrokenFile: its offset leaves the file.
    """
    return FlatTable(raw, _unpack("<I", raw, 0))


@dataclass(frozen=True)
class FlatTable:
    """One table.

    Attributes:
        raw: The file.
        position: Where it starts.
    """

    raw: bytes
    position: int

    def number(self, slot: int, form: str, default: int | float) -> int | float:
        """A scalar field.

        Args:
            slot: Place of the field in the schema, from 0.
            form: As `struct` has it, one character.
            default: Where it is absent.
        """
        place = self._place(slot)
        return default if place is None else _unpack(f"<{form}", self.raw, place)

    def integer(self, slot: int, form: str = "i", default: int = 0) -> int:
        """A scalar field of an integer type."""
        return int(self.number(slot, form, default))

    def table(self, slot: int) -> "FlatTable | None":
        """A table that the field points to."""
        place = self._place(slot)
        return None if place is None else FlatTable(self.raw, place + _unpack("<I", self.raw, place))

    def tables(self, slot: int) -> list["FlatTable"]:
        """A vector of tables."""
        start, count = self._vector(slot, 4)
        if count > _MOST_ENTRIES:
            raise BrokenFile(f"a list of {count} entries")
        places = [start + 4 * index for index in range(count)]
        return [FlatTable(self.raw, place + _unpack("<I", self.raw, place)) for place in places]

    def numbers(self, slot: int, dtype: str) -> NDArray[np.generic]:
        """A vector of scalars, little-endian; empty where it is absent."""
        size = np.dtype(dtype).itemsize
        start, count = self._vector(slot, size)
        return np.frombuffer(self.raw, np.dtype(dtype).newbyteorder("<"), count, start) if count else np.empty(0, dtype)

    def text(self, slot: int) -> str:
        """A string; empty where it is absent."""
        start, count = self._vector(slot, 1)
        return self.raw[start : start + min(count, 1000)].decode("utf-8", "replace")

    def _vector(self, slot: int, size: int) -> tuple[int, int]:
        """Where the elements start, and how many there are."""
        place = self._place(slot)
        if place is None:
            return 0, 0
        start = place + _unpack("<I", self.raw, place)
        count = int(_unpack("<I", self.raw, start))
        if start + 4 + count * size > len(self.raw):
            raise BrokenFile(f"a list of {count} entries ends behind the file")
        return start + 4, count

    def _place(self, slot: int) -> int | None:
        """Where a field lies; None where it is absent."""
        vtable = self.position - _unpack("<i", self.raw, self.position)
        if 4 + 2 * slot + 2 > _unpack("<H", self.raw, vtable):
            return None
        offset = _unpack("<H", self.raw, vtable + 4 + 2 * slot)
        return self.position + offset if offset else None


def _unpack(form: str, raw: bytes, place: int) -> int:
    if place < 0 or place + struct.calcsize(form) > len(raw):
        raise BrokenFile(f"an offset of {place} in a file of {len(raw)} bytes")
    return struct.unpack_from(form, raw, place)[0]  # type: ignore[no-any-return]
