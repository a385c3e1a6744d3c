# SPDX-License-Identifier: Apache-2.0
"""Whether a sum fits its accumulator: proven from the stored codes, or refused."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.site import Site, unknown
from qhw.numerics import accumulator_bits_needed

__all__ = ["Bounds", "Overflow", "overflow_of", "wrapped"]

Overflow = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of an accumulator at any moment, in any order: int64 [out_channels]."""

    lowest: Tensor
    highest: Tensor

    @property
    def largest(self) -> int:
        """Largest magnitude."""
        return max(int(self.highest.max()), -int(self.lowest.min()))

    @property
    def bits(self) -> Tensor:
        """Bits that each channel needs, the sign included: int64 [out_channels]."""
        return accumulator_bits_needed(self.lowest, self.highest)


def overflow_of(site: Site, bounds: Bounds) -> Overflow:
    """What happens to a sum behind its last product: nothing where it cannot overflow, else what the target says.

    A sum that wraps is the same in any order. One that saturates depends on the order, which no target states.

    Raises:
        IntegerError: the width is not known, or some input makes the sum overflow and its value is not defined.
    """
    path, accumulator = site.accumulator
    if accumulator.kind == "float":
        raise IntegerError(f'{path}.kind = "float" cannot be executed exactly')
    if accumulator.pairwise == "unknown":
        raise unknown(f"{path}.pairwise", accumulator.pairwise)
    if accumulator.pairwise is not None:
        raise IntegerError(f"{path}.pairwise sums cannot be executed yet")
    if accumulator.bits == "per_layer":
        return _unchanged
    if not isinstance(accumulator.bits, int):
        raise unknown(f"{path}.bits", accumulator.bits)
    needed = int(bounds.bits.max())
    if needed <= accumulator.bits:
        return _unchanged
    if accumulator.overflow == "wrap":
        return partial(wrapped, bits=accumulator.bits)
    raise IntegerError(
        f"its accumulator may need {needed} bits, {path}.bits = {accumulator.bits}, and with overflow = "
        f'"{accumulator.overflow or "not stated"}" the sum is not defined ("qhw accumulators" shows the channels)'
    )


def wrapped(total: Tensor, bits: int) -> Tensor:
    """Two's complement of a width: int64 in [-2^(bits - 1), 2^(bits - 1)).

    Args:
        total: Whole numbers, in any dtype that holds them; [*shape].
        bits: 1 to 63.
    """
    half = 1 << (bits - 1)
    return torch.remainder(total.long() + half, 2 * half) - half


def _unchanged(total: Tensor) -> Tensor:
    return total
