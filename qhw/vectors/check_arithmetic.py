# SPDX-License-Identifier: Apache-2.0
"""Arithmetic of check.py, in plain int64 and numpy alone: golden vectors get both as one file."""

from typing import Any

import numpy as np

Array = Any
Entry = dict[str, Any]
Found = dict[str, Array]


class Unusable(Exception):
    """The files cannot be read, or say what this script does not know."""


# Rounding.


def divide(n: Array, d: Array, rule: str) -> Array:
    """round(n / d) of whole numbers, d > 0, exact."""
    low = n // d
    twice = 2 * (n - low * d)
    if rule == "floor":
        return low
    if rule == "toward_zero":
        return low + ((n < 0) & (twice > 0))
    if rule == "half_to_plus_infinity":
        return low + (twice >= d)
    if rule == "half_away_from_zero":
        return low + ((twice > d) | ((twice == d) & (n >= 0)))
    if rule == "half_even":
        return low + ((twice > d) | ((twice == d) & (low % 2 == 1)))
    raise Unusable(f"rounding '{rule}' is not known to this script")


def whole(x: Array, rule: str) -> Array:
    """round(x) of floats: their fraction is exact in float64."""
    x = np.clip(x.astype(np.float64), -(2.0**62), 2.0**62)
    low = np.floor(x)
    rest = x - low
    if rule == "floor":
        up = np.zeros(x.shape, bool)
    elif rule == "toward_zero":
        up = (x < 0) & (rest > 0)
    elif rule == "half_to_plus_infinity":
        up = rest >= 0.5
    elif rule == "half_away_from_zero":
        up = (rest > 0.5) | ((rest == 0.5) & (x > 0))
    elif rule == "half_even":
        up = (rest > 0.5) | ((rest == 0.5) & (low % 2 == 1))
    else:
        raise Unusable(f"rounding '{rule}' is not known to this script")
    return low.astype(np.int64) + up


def wrap(x: Array, bits: int) -> Array:
    """Two's complement of a width."""
    half = 1 << (bits - 1)
    return (x + half) % (2 * half) - half


# From sums to codes.


def integers(values: list[Any], facts: Entry) -> Array:
    """Multipliers or shifts, in a shape that broadcasts against sums."""
    return np.array(values, np.int64).reshape(facts["shape"])


def floats(facts: Entry) -> Array:
    """float32 or float64 factors, in a shape that broadcasts against sums."""
    kind = "float32" if "float32" in facts else "float64"
    return np.array([float.fromhex(text) for text in facts[kind]], kind).reshape(facts["shape"])


def requantize(acc: Array, r: Entry) -> Array:
    """Codes before the clamp."""
    if r["kind"] == "float32":
        product = acc.astype(np.float32) * floats(r)
        if r["zero_point_before"]:
            return whole(product + np.float32(r["zero_point"]), r["rounding"])
        return whole(product, r["rounding"]) + r["zero_point"]
    if r["kind"] == "float64":
        product = acc.astype(np.float64) * floats(r)
        if r["zero_point_before"]:
            return whole(product + r["zero_point"], r["rounding"])
        return whole(product, r["rounding"]) + r["zero_point"]
    if r["kind"] not in ("shift", "fixed_point"):
        raise Unusable(f"requantization '{r['kind']}' is not known to this script")
    shift = integers(r["shift"], r)
    if "steps" in r:
        return stepwise(acc, shift, r)
    if r["kind"] == "shift":
        return quotient_of(acc, shift, r)
    multiplier, bits = integers(r["multiplier"], r), r["multiplier_bits"]
    if not r["rounding"].startswith("double"):
        return quotient_of(times(acc, multiplier), shift + bits, r)
    # gemmlowp: shift left in a register of bits + 1 bits, high half of the product, rounding shift right.
    left, right = np.maximum(-shift, 0), np.maximum(shift, 0)
    high = power(times(wrap(power(acc, -left, "floor"), bits + 1), multiplier), np.array(bits), "half_to_plus_infinity")
    last = "half_to_plus_infinity" if r["rounding"] == "double_half_to_plus_infinity" else "half_away_from_zero"
    return power(high, right, last) + r["zero_point"]


def quotient_of(n: Array, shift: Array, r: Entry) -> Array:
    """round(n / 2^shift) and the zero point, behind rounding or before it."""
    if not r["zero_point_before"]:
        return power(n, shift, r["rounding"]) + r["zero_point"]
    left, right = np.maximum(-shift, 0), np.maximum(shift, 0)
    return power(power(n, -left, "floor") + (r["zero_point"] << right.astype(object)), right, r["rounding"])


