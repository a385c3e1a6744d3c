# SPDX-License-Identifier: Apache-2.0
"""The plain path of fixed-point requantization: int64 arithmetic, exact for every accumulator it does not refuse."""

from typing import cast

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.rounding import Rounding, shift_right

# Roundings in two steps, and how the second one rounds.
DOUBLE: dict[str, Rounding] = {
    "double": "half_away_from_zero",
    "double_half_to_plus_infinity": "half_to_plus_infinity",
}


def rescale_int64(acc: Tensor, multiplier: Tensor, shift: Tensor, bits: int, rounding: str) -> Tensor:
    """`rescale_fixed_point` on int64 [*shape], its arguments checked.

    Raises:
        RangeError: an accumulator does not fit the register, or a result int64.
    """
    if rounding in DOUBLE:
        _check_register(acc, bits)
        shifted = _wrapped(acc << (-shift).clamp(min=0), bits + 1)
        # |product| <= 2**(2 * bits) <= 2**62, and half a unit more still fits.
        high = (shifted * multiplier + 2 ** (bits - 1)) >> bits
        return shift_right(high, shift.clamp(min=0), DOUBLE[rounding])
    rule = cast(Rounding, rounding)
    if _largest(acc) * _largest(multiplier) < 2**62:
        return shift_exactly(acc * multiplier, shift + bits, rule)
    return _shift_wide(acc, multiplier, shift + bits, rule)


def shift_exactly(q: Tensor, shift: Tensor, rule: Rounding) -> Tensor:
    """round(q / 2**shift) for int64 q and shifts of -62 to 124, negative ones to the left.

    Raises:
        RangeError: a left shift leaves int64.
    """
    left = (-shift).clamp(min=0)
    shifted = q << left
    if bool((shifted >> left != q).any()):
        bad = torch.broadcast_to(q, shifted.shape)[shifted >> left != q].flatten()[0].item()
        raise RangeError(f"rescale: {bad} shifted left must fit int64. Use a smaller ratio or accumulator.")
    # Past 62, bits that cannot decide become one sticky bit: the lowest bit kept is 1 if any dropped one is.
    more = (shift - 62).clamp(min=0)
    if bool((more > 0).any()):
        dropped = shifted & ((torch.ones_like(more) << more) - 1)
        shifted = (shifted >> more) | (dropped != 0).long()
    return shift_right(shifted, shift.clamp(0, 62), rule)


def _shift_wide(acc: Tensor, multiplier: Tensor, shift: Tensor, rule: Rounding) -> Tensor:
    """round(acc * multiplier / 2**shift) where the product needs more than 63 bits, in two limbs of 31 bits below."""
    if _largest(acc) >= 2**61 or bool((shift < 31).any()):
        raise RangeError(
            f"rescale: a product past 2**62 needs |acc| < 2**61 and bits + shift >= 31; got {_largest(acc)} and "
            f"{int(shift.min())}. Use a narrower accumulator."
        )
    low = (acc & (2**31 - 1)) * multiplier
    high = (acc >> 31) * multiplier + (low >> 31)
    low = low & (2**31 - 1)
    # product = high * 2**31 + low. Rounding asks of low only: its highest bit, and whether anything is below.
    kept = (high << 2) | ((low >> 30) << 1) | (low & (2**30 - 1) != 0).long()
    return shift_exactly(kept, shift - 29, rule)


def _check_register(acc: Tensor, bits: int) -> None:
    outside = (acc < -(2**bits)) | (acc >= 2**bits)
    if bool(outside.any()):
        bad = acc[outside].flatten()[0].item()
        raise RangeError(
            f"rescale: a double rounding with {bits} bits takes accumulators of {bits + 1} bits; got {bad}. "
            "Use a single rounding or a narrower accumulator."
        )


def _wrapped(q: Tensor, width: int) -> Tensor:
    """The lowest bits of q as a two's-complement number."""
    half = 2 ** (width - 1)
    wrapped: Tensor = ((q + half) & (2 * half - 1)) - half
    return wrapped


def _largest(q: Tensor) -> int:
    low, high = torch.aminmax(q)
    return max(-int(low), int(high))
