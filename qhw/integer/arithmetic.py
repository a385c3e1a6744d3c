# SPDX-License-Identifier: Apache-2.0
"""From the accumulator to the output code, as the target says: built once per operator, then run on tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qhw.errors import IntegerError, RangeError
from qhw.integer.site import Site, unknown
from qhw.numerics import (
    ROUNDING_RULES,
    Rounding,
    fixed_point_multiplier,
    rescale_fixed_point,
    rescale_float32,
    rescale_shift,
    round_real,
)
from qhw.numerics.requantize import FixedPointCodes
from qhw.schema import Requantize

__all__ = ["Requantization", "clamped", "code_bounds", "fixed_point", "rescaler", "rounding_of"]

Double = Literal["double", "double_half_to_plus_infinity"]
Ratio = Callable[[torch.dtype, torch.dtype], Tensor]

_BITS = 31  # of a multiplier, where the target leaves it open


@dataclass(frozen=True)
class Requantization:
    """From accumulators to codes before the clamp, as data; called with accumulators, it computes them.

    Attributes:
        kind: float32, float64: round(acc * factor), both in that precision; fixed_point: round(acc * multiplier /
            2^(bits + shift)); shift: round(acc / 2^shift).
        rounding: Its rule; those that begin with `double` round behind the multiplier and behind the shift.
        zero_point: What is added in the end.
        factor: Of kinds float32 and float64, in that dtype; broadcasts against the accumulators.
        multiplier: int64, of kind fixed_point.
        shift: int64 right shifts, of kinds fixed_point and shift.
        bits: Of the multiplier.
        before: Of kind float32: whether the zero point is added to the product, in float32, before rounding.
    """

    kind: Literal["float32", "float64", "fixed_point", "shift"]
    rounding: Rounding | Double
    zero_point: int = 0
    factor: Tensor | None = None
    multiplier: Tensor | None = None
    shift: Tensor | None = None
    bits: int | None = None
    before: bool = False

    def __call__(self, acc: Tensor) -> Tensor:
        """Codes before the clamp, whole numbers.

        Args:
            acc: [*shape], whole numbers in float32, float64 or int64.
        """
        if self.factor is not None:
            return self._by_factor(acc, self.factor)
        assert self.shift is not None
        if self.multiplier is None or self.bits is None:
            return rescale_shift(acc.long(), self.shift, rounding=_single(self.rounding)) + self.zero_point
        found = rescale_fixed_point(acc, self.multiplier, self.shift, bits=self.bits, rounding=self.rounding)
        return found.add_(self.zero_point)

    def codes(self, acc: Tensor, limits: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Codes within limits, in a dtype that holds them: the clamped result of a call, in fewer passes.

        Args:
            acc: [*shape], whole numbers in float32, float64 or int64.
            limits: Lowest and highest code.
            dtype: Of the result.
        """
        if self._prepared is None:
            return clamped(self(acc), limits, dtype)
        return self._prepared(acc, self.zero_point, *limits, dtype)

    @cached_property
    def _prepared(self) -> FixedPointCodes | None:
        if self.multiplier is None or self.shift is None or self.bits is None:
            return None
        return FixedPointCodes.of(self.multiplier, self.shift, self.bits, self.rounding)

    def _by_factor(self, acc: Tensor, factor: Tensor) -> Tensor:
        if self.kind == "float64":
            return round_real(acc.double() * factor, _single(self.rounding)).add_(float(self.zero_point))
        if self.before:  # the product is rounded, then the sum, then the result to a whole number
            return (acc.float() * factor + float(self.zero_point)).round_()
        if self.rounding == "half_even":
            return (acc.float() * factor).round_().add_(float(self.zero_point))
        return rescale_float32(acc, factor, rounding=_single(self.rounding)).float().add_(float(self.zero_point))


def _single(rounding: Rounding | Double) -> Rounding:
    assert rounding != "double" and rounding != "double_half_to_plus_infinity"
    return rounding