def stepwise(acc: Array, shift: Array, r: Entry) -> Array:
    """Every step on the integer that the one before it made."""
    for name, rule in r["steps"]:
        if name == "multiply":
            acc = power(times(acc, integers(r["multiplier"], r)), np.array(r["multiplier_bits"]), rule)
        elif name == "shift":
            acc, shift = power(acc, shift, rule), np.zeros_like(shift)
        else:  # a shift to the left comes before the sum
            left, shift = np.maximum(-shift, 0), np.maximum(shift, 0)
            acc = power(acc, -left, "floor") + (r["zero_point"] << shift)
    return acc


def held(total: Array, facts: Entry) -> Array:
    """What a register holds of a sum or product; all of it where nothing is said of its width."""
    bits = facts.get("accumulator_bits")
    if bits is None:
        return total
    half = 1 << (bits - 1)
    return wrap(total, bits) if facts["accumulator_overflow"] == "wrap" else np.clip(total, -half, half - 1)


def times(a: Array, b: Array) -> Array:
    """Products; in Python's integers where int64 is too narrow."""
    return a.astype(object) * b if largest(a) * largest(b) >= 2**62 else a * b


def power(n: Array, shift: Array, rule: str) -> Array:
    """round(n / 2^shift); a negative shift multiplies."""
    left, right = np.maximum(-shift, 0), np.maximum(shift, 0)
    if largest(right) > 60 or largest(n) << largest(left) >= 2**62:
        n, left, right = n.astype(object), left.astype(object), right.astype(object)
    found = divide(n << left, np.left_shift(1, right), rule)
    return found.astype(np.int64) if largest(found) < 2**63 else found


def largest(x: Array) -> int:
    return max(abs(int(x.max())), abs(int(x.min()))) if x.size else 0


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32 a * b + c, rounded once: the sum in float64 goes to its odd neighbour where it is inexact."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    part = total - product
    lost = (product - (total - part)) + (c - part)
    even = total.view(np.int64) % 2 == 0
    towards = np.where(lost > 0, np.inf, -np.inf)
    return np.where((lost != 0) & even, np.nextafter(total, towards), total).astype(np.float32)


# Functions in 32-bit fixed point.


def multiply(a: Array, b: Array | int) -> Array:
    """round(a b / 2^31) of 32-bit fixed-point numbers, ties upwards."""
    return np.minimum(power(a * b, np.array(31), "half_to_plus_infinity"), 2**31 - 1)


def away(n: Array, shift: Array | int) -> Array:
    return power(n, np.asarray(shift), "half_away_from_zero")


def up(n: Array, shift: int) -> Array:
    """n 2^shift, saturating at 32 bits."""
    return np.clip(n << shift, -(2**31), 2**31 - 1)


def zeros(n: Array) -> Array:
    """Leading zeros of positive 32-bit integers."""
    return 32 - np.frexp(n.astype(np.float64))[1].astype(np.int64)


def fixed(real: float, integer_bits: int = 0) -> int:
    return int(np.floor(real * 2.0 ** (31 - integer_bits) + 0.5))


def reciprocal(x: Array) -> Array:
    """1 / (1 + x) for 0 <= x < 1: three Newton steps."""
    half = (x + 2**31) >> 1
    y = fixed(48 / 17, 2) + multiply(half, fixed(-32 / 17, 2))
    for _ in range(3):
        y = y + up(multiply(y, 2**29 - multiply(half, y)), 2)
    return up(y, 1)


def logarithm(x: Array, bits: int, out_bits: int) -> Array:
    """ln(x) for x >= 1: a rational function around 2^(-1/4) plus a multiple of ln(2)."""
    inner, root = out_bits + 1, 0.5**0.5
    n, m = zeros(x), zeros(multiply(x, fixed(root))) - 1
    quarter, point = 1 << (29 - inner), 31 - inner
    r = np.minimum(up(multiply(up(x, n - 1), fixed(root)), 1), up(x, m))
    exponent = np.maximum(((bits - n) << point) + quarter, ((bits - m) << point) - quarter)
    middle, two = fixed(0.5**0.25), 2**0.25
    p, q = (r + middle + 1) >> 1, 2 * (r - middle)
    square = multiply(q, q)
    above = multiply(q, r) + multiply(multiply(q, square), fixed(11 / 240 * two))
    inside = fixed(2 / two - two) + q + multiply(square, fixed(two / 20))
    below = multiply(p, inside) + multiply(q, fixed(two / 4))
    return up(multiply(exponent, fixed(float(np.log(2.0)))) + multiply(away(above, inner), reciprocal(below)), 1)
