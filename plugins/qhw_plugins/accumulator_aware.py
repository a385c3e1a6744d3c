# SPDX-License-Identifier: Apache-2.0
"""Accumulator-aware training: at every step the weights' sums fit a narrow accumulator, whatever the input."""

from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Reason, Resources, Site, Step, Survey, Verdict
from qhw.extension import Algorithm, PluginInfo, TrainingAlgorithm, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import Grid, LearnedQuantizer, QParams
from qhw.schema import TargetSpec
from qhw_plugins.accumulator_projection import AccumulatorProjection
from qhw_plugins.sites import not_uniform


class AccumulatorAwareQuantizer(LearnedQuantizer):
    """A learning quantizer of weights whose codes have bounded sums.

    With P and N the sums of a channel's positive and of its negated negative codes, P <= limit and N <= limit hold for
    what `forward` returns. Codes that fit when rounded to nearest stay; else the positive or the negative weights
    shrink by limit / sum, and are rounded towards zero, so that no sum comes back above its limit. The shrinking has
    its gradient, rounding passes straight through.

    Args:
        qparams: Where training starts; zero point 0, channels along axis 0.
        grid: What the format allows.
        limit: float32 [channels] >= 0, whole numbers.
        name: The tensor's name, for messages.
    """

    limit: Tensor

    def __init__(self, qparams: QParams, grid: Grid, limit: Tensor, name: str) -> None:
        super().__init__(qparams, grid, domain="log2", name=name)
        self.register_buffer("limit", limit)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized weights: float32 [channels, ...]."""
        if not self.enabled:
            return x
        scale, _ = self._broadcast(x, self.scale, self.zero_point)
        rows = (x.float() / scale).clamp(self.quant_min, self.quant_max).flatten(1)
        codes = _side(rows.clamp(min=0), self.limit) - _side((-rows).clamp(min=0), self.limit)
        return (codes.reshape(x.shape) * scale).to(x.dtype)


def _side(magnitudes: Tensor, limit: Tensor) -> Tensor:
    """Whole numbers whose sum along a row is at most its limit: float32 [channels, inputs]."""
    nearest = magnitudes.round()
    fits = (nearest.sum(1) <= limit)[:, None]
    total = magnitudes.sum(1)
    # A float32 product may come out above its real value: one part in 2^20 makes room for that.
    factor = (limit / total.clamp(min=1e-30) * (1 - 2.0**-20)).clamp(max=1.0)[:, None]
    wanted = torch.where(fits, magnitudes, magnitudes * factor)
    whole = torch.where(fits, nearest, wanted.floor())
    return wanted + (whole - wanted).detach()


class AccumulatorAware(TrainingAlgorithm):
    """Bounds the sums of weight codes while they are trained.

    For inputs that span S = quant_max - quant_min codes and an accumulator of n bits, no sum of products leaves the
    accumulator, in any order and for any zero point of the input, where P <= L and N <= L with

        L = floor((2^(n-1) - 1 - reserve) / S)

    The reserve is twice the bias that the channel starts with, in units of the accumulator. What the bias becomes is
    proven, and mended, by the steps of the stage `fit` when training ends.

    Reference:
        Colbert et al., 2024, arXiv:2401.10432 (A2Q+: the bound for weights whose sums P and N are alike). Differs: the
        norm is not a parameter of its own, it shrinks where it must; the mean is left as it is, P and N being bounded
        apart.
    """

    name = "accumulator_aware"
    summary = "Weights stay within what a narrow accumulator holds at every step of training."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights whose widest sum could leave the accumulator, with one scale per tensor or output channel."""
        found = AccumulatorProjection().survey(graph, points, target, resources)
        sites = tuple(_site(site, graph, points, target) for site in found.sites)
        taken = any(site.verdict.taken for site in sites)
        return Survey(verdict=found.verdict.model_copy(update={"taken": taken}), sites=sites)

    def attach(self, form: Any, step: Step) -> None:
        """A bounded quantizer for every planned weight."""
        for group in step.sites:
            limit = _limit(form, group)
            form.set_quantizer(group, AccumulatorAwareQuantizer(form.qparams[group], form.grid(group), limit, group))


def _site(site: Site, graph: Graph, points: Placement, target: TargetSpec) -> Site:
    """The site, refused where the weights' channels do not lie along axis 0 or their zero point is not 0."""
    if not site.verdict.taken:
        return site
    point = next(point for point in points.points if point.group == site.name)
    operator = graph.operator(point.operator)
    if operator.weight_axis != 0 or len(point.consumers) > 1:
        rule = "a weight of {value} has its channels elsewhere, or several readers"
        return _refused(site, Reason(subject=f"graph.{operator.name}.kind", value=operator.kind, rule=rule))
    spec = target.formats[point.format]
    if not spec.is_uniform:
        return _refused(site, not_uniform(target, point.format))
    if spec.per == "group" or spec.zero_point != 0:
        rule = "scales per {value}, or a zero point that is not 0, have no bound here"
        return _refused(site, Reason(subject=f"formats.{point.format}.per", value=spec.per, rule=rule))
    return site


def _refused(site: Site, reason: Reason) -> Site:
    return site.model_copy(update={"verdict": Verdict(taken=False, reasons=(reason,))})


def _limit(form: Any, group: str) -> Tensor:
    """L of every channel: float32 [channels], whole numbers."""
    point = form.group(group)[0]
    operator = form.origin.operator(point.operator)
    placement = next(p for p in form.plan.operators if p.name == operator.name)
    bits = int(form.target.accumulators[form.target.kernels[placement.kernel].accumulator].bits)
    source = form.start[form.input_group(operator.name)]
    room = torch.full((len(form.origin.tensor(point.tensor)),), 2.0 ** (bits - 1) - 1, dtype=torch.float64)
    if operator.bias is not None:
        bias = form.origin.tensor(operator.bias).detach().double().abs()
        unit = source.scale.double() * form.start[group].scale.double()
        room = room - 2 * (bias / unit).ceil()
    limit: Tensor = (room / (source.quant_max - source.quant_min)).floor().clamp(min=0)
    return limit.float()


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Weights trained within the bounds of a narrow accumulator.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [AccumulatorAware]
