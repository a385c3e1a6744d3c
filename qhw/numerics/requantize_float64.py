# SPDX-License-Identifier: Apache-2.0
"""The fast path of fixed-point requantization: float64, which vectorizes, with near-ties decided in integers.

Why it is exact. Without the trailing zeros of the multiplier, |acc| * odd <= 2**52 makes the product an integer that
float64 holds, and adding one half is exact wherever the half can decide. Past that the product is off by at most one
part in 2**53; a result can only be wrong where it lies that close to a whole number or a half, and those elements are
computed again in int64.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhw.numerics.requantize_int64 import DOUBLE, rescale_int64

# Elements of one piece of work per thread: its float64 copy of 512 KiB stays in a second-level cache.
_CHUNK = 2**16
_EXACT = 2**52
# Moves a tie away from zero and nothing past the next quotient: below 2**31 it adds less than one unit in 2**9.
_AWAY = 1.0 + 2.0**-40


@dataclass(frozen=True)
class Factors:
    """A multiplier as integers and as float64 factors, all with as many axes as the accumulator."""

    multiplier: Tensor
    shift: Tensor
    bits: int
    rounding: str
    first: Tensor
    second: Tensor
    odd: int
    largest_multiplier: int
    largest_first: float
    largest_left: int

    def narrowed(self, axis: int, start: int, count: int) -> "Factors":
        """The part for these indices of an axis."""
        if all(t.shape[axis] == 1 for t in (self.multiplier, self.shift, self.first, self.second)):
            return self
        return self._each(lambda t: t.narrow(axis, start, count) if t.shape[axis] > 1 else t)

    def with_axes(self, count: int) -> "Factors":
        """The same with axes of size 1 in front, `count` in all."""
        if self.first.dim() == count:
            return self
        return self._each(lambda t: t.reshape([1] * (count - t.dim()) + list(t.shape)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Factors":
        return replace(
            self,
            multiplier=change(self.multiplier),
            shift=change(self.shift),
            first=change(self.first),
            second=change(self.second),
        )


@dataclass(frozen=True)
class Finish:
    """What makes codes of rescaled accumulators: a zero point added, then bounds; all within 2**52."""

    zero_point: int
    low: int
    high: int

    def __call__(self, x: Tensor) -> Tensor:
        """In place."""
        return x.add_(self.zero_point).clamp_(self.low, self.high)


def rescale_fast(acc: Tensor, multiplier: Tensor, shift: Tensor, bits: int, rounding: str) -> Tensor:
    """`rescale_fixed_point`, its arguments checked; the same numbers as `rescale_int64`.

    Args:
        acc: int64, float32 or float64, [*shape].
        multiplier: int64, broadcasts against acc.
        shift: int64, broadcasts against acc.
        bits: Of the multiplier.
        rounding: A named rule, or a key of DOUBLE.

    Returns:
        Tensor: int64 [*shape].

    Raises:
        RangeError: as `rescale_int64`.
    """
    if not multiplier.numel() or not shift.numel():
        shape = torch.broadcast_shapes(acc.shape, multiplier.shape, shift.shape)  # type: ignore[no-untyped-call]
        return torch.empty(shape, dtype=torch.int64, device=acc.device)
    return rescale_by(acc, factors_of(multiplier, shift, bits, rounding))


def rescale_by(acc: Tensor, factors: Factors, finish: Finish | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
    """`rescale_fast` by factors that were made before.

    Args:
        acc: int64, float32 or float64, [*shape].
        factors: Broadcast against acc.
        finish: Turns the result into codes; None: it stays as it is.
        dtype: Of the result; it holds it.

    Raises:
        RangeError: as `rescale_int64`.
    """
    shape = torch.broadcast_shapes(acc.shape, factors.first.shape)  # type: ignore[no-untyped-call]
    result = torch.empty(shape, dtype=dtype, device=acc.device)
    if result.numel():
        _in_chunks(acc.expand(shape), factors.with_axes(len(shape)), result, finish)
    return result


def factors_of(multiplier: Tensor, shift: Tensor, bits: int, rounding: str) -> Factors:
    """Of checked multipliers and shifts that are not empty; they broadcast against each other."""
    multiplier, shift = torch.broadcast_tensors(multiplier, shift)  # type: ignore[no-untyped-call]
    left = (-shift).clamp(min=0)
    double = rounding in DOUBLE
    first = multiplier.double() * power_of_two(left - bits if double else -shift - bits)
    odd = multiplier // (multiplier & -multiplier).clamp(min=1)
    return Factors(
        multiplier=multiplier,
        shift=shift,
        bits=bits,
        rounding=rounding,
        first=first,
        second=power_of_two(-shift.clamp(min=0)) * (_AWAY if rounding == "double" else 1.0),
        odd=int(odd.max()),
        largest_multiplier=int(multiplier.max()),
        largest_first=float(first.max()),
        largest_left=int(left.max()),
    )


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in float64, for exponents of normal numbers; by its bits, for pow and exp2 may round."""
    return ((exponent + 1023) << 52).view(torch.float64)


