# SPDX-License-Identifier: Apache-2.0
"""Palettes: weights stored as indexes into a look-up table, one for the tensor or one for each few output channels."""

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.clusters import cluster_rows
from qhw.numerics.elements import ElementSet
from qhw.numerics.float_elements import BFLOAT16, FLOAT16

__all__ = ["PaletteElements", "PaletteEntry"]

PaletteEntry = Literal["float32", "float16", "bfloat16", "int8"]
_WIDTH = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8}
_LARGEST_INT8 = 127


class PaletteElements(ElementSet):
    """The entries of look-up tables: code k stands for entry k of the table of its channel.

    A palette without a table is what a format allows; `filled` finds the table for a weight. Entries ascend. A real
    goes to the nearest entry, a tie to the lower one.

    Args:
        index_bits: Width of a code; a table has 2^index_bits entries.
        entry: Type of an entry; int8 entries are whole numbers that the scale multiplies.
        group_channels: Output channels that share a table; None: all.
        has_scale: Whether entries are multiplied by a scale; else they are the weights themselves.
        table: float32 [1, ..., groups, ..., 1, entries]: the axes of the weight, groups in place of output channels,
            and one of entries.
    """

    def __init__(
        self,
        index_bits: int,
        entry: PaletteEntry,
        group_channels: int | None = None,
        has_scale: bool = False,
        table: Tensor | None = None,
    ) -> None:
        if not 1 <= index_bits <= 8:
            raise RangeError(f"palette: index_bits must be 1 to 8; got {index_bits}. Use a narrower index.")
        self.index_bits = index_bits
        self.entry: PaletteEntry = entry
        self.group_channels = group_channels
        self.has_scale = has_scale
        self.table = table
        if table is not None:
            self._check(table)

    def _check(self, table: Tensor) -> None:
        groups = [size for size in table.shape[:-1] if size != 1]
        if table.dtype != torch.float32 or table.shape[-1:] != (2**self.index_bits,) or len(groups) > 1:
            raise RangeError(
                f"palette: the table must be float32 [groups among ones, {2**self.index_bits}]; got {table.dtype} "
                f"{list(table.shape)}. Make it with filled()."
            )
        if not bool(torch.isfinite(table).all() & (table.diff(dim=-1) >= 0).all()):
            raise RangeError("palette: entries must be finite and ascend. Make the table with filled().")

    @property
    def _known(self) -> Tensor:
        if self.table is None:
            raise RangeError("palette: has no look-up table yet. Let an algorithm for palettes choose it.")
        return self.table

    @property
    def bits(self) -> int:
        """Width of an index."""
        return self.index_bits

    @property
    def beside_bits(self) -> int:
        """Bits of all entries."""
        return 0 if self.table is None else self.table.numel() * _WIDTH[self.entry]

    @property
    def is_absolute(self) -> bool:
        """Whether entries are the weights themselves."""
        return not self.has_scale

    @property
    def lowest(self) -> float:
        """The lowest entry; without a table that of a weight divided by its largest magnitude."""
        return -1.0 if self.table is None else float(self.table.min())

    @property
    def highest(self) -> float:
        """The highest entry; without a table that of a weight divided by its largest magnitude."""
        return 1.0 if self.table is None else float(self.table.max())

    @property
    def edges(self) -> tuple[float, float]:
        """None: tables differ, and what lies beyond one is drawn back by its gradient."""
        return -math.inf, math.inf

    @property
    def words(self) -> str:
        """As `a palette of 16 entries`."""
        return f"a palette of {2**self.index_bits} entries"

    def filled(self, reals: Tensor, axis: int | None) -> "PaletteElements":
        """The palette with the tables that serve a weight best: k-means, entries then rounded to their type.

        Args:
            reals: float [*shape], the weight divided by its scale.
            axis: Of the output channels; None: one table.
        """
        groups, rows = 1, reals.reshape(1, -1)
        if axis is not None and self.group_channels is not None:
            channels, size = reals.shape[axis], self.group_channels
            groups = -(-channels // size)
            whole = reals.movedim(axis, 0).reshape(channels, -1).float()
            short = groups * size - channels
            if short:
                whole = torch.cat([whole, whole.new_full((short, whole.shape[1]), math.nan)])
            rows = whole.reshape(groups, -1)
        centres = cluster_rows(rows, 2**self.index_bits)
        shape = [1] * reals.dim()
        if axis is not None:
            shape[axis] = groups
        return self.with_tensors({"table": _as_entries(centres, self.entry).reshape(*shape, -1)})

    def round_to(self, x: Tensor) -> Tensor:
        """The nearest entry of each channel's table."""
        table, rows, restore = self._rows(x)
        middles = ((table[:, 1:].double() + table[:, :-1].double()) / 2).to(x.dtype).contiguous()
        index = torch.searchsorted(middles, rows.contiguous())
        found = table.to(x.dtype).gather(1, index)
        return restore(torch.where(rows.isnan(), rows, found))

    def encode(self, elements: Tensor) -> Tensor:
        """Indexes, uint8; the first where entries are equal."""
        table, rows, restore = self._rows(elements)
        index = torch.searchsorted(table.contiguous(), rows.contiguous()).clamp(max=table.shape[1] - 1)
        return restore(index.to(torch.uint8))

    def decode(self, codes: Tensor) -> Tensor:
        """Entries."""
        table, rows, restore = self._rows(codes)
        return restore(table.gather(1, rows.long()))

    def _rows(self, x: Tensor) -> "tuple[Tensor, Tensor, _Restore]":
        """Tables [rows, entries] and x [rows, elements], and how rows become a tensor like x again."""
        table = self._known.to(x.device)
        axis = next((axis for axis, size in enumerate(table.shape[:-1]) if size != 1), None)
        flat = table.reshape(-1, table.shape[-1])
        if axis is None:
            return flat, x.reshape(1, -1), _Restore(tuple(x.shape), None)
        if table.dim() != x.dim() + 1 or self.group_channels is None:
            raise RangeError(
                f"palette: tables for axis {axis} of {table.dim() - 1} axes do not fit a tensor of shape "
                f"{list(x.shape)}. Use the weight that they were made for."
            )
        moved = x.movedim(axis, 0)
        owner = torch.arange(x.shape[axis], device=x.device) // self.group_channels
        return flat[owner], moved.reshape(x.shape[axis], -1), _Restore(tuple(moved.shape), axis)

    def tensors(self) -> dict[str, Tensor]:
        """The table, once there is one."""
        return {} if self.table is None else {"table": self.table}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "PaletteElements":
        """The same palette on another table."""
        table = tensors.get("table")
        return PaletteElements(self.index_bits, self.entry, self.group_channels, self.has_scale, table)

    def is_of(self, format_elements: ElementSet) -> bool:
        """Whether it has a table, and is what the format says."""
        return (
            isinstance(format_elements, PaletteElements)
            and self.table is not None
            and self._facts == format_elements._facts
        )

    @property
    def _facts(self) -> tuple[int, str, int | None, bool]:
        return self.index_bits, self.entry, self.group_channels, self.has_scale

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PaletteElements):
            return NotImplemented
        if self.table is None or other.table is None:
            return self._facts == other._facts and self.table is other.table
        return self._facts == other._facts and torch.equal(self.table, other.table)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shape = "" if self.table is None else f", table {list(self.table.shape)}"
        return f"PaletteElements({self.index_bits} bits, {self.entry}{shape})"


class _Restore:
    """Rows become a tensor again."""

    def __init__(self, shape: tuple[int, ...], axis: int | None) -> None:
        self._shape = shape
        self._axis = axis

    def __call__(self, rows: Tensor) -> Tensor:
        x = rows.reshape(self._shape)
        return x if self._axis is None else x.movedim(0, self._axis).contiguous()


def _as_entries(centres: Tensor, entry: PaletteEntry) -> Tensor:
    """Centres in the type of an entry, as float32; rounding keeps their order."""
    if entry == "int8":
        return centres.round().clamp(-_LARGEST_INT8 - 1, _LARGEST_INT8).float()
    if entry == "float16":
        return FLOAT16.round_to(centres).float()
    if entry == "bfloat16":
        return BFLOAT16.round_to(centres).float()
    return centres.float()
