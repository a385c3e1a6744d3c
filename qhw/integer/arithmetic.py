# SPDX-License-Identifier: Apache-2.0
"""From the accumulator to the output code, as the target says: built once per operator, then run on tensors."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from qhw.errors import IntegerError, RangeError
from qhw.integer.site import Site, unknown
from qhw.integer.stages import Step, order_decides, rounded_behind, run_steps, steps_of
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
from qhw.schema import Requantize, Shift

__all__ = ["Requantization", "check_shift", "clamped", "code_bounds", "fixed_point", "rescaler", "rounding_of"]

Double = Literal["double", "double_half_to_plus_infinity"]
Ratio = Callable[[torch.dtype, torch.dtype], Tensor]

_KINDS = ("float32", "float64", "fixed_point", "shift")
_FURTHEST = 62  # that an int64 is shifted


@dataclass(frozen=True)
class Requantization:
    """From accumulators to codes before the clamp, as data; called with accumulators, it computes them.

    Attributes:
        kind: float32, float64: round(acc * factor), both in that precision; fixed_point: round(acc * multiplier /
            2^(bits + shift)); shift: round(acc / 2^shift).
        rounding: Its rule; those that begin with `double` round behind the multiplier and behind the shift; `stages`:
            as `steps` says.
        zero_point: What is added in the end.
        factor: Of kinds float32 and float64, in that dtype; broadcasts against the accumulators.
        multiplier: int64, of kind fixed_point.
        shift: int64 right shifts, of kinds fixed_point and shift.
        bits: Of the multiplier.
        before: Whether the zero point is added before rounding: to the product, in its precision, or to the exact
            quotient.
        steps: What is computed one after another, each rounded, where `rounding` is `stages`.
    """

    kind: Literal["float32", "float64", "fixed_point", "shift"]
    rounding: Rounding | Double | Literal["stages"]
    zero_point: int = 0
    factor: Tensor | None = None
    multiplier: Tensor | None = None
    shift: Tensor | None = None
    bits: int | None = None
    before: bool = False
    steps: tuple[Step, ...] = ()

    def __call__(self, acc: Tensor) -> Tensor:
        """Codes before the clamp, whole numbers.

        Args:
            acc: [*shape], whole numbers in float32, float64 or int64.
        """
        if self.factor is not None:
            return self._by_factor(acc, self.factor)
        assert self.shift is not None
        if self.steps:
            return run_steps(acc.long(), self.steps, self.multiplier, self.shift, self.bits or 0, self.zero_point)
        if self.before:
            return rounded_behind(self._quotient, acc.long(), _single(self.rounding), self.zero_point)
        if self.multiplier is None:
            return self._quotient(acc.long(), _single(self.rounding)) + self.zero_point
        return self._quotient(acc, self.rounding).add_(self.zero_point)

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
        if self.multiplier is None or self.shift is None or self.bits is None or self.before:
            return None
        return None if self.rounding == "stages" else FixedPointCodes.of(
            self.multiplier, self.shift, self.bits, self.rounding
        )  # fmt: skip

    def _quotient(self, acc: Tensor, rule: Rounding | Double | Literal["stages"]) -> Tensor:
        assert self.shift is not None and rule != "stages"
        if self.multiplier is None or self.bits is None:
            return rescale_shift(acc, self.shift, rounding=_single(rule))
        return rescale_fixed_point(acc, self.multiplier, self.shift, bits=self.bits, rounding=rule)

    def _by_factor(self, acc: Tensor, factor: Tensor) -> Tensor:
        rule, added = _single(self.rounding), float(self.zero_point)
        product = acc.to(factor.dtype) * factor
        if self.before:  # the product is rounded, then the sum, then the result to a whole number
            return round_real(product.add_(added), rule)
        if self.kind == "float64":
            return round_real(product, rule).add_(added)
        if rule == "half_even":
            return product.round_().add_(added)
        return rescale_float32(acc, factor, rounding=rule).float().add_(added)


def _single(rounding: Rounding | Double | Literal["stages"]) -> Rounding:
    assert rounding in ROUNDING_RULES
    return rounding  # type: ignore[return-value]


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
    kind = _stated(f"{path}.kind", rule.kind, _KINDS)
    if count is not None and kind != "fixed_point":
        raise IntegerError(f'{site.path}.mean_count = "multiplier" needs requantize kind fixed_point')
    if kind == "float32" or kind == "float64":
        return _by_float(site, kind, ratio, zero_point)
    if kind == "fixed_point":
        return fixed_point(site, ratio(*_precisions(site)).double(), zero_point, count)
    if kind == "shift":
        return _shift(site, ratio(torch.float64, torch.float64), zero_point)
    raise IntegerError(f'{path}.kind = "{kind}" cannot be executed; kinds that can: {", ".join(_KINDS)}')


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
    _stated(where, found, ROUNDING_RULES)
    if found not in ROUNDING_RULES:
        raise IntegerError(f'{where} = "{found}" names no single rounding')
    return found  # type: ignore[return-value]


def _stated(path: str, value: object, choices: Iterable[str] = ()) -> object:
    if value is None or value == "unknown":
        raise unknown(path, value, choices)
    return value


def _by_float(site: Site, kind: Literal["float32", "float64"], ratio: Ratio, zero_point: int) -> Requantization:
    path, rule = site.requantize
    steps_of(site, zero_point)
    before = zero_point != 0 and site.adds_zero_point_first
    factor = ratio(torch.float32, torch.float32) if kind == "float32" else ratio(*_precisions(site)).double()
    legal = torch.isfinite(factor) & (factor > 0)
    if not bool(legal.all()):
        bad = float(factor.flatten()[~legal.flatten()][0])
        raise IntegerError(f"its ratio of scales must be a positive {kind}; got {bad:g}. Change a scale")
    return Requantization(kind, _rounding(site, path, rule), zero_point, factor=factor, before=before)


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
    bits = _stated(f"{path}.multiplier_bits", rule.multiplier_bits)
    assert isinstance(bits, int)
    low, high = _ends(rule.shift)
    out_of_range = rule.out_of_range if rule.out_of_range in ("saturate", "zero_scale", "refuse") else "refuse"
    try:
        multiplier, right = fixed_point_multiplier(
            ratio, bits=bits, shift_min=low, shift_max=high, out_of_range=out_of_range
        )
    except RangeError as error:
        raise IntegerError(f"{path}: {error}") from error
    _check_open_ends(f"{path}.shift", rule.shift, right)
    if count is not None:
        if not isinstance(rule.shift, Shift) or not isinstance(rule.shift.max, int):
            raise unknown(f"{path}.shift.max", None)
        more = (high - right).clamp(max=min(count.bit_length() - 1, 62 - bits))
        multiplier, right = (multiplier << more) // count, right + more
    return _rounded(
        site, Requantization("fixed_point", "stages", zero_point, multiplier=multiplier, shift=right, bits=bits)
    )


def _rounded(site: Site, found: Requantization) -> Requantization:
    """With what the target says of rounding, and of the zero point where its order changes a code."""
    steps = steps_of(site, found.zero_point)
    if steps is not None:
        return replace(found, steps=steps)
    path, rule = site.requantize
    own = site.spec.rounding or rule.rounding
    if found.kind == "fixed_point" and (own == "double" or own == "double_half_to_plus_infinity"):
        if found.zero_point != 0 and site.adds_zero_point_first:
            raise IntegerError(
                f'{site.path}.rounding_order = "zero_point_before" does not say before which rounding of "{own}"'
            )
        return replace(found, rounding=own)
    rounding = _rounding(site, path, rule)
    assert found.shift is not None
    is_exact = found.kind == "shift" and not bool((found.shift > 0).any())
    before = not is_exact and order_decides(rounding, found.zero_point) and site.adds_zero_point_first
    return replace(found, rounding=rounding, before=before)


def _shift(site: Site, ratio: Tensor, zero_point: int) -> Requantization:
    path, rule = site.requantize
    mantissa, exponent = torch.frexp(ratio)
    if not bool((mantissa == 0.5).all()):
        bad = float(ratio.flatten()[(mantissa != 0.5).flatten()][0])
        raise IntegerError(f'{path}.kind = "shift" needs a ratio of scales that is a power of two; got {bad:.6g}')
    right = (1 - exponent).long()
    check_shift(f"{path}.shift", rule.shift, right)
    return _rounded(site, Requantization("shift", "stages", zero_point, shift=right))


def check_shift(path: str, legal: Shift | str | None, right: Tensor) -> None:
    """That shifts are among those that a target has.

    Args:
        path: Where they are stated.
        legal: What stands there.
        right: int64, right shifts.

    Raises:
        IntegerError: one is not, or the target leaves the end open on its side.
    """
    low, high = _ends(legal)
    outside = (right < low) | (right > high)
    if bool(outside.any()):
        bad = int(right[outside].flatten()[0])
        raise IntegerError(f"{path} goes from {low} to {high}, and this operator needs {bad}. Change a scale")
    _check_open_ends(path, legal, right)


def _check_open_ends(path: str, legal: Shift | str | None, right: Tensor) -> None:
    """An end that the target leaves open decides where the operator shifts to its side."""
    ends = (legal.min, legal.max) if isinstance(legal, Shift) else (legal, legal)
    for name, end, beyond in (("min", ends[0], right < 0), ("max", ends[1], right > 0)):
        if not isinstance(end, int) and bool(beyond.any()):
            where = f"{path}.{name}" if isinstance(legal, Shift) else path
            raise IntegerError(
                f"{unknown(where, end)}, and this operator shifts right by {int(right[beyond].flatten()[0])}"
            )


def _ends(legal: Shift | str | None) -> tuple[int, int]:
    """Legal right shifts as far as they are stated, within what an int64 takes."""
    low, high = (legal.min, legal.max) if isinstance(legal, Shift) else (None, None)
    return (
        max(low, -_FURTHEST) if isinstance(low, int) else -_FURTHEST,
        min(high, _FURTHEST) if isinstance(high, int) else _FURTHEST,
    )


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
