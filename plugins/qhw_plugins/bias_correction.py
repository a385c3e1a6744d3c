# SPDX-License-Identifier: Apache-2.0
"""Bias correction: what quantized weights shift in the mean of a layer's output is taken out of its bias."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.engine import Layer, layers
from qhw.errors import PlanError, RangeError
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import WEIGHTED_KINDS, Graph, Operator, Placement
from qhw.schema import TargetSpec
from qhw_plugins.moments import (
    Channels,
    InputOptions,
    after_weights,
    batch_norms,
    folded_normals,
    input_channels,
    told_channels,
    why_untold,
)
from qhw_plugins.sites import DATA_GIVEN, TAKEN, needs_calibration, weight_sites


class EmpiricalBiasCorrectionOptions(AlgorithmOptions):
    """What may be set."""

    samples: int = Field(512, ge=1, description="Calibration samples to measure by, whole micro-batches of 32.")


class EmpiricalBiasCorrection(Algorithm):
    """Takes the shift of the mean output, measured on calibration data, out of each bias, layer after layer.

        b <- b - (E[W_hat x] - E[W x])                                              (27)

    per output channel, over samples and positions. E[W_hat x] is that of the model whose weights are quantized and
    whose layers before this one are corrected; E[W x] that of the float model; both before the activation. Activations
    are float. On the calibration data the mean error of each corrected output is then zero.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.4. Differs: a layer without a bias, which no batch norm gives
        one, is left alone, for the target's kernel would have to add one.
    """

    name = "empirical_bias_correction"
    stage = "correct"
    summary = "Correct biases by the mean output error on calibration data."
    Options = EmpiricalBiasCorrectionOptions

    options: EmpiricalBiasCorrectionOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weight groups of layers with a bias of their own, given calibration data."""
        refused = needs_calibration(resources)
        if refused is not None:
            return refused
        sites = []
        for name in weight_sites(points):
            found = _layer(graph, points, name)
            verdict = TAKEN if isinstance(found, Operator) else Verdict(taken=False, reasons=(found,))
            sites.append(Site(name=name, verdict=verdict))
        taken = any(site.verdict.taken for site in sites)
        return Survey(verdict=Verdict(taken=taken, reasons=(DATA_GIVEN,)), sites=tuple(sites))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One walk through the layers, with the data running through both models."""
        figures: dict[str, dict[str, Json]] = {}
        count = 0
        for layer in layers(
            work, context, step.sites, samples=self.options.samples, label="bias correction, empirical"
        ):
            count = sum(map(len, layer.inputs))
            shift = _mean_error(work, layer)
            figures[layer.group] = _correct(work.graph, layer.operator, shift)
        summary = f"{counted(len(figures), 'bias', 'biases')} corrected by {counted(count, 'sample')}"
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


class AnalyticBiasCorrection(Algorithm):
    """Takes the expected shift of the mean output out of each bias, without data.

        b <- b - dW E[x],  dW = W_hat - W                                           (26)
        E[x] = |gamma| n(-beta / |gamma|) + beta (1 - P(-beta / |gamma|))           (28)

    for an input behind batch norm and ReLU; n, P: density and distribution of the standard normal. Other inputs have
    the mean of a clipped normal or of a sum, propagated as `qhw_plugins.moments` says; a model input has that of the
    options. A convolution sums dW over its taps, as if no zeros were padded at the borders.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.4. Differs: inputs without a batch norm of their own.
    """

    name = "analytic_bias_correction"
    stage = "correct"
    summary = "Correct biases by the output error that batch norms let expect, without data."
    Options = InputOptions

    options: InputOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weight groups of layers with a bias of their own whose input can be told."""
        norms = batch_norms(graph)
        if not norms:
            reason = Reason(subject="graph.batch_norms", value=0, rule="there is no batch norm with running statistics")
            return Survey(verdict=Verdict(taken=False, reasons=(reason,)))
        told = told_channels(graph, folded_normals(graph, points), self.options.inputs(graph))
        sites = tuple(
            Site(name=name, verdict=self._verdict(graph, points, told, name)) for name in weight_sites(points)
        )
        rule = "{value} batch norms tell mean inputs" if len(norms) > 1 else "{value} batch norm tells mean inputs"
        tell = Reason(subject="graph.batch_norms", value=len(norms), rule=rule)
        return Survey(verdict=Verdict(taken=any(s.verdict.taken for s in sites), reasons=(tell,)), sites=sites)

    def _verdict(self, graph: Graph, points: Placement, told: dict[str, Channels], name: str) -> Verdict:
        found = _layer(graph, points, name)
        if not isinstance(found, Operator):
            return Verdict(taken=False, reasons=(found,))
        value = found.inputs[0]
        if input_channels(graph, found, told) is None:
            return Verdict(taken=False, reasons=(why_untold(graph, told, value),))
        return Verdict(taken=True, reasons=(self.options.reason(self.name, value),)) if value in graph.inputs else TAKEN

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Each planned layer by itself."""
        told = told_channels(work.reference, work.normals, self.options.inputs(work.reference))
        figures: dict[str, dict[str, Json]] = {}
        for group in context.progress.track(step.sites, "bias correction, analytic", len(step.sites)):
            name = work.group(group)[0].tensor
            operator = work.graph.weight_users(name)[0]
            x = input_channels(work.reference, operator, told)
            if x is None:
                why = why_untold(work.reference, told, operator.inputs[0]).sentence()
                raise PlanError(f"{group}: {why}. Plan again with --without {self.name}.")
            change = work.quantized_weight(group).double() - work.reference.tensor(name).detach().double()
            shift = after_weights(operator, change, x.moments).mean
            figures[group] = _correct(work.graph, operator, shift)
        summary = f"{counted(len(figures), 'bias', 'biases')} corrected by what batch norms tell of their inputs"
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


def _layer(graph: Graph, points: Placement, group: str) -> Operator | Reason:
    """The layer behind a group of weights, or why its bias cannot be corrected."""
    name = next(point.tensor for point in points.points if point.group == group)
    users = graph.weight_users(name)
    operator = users[0]
    if operator.kind not in WEIGHTED_KINDS:
        return Reason(subject=f"graph.{operator.name}.kind", value=operator.kind, rule="{value} has no bias to correct")
    if len(users) > 1:
        rule = f"{{value}} operators share {name}, each with another input"
        return Reason(subject=f"graph.{name}.readers", value=len(users), rule=rule)
    if operator.bias is None:
        folded = {placement.name for placement in points.operators if placement.where == "folded"}
        if not any(reader.name in folded for reader in graph.consumers(operator.name)):
            return Reason(subject=f"graph.{operator.name}.bias", value=None, rule=f"{operator.name} has no bias")
        return operator
    tensor = graph.tensor(operator.bias)
    sharing = [o for o in graph.operators if o.bias is not None and graph.tensor(o.bias) is tensor]
    if len(sharing) > 1:
        rule = f"{{value}} operators share {operator.bias}"
        return Reason(subject=f"graph.{operator.bias}.readers", value=len(sharing), rule=rule)
    return operator


def _mean_error(work: Any, layer: Layer) -> Tensor:
    """Mean output of the quantized layer less that of the float one, per output channel: float64 [out_channels]."""
    weight = work.quantized_weight(layer.group)
    axis = -1 if layer.operator.kind == "Gemm" else -1 - len(layer.operator.attributes["kernel"])
    total = torch.zeros(layer.form.out_channels, dtype=torch.float64)
    count = 0
    for x, wanted in zip(layer.inputs, layer.outputs, strict=True):
        with torch.no_grad():
            error = _output(work.graph, layer.operator, x, weight) - wanted
        others = [a for a in range(error.dim()) if a != axis % error.dim()]
        total += error.sum(others, dtype=torch.float64)
        count += error.numel() // len(total)
    return total / max(count, 1)


def _output(graph: Graph, operator: Operator, x: Tensor, weight: Tensor) -> Tensor:
    """The operator's output with other weights."""
    node = graph.node(operator.name)

    def value(source: fx.Node) -> Tensor:
        if source.op != "get_attr":
            return x
        return weight if source.target == operator.weight else graph.tensor(str(source.target))

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value)
    result: Tensor = node.target(*args, **kwargs)  # type: ignore[operator]
    return result


def _correct(graph: Graph, operator: Operator, shift: Tensor) -> dict[str, Json]:
    """Take a shift out of a bias; returns its size.

    Raises:
        RangeError: it is not finite.
    """
    if not bool(torch.isfinite(shift).all()):
        raise RangeError(
            f"{operator.name}: its output holds NaN or infinite values on the calibration data. Scale the model's "
            f"inputs or weights down, or keep '{operator.name}' in float with --keep-float."
        )
    if operator.bias is None:
        raise PlanError(
            f"{operator.name}: has no bias; the plan counts on a batch norm that gives it one. "
            "Put batch-norm folding back, or plan again."
        )
    bias = graph.tensor(operator.bias).detach()
    graph.set_tensor(operator.bias, (bias.double() - shift).to(bias.dtype))
    mean, largest = (shift.abs().mean(), shift.abs().max()) if shift.numel() else (0.0, 0.0)
    return {"mean_abs": float(f"{float(mean):.6g}"), "max_abs": float(f"{float(largest):.6g}")}


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Bias correction, from calibration data or from batch norms.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [EmpiricalBiasCorrection, AnalyticBiasCorrection]
