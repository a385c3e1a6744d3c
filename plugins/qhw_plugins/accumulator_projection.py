# SPDX-License-Identifier: Apache-2.0
"""Weights made small enough for a narrow accumulator: no input makes its sums overflow, proven channel by channel."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, Reason, Resources, Step, StepReport, Survey, Verdict, counted
from qhw.engine import weight_sum_limit
from qhw.errors import RangeError
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Operator, Placement, accumulator_width, input_point, num_products, sum_bits
from qhw.numerics import accumulator_bits_needed, accumulator_bounds
from qhw.schema import TargetSpec
from qhw_plugins.fitted_weights import FittedWeight, refused, weight_survey, weighted_users
from qhw_plugins.l1_ball import onto_ball
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

    Where a kernel limits P + N itself (`weight_abs_sum_max`), the codes are projected onto that ball as well.

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
    """Whether sums could leave the accumulator, or weights the limit that the kernel states."""
    verdict, norm = _of_sums(operator, weight_format, points, target), _of_norm(operator, weight_format, points, target)
    if norm is None or (verdict.taken and not norm.taken):
        return verdict
    if norm.taken and not verdict.taken:
        return norm
    return Verdict(taken=norm.taken, reasons=(*verdict.reasons, *norm.reasons))


def _of_norm(operator: Operator, weight_format: str, points: Placement, target: TargetSpec) -> Verdict | None:
    """Whether the codes of a channel could sum to more than the kernel allows; None where it states nothing."""
    kernel = points.operator(operator.name).kernel
    stated = target.kernels[kernel].weight_abs_sum_max if kernel is not None else None
    weight, point = target.formats[weight_format], input_point(points.points, operator.name)
    if stated is None or stated == "unknown" or weight.zero_point not in (0, None) or point is None:
        return None
    if not (weight.is_uniform and target.formats[point.format].is_uniform):
        return None
    products = num_products(operator)
    # What an accumulator allows is known with the zero point of the input: as little as with the widest.
    bits = accumulator_width(target, kernel)
    reach = sum_bits(operator, target.formats[point.format], weight)
    if stated == "from_accumulator" and bits is None:
        return None
    largest = products * max(abs(int(weight.quant_min or 0)), abs(int(weight.quant_max or 0)))
    holds = reach <= int(bits or 0) if stated == "from_accumulator" else largest <= int(stated)
    rule = f"{{value}}: codes of {products} weights " + ("always fit" if holds else f"can sum to {largest}")
    reason = Reason(subject=f"kernels.{kernel}.weight_abs_sum_max", value=stated, rule=rule)
    return Verdict(taken=not holds, reasons=(reason,))


def _of_sums(operator: Operator, weight_format: str, points: Placement, target: TargetSpec) -> Verdict:
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
        bits: Of the accumulator; 128 where it is not known.
        quant_min: Lowest weight code.
        quant_max: Highest.
        most: Largest sum of magnitudes of a channel's codes that the kernel allows; infinite without a limit.
    """

    low: int
    high: int
    bias: Tensor
    unit: float
    bits: int
    quant_min: int
    quant_max: int
    most: float = math.inf

    @classmethod
    def of(cls, work: Any, group: str, operator: Operator, channels: int) -> "_Sums":
        x, weight = work.qparams[work.input_group(operator.name)], work.weight_qparams(group)
        placement = next(p for p in work.plan.operators if p.name == operator.name)
        bits = accumulator_width(work.target, placement.kernel) or 128
        limit = weight_sum_limit(work, operator.name)
        bias = torch.zeros(channels, dtype=torch.float64)
        if operator.bias is not None:
            bias = work.graph.tensor(operator.bias).detach().double()
        low, high = x.quant_min - int(x.zero_point), x.quant_max - int(x.zero_point)
        most = math.inf if limit is None else float(limit)
        return cls(low, high, bias, float(x.scale), bits, weight.quant_min, weight.quant_max, most)

    def bias_codes(self, scale: Tensor) -> Tensor:
        """In units of the accumulator, rounded outwards by one."""
        codes = self.bias / (self.unit * scale)
        return torch.where(self.bias == 0, 0.0, (codes.abs().ceil() + 1) * codes.sign())

    def fitted(self, rows: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of weights on these scales whose sums fit, and the channels that had to change for it."""
        codes = (rows / scale[:, None]).round().clamp(self.quant_min, self.quant_max)
        found, changed = projected(codes, self.low, self.high, self.bias_codes(scale), self.bits)
        over = found.abs().sum(1) > self.most
        if not bool(over.any()):
            return found, changed
        inside = onto_ball(found.abs(), torch.full_like(self.bias, self.most)) * found.sign()
        return torch.where(over[:, None], inside, found), changed | over

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
        growth = torch.maximum(highest, lowest) / (2.0 ** (self.bits - 1) - 1)
        return torch.maximum(growth, (p + n) / self.most).clamp(min=1)


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
        fitted = onto_ball(positive, first.floor()) - onto_ball(negative, second.floor())
    else:
        limit = (torch.minimum(up, down) / max(high, -low)).floor()
        fitted = onto_ball(rows.abs(), limit) * rows.sign()
    return torch.where(over[:, None], fitted, rows), over


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Weights made to fit narrow accumulators.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [AccumulatorProjection]
