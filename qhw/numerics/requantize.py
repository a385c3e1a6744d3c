# SPDX-License-Identifier: Apache-2.0
"""From an accumulator to the scale of the output: by a fixed-point multiplier, a float32 factor, or a shift."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.requantize_bounded import BoundedCodes, bounded_codes
from qhw.numerics.requantize_float64 import Factors, Finish, factors_of, rescale_by, rescale_fast
from qhw.numerics.requantize_int64 import DOUBLE, shift_exactly
from qhw.numerics.rounding import ROUNDING_RULES, Rounding, round_real

# Larger results of a float32 rescale are cut to this, so that they convert to int64; no grid reaches it.
_LARGEST_RESULT = 2.0**62
_MAX_BITS = 31


def fixed_point_multiplier(
    ratio: Tensor,
    *,
    bits: int = 31,
    shift_min: int = -30,
    shift_max: int = 31,
    out_of_range: Literal["saturate", "zero_scale", "refuse"] = "refuse",
) -> tuple[Tensor, Tensor]:
    """Integer multiplier and right shift next to a real ratio of scales.

        ratio ~ multiplier / 2**bits / 2**shift,  2**(bits - 1) <= multiplier < 2**bits

    The significand of frexp is rounded to `bits` bits, ties away from zero; a significand that rounds up to 2**bits is
    halved. With the defaults this is TFLite's QuantizeMultiplier, whose shift counts left.

    Args:
        ratio: float64 [*P], input scale times weight scale over output scale.
        bits: Of the multiplier, 1 to 31.
        shift_min: Smallest right shift; a negative one shifts left.
        shift_max: Largest right shift.
        out_of_range: A ratio beyond the shifts. "saturate": a larger one becomes the largest multiplier at shift_min, a
            smaller one 0, as in TFLite (whose default build leaves the larger one undefined); "zero_scale": both
            become 0; "refuse": RangeError.

    Returns:
        tuple: multiplier and shift, int64 [*P]. A ratio of 0 that is not refused has multiplier 0.

    Raises:
        RangeError: a ratio is negative, NaN, infinite or not float64; it is refused; or bits is out of bounds.

    Reference:
        Jacob et al., 2018, arXiv:1712.05877, eq. 6.
    """
    _check_bits(bits)
    if ratio.dtype != torch.float64:
        raise RangeError(f"multiplier: ratio must be float64; got {ratio.dtype}. Divide the scales in float64.")
    if shift_min > shift_max:
        raise RangeError(
            f"multiplier: shift_min must not exceed shift_max; got {shift_min} and {shift_max}. Swap them."
        )
    legal = torch.isfinite(ratio) & (ratio >= 0)
    if not bool(legal.all()):
        bad = ratio[~legal].flatten()[0].item()
        raise RangeError(f"multiplier: ratio must be a finite number from 0 on; got {bad}. Mend the scales.")
    significand, exponent = torch.frexp(ratio)
    # At most 53 bits, scaled by a power of two: exact until it is rounded.
    multiplier = round_real(significand * 2.0**bits, "half_away_from_zero").long()
    carry = multiplier == 2**bits
    multiplier = torch.where(carry, multiplier >> 1, multiplier)
    shift = -(exponent.long() + carry.long())
    above, below = shift < shift_min, (shift > shift_max) | (multiplier == 0)
    if out_of_range == "refuse" and bool((above | below).any()):
        bad = ratio[above | below].flatten()[0].item()
        raise RangeError(
            f"multiplier: ratio must be at least 2**{-shift_max - 1} and below 2**{-shift_min} for right shifts of "
            f"{shift_min} to {shift_max}; got {bad:.6g}. Change a scale."
        )
    zero = below | above if out_of_range == "zero_scale" else below
    multiplier = torch.where(above, 2**bits - 1, multiplier).masked_fill(zero, 0)
    return multiplier, shift.clamp(min=shift_min).masked_fill(zero, min(max(0, shift_min), shift_max))


def rescale_fixed_point(
    acc: Tensor,
    multiplier: Tensor,
    shift: Tensor,
    *,
    bits: int = 31,
    rounding: Rounding | Literal["double", "double_half_to_plus_infinity"] = "double",
) -> Tensor:
    """An accumulator times a fixed-point multiplier, exact.

    A named rule rounds once:

        result = round(acc * multiplier / 2**(bits + shift))

    "double" rounds twice, as gemmlowp and TFLite's reference kernels do; "double_half_to_plus_infinity" is what its
    optimized kernels do:

        high   = round_half_to_plus_infinity(wrap(acc * 2**max(-shift, 0)) * multiplier / 2**bits)
        result = round_half_away_from_zero(high / 2**max(shift, 0))     or half to plus infinity

    gemmlowp adds 1 - 2**30 to negative products and then truncates, which sends the ties of the high multiply upwards.
    wrap keeps bits + 1 bits in two's complement: TFLite shifts left in an int32, and what overflows there is lost.

    Args:
        acc: int64, or float32 or float64 that holds whole numbers; [*shape].
        multiplier: int64, broadcasts against acc; 0 <= multiplier < 2**bits.
        shift: int64, broadcasts against acc; -62 to 62, negative shifts left.
        bits: Of the multiplier, 1 to 31.
        rounding: One of ROUNDING_RULES, "double" or "double_half_to_plus_infinity".

    Returns:
        Tensor: int64 [*shape].

    Raises:
        RangeError: an argument is out of bounds; an accumulator does not fit the bits + 1 bits of a double rounding; or
            a product past 2**62 leaves int64 or the exact split (|acc| < 2**61 and bits + shift >= 31).

    Reference:
        Jacob et al., 2018, arXiv:1712.05877, section 2.2; gemmlowp fixedpoint.h; ARM's SQRDMULH.
    """
    _check_bits(bits)
    _check_rule(rounding, tuple(DOUBLE))
    _check_acc(acc)
    _check_integers("multiplier", multiplier, 0, 2**bits - 1)
    _check_integers("shift", shift, -62, 62)
    return rescale_fast(acc, multiplier, shift, bits, rounding)


@dataclass(frozen=True)
class FixedPointCodes:
    """`rescale_fixed_point`, a zero point and a clamp in one pass, its arguments checked once.

    code = clamp(rescale_fixed_point(acc, ...) + zero_point, low, high)
    """

    factors: Factors

    @classmethod
    def of(
        cls,
        multiplier: Tensor,
        shift: Tensor,
        bits: int,
        rounding: Rounding | Literal["double", "double_half_to_plus_infinity"],
    ) -> "FixedPointCodes":
        """Prepared multipliers.

        Args:
            multiplier: int64, not empty, broadcasts against accumulators; 0 <= multiplier < 2**bits.
            shift: int64, likewise; -62 to 62.
            bits: Of the multiplier, 1 to 31.
            rounding: As for `rescale_fixed_point`.

        Raises:
            RangeError: an argument is out of bounds.
        """
        _check_bits(bits)
        _check_rule(rounding, tuple(DOUBLE))
        _check_integers("multiplier", multiplier, 0, 2**bits - 1)
        _check_integers("shift", shift, -62, 62)
        return cls(factors_of(multiplier, shift, bits, rounding))

    def __call__(self, acc: Tensor, zero_point: int, low: int, high: int, dtype: torch.dtype) -> Tensor:
        """Codes, `dtype` [*shape].

        Args:
            acc: int64, float32 or float64; [*shape].
            zero_point: Added; within 2**52, as low and high.
            low: Lowest code.
            high: Highest code.
            dtype: Holds every code.

        Raises:
            RangeError: as `rescale_fixed_point`.
        """
        _check_acc(acc)
        return rescale_by(acc, self.factors, Finish(zero_point, low, high), dtype)

    def bounded(self, zero_point: int, low: int, high: int, largest: int) -> BoundedCodes | None:
        """The same for accumulators in [-largest, largest], in fewer steps; None where that is not proven exact."""
        return bounded_codes(self.factors, Finish(zero_point, low, high), largest)


def rescale_float32(acc: Tensor, multiplier: Tensor, *, rounding: Rounding = "half_even") -> Tensor:
    """An accumulator times a float32 factor, in one float32 product.

        result = round(float32(acc) * multiplier)

    The conversion of acc rounds half to even where it needs more than 24 bits, and so does the product.

    Args:
        acc: int64, or float32 that holds whole numbers; [*shape].
        multiplier: float32, finite, broadcasts against acc.
        rounding: Named rule for the product.

    Returns:
        Tensor: int64 [*shape]; values beyond 2**62 are cut to it.

    Raises:
        RangeError: a dtype is wrong, the multiplier is not finite, or the rule is unknown.
    """
    _check_rule(rounding)
    if acc.dtype not in (torch.int64, torch.float32):
        raise RangeError(f"rescale: acc must be int64 or float32; got {acc.dtype}. Convert it.")
    if multiplier.dtype != torch.float32 or not bool(torch.isfinite(multiplier).all()):
        raise RangeError(f"rescale: multiplier must be finite float32; got {multiplier.dtype}. Mend the scales.")
    product = acc.float() * multiplier
    return round_real(product, rounding).clamp_(-_LARGEST_RESULT, _LARGEST_RESULT).long()


def rescale_shift(acc: Tensor, shift: Tensor, *, rounding: Rounding = "half_even") -> Tensor:
    """An accumulator times a power of two, exact.

        result = round(acc / 2**shift)

    Args:
        acc: int64 [*shape].
        shift: int64, broadcasts against acc; -62 to 62, negative shifts left.
        rounding: Named rule for the quotient.

    Returns:
        Tensor: int64 [*shape].

    Raises:
        RangeError: a dtype is wrong, a shift is out of bounds, a left shift leaves int64, or the rule is unknown.
    """
    _check_rule(rounding)
    if acc.dtype != torch.int64:
        raise RangeError(f"rescale: acc must be int64; got {acc.dtype}. Convert it.")
    _check_integers("shift", shift, -62, 62)
    return shift_exactly(acc, shift, rounding)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= _MAX_BITS:
        raise RangeError(f"multiplier: bits must lie in 1 to {_MAX_BITS}; got {bits}. Use a narrower multiplier.")


def _check_rule(rounding: str, more: tuple[str, ...] = ()) -> None:
    known = (*ROUNDING_RULES, *more)
    if rounding not in known:
        raise RangeError(f"rescale: rounding must be one of {', '.join(known)}; got {rounding!r}. Choose one of them.")


def _check_acc(acc: Tensor) -> None:
    if acc.dtype not in (torch.int64, torch.float32, torch.float64):
        raise RangeError(f"rescale: acc must be int64, float32 or float64; got {acc.dtype}. Convert it.")


def _check_integers(name: str, values: Tensor, low: int, high: int) -> None:
    if values.dtype != torch.int64:
        raise RangeError(f"rescale: {name} must be int64; got {values.dtype}. Convert it.")
    if not values.numel():
        return
    least, most = (int(end) for end in torch.aminmax(values))
    if least < low or most > high:
        bad = least if least < low else most
        raise RangeError(f"rescale: {name} must lie in {low} to {high}; got {bad}. See fixed_point_multiplier.")
