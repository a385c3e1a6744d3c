# SPDX-License-Identifier: Apache-2.0
"""Weights made small enough for registers that hold the sum of two products: no input makes a pair overflow."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, Reason, Resources, Step, StepReport, Survey, Verdict
from qhw.engine import MatrixForm
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Operator, Placement, input_point
from qhw.numerics import Operands, PerTensor, QParams, multiplied_range, pair_sums
from qhw.schema import Accumulator, Pairwise, TargetSpec
from qhw_plugins.fitted_weights import FittedWeight, refused, weight_survey, weighted_users
from qhw_plugins.sites import not_uniform
from qhw_plugins.weight_loss import lowest, sqnr_db

_FORMS: tuple[Operands, ...] = ("centred", "stored", "unsigned")


class ReduceRange(Algorithm):
    """Lowers the range of weights where a kernel adds two products in a register that they could overflow.

    With inputs as they are multiplied in [a, b], two neighbouring weight codes v, w fit a register of n bits where

        max(a v, b v) + max(a w, b w) <= 2^(n-1) - 1,    min(a v, b v) + min(a w, b w) >= -2^(n-1)

    For unsigned bytes times signed ones in 16 bits, codes within [-64, 64] always do, which is the fixed rule of other
    tools. Here a channel is changed only where its own pairs do not fit, and no further than they need: a coarser
    scale, its largest pairs cut, or both; of nine scales the one with the least squared error of the weights is taken,
    for each channel, or for the tensor where it has one scale. Where the target does not say which products make a
    pair, any two must fit; where it does not say what is multiplied, all that it may be.

    Reference:
        Named after `reduce_range` of onnxruntime's quantization tool. Differs: by proof instead of by one bit less.
    """

    name = "reduce_range"
    stage = "fit"
    summary = "Lower the range of weights whose products could overflow the register of a pair."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights with a pair of codes, among all that their format has, that could overflow are sites."""
        return weight_survey(graph, points, lambda operator, name: _verdict(operator, name, points, target))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Shrink what could overflow."""
        figures = {group: _fit(work, group, operator) for group, operator in weighted_users(work, step)}
        changed = {name: site for name, site in figures.items() if site["channels"]}
        channels = sum(int(str(site["channels"])) for site in changed.values())
        summary = f"no pair of products of {len(figures)} weights can overflow; {channels} channels of {len(changed)} "
        return StepReport(
            stage=step.stage, algorithm=self.name, summary=f"{summary}made to fit{lowest(changed)}", sites=figures
        )


def _verdict(operator: Operator, weight_format: str, points: Placement, target: TargetSpec) -> Verdict:
    kernel = points.operator(operator.name).kernel
    name = target.kernels[kernel].accumulator if kernel is not None else None
    accumulator = target.accumulators.get(str(name))
    subject = f"accumulators.{name}.pairwise"
    pairs = accumulator.pairwise if accumulator is not None else None
    if not isinstance(pairs, Pairwise) or not isinstance(pairs.bits, int):
        value = pairs if not isinstance(pairs, Pairwise) else pairs.bits
        rule = "its width is {value}: nothing to hold pairs to" if value else "no register holds sums of two products"
        return refused(subject, value, rule)
    weight, point = target.formats[weight_format], input_point(points.points, operator.name)
    for form in (weight_format, *(() if point is None else (point.format,))):
        if not target.formats[form].is_uniform:
            return Verdict(taken=False, reasons=(not_uniform(target, form),))
    if weight.zero_point not in (0, None):
        return refused(f"formats.{weight_format}.zero_point", str(weight.zero_point), "weights have a zero point")
    codes = max(-int(weight.quant_min or 0), int(weight.quant_max or 0))
    largest = 2 * codes * (_widest(target.formats[point.format], pairs) if point is not None else 0)
    if largest < 1 << (pairs.bits - 1):
        return refused(f"{subject}.bits", pairs.bits, "{value} bits hold every sum of two products that formats allow")
    rule = f"{{value}} bits: two products could need {largest.bit_length() + 1}"
    return Verdict(taken=True, reasons=(Reason(subject=f"{subject}.bits", value=pairs.bits, rule=rule),))


def _widest(spec: Any, pairs: Pairwise) -> int:
    """Largest magnitude that an input of a format has as it may be multiplied, whatever its zero point."""
    low, high = int(spec.quant_min), int(spec.quant_max)
    zeros = (spec.zero_point, spec.zero_point) if isinstance(spec.zero_point, int) else (low, high)
    ends = []
    for zero in zeros:
        x = QParams(torch.tensor(1.0), torch.tensor(zero, dtype=torch.int32), low, high, PerTensor())
        ends += [abs(end) for form in _forms(pairs) for end in multiplied_range(x, form)]
    return max(ends)


def _forms(pairs: Pairwise) -> tuple[Operands, ...]:
    return _FORMS if pairs.operands is None or pairs.operands == "unknown" else (pairs.operands,)


def _fit(work: Any, group: str, operator: Operator) -> dict[str, Json]:
    """Codes and scales of one operator's weights, so that its pairs fit."""
    weight = FittedWeight.of(work, group, operator)
    register, rows = _Register.of(work, operator, weight.form), weight.rows
    limits = weight.start.quant_min, weight.start.quant_max
    codes = (rows / weight.scale[:, None]).round().clamp(*limits)
    excess = register.excess(codes).amax(1)
    if not bool((excess > 1).any()):
        return {"largest_code_before": _largest(codes), "largest_code": _largest(codes), "channels": 0, "sqnr_db": None}

    def error(scale: Tensor) -> Tensor:
        return (rows - register.cut(rows, scale, limits) * scale[:, None]).square().sum(1)

    # Rounding may lift a pair above its real value.
    best = weight.best_scale(excess.clamp(min=1) * (1 + 2.0**-6), error)
    kept = register.cut(rows, best, limits)
    weight.put(work, kept, best)
    return {
        "largest_code_before": _largest(codes),
        "largest_code": _largest(kept),
        "channels": int((excess > 1).sum()),
        "sqnr_db": sqnr_db(rows, kept * best[:, None]),
    }


