# SPDX-License-Identifier: Apache-2.0
"""Slow, independent quantization in numpy and exact fractions, to test fast code against; imports no torch.

Plain arguments only: scale and zero_point are arrays that broadcast against x (see `expand`), codes are Python or numpy
integers. Written from the definitions, one element at a time, sharing nothing with `qhw.numerics`.
"""

import math
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike, NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_SMALLEST_NORMAL = Fraction(1, 2**126)
_LARGEST_FLOAT32 = Fraction(float(np.finfo(np.float32).max))


def round_exact(x: Fraction, rule: str = "half_even") -> int:
    """Integer next to an exact real number, by a rule's name as in `qhw.numerics.ROUNDING_RULES`.

    Raises:
        ValueError: the rule is unknown.
    """
    floor = math.floor(x)
    rest = x - floor
    if rule == "floor":
        return floor
    if rule == "toward_zero":
        return math.trunc(x)
    if rest != Fraction(1, 2):
        nearest = floor + (rest > Fraction(1, 2))
    elif rule == "half_even":
        nearest = floor + floor % 2
    elif rule == "half_away_from_zero":
        nearest = floor + (x > 0)
    elif rule == "half_to_plus_infinity":
        nearest = floor + 1
    if rule not in ("half_even", "half_away_from_zero", "half_to_plus_infinity"):
        raise ValueError(f"unknown rounding rule {rule!r}")
    return nearest