def rescaler(site: Site, ratio: Ratio, zero_point: int, count: int | None = None) -> Requantization:
    """The requantization of one operator.

    Args:
        site: The operator.
        ratio: What one unit of the accumulator is in units of the output scale, shaped to broadcast against the
            accumulator. Asked for with two dtypes, in which every operation rounds: of the product of input scales,
            and of its division.
        zero_point: Of the output.
        count: What the multiplier is divided by, beside the ratio; None: nothing.

    Raises:
        IntegerError: the target leaves a field open that decides, or asks for arithmetic that qhw does not have.
    """
    path, rule = site.requantize
    kind = _stated(f"{path}.kind", rule.kind)
    if rule.stages == "unknown":
        raise unknown(f"{path}.stages", rule.stages)
    if rule.stages is not None:
        raise IntegerError(f"{path}.stages cannot be executed yet")
    before = site.adds_zero_point_first
    if count is not None and kind != "fixed_point":
        raise IntegerError(f'{site.path}.mean_count = "multiplier" needs requantize kind fixed_point')
    if kind == "float32":
        return _float32(ratio(torch.float32, torch.float32), _rounding(site, path, rule), zero_point, before)
    if before:
        raise IntegerError(f'{site.path}.rounding_order = "zero_point_before" needs requantize kind float32')
    if kind == "float64":
        factor = ratio(*_precisions(site)).double()
        return Requantization("float64", _rounding(site, path, rule), zero_point, factor=factor)
    if kind == "fixed_point":
        return fixed_point(site, ratio(*_precisions(site)).double(), zero_point, count)
    if kind == "shift":
        exact = ratio(torch.float64, torch.float64)
        return _shift(path, rule, exact, _rounding(site, path, rule), zero_point)
    raise IntegerError(f'{path}.kind = "{kind}" cannot be executed yet')


def rounding_of(site: Site) -> Rounding:
    """The named rounding rule of an operator's requantization.

    Raises:
        IntegerError: the target does not say, or the rule is none for a single rounding.
    """
    path, rule = site.requantize
    return _rounding(site, path, rule)


def _rounding(site: Site, path: str, rule: Requantize) -> Rounding:
    own = site.spec.rounding
    where, found = (f"{site.path}.rounding", own) if own is not None else (f"{path}.rounding", rule.rounding)
    _stated(where, found)
    if found not in ROUNDING_RULES:
        raise IntegerError(f'{where} = "{found}" names no single rounding')
    return found  # type: ignore[return-value]


def _stated(path: str, value: object) -> object:
    if value is None or value == "unknown":
        raise unknown(path, value)
    return value


def _float32(ratio: Tensor, rounding: Rounding, zero_point: int, before: bool) -> Requantization:
    if before and rounding != "half_even":
        raise IntegerError("a zero point that is added before rounding needs half_even")
    if not bool((torch.isfinite(ratio) & (ratio > 0)).all()):
        bad = float(ratio.flatten()[~(torch.isfinite(ratio) & (ratio > 0)).flatten()][0])
        raise IntegerError(f"its ratio of scales must be a positive float32; got {bad:g}. Change a scale")
    return Requantization("float32", rounding, zero_point, factor=ratio, before=before)


def _precisions(site: Site) -> tuple[torch.dtype, torch.dtype]:
    """Of the product of input scales, and of its division by the output scale."""
    how = site.spec.ratio
    if how == "unknown":
        raise unknown(f"{site.path}.ratio", how)
    product = torch.float32 if how in ("float32", "float32_product") else torch.float64
    return product, torch.float32 if how == "float32" else torch.float64