def _in_chunks(acc: Tensor, factors: Factors, result: Tensor, finish: Finish | None) -> None:
    """Fill the result piece by piece; pieces are cut along the first axis that has more than one index."""
    limit = _CHUNK * torch.get_num_threads() if acc.device.type == "cpu" else acc.numel()
    if acc.numel() <= limit:
        _rescale_chunk(acc, factors, result, finish)
        return
    axis = next(i for i, size in enumerate(acc.shape) if size > 1)
    step = max(1, acc.shape[axis] * limit // acc.numel())
    for start in range(0, acc.shape[axis], step):
        count = min(step, acc.shape[axis] - start)
        part = factors.narrowed(axis, start, count)
        _in_chunks(acc.narrow(axis, start, count), part, result.narrow(axis, start, count), finish)


def _rescale_chunk(acc: Tensor, factors: Factors, result: Tensor, finish: Finish | None) -> None:
    f = factors
    low, high = torch.aminmax(acc)
    bound = max(-low.item(), high.item())
    # A NaN compares false and goes on to the plain path.
    fits = bound * 2**f.largest_left < 2**f.bits if f.rounding in DOUBLE else bound * f.largest_first < 2.0**62
    slack = 2.0**-51 * (bound * f.largest_first + 1.0)
    if not (fits and bound * f.largest_multiplier < 2**62 and slack < 0.125):
        exact = rescale_int64(whole(acc), f.multiplier, f.shift, f.bits, f.rounding)
        result.copy_(exact if finish is None else finish(exact))
        return
    product = acc.double()
    product = product.mul_(f.first) if product is not acc else product * f.first
    near = None
    if bound * f.odd > _EXACT:
        twice = product * 2.0
        near = twice.sub_(twice.round()).abs_() <= 2.0 * slack
    found = rounded(product, f)
    result.copy_(found if finish is None else finish(found))
    if near is not None and bool(near.any()):
        x, m, s = (torch.broadcast_to(t, near.shape)[near] for t in (acc, f.multiplier, f.shift))
        exact = rescale_int64(whole(x), m, s, f.bits, f.rounding)
        result[near] = (exact if finish is None else finish(exact)).to(result.dtype)


def rounded(x: Tensor, factors: Factors) -> Tensor:
    """Whole numbers next to x, in place; not by round_real, whose steps take five times as long."""
    rule = factors.rounding
    if rule in DOUBLE:
        x = x.add_(0.5).floor_().mul_(factors.second)
        return x.round_() if rule == "double" else x.add_(0.5).floor_()
    if rule == "half_even":
        return x.round_()
    if rule == "half_to_plus_infinity":
        return x.add_(0.5).floor_()
    if rule == "floor":
        return x.floor_()
    # torch.trunc does not vectorize.
    magnitude = x.abs() if rule == "toward_zero" else x.abs().add_(0.5)
    return magnitude.floor_().copysign_(x)


def whole(acc: Tensor) -> Tensor:
    """int64 of accumulators that hold whole numbers."""
    return acc if acc.dtype == torch.int64 else acc.long()