def _largest(codes: Tensor) -> int:
    return int(codes.abs().max())


@dataclass(frozen=True)
class _Register:
    """What holds a pair of products.

    Attributes:
        ranges: Lowest and highest input as it may be multiplied.
        half: 2^(bits - 1).
        order: Where weights stand in rows, in the order of summation; None where it is not known.
    """

    ranges: tuple[tuple[int, int], ...]
    half: int
    order: Tensor | None

    @classmethod
    def of(cls, work: Any, operator: Operator, form: MatrixForm) -> "_Register":
        placement = next(p for p in work.plan.operators if p.name == operator.name)
        spec: Accumulator = work.target.accumulators[work.target.kernels[placement.kernel].accumulator]
        assert isinstance(spec.pairwise, Pairwise) and isinstance(spec.pairwise.bits, int)
        x = work.qparams[work.input_group(operator.name)]
        ranges = tuple(multiplied_range(x, operands) for operands in _forms(spec.pairwise))
        # The taps of a transposed convolution that one output meets, and so their neighbours, depend on its position.
        is_known = spec.order is not None and spec.order != "unknown" and operator.kind != "ConvTranspose"
        order = form.reduction_order(spec.order) if is_known else None  # type: ignore[arg-type]
        return cls(ranges, 1 << (spec.pairwise.bits - 1), order)

    def excess(self, codes: Tensor) -> Tensor:
        """How many times too large the pair of each weight is: float64 [out, in], 1 or less where it fits.

        Args:
            codes: float64 [out, in], whole numbers.
        """
        ordered = codes.repeat_interleave(2, 1) if self.order is None else codes[:, self.order]
        worst = torch.zeros((), dtype=torch.float64)
        for low, high in self.ranges:
            lowest, highest = pair_sums(ordered.long(), low, high)
            worst = torch.maximum(
                worst, torch.maximum(highest.double() / (self.half - 1), -lowest.double() / self.half)
            )
        if self.order is None:
            return worst
        found = torch.empty_like(codes)
        found[:, self.order] = worst.repeat_interleave(2, 1)[:, : codes.shape[1]]
        return found

    def cut(self, rows: Tensor, scale: Tensor, limits: tuple[int, int]) -> Tensor:
        """Codes of weights on these scales, those of pairs that do not fit made smaller, toward 0.

        Both bounds of a pair grow in proportion to its weights: divided by their excess and truncated, it fits.

        Args:
            rows: float64 [out, in], reals.
            scale: float64 [out].
            limits: Lowest and highest code.
        """
        codes = (rows / scale[:, None]).round().clamp(*limits)
        excess = self.excess(codes)
        return torch.where(excess > 1, (codes / excess).trunc(), codes)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Weight ranges lowered for pairs of products.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [ReduceRange]
