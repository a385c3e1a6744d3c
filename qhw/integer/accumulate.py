# SPDX-License-Identifier: Apache-2.0
"""Whether a sum fits its accumulator: proven from the stored codes, or refused."""

from dataclasses import dataclass

from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.site import Site, unknown
from qhw.numerics import accumulator_bits_needed

__all__ = ["Bounds", "fits"]


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


def fits(site: Site, bounds: Bounds) -> None:
    """Accept a sum that cannot overflow.

    Raises:
        IntegerError: the width is not known, or some input can make it overflow.
    """
    path, accumulator = site.accumulator
    if accumulator.kind == "float":
        raise IntegerError(f'{path}.kind = "float" cannot be executed exactly')
    if accumulator.pairwise is not None and accumulator.pairwise != "unknown":
        raise IntegerError(f"{path}.pairwise sums cannot be executed yet")
    if accumulator.bits == "per_layer":
        return
    if not isinstance(accumulator.bits, int):
        raise unknown(f"{path}.bits", accumulator.bits)
    needed = int(bounds.bits.max())
    if needed > accumulator.bits:
        raise IntegerError(f"its accumulator may need {needed} bits, and {path}.bits = {accumulator.bits}")
