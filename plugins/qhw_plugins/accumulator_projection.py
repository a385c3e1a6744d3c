# SPDX-License-Identifier: Apache-2.0
"""Weights made small enough for a narrow accumulator: no input makes its sums overflow, proven channel by channel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, Reason, Resources, Step, StepReport, Survey, Verdict, counted
from qhw.errors import RangeError
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Operator, Placement, input_point, num_products, sum_bits
from qhw.numerics import accumulator_bits_needed, accumulator_bounds
from qhw.schema import TargetSpec
from qhw_plugins.fitted_weights import FittedWeight, refused, weight_survey, weighted_users
from qhw_plugins.sites import not_uniform
from qhw_plugins.weight_loss import lowest, sqnr_db


class AccumulatorProjection(Algorithm):
    """Gives a channel's weights the scale and codes with which its sums fit the accumulator.

    With inputs in [a, b] (zero point taken off, a <= 0 <= b), P and N the sums of positive and of negated negative
    codes, a signed accumulator of n bits holds every sum, in any order, where

        b P - a N + max(bias, 0) <= 2^(n-1) - 1,    b N - a P - min(bias, 0) <= 2^(n-1)

    A coarser scale makes all codes smaller and keeps the weights; projecting codes keeps the scale and loses the small
    ones. Between the present scale and one that needs no projection nine are tried, and the least squared error of the
    weights is taken: for each channel, or for the tensor where it has one scale. Codes are projected onto the L1 ball
    that the bound leaves (P and N apart where a or b is 0): magnitudes shrink by a common threshold, then to whole
    numbers, what is left of the limit going to the largest remainders. Channels that fit stay as they are. Taken only
    where the widest sums that formats and shape allow could overflow.

    Reference:
        Colbert et al., 2023, arXiv:2308.13504 (A2Q: the bound on the L1 norm); 2024, arXiv:2401.10432 (A2Q+: the
        projection). Differs: after training, with the actual input range and bias, and with the scale as a way out.
    """

    name = "accumulator_projection"
    stage = "fit"
    summary = "Shrink the weights of channels whose sums could overflow the accumulator."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights whose widest sum could leave the accumulator are sites."""
        return weight_survey(graph, points, lambda operator, name: _verdict(operator, name, points, target))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Project the channels that need it, and prove what is left."""
        figures = {group: _fit(work, group, operator) for group, operator in weighted_users(work, step)}
        changed = [site for site in figures.values() if site["channels"]]
        channels = sum(int(str(site["channels"])) for site in changed)
        start = f"no sum of {counted(len(figures), 'weight')} can overflow"
        summary = f"{start}; {counted(channels, 'channel')} of {len(changed)} made to fit"
        summary += lowest({name: site for name, site in figures.items() if site["channels"]})
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


def _verdict(operator: Operator, weight_format: str, points: Placement, target: TargetSpec) -> Verdict:
    placement = points.operator(operator.name)
    name = target.kernels[placement.kernel].accumulator if placement.kernel is not None else None
    accumulator = target.accumulators.get(str(name))
    bits = accumulator.bits if accumulator is not None else None
    subject = f"accumulators.{name}.bits" if accumulator is not None else f"kernels.{placement.kernel}.accumulator"
    if not isinstance(bits, int):
        value = bits if bits is not None else name
        return refused(subject, value, "the width of the accumulator is {value}: nothing to hold sums to")
    weight, point = target.formats[weight_format], input_point(points.points, operator.name)
    for form in (weight_format, *(() if point is None else (point.format,))):
        if not target.formats[form].is_uniform:
            return Verdict(taken=False, reasons=(not_uniform(target, form),))
    if weight.zero_point not in (0, None):
        return refused(
            f"formats.{weight_format}.zero_point", str(weight.zero_point), "weights have a zero point of {value}"
        )
    needed = 1 if point is None else sum_bits(operator, target.formats[point.format], weight)
    # Why another kernel was taken for its bits, or was not.
    more = (Reason(subject=placement.subject, value=placement.kernel, rule=placement.reason),) * bool(placement.reason)
    if needed <= bits:
        rule = "{value} bits hold every sum that formats and shapes allow"
        return Verdict(taken=False, reasons=(Reason(subject=subject, value=bits, rule=rule), *more))
    rule = f"{{value}} bits: sums of {num_products(operator)} products could need {needed}"
    return Verdict(taken=True, reasons=(Reason(subject=subject, value=bits, rule=rule), *more))


def _fit(work: Any, group: str, operator: Operator) -> dict[str, Json]:
    """Codes and scales of one operator's weights, so that its sums fit."""
    weight = FittedWeight.of(work, group, operator)
    rows, scale = weight.rows, weight.scale
    sums = _Sums.of(work, group, operator, len(rows))
    codes, over = sums.fitted(rows, scale)
    before = sums.bits_needed((rows / scale[:, None]).round(), scale)
    if bool(over.any()):
        # Rounding may lift a sum above its real value.
        scale = weight.best_scale(sums.needed_growth(rows, scale) * (1 + 2.0**-6), lambda s: sums.error(rows, s))
        codes, _ = sums.fitted(rows, scale)
        weight.put(work, codes, scale)
    after = sums.bits_needed(codes, scale)
    if after > sums.bits:
        raise RangeError(
            f"{group}: its sums need {after} bits, of which {sums.bits} are there, whatever its weights. Keep "
            f"'{operator.name}' in float with --keep-float, or choose a kernel with a wider accumulator."
        )
    return {
        "bits_before": before,
        "bits": after,
        "channels": int(over.sum()),
        "sqnr_db": sqnr_db(rows, codes * scale[:, None]),
    }