def expand(
    parameter: ArrayLike, shape: tuple[int, ...], axis: int | None = None, group_size: int | None = None
) -> Float32:
    """A scale or zero point written out for every element of a tensor.

    Args:
        parameter: [] without an axis; [channels] with an axis; the shape with a shortened axis with a group size.
        shape: Shape of the tensor.
        axis: The axis kept, or cut into groups when group_size is given.
        group_size: Elements per group.

    Returns:
        ndarray: parameter's dtype [*shape].
    """
    parameter = np.asarray(parameter)
    full = np.empty(shape, dtype=parameter.dtype)
    for index in np.ndindex(*shape):
        if axis is None:
            full[index] = parameter
        elif group_size is None:
            full[index] = parameter[index[axis]]
        else:
            full[index] = parameter[(*index[:axis], index[axis] // group_size, *index[axis + 1 :])]
    return full


def quantize(
    x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, quant_min: int, quant_max: int, rounding: str = "half_even"
) -> Int64:
    """clamp(round(x / scale) + zero_point, quant_min, quant_max), the quotient in float32.

    Args:
        x: float32 [*shape], finite.
        scale: float32, broadcasts against x.
        zero_point: integer, broadcasts against x.
        quant_min: Lowest code.
        quant_max: Highest code.
        rounding: Name of the rule for the quotient.

    Returns:
        ndarray: int64 [*shape].
    """
    x = np.asarray(x, dtype=np.float32)
    with np.errstate(over="ignore", under="ignore"):
        quotient = x / np.asarray(scale, dtype=np.float32)
    offset = np.broadcast_to(np.asarray(zero_point, dtype=np.int64), x.shape)
    codes = np.empty(x.shape, dtype=np.int64)
    for index in np.ndindex(*x.shape):
        value = float(quotient[index])
        if math.isinf(value):
            codes[index] = quant_max if value > 0 else quant_min
        else:
            codes[index] = min(max(round_exact(Fraction(value), rounding) + int(offset[index]), quant_min), quant_max)
    return codes


def dequantize(x_q: ArrayLike, scale: ArrayLike, zero_point: ArrayLike) -> Float32:
    """scale * (x_q - zero_point), one float32 product.

    Args:
        x_q: integer [*shape].
        scale: float32, broadcasts against x_q.
        zero_point: integer, broadcasts against x_q.

    Returns:
        ndarray: float32 [*shape].
    """
    steps = np.asarray(x_q, dtype=np.int64) - np.asarray(zero_point, dtype=np.int64)
    real: Float32 = np.asarray(scale, dtype=np.float32) * steps.astype(np.float32)
    return real


def legal_scale(
    scale: Fraction,
    span: int,
    kind: str = "float32",
    scale_min: float | None = None,
    scale_max: float | None = None,
    values: Iterable[float] = (),
) -> np.float32:
    """Smallest legal scale not below a wanted one, or the largest there is; a float32 scale is rounded to nearest.

    Args:
        scale: Wanted, exact.
        span: quant_max - quant_min.
        kind: "float32", "power_of_two", or "enumerated" (which a fixed scale is too).
        scale_min: Lowest legal scale.
        scale_max: Highest legal scale.
        values: The legal scales when enumerated.
    """
    if kind == "enumerated":
        listed = sorted(np.float32(value) for value in values)
        return next((value for value in listed if Fraction(float(value)) >= scale), listed[-1])
    low = max(_SMALLEST_NORMAL, Fraction(scale_min or 0))
    high = min(_LARGEST_FLOAT32 / span, Fraction(scale_max) if scale_max else _LARGEST_FLOAT32)
    if kind == "float32":
        return _float32_between(min(max(scale, low), high), low, high)
    legal = [exponent for exponent in range(-126, 128) if low <= Fraction(2) ** exponent <= high]
    fits = [exponent for exponent in legal if Fraction(2) ** exponent >= scale]
    return np.float32(2.0 ** (fits[0] if fits else legal[-1]))


def _float32_between(scale: Fraction, low: Fraction, high: Fraction) -> np.float32:
    nearest = np.float32(float(scale))
    if Fraction(float(nearest)) < low:
        return np.float32(np.nextafter(nearest, np.float32(np.inf)))
    if Fraction(float(nearest)) > high:
        return np.float32(np.nextafter(nearest, np.float32(0)))
    return nearest


def qparams_from_range(
    min_val: float,
    max_val: float,
    quant_min: int,
    quant_max: int,
    zero_point: int | None = None,
    kind: str = "float32",
    scale_min: float | None = None,
    scale_max: float | None = None,
    values: Iterable[float] = (),
) -> tuple[np.float32, int]:
    """Finest legal scale, and zero point, that cover one real range widened to contain 0; scale 1.0 for [0, 0].

    Args:
        min_val: Lowest value.
        max_val: Highest value.
        quant_min: Lowest code.
        quant_max: Highest code.
        zero_point: The fixed zero point, or None.
        kind: As `legal_scale`.
        scale_min: As `legal_scale`.
        scale_max: As `legal_scale`.
        values: As `legal_scale`.

    Returns:
        tuple: scale and zero point.
    """
    low, high = min(Fraction(min_val), Fraction(0)), max(Fraction(max_val), Fraction(0))
    span = quant_max - quant_min
    if zero_point is None:
        wanted = (high - low) / span
    else:
        wanted = Fraction(0)
        if quant_max > zero_point:
            wanted = max(wanted, high / (quant_max - zero_point))
        if quant_min < zero_point:
            wanted = max(wanted, -low / (zero_point - quant_min))
    scale = legal_scale(wanted or Fraction(1), span, kind, scale_min, scale_max, values)
    if zero_point is None:
        zero_point = min(max(quant_min - round_exact(low / Fraction(float(scale))), quant_min), quant_max)
    return scale, zero_point


def squared_error(x: ArrayLike, scale: ArrayLike, zero_point: ArrayLike, quant_min: int, quant_max: int) -> float:
    """Sum of squared differences between a tensor and its image on a grid, rounding half to even, in float64.

    Args:
        x: float32 [*shape].
        scale: float32, broadcasts against x.
        zero_point: integer, broadcasts against x.
        quant_min: Lowest code.
        quant_max: Highest code.
    """
    x = np.asarray(x, dtype=np.float32)
    steps = np.rint(x / np.asarray(scale, dtype=np.float32)).astype(np.float64)
    codes = np.clip(steps + np.asarray(zero_point), quant_min, quant_max) - np.asarray(zero_point)
    return float(np.sum((codes * np.asarray(scale, dtype=np.float64) - x.astype(np.float64)) ** 2))


def least_squared_error(
    x: ArrayLike, candidates: Iterable[tuple[float, int]], quant_min: int, quant_max: int
) -> tuple[float, float, int]:
    """The best of some scales and zero points for one tensor, by trying each.

    Args:
        x: float32 [*shape].
        candidates: Pairs of scale and zero point.
        quant_min: Lowest code.
        quant_max: Highest code.

    Returns:
        tuple: error, scale, zero point.
    """
    return min((squared_error(x, scale, z, quant_min, quant_max), float(scale), z) for scale, z in candidates)
