# SPDX-License-Identifier: Apache-2.0
"""Sums and their codes a few samples at a time, so that what is made on the way stays in the cache."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qhw.integer.finish import Finish
from qhw.integer.site import Site

__all__ = ["in_pieces"]

_PIECE = 2**20  # elements of the operand or the result, whichever has more
Run = Callable[[Sequence[Tensor]], Tensor]


def in_pieces(site: Site, accumulate: Run, finish: Finish, dtype: torch.dtype) -> Run:
    """The codes that `finish` makes of what `accumulate` sums; operators of one operand run by samples.

    Args:
        site: The operator.
        accumulate: Codes of the operands -> accumulators, new ones.
        finish: Fills its second argument with the codes of its first.
        dtype: Of the codes.
    """
    given, made = site.input_shape[1:], tuple(site.node.meta["shape"])[1:]
    is_batched = len(given) == len(site.operator.attributes.get("kernel", ())) + 1
    samples = max(1, _PIECE // max(math.prod(given), math.prod(made), 1))

    def whole(values: Sequence[Tensor]) -> Tensor:
        acc = accumulate(values)
        result = acc if acc.dtype == dtype else torch.empty_like(acc, dtype=dtype)
        finish(acc, result)
        return result

    def run(values: Sequence[Tensor]) -> Tensor:
        if len(values) > 1 or not is_batched or len(values[0]) <= samples:
            return whole(values)
        parts = torch.split(values[0], samples)
        first = whole(parts[:1])
        result = _stacked(first, len(values[0]))
        result[:samples] = first
        for part, filled in zip(parts[1:], torch.split(result, samples)[1:], strict=True):
            finish(accumulate([part]), filled)
        return result

    return run


def _stacked(part: Tensor, count: int) -> Tensor:
    """An empty tensor for so many samples, with the axes in memory as a part has them."""
    is_last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if is_last else torch.contiguous_format
    return torch.empty((count, *part.shape[1:]), dtype=part.dtype, device=part.device, memory_format=layout)