@dataclass(frozen=True)
class _Sums:
    """What the sums of one operator are made of besides its weights.

    Attributes:
        low: Smallest input minus its zero point, <= 0.
        high: Largest, >= 0.
        bias: float64 [out], reals; zeros where there is none.
        unit: Scale of the input.
        bits: Of the accumulator.
        quant_min: Lowest weight code.
        quant_max: Highest.
    """

    low: int
    high: int
    bias: Tensor
    unit: float
    bits: int
    quant_min: int
    quant_max: int

    @classmethod
    def of(cls, work: Any, group: str, operator: Operator, channels: int) -> "_Sums":
        x, weight = work.qparams[work.input_group(operator.name)], work.weight_qparams(group)
        placement = next(p for p in work.plan.operators if p.name == operator.name)
        bits = int(work.target.accumulators[work.target.kernels[placement.kernel].accumulator].bits)
        bias = torch.zeros(channels, dtype=torch.float64)
        if operator.bias is not None:
            bias = work.graph.tensor(operator.bias).detach().double()
        low, high = x.quant_min - int(x.zero_point), x.quant_max - int(x.zero_point)
        return cls(low, high, bias, float(x.scale), bits, weight.quant_min, weight.quant_max)

    def bias_codes(self, scale: Tensor) -> Tensor:
        """In units of the accumulator, rounded outwards by one."""
        codes = self.bias / (self.unit * scale)
        return torch.where(self.bias == 0, 0.0, (codes.abs().ceil() + 1) * codes.sign())

    def fitted(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of weights on these scales whose sums fit, and the channels that had to change for it."""
        codes = (rows / scale[:, None]).round().clamp(self.quant_min, self.quant_max)
        return projected(codes, self.low, self.high, self.bias_codes(scale), self.bits)

    def error(self, rows: Tensor, scale: Tensor) -> Tensor:
        """Squared error of weights on these scales, made to fit: float64 [out]; infinite where no bias would."""
        codes, _ = self.fitted(rows, scale)
        error = (rows - codes * scale[:, None]).square().sum(1)
        return torch.where(self.bias_codes(scale).abs() < 2.0 ** (self.bits - 1), error, math.inf)

    def bits_needed(self, codes: Tensor, scale: Tensor) -> int:
        """Width that holds the sums of all channels."""
        bounds = accumulator_bounds(
            codes.long(),
            input_quant_min=self.low,
            input_quant_max=self.high,
            bias_q=self.bias_codes(scale).long(),
        )
        return int(accumulator_bits_needed(*bounds).max())

    def needed_growth(self, rows: Tensor, scale: Tensor) -> Tensor:
        """How much coarser each channel's scale must be for its sums to fit without a projection: float64 [out]."""
        codes = (rows / scale[:, None]).round()
        p, n = codes.clamp(min=0).sum(1), (-codes).clamp(min=0).sum(1)
        bias = self.bias_codes(scale)
        highest = self.high * p - self.low * n + bias.clamp(min=0)
        lowest = self.high * n - self.low * p - bias.clamp(max=0)
        return (torch.maximum(highest, lowest) / (2.0 ** (self.bits - 1) - 1)).clamp(min=1)


def projected(rows: Tensor, low: int, high: int, bias: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Weight codes whose sums fit.

    Args:
        rows: float64 [out, in], whole numbers.
        low: Smallest input minus its zero point, <= 0.
        high: Largest, >= 0.
        bias: float64 [out], whole numbers.
        bits: Of the accumulator.

    Returns:
        tuple: float64 [out, in]; and bool [out]: the channels that had to change.
    """
    up = (2.0 ** (bits - 1) - 1) - bias.clamp(min=0)  # what the products may add, and take away
    down = 2.0 ** (bits - 1) + bias.clamp(max=0)
    positive, negative = rows.clamp(min=0), (-rows).clamp(min=0)
    p, n = positive.sum(1), negative.sum(1)
    over = (high * p - low * n > up) | (high * n - low * p > down)
    if low == 0 or high == 0:
        # One of the two terms is 0 on each side: P and N are bounded apart.
        first, second = (up / high, down / high) if low == 0 else (down / -low, up / -low)
        fitted = _onto_ball(positive, first.floor()) - _onto_ball(negative, second.floor())
    else:
        limit = (torch.minimum(up, down) / max(high, -low)).floor()
        fitted = _onto_ball(rows.abs(), limit) * rows.sign()
    return torch.where(over[:, None], fitted, rows), over


def _onto_ball(magnitudes: Tensor, limit: Tensor) -> Tensor:
    """Whole numbers next to the Euclidean projection onto {sum <= limit}, per row (Duchi et al., 2008); not above."""
    limit = limit.clamp(min=0)
    ordered = magnitudes.sort(1, descending=True).values
    counts = torch.arange(1, magnitudes.shape[1] + 1, dtype=torch.float64)
    thresholds = (ordered.cumsum(1) - limit[:, None]) / counts
    last = (ordered > thresholds).long().cumsum(1).argmax(1, keepdim=True)
    threshold = thresholds.gather(1, last).clamp(min=0)
    real = (magnitudes - threshold).clamp(min=0)
    whole = real.floor()
    spare = (limit - whole.sum(1)).clamp(min=0)
    order = (real - whole).argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(magnitudes.shape[1]).expand_as(order))
    return whole + ((rank < spare[:, None]) & (real > whole)).double()


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Weights made to fit narrow accumulators.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [AccumulatorProjection]
