# SPDX-License-Identifier: Apache-2.0
"""Bias absorption: what a channel always carries behind its Relu moves into the bias of the next layer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, fx

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import VIEW_KINDS, Graph, Operator, Placement
from qhw.schema import TargetSpec
from qhw_plugins.equalization_pairs import Pair, PairFinder, folded_norms, planned_pairs

_DEVIATIONS = 3.0


class BiasAbsorptionOptions(AlgorithmOptions):
    """What may be set."""

    exact_only: bool = Field(
        False, description="Leave out pairs whose second operator pads with zeros, where borders become inexact."
    )


class BiasAbsorption(Algorithm):
    """Shifts channels of a layer before Relu down by c, and the next layer's bias up by what that takes away.

        b1' = b1 - c,  b2' = b2 + W2 c                                                  (23)
        c[i] = max(0, beta[i] - 3 |gamma[i]|)         where a batch norm was folded into the first layer
        c[i] = max(0, min over x of (W1 x + b1)[i])   else, over the calibration data   (24)

    W2 c sums over the kernel's taps. beta and gamma are those of the folded batch norm after equalization; its mean
    becomes beta - c. With a batch norm 99.87 % of normal pre-activations lie above c, for which the function is
    preserved; with data, all that were seen.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1; zero padding makes the borders inexact, see `exact_only`.
        Differs: without an activation in between nothing is absorbed.
    """

    name = "bias_absorption"
    stage = "equalize"
    summary = "Move high biases before a Relu into the next layer's bias."
    Options = BiasAbsorptionOptions

    options: BiasAbsorptionOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Each operator with weights is a site; it is taken where Relu alone lies before the next one."""
        finder = PairFinder(graph, folded_norms(points))
        sites, with_norm, padded = [], 0, 0
        for first in finder.firsts():
            found = finder.after(first)
            has_norm = finder.batch_norm_of(first) is not None
            reason = found if isinstance(found, Reason) else self._obstacle(found, has_norm, points, target, resources)
            sites.append(
                Site(name=first.name, verdict=Verdict(taken=reason is None, reasons=(reason,) if reason else ()))
            )
            if reason is None and isinstance(found, Pair):
                with_norm += has_norm
                padded += pads_zeros(found.second)
        taken = sum(site.verdict.taken for site in sites)
        if not taken:
            none = Reason(subject="graph.pairs", value=0, rule="no operator with weights can hand its bias to another")
            return Survey(verdict=Verdict(taken=False, reasons=(none,)), sites=tuple(sites))
        reasons = [_whole("graph.pairs", f"{taken} of {len(sites)}", "{value} operators with weights hand on a bias")]
        if with_norm:
            reasons.append(_whole("graph.batch_norms", with_norm, "{value} by the statistics of a folded batch norm"))
        if with_norm < taken:
            reasons.append(_whole("resources.calibration", True, f"{taken - with_norm} by the calibration data"))
        if padded:
            rule = f"{padded} of them before zero padding, whose borders become inexact"
            reasons.append(_whole("options.exact_only", self.options.exact_only, rule))
        return Survey(verdict=Verdict(taken=True, reasons=tuple(reasons)), sites=tuple(sites))

    def _obstacle(
        self, pair: Pair, has_norm: bool, points: Placement, target: TargetSpec, resources: Resources
    ) -> Reason | None:
        """Why nothing is absorbed between a pair; None where it is."""
        kinds = [operator.kind for operator in pair.between if operator.kind not in VIEW_KINDS]
        second = pair.second
        if kinds != ["Relu"]:
            between = ", ".join(kinds) or "nothing"
            rule = "{value} lies before the next operator with weights; a bias is absorbed through Relu alone"
            return _of(pair.first, "activation", between, rule)
        if second.kind == "ConvTranspose":
            return _of(second, "kind", second.kind, "the taps of a {value} that meet the input differ between outputs")
        if self.options.exact_only and pads_zeros(second):
            padding = second.attributes["padding"]
            return _of(second, "padding", padding, "zero padding of {value} makes the borders inexact (exact_only)")
        if not has_norm and not resources.calibration:
            rule = f"{pair.first.name} has no folded batch norm, and calibration data is absent"
            return Reason(subject="resources.calibration", value=False, rule=rule)
        changed = (second,) if has_norm else (pair.first, second)
        found = (_bias_obstacle(operator, points, target) for operator in changed)
        return next((reason for reason in found if reason is not None), None)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Absorb between the planned pairs; one pass over the data where a first operator has no normals."""
        pairs = planned_pairs(work.graph, step.sites, self.name)
        unknown = [pair.first for pair in pairs if pair.first.name not in work.normals]
        minima = lowest_outputs(work.graph, unknown, context) if unknown else {}
        figures: dict[str, dict[str, Json]] = {}
        amounts = []
        for pair in pairs:
            name = pair.first.name
            if name in minima:
                amount = minima[name].clamp(min=0.0)
            else:
                normal = work.normals[name]
                amount = (normal.mean - _DEVIATIONS * normal.std).clamp(min=0.0)
                work.normals[name] = normal.shifted(-amount)
            amounts.append(amount)
            figures[name] = {
                "channels": pair.channels,
                "absorbed": int((amount > 0).sum()),
                "largest": float(amount.max()),
                "from": "calibration" if name in minima else "batch_norm",
                "zero_padding": pads_zeros(pair.second),
            }
        absorb(work.graph, pairs, amounts)
        channels = sum(int((amount > 0).sum()) for amount in amounts)
        summary = f"{counted(channels, 'channel')} of {counted(len(pairs), 'operator')} absorbed"
        return StepReport(
            stage=step.stage, algorithm=self.name, summary=summary, sites={site: figures[site] for site in step.sites}
        )


def absorb(graph: Graph, pairs: Sequence[Pair], amounts: Sequence[Tensor]) -> None:
    """Subtract amounts from the biases of the first operators, add what they make to those of the second ones.

    Args:
        graph: Changed in place; operators without a bias get one where it is not 0.
        pairs: With Relu in between.
        amounts: float64 [channels] >= 0 for each pair.
    """
    operators: dict[str, Operator] = {}
    changes: dict[str, Tensor] = {}
    for pair, amount in zip(pairs, amounts, strict=True):
        if bool((amount > 0).any()):
            for operator, change in ((pair.first, -amount), (pair.second, _response(graph, pair, amount))):
                operators[operator.name] = operator
                changes[operator.name] = changes.get(operator.name, torch.zeros_like(change)) + change
    with graph.changes():
        for name, change in changes.items():
            operator = operators[name]
            if operator.bias is None:
                graph.add_bias(operator, change.to(graph.tensor(str(operator.weight)).dtype))
            else:
                bias = graph.tensor(operator.bias).detach()
                graph.set_tensor(operator.bias, (bias.double() + change).to(bias.dtype))


def lowest_outputs(graph: Graph, operators: Sequence[Operator], context: Any) -> Mapping[str, Tensor]:
    """The lowest output of each channel of some operators over the calibration data.

    Returns:
        Operator -> float64 [channels].
    """
    found = _Lowest(graph, operators)
    context.run_over(found.run, "bias absorption")
    return found.lowest


def pads_zeros(operator: Operator) -> bool:
    """Whether some of an operator's taps meet zeros beside the image."""
    padding: Any = operator.attributes.get("padding", 0)
    if padding == "same":
        return any(size > 1 for size in operator.attributes["kernel"])
    return padding not in (0, "valid") and any(padding)


