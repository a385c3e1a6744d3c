# SPDX-License-Identifier: Apache-2.0
"""Functions of two narrow operands as one look-up per element: any arithmetic at the same speed."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qhw.numerics import QParams

__all__ = ["by_table"]

_LARGEST = 2**16  # entries: two operands of 8 bits
_CHUNK = 2**16  # elements whose index stays in the cache

Run = Callable[[Sequence[Tensor]], Tensor]


def by_table(run: Run, a: QParams, b: QParams) -> Run:
    """The same function, evaluated once for every pair of codes; itself where the operands have too many.

    Args:
        run: Element by element: float32 codes of both operands, broadcast -> float32 codes.
        a: Grid of the first operand.
        b: Grid of the second.
    """
    columns = b.quant_max - b.quant_min + 1
    if (a.quant_max - a.quant_min + 1) * columns > _LARGEST:
        return run
    first, second = (torch.arange(q.quant_min, q.quant_max + 1, dtype=torch.float32) for q in (a, b))
    table = run([first[:, None].expand(-1, columns).contiguous(), second.expand(len(first), -1).contiguous()]).flatten()
    offset = a.quant_min * columns + b.quant_min

    def look_up(values: Sequence[Tensor]) -> Tensor:
        x, y = torch.broadcast_tensors(*values)  # type: ignore[no-untyped-call]
        if any(_has_channels_last(t) for t in (x, y)):
            return in_order(x.movedim(1, -1), y.movedim(1, -1)).movedim(-1, 1)
        return in_order(x, y)

    def in_order(x: Tensor, y: Tensor) -> Tensor:
        """Element by element, as they lie in memory."""
        found = torch.empty(x.shape, dtype=table.dtype)
        rows = max(1, _CHUNK * len(x) // max(x.numel(), 1)) if x.dim() else 1
        parts = zip(*(torch.split(t, rows) if t.dim() else (t,) for t in (x, y, found)), strict=True)
        for one, other, part in parts:
            index = torch.add(other.contiguous(), one.contiguous(), alpha=columns)
            index = (index.sub_(offset) if offset else index).int().flatten()
            torch.index_select(table, 0, index, out=part.view(-1))
        return found

    return look_up


def _has_channels_last(x: Tensor) -> bool:
    return x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