def fixed_point(site: Site, ratio: Tensor, zero_point: int = 0, count: int | None = None) -> Requantization:
    """A multiplier and a shift next to a ratio, as the operator's requantization has them.

    Args:
        site: The operator.
        ratio: float64.
        zero_point: What is added in the end.
        count: What the multiplier is divided by; None: nothing.

    Raises:
        IntegerError: the target leaves a field open, or has no such multiplier.
    """
    path, rule = site.requantize
    own = site.spec.rounding or rule.rounding
    rounding: Rounding | Double
    rounding = own if own == "double" or own == "double_half_to_plus_infinity" else _rounding(site, path, rule)
    bits = rule.multiplier_bits if isinstance(rule.multiplier_bits, int) else None
    if bits is None:
        raise unknown(f"{path}.multiplier_bits", rule.multiplier_bits)
    low, high = -(_BITS - 1), _BITS
    shift = rule.shift
    if shift is None or isinstance(shift, str):
        raise unknown(f"{path}.shift", shift)
    low = shift.min if isinstance(shift.min, int) else low
    high = shift.max if isinstance(shift.max, int) else high
    out_of_range = rule.out_of_range if rule.out_of_range in ("saturate", "zero_scale", "refuse") else "refuse"
    try:
        multiplier, right = fixed_point_multiplier(
            ratio, bits=bits, shift_min=low, shift_max=high, out_of_range=out_of_range
        )
    except RangeError as error:
        raise IntegerError(f"{path}: {error}") from error
    if count is not None:
        more = (high - right).clamp(max=min(count.bit_length() - 1, 62 - bits))
        multiplier, right = (multiplier << more) // count, right + more
    return Requantization("fixed_point", rounding, zero_point, multiplier=multiplier, shift=right, bits=bits)


def _shift(path: str, rule: Requantize, ratio: Tensor, rounding: Rounding, zero_point: int) -> Requantization:
    mantissa, exponent = torch.frexp(ratio)
    if not bool((mantissa == 0.5).all()):
        bad = float(ratio.flatten()[(mantissa != 0.5).flatten()][0])
        raise IntegerError(f'{path}.kind = "shift" needs a ratio of scales that is a power of two; got {bad:.6g}')
    right = (1 - exponent).long()
    low, high = _shifts(rule)
    if bool(((right < low) | (right > high)).any()):
        bad = int(right[(right < low) | (right > high)].flatten()[0])
        raise IntegerError(f"{path}.shift goes from {low} to {high}, and this operator needs {bad}. Change a scale")
    return Requantization("shift", rounding, zero_point, shift=right)


def _shifts(rule: Requantize) -> tuple[int, int]:
    """Legal right shifts, as far as they are stated, within what an int64 takes."""
    low, high = -62, 62
    if rule.shift is not None and rule.shift != "unknown":
        low = rule.shift.min if isinstance(rule.shift.min, int) else low
        high = rule.shift.max if isinstance(rule.shift.max, int) else high
    return max(low, -62), min(high, 62)


def code_bounds(site: Site) -> tuple[int, int]:
    """Lowest and highest code of the result, behind the clips that are computed along.

    A bound becomes a code as quantization has it: round(bound / scale) + zero point, by the rounding of the output's
    format; half to even where it states none.

    Raises:
        IntegerError: something else than a clip is computed along.
    """
    low, high = site.result.quant_min, site.result.quant_max
    for member in site.members[0 if site.operator.kind in ("Relu", "Clip") else 1 :]:
        if member.kind == "Dropout":
            continue
        if member.kind not in ("Relu", "Clip"):
            raise IntegerError(f"{member.kind} behind {site.operator.kind} cannot be executed exactly yet")
        facts = member.attributes
        low, high = _narrowed(site, facts.get("minimum"), facts.get("maximum"), low, high)
    return low, high


def _narrowed(site: Site, minimum: float | None, maximum: float | None, low: int, high: int) -> tuple[int, int]:
    qparams, rounding = site.result, site.code_rounding

    def code(bound: float) -> int:
        scaled = torch.tensor(bound, dtype=torch.float32) / qparams.scale
        return int(round_real(scaled, rounding).clamp(-(2.0**40), 2.0**40)) + int(qparams.zero_point)

    if minimum is not None:
        low = min(max(low, code(minimum)), high)
    if maximum is not None:
        high = max(min(high, code(maximum)), low)
    return low, high


def clamped(values: Tensor, bounds: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Codes within bounds, in the dtype that carries them."""
    values = values.clamp_(*bounds).to(dtype)
    # float32 has no 2^31 - 1: its clamp stops at 2^31.
    return values.clamp_(*bounds) if dtype == torch.int64 else values
