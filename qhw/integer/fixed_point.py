# SPDX-License-Identifier: Apache-2.0
"""Functions in 32-bit fixed point: exponential, reciprocal, logarithm, inverse square root.

A real x with b integer bits is the whole number x 2^(31 - b); products round ties upwards, shifts to the right away
from zero. Reference: gemmlowp fixedpoint.h; TFLite common.h.
"""

import math

import torch
from torch import Tensor

from qhw.numerics import shift_right

__all__ = ["HIGHEST", "exp_of_negative", "half_up", "headroom", "inverse_square_root", "logarithm", "multiply",
           "reciprocal_of_one_plus", "rounded_right"]  # fmt: skip

HIGHEST = 2**31 - 1
_LOWEST = -(2**31)
_NEWTON_STEPS = 3
_SQUARE_ROOT_STEPS = 5


def constant(value: float, integer_bits: int = 0) -> int:
    """The whole number next to a real."""
    return math.floor(math.ldexp(value, 31 - integer_bits) + 0.5)


def half_up(product: Tensor, bits: int) -> Tensor:
    """round(product / 2^bits), ties upwards: int64 -> int64."""
    return (product + (1 << (bits - 1))) >> bits


def multiply(a: Tensor, b: Tensor | int) -> Tensor:
    """round(a b / 2^31), ties upwards; integer bits add up."""
    return half_up(a * b, 31).clamp(max=HIGHEST)


def rounded_right(x: Tensor, bits: int | Tensor) -> Tensor:
    """round(x / 2^bits), ties away from zero."""
    return shift_right(x, bits, "half_away_from_zero")


def _moved(x: Tensor, bits: int) -> Tensor:
    """x 2^bits, saturating: the same real with `bits` fewer integer bits; rounded where `bits` is negative."""
    return rounded_right(x, -bits) if bits < 0 else (x << bits).clamp(_LOWEST, HIGHEST)


def headroom(x: Tensor) -> Tensor:
    """Leading zeros of positive 32-bit integers."""
    return 32 - torch.frexp(x.double()).exponent.long()


def exp_of_negative(x: Tensor, integer_bits: int) -> Tensor:
    """exp(x) of x <= 0.

    x = r - q / 4, -1/4 <= r < 0: a polynomial of degree 4 around -1/8 for r, times exp(-2^k) for each bit of q / 4.

    Args:
        x: int64 [*shape], with `integer_bits` integer bits.
        integer_bits: 0 to 5.

    Returns:
        Tensor: int64 [*shape], without integer bits; exp(0) is 2^31 - 1.
    """
    point = 31 - integer_bits
    quarter = 1 << (point - 2)
    rest = (x & (quarter - 1)) - quarter
    found = _exp_of_last_quarter(_moved(rest, integer_bits))
    for power in range(-2, integer_bits):
        is_set = ((rest - x) & (1 << (point + power))) != 0
        found = torch.where(is_set, multiply(found, constant(math.exp(-(2.0**power)))), found)
    return found.masked_fill(x == 0, HIGHEST)


def _exp_of_last_quarter(x: Tensor) -> Tensor:
    """exp(x), -1/4 <= x < 0: exp(-1/8) (1 + y + y^2/2 + y^3/6 + y^4/24), y = x + 1/8."""
    y = x + (1 << 28)
    square = multiply(y, y)
    cube, fourth = multiply(square, y), multiply(square, square)
    higher = rounded_right(multiply(rounded_right(fourth, 2) + cube, constant(1 / 3)) + square, 1)
    middle = constant(math.exp(-1 / 8))
    return middle + multiply(y + higher, middle)


def reciprocal_of_one_plus(x: Tensor) -> Tensor:
    """1 / (1 + x) of 0 <= x < 1, both without integer bits: three Newton steps from 48/17 - 32/17 (1 + x)/2."""
    half = (x + HIGHEST + 1) >> 1
    found = constant(48 / 17, 2) + multiply(half, constant(-32 / 17, 2))
    one = 1 << 29
    for _ in range(_NEWTON_STEPS):
        found = found + _moved(multiply(found, one - multiply(half, found)), 2)
    return _moved(found, 1)


def logarithm(x: Tensor, integer_bits: int, result_bits: int) -> Tensor:
    """ln(x) of x >= 1.

    x = r 2^n with r next to 2^(-1/4), of two candidates the smaller r; ln(r) as a rational function of
    q = 2 (r - 2^(-1/4)), n ln(2) added.

    Args:
        x: int64 [*shape], with `integer_bits` integer bits.
        integer_bits: Of x.
        result_bits: Of the result.

    Returns:
        Tensor: int64 [*shape], with `result_bits` integer bits.
    """
    inner = result_bits + 1
    point, quarter = 31 - inner, 1 << (29 - inner)
    root, fourth_root, fourth_of_two = 0.5**0.5, 0.5**0.25, 2**0.25
    zeros = headroom(x)
    first = _moved(multiply(_left(x, zeros - 1), constant(root)), 1)
    other_zeros = headroom(multiply(x, constant(root))) - 1
    second = _left(x, other_zeros)
    power = torch.maximum(
        ((integer_bits - zeros) << point) + quarter, ((integer_bits - other_zeros) << point) - quarter
    )
    r = torch.minimum(first, second)
    middle = constant(fourth_root)
    p, q = (r + middle + 1) >> 1, 2 * (r - middle)
    square = multiply(q, q)
    above = multiply(q, r) + multiply(multiply(q, square), constant(11 / 240 * fourth_of_two))
    inside = constant(2 / fourth_of_two - fourth_of_two) + q + multiply(square, constant(fourth_of_two / 20))
    below = multiply(p, inside) + multiply(q, constant(fourth_of_two / 4))
    fraction = multiply(rounded_right(above, inner), reciprocal_of_one_plus(below))
    return _moved(multiply(power, constant(math.log(2))) + fraction, 1)


def _left(x: Tensor, bits: Tensor) -> Tensor:
    return (x << bits).clamp(_LOWEST, HIGHEST)


def inverse_square_root(values: Tensor) -> tuple[Tensor, Tensor]:
    """Multiplier m and right shift k with m / 2^31 / 2^k next to 1 / sqrt(value): five Newton steps from 1.

    Args:
        values: int64 [*shape], 1 to 2^29 - 1. 1 has the multiplier 2^31 - 1.

    Returns:
        tuple: int64 [*shape] each.
    """
    pairs = (headroom(values) - 1) // 2 - 1
    shift = 11 - pairs
    x = (values << (2 * pairs)) >> 1
    half, found = rounded_right(x, 1), torch.full_like(values, 1 << 28)
    for _ in range(_SQUARE_ROOT_STEPS):
        cube = _moved(multiply(multiply(found, found), found), 6)
        found = _moved(multiply(found, constant(1.5, 3)) - multiply(half, cube), 3)
    multiplier = multiply(found, constant(0.5**0.5)) << (-shift).clamp(min=0)
    is_one = values == 1
    return multiplier.masked_fill(is_one, HIGHEST), shift.clamp(min=0).masked_fill(is_one, 0)
