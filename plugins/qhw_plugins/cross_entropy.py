# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy ranges for logits: keep the softmax of what the model returns, and with it the order of the classes."""

from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import cross_entropy_qparams
from qhw.schema import TargetSpec
from qhw_plugins.sites import DATA_GIVEN, TAKEN, activation_sites, needs_calibration, scale_reasons

_LEAST = "the {value} scale that changes the softmax least"
_SOFTMAX = ("Softmax", "LogSoftmax")
# What follows a matrix product and still gives scores of classes; a sigmoid or a clip does not.
_SCORES = ("Add", "Sub", "Mul", "Div", "BatchNormalization", "Relu", "LeakyRelu", "PRelu")
# 16 MB of float32: the logits of 4,194 images with 1,000 classes. Of more data the first rows count.
_MOST_VALUES = 2**22


class CrossEntropy(Algorithm):
    """Ranges of logits that change the softmax least.

        argmin over (q_min, q_max) of H(softmax(v), softmax(v_hat)),  H(p, q) = -sum p log q        (17)

    Summed over the calibration samples, up to 2**22 logits. Logits are what the model returns from a matrix product
    with rows of samples and columns of classes, and what it returns the softmax of. Candidates are those of the MSE
    search. All other ranges are left to other algorithms of the stage.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1.
    """

    name = "cross_entropy"
    stage = "activation_range"
    summary = "Ranges of logits that keep the softmax of what the model returns."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """The groups of the logits, given calibration data."""
        refused = needs_calibration(resources)
        if refused is not None:
            return refused
        axes = class_axes(graph, points)
        names = activation_sites(points)
        sites = tuple(_site(graph, points, name, axes) for name in names)
        taken = tuple(site.name for site in sites if site.verdict.taken)
        if taken:
            reasons = (DATA_GIVEN, *scale_reasons(points, target, taken, _LEAST))
            return Survey(verdict=Verdict(taken=True, reasons=reasons), sites=sites)
        nothing = Reason(subject="points", value=len(names), rule="none of the {value} activation ranges is of logits")
        return Survey(verdict=Verdict(taken=False, reasons=(nothing,)), sites=sites)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One pass over the data; then a search per group."""
        axes = class_axes(work.graph, work.plan)
        seen = work.observe(
            step.sites,
            lambda group: _Rows(_axis_of(group, work.plan, axes)),
            context,
            "activation ranges, cross-entropy",
        )
        figures: dict[str, dict[str, Json]] = {}
        for group in context.progress.track(step.sites, "activation ranges, search", len(step.sites)):
            logits = seen[group].logits
            low, high = work.bounded(group, logits.min(), logits.max())
            work.set_qparams(group, cross_entropy_qparams(logits.clamp(low, high), work.grid(group), group))
            figures[group] = {"min": float(logits.min()), "max": float(logits.max()), "rows": len(logits)}
        summary = (
            f"{counted(len(seen), 'range')} of logits from {counted(context.calibration.num_samples or 0, 'sample')}"
        )
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


def class_axes(graph: Graph, points: Any) -> dict[str, int | Reason]:
    """Tensors that the model returns, or returns the softmax of -> axis of the classes, or why they are no logits.

    Args:
        graph: The model.
        points: A placement or a plan: `operators` says what is folded and fused.
    """
    placed = {placement.name: placement for placement in points.operators}
    found: dict[str, int | Reason] = {}
    for value in graph.output_values:
        tensor, answer = _class_axis(graph, placed, value)
        if not isinstance(found.get(tensor), int):
            found[tensor] = answer
    return found


def _class_axis(graph: Graph, placed: Any, value: str) -> tuple[str, int | Reason]:
    """The tensor behind one returned value, and the axis of its classes or why it holds no logits."""
    tensor = _tensor(graph, placed, value)
    kind = "Input" if tensor in graph.inputs else graph.operator(tensor).kind
    if kind in _SOFTMAX:
        softmax = graph.operator(tensor)
        tensor, seen, axis = _tensor(graph, placed, softmax.inputs[0]), softmax.shape, int(softmax.attributes["axis"])
    else:
        if kind != "Input" and placed[tensor].fused_into and kind in _SCORES:
            kind = graph.operator(placed[tensor].fused_into).kind
        if kind != "Gemm":
            rule = "returned by the model, but {value} gives no logits"
            return tensor, Reason(subject=f"{tensor}.kind", value=kind, rule=rule)
        seen, axis = graph.operator(value).shape, 1
        if len(seen) != 2:
            rule = "returned with {value} axes, where logits have two: samples and classes"
            return tensor, Reason(subject=f"{tensor}.rank", value=len(seen), rule=rule)
    if seen != _shape(graph, tensor):
        rule = "cut anew to {value}, so that its classes are not known"
        return tensor, Reason(subject=f"{tensor}.shape", value=list(seen), rule=rule)
    if seen[axis] < 2:
        return tensor, Reason(subject=f"{tensor}.classes", value=seen[axis], rule="{value} class needs no softmax")
    return tensor, axis


def _tensor(graph: Graph, placed: Any, value: str) -> str:
    """The tensor that a value is, once views and what is folded away are looked through."""
    while value not in graph.inputs:
        operator = graph.operator(value)
        if not operator.is_view and placed[value].where != "folded":
            return value
        value = operator.inputs[0]
    return value


def _shape(graph: Graph, tensor: str) -> tuple[int, ...]:
    return graph.inputs[tensor] if tensor in graph.inputs else graph.operator(tensor).shape


def _axis_of(group: str, points: Any, axes: dict[str, int | Reason]) -> int:
    axis = next(axes[point.tensor] for point in points.points if point.group == group)
    return axis if isinstance(axis, int) else 1


def _site(graph: Graph, points: Placement, group: str, axes: dict[str, int | Reason]) -> Site:
    """A group of activation points with the verdict on it."""
    tensors = list(dict.fromkeys(point.tensor for point in points.points if point.group == group))
    known = [axes[tensor] for tensor in tensors if tensor in axes]
    refusals = [axis for axis in known if isinstance(axis, Reason)]
    if not known:
        returned: Json = list(graph.output_values)
        reason = Reason(subject="graph.outputs", value=returned, rule="only for logits, and the model returns {value}")
    elif refusals:
        reason = refusals[0]
    elif len(tensors) > 1:
        rule = "logits that share their scale with other tensors: {value}"
        reason = Reason(subject=f"groups.{group}", value=list(tensors), rule=rule)
    else:
        return Site(name=group, verdict=TAKEN)
    return Site(name=group, verdict=Verdict(taken=False, reasons=(reason,)))


class _Rows:
    """Logits as they come, [rows, classes], the first ones."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._parts: list[Tensor] = []
        self._num_rows = 0

    def update(self, x: Tensor) -> None:
        """Keep the logits of a micro-batch while there is room."""
        rows = x.detach().movedim(self._axis, -1).flatten(0, -2).float()
        room = max(1, _MOST_VALUES // rows.shape[1]) - self._num_rows
        if room > 0 and len(rows):
            self._parts.append(rows[:room].clone())
            self._num_rows += len(self._parts[-1])

    @property
    def logits(self) -> Tensor:
        """All that was kept, float32 [rows, classes]."""
        return torch.cat(self._parts)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Ranges of logits by cross-entropy.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [CrossEntropy]
