# SPDX-License-Identifier: Apache-2.0
"""Batch norm in training: kept behind its operator where scales are per channel, or folded anew at each step."""

from collections.abc import Iterator
from typing import Any

from pydantic import Field

from qhw.decisions import Reason, Resources, Site, Step, Survey, Verdict
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, TrainingAlgorithm, hookimpl
from qhw.graph import Graph, Operator, Placement, QuantPoint
from qhw.schema import TargetSpec
from qhw_plugins.sites import TAKEN, not_uniform

_SPLITTABLE = ("Conv", "DepthwiseConv", "Gemm")


class KeptBatchNorm(TrainingAlgorithm):
    """Weights are quantized without their batch norm, which goes on normalizing behind the operator.

    Its scale merges into the weight scales when training ends (eq. 41), which needs one scale per output channel, of
    any size, and a symmetric grid.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.2, eq. 41, table 7.
    """

    name = "kept_batch_norm"
    summary = "Batch norms stay behind their operators; their scale merges into per-channel weight scales."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Batch norms that are folded into weights whose format can take their scale."""
        return _survey(graph, points, target, _keeps, "batch norms stay, and merge into scales per output channel")

    def attach(self, form: Any, step: Step) -> None:
        """Take the planned batch norms out of their operators."""
        for norm in step.sites:
            form.keep_norm(form.holder_of(norm))


class DoubleForwardOptions(AlgorithmOptions):
    """When the statistics are frozen."""

    freeze_after: int | None = Field(None, ge=0, description="Training steps after which running statistics serve.")


class DoubleForward(TrainingAlgorithm):
    """The batch norm is folded anew at each step, by its running statistics; the batch's own are restored behind.

    Costs a second pass through each operator. The paper finds it no better than static folding, so no shipped pipeline
    prefers it.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.2, table 7; Krishnamoorthi, 2018, arXiv:1806.08342.
    """

    name = "double_forward"
    summary = "Batch norms are folded into the weights at each step of training, with a second forward pass."
    Options = DoubleForwardOptions
    options: DoubleForwardOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Batch norms that are folded into weights."""
        return _survey(graph, points, target, lambda *_: None, "batch norms are folded at each step")

    def attach(self, form: Any, step: Step) -> None:
        """Take the planned batch norms out of their operators."""
        for norm in step.sites:
            form.fold_each_step(form.holder_of(norm), self.options.freeze_after)


def _survey(graph: Graph, points: Placement, target: TargetSpec, obstacle: Any, rule: str) -> Survey:
    folded = dict(_folded(graph, points))
    if not folded:
        reason = Reason(subject="graph.batch_norms", value=0, rule="no batch norm was folded into weights")
        return Survey(verdict=Verdict(taken=False, reasons=(reason,)))
    sites = []
    for name, operator in folded.items():
        reason = _cannot_split(operator) or obstacle(operator.name, points, target)
        sites.append(Site(name=name, verdict=Verdict(taken=False, reasons=(reason,)) if reason else TAKEN))
    count = sum(site.verdict.taken for site in sites)
    reasons = (Reason(subject="graph.batch_norms", value=f"{count} of {len(sites)}", rule=f"{{value}} {rule}"),)
    return Survey(verdict=Verdict(taken=count > 0, reasons=reasons if count else ()), sites=tuple(sites))


def _folded(graph: Graph, points: Placement) -> Iterator[tuple[str, Operator]]:
    """Batch norms that are folded, or will be once the plan has run, each with the operator whose weights hold it."""
    for placement in points.operators:
        if placement.where == "folded" and placement.kind == "BatchNormalization" and placement.fused_into:
            yield placement.name, graph.operator(placement.fused_into)


def _cannot_split(operator: Operator) -> Reason | None:
    if operator.kind in _SPLITTABLE and operator.weight_axis == 0:
        return None
    return Reason(
        subject=f"graph.{operator.name}.kind", value=operator.kind, rule="a batch norm in {value} stays there"
    )


def _keeps(operator: str, points: Placement, target: TargetSpec) -> Reason | None:
    """Why the scales of an operator's weights cannot take its batch norm's; None where they can."""
    point = _weight_point(operator, points)
    if point is None:
        return Reason(subject=f"points.{operator}", value=None, rule="its weight is not quantized")
    spec, where = target.formats[point.format], f"formats.{point.format}"
    if spec.per != "out_channel":
        rule = "a scale per {value} cannot take each channel's batch norm: it stays folded"
        return Reason(subject=f"{where}.per", value=spec.per, rule=rule)
    if not spec.is_uniform:
        return not_uniform(target, point.format)
    kind = getattr(spec.scale, "kind", None) or "float32"
    if kind != "float32":
        return Reason(subject=f"{where}.scale.kind", value=kind, rule="a {value} scale cannot take any factor")
    if spec.zero_point != 0:
        return Reason(
            subject=f"{where}.zero_point", value=str(spec.zero_point), rule="a negative factor needs symmetry"
        )
    return None


def _weight_point(operator: str, points: Placement) -> QuantPoint | None:
    weights = (point for point in points.points if point.role == "weight")
    return next((point for point in weights if operator in (point.operator, *point.consumers)), None)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Batch norm in quantization-aware training.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [KeptBatchNorm, DoubleForward]