class _Lowest(fx.Interpreter):
    """Runs a graph and keeps the lowest value of every channel of some operators."""

    def __init__(self, graph: Graph, operators: Sequence[Operator]) -> None:
        super().__init__(graph.module)
        self.extra_traceback = False
        self._operators = {operator.node: operator for operator in operators}
        self.lowest: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Compute one node."""
        result = super().run_node(n)
        operator = self._operators.get(n.name)
        if operator is not None:
            spatial = 0 if operator.kind == "Gemm" else len(operator.attributes["kernel"])
            lowest = result.movedim(result.dim() - 1 - spatial, 0).flatten(1).amin(1).double()
            seen = self.lowest.get(operator.name, lowest)
            self.lowest[operator.name] = torch.minimum(seen, lowest)
        return result


def _response(graph: Graph, pair: Pair, amount: Tensor) -> Tensor:
    """W2 c, summed over the kernel's taps: float64 [outputs of the second]."""
    second = pair.second
    weight = graph.tensor(str(second.weight)).detach().double()
    if second.kind == "DepthwiseConv":
        return weight.flatten(1).sum(1) * amount
    weight = weight if second.weight_axis == 0 else weight.t()
    summed = weight.flatten(2).sum(2) if weight.dim() > 2 else weight
    return summed @ amount.repeat_interleave(pair.block)


def _bias_obstacle(operator: Operator, points: Placement, target: TargetSpec) -> Reason | None:
    """Why an operator without a bias cannot be given one."""
    if operator.bias is not None or any(p.role == "bias" and p.operator == operator.name for p in points.points):
        return None
    if operator.kind == "Gemm" and operator.weight_axis == 1 and len(operator.shape) != 2:
        return _of(operator, "rank", len(operator.shape), "a matrix product of rank {value} takes no bias")
    kernel = points.operator(operator.name).kernel
    rule = None if kernel is None else target.kernels[kernel].bias
    if rule == "none":
        return Reason(
            subject=f"kernels.{kernel}.bias", value="none", rule=f"the kernel of {operator.name} adds {{value}}"
        )
    if rule not in (None, "unknown") and target.biases[str(rule)].bits not in (None, "float", "unknown"):
        return _of(operator, "bias", None, "its bias is {value}, and the plan has no scale for a new one")
    return None


def _of(operator: Operator, fact: str, value: Json, rule: str) -> Reason:
    return Reason(subject=f"graph.{operator.name}.{fact}", value=value, rule=rule)


def _whole(subject: str, value: Json, rule: str) -> Reason:
    return Reason(subject=subject, value=value, rule=rule)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Bias absorption.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [BiasAbsorption]
