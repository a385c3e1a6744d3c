# SPDX-License-Identifier: Apache-2.0
"""Fixed-point requantization of accumulators whose bound is known: float64 alone, without a look at the data.

Why it is exact. In units of 2**-(bits + shift) a quotient acc * multiplier / 2**(bits + shift) is whole, and so are a
half and the zero point. float64 holds 2**53 of them. Where the bound of |acc| does not keep sums below that, the clamp
does: every step (a positive factor, a sum, a rounding) keeps the order of numbers, so what lies beyond the codes ends
on the same code as the exact result.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.numerics.requantize_float64 import Factors, Finish, power_of_two, rounded
from qhw.numerics.requantize_int64 import DOUBLE

# Elements of one piece of work per thread: its float64 copy of 2 MiB stays in a third-level cache; smaller pieces pay
# more in calls than a second-level cache gives back.
_CHUNK = 2**18
_UNITS = 2**53  # whole numbers up to it are exact in float64
_FLOAT32_EXACT = 2**23
_ADDS_A_HALF = ("half_away_from_zero", "half_to_plus_infinity")


@dataclass(frozen=True)
class BoundedCodes:
    """clamp(round(acc * multiplier / 2**(bits + shift)) + zero_point, low, high), decided as far as it can be.

    Attributes:
        factor: float64, broadcasts against accumulators.
        offset: float64, added before one floor that rounds, the zero point included; None: rounded by `factors`.
        factors: What was prepared.
        finish: Zero point and bounds.
    """

    factor: Tensor
    offset: Tensor | None
    factors: Factors
    finish: Finish

    def __call__(self, acc: Tensor, out: Tensor) -> None:
        """Fill `out`, by pieces along the first axis.

        Args:
            acc: Whole numbers within the bound, float32, float64 or int64; [*shape].
            out: [*shape], a dtype that holds every code; may be `acc` itself.
        """
        if acc.dim() <= self.factor.dim():
            self._fill(acc, out)
            return
        step = max(1, _CHUNK * torch.get_num_threads() * len(acc) // max(acc.numel(), 1))
        for start in range(0, len(acc), step):
            self._fill(acc[start : start + step], out[start : start + step])

    def _fill(self, acc: Tensor, out: Tensor) -> None:
        y = acc * self.factor if acc.dtype == torch.float64 else acc.double().mul_(self.factor)
        if self.offset is not None:
            y, zero_point = y.add_(self.offset).floor_(), 0
        else:
            y, zero_point = rounded(y, self.factors), self.finish.zero_point
        if out.dtype != torch.float32:
            out.copy_(y.add_(zero_point).clamp_(self.finish.low, self.finish.high))
            return
        out.copy_(y)  # what float32 does not hold lies beyond the bounds, and stays there
        if zero_point:
            out.add_(zero_point)
        out.clamp_(self.finish.low, self.finish.high)


def bounded_codes(factors: Factors, finish: Finish, largest: int) -> BoundedCodes | None:
    """What makes codes of accumulators in [-largest, largest]; None where float64 alone is no proof.

    Args:
        factors: Of checked multipliers and shifts.
        finish: Zero point and bounds of the codes.
        largest: Of |acc|.
    """
    f, zero_point = factors, finish.zero_point
    ends = (finish.low, finish.high, finish.low - zero_point, finish.high - zero_point)
    reach = max(map(abs, ends)) + abs(zero_point) + 1
    if reach >= _FLOAT32_EXACT or (f.rounding in DOUBLE and largest << f.largest_left >= 1 << f.bits):
        return None  # or the register would wrap
    channels = set(zip(f.multiplier.flatten().tolist(), f.shift.flatten().tolist(), strict=True))
    if all(_fits(f, m, s, abs(zero_point) + 1, reach, largest) for m, s in channels):
        return BoundedCodes(*_folded(f, finish), f, finish)
    if all(_fits(f, m, s, int(f.rounding in _ADDS_A_HALF), reach, largest) for m, s in channels):
        return BoundedCodes(f.first, None, f, finish)
    return None


def _fits(f: Factors, multiplier: int, shift: int, added: int, reach: int, largest: int) -> bool:
    """Whether float64 holds a channel's quotients and their sums with a number of at most `added`."""
    right = max(shift, 0) if f.rounding in DOUBLE else shift
    one = 1 << max(f.bits + right, 1)  # in units
    product = largest * multiplier << max(-shift, 0)
    rounds_to_nearest = f.rounding not in ("floor", "toward_zero")
    if rounds_to_nearest and 8 * product <= one:
        return True  # far from a half: 0, whatever the last bits
    return min(reach * one, product) + max(added * one, 1 << f.bits) <= _UNITS


def _folded(f: Factors, finish: Finish) -> tuple[Tensor, Tensor | None]:
    """Factor and offset of floor(acc * factor + offset), for rules that are a floor."""
    if f.rounding == "half_to_plus_infinity":
        return f.first, torch.full_like(f.first, finish.zero_point + 0.5)
    # What `double` does otherwise than `double_half_to_plus_infinity` is below 0, and here the clamp cuts that.
    is_cut = f.rounding == "double" and finish.low >= finish.zero_point
    if f.rounding != "double_half_to_plus_infinity" and not is_cut:
        return f.first, None
    # floor((floor(a + 1/2) + n/2) / n) = floor((a + 1/2 + n/2) / n) for an even n; for n = 1 nothing is left to round.
    unit = power_of_two(-f.shift.clamp(min=0))
    half = torch.where(f.shift > 0, 0.5 * unit, 0.0)
    return f.first * unit, half + (finish.zero_point + 0.5)
