# SPDX-License-Identifier: Apache-2.0
"""Cross-layer equalization: channel ranges of successive layers evened out, the function being preserved."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Operator, Placement
from qhw.schema import TargetSpec
from qhw_plugins.equalization_pairs import (
    Pair,
    PairFinder,
    along_features,
    along_outputs,
    folded_norms,
    largest_weights,
    planned_pairs,
)

_PER_RULES = {
    "tensor": "one scale per {value} serves channels of every range",
    "out_channel": "weights have a scale per {value}; equalization evens out the activations and the input channels",
}


class CrossLayerEqualizationOptions(AlgorithmOptions):
    """What may be set."""

    tolerance: float = Field(
        1e-3, gt=0.0, le=1.0, description="Sweeps over a chain end when no scale changes by more than this, as |log|."
    )
    max_sweeps: int = Field(50, ge=1, le=1000, description="Most sweeps over a chain.")


class CrossLayerEqualization(Algorithm):
    """Gives channel i between two layers the range sqrt(r1[i] r2[i]) on both sides.

        s[i] = sqrt(r1[i] / r2[i]),  W1' = W1 / s,  b1' = b1 / s,  W2' = W2 s           (21, 22)

    r1[i] is max |W1| over output channel i, r2[i] over input channel i. Through depthwise layers a channel stays by
    itself, so that a run of k layers is evened out at once: every range becomes (r1 .. rk)^(1/k), s = r1 / g, then
    s r2 / g, and so on (k = 3: the triple of the literature). Chains of runs are swept until no scale moves. A channel
    without weights on one side keeps s = 1. Products are formed in float64 and rounded once.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1, eqs. 20 to 22; Nagel et al., 2019, arXiv:1906.04721. A
        clip with a bound (ReLU6) is refused; `relu6_replacement` may have taken it away before.
    """

    name = "cross_layer_equalization"
    stage = "equalize"
    summary = "Even out channel ranges between successive layers, preserving the function."
    Options = CrossLayerEqualizationOptions

    options: CrossLayerEqualizationOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Each operator with weights is a site; it is taken where the next one can take up its scale."""
        finder = PairFinder(graph, folded_norms(points))
        hosted = {operator.name for operator in points.operators if operator.where == "host"}
        found = [(first, finder.after(first)) for first in finder.firsts()]
        sites = tuple(Site(name=first.name, verdict=_verdict(pair, hosted)) for first, pair in found)
        taken = {site.name for site in sites if site.verdict.taken}
        pairs = [pair for _, pair in found if isinstance(pair, Pair) and pair.first.name in taken]
        if not pairs:
            reason = Reason(subject="graph.pairs", value=0, rule="no operator with weights hands its scale to another")
            return Survey(verdict=Verdict(taken=False, reasons=(reason,)), sites=sites)
        rule = "{value} operators with weights hand their scale to the next"
        count = Reason(subject="graph.pairs", value=f"{len(pairs)} of {len(found)}", rule=rule)
        return Survey(
            verdict=Verdict(taken=True, reasons=(count, *_format_reasons(pairs, points, target))), sites=sites
        )

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Equalize the planned pairs, chain by chain."""
        figures: dict[str, dict[str, Json]] = {}
        pairs = planned_pairs(work.graph, step.sites, self.name)
        for chain in _chains(pairs):
            scales = equalize(work.graph, chain, self.options.tolerance, self.options.max_sweeps)
            figures |= scales.figures
            for pair, scale in zip(chain, scales.scales, strict=True):
                if pair.first.name in work.normals:
                    work.normals[pair.first.name] = work.normals[pair.first.name].scaled(1.0 / scale)
        summary = f"{counted(len(pairs), 'pair')} equalized"
        return StepReport(
            stage=step.stage, algorithm=self.name, summary=summary, sites={site: figures[site] for site in step.sites}
        )


@dataclass(frozen=True)
class Equalized:
    """What was done to one chain.

    Attributes:
        scales: float64 [channels] for each pair: the first operator's outputs were divided by it.
        figures: First operator -> channels; largest over smallest range of its output channels, before and after (those
            that are 0 are left out); sweeps.
    """

    scales: tuple[Tensor, ...]
    figures: dict[str, dict[str, Json]]


def equalize(graph: Graph, chain: Sequence[Pair], tolerance: float = 1e-3, max_sweeps: int = 50) -> Equalized:
    """Equalize pairs of which each begins with the operator that ends the one before.

    Args:
        graph: Changed in place.
        chain: The pairs.
        tolerance: Largest |log| of a change of scale at which sweeping ends.
        max_sweeps: Most sweeps.
    """
    ranges = _Ranges(graph, chain)
    runs = list(_runs(chain))
    before = [_spread(ranges.outputs(index)) for index in range(len(chain))]
    sweeps, moved = 0, float("inf")
    while moved >= tolerance and sweeps < max_sweeps:
        moved = max([ranges.even_out(run) for run in runs])
        sweeps += 1
    operators = [chain[0].first, *(pair.second for pair in chain)]
    for index, operator in enumerate(operators):
        _rescale(graph, operator, ranges.incoming(index), ranges.outgoing(index))
    figures: dict[str, dict[str, Json]] = {
        pair.first.name: {
            "channels": pair.channels,
            "ratio_before": before[index],
            "ratio_after": _spread(ranges.outputs(index)),
            "sweeps": sweeps,
        }
        for index, pair in enumerate(chain)
    }
    return Equalized(tuple(ranges.scales), figures)


class _Ranges:
    """Largest magnitudes of a chain's weights, [out, in] or [channels], under the scales found so far."""

    def __init__(self, graph: Graph, chain: Sequence[Pair]) -> None:
        operators = [chain[0].first, *(pair.second for pair in chain)]
        self._largest = [largest_weights(graph, operator) for operator in operators]
        self._blocks = [pair.block for pair in chain]
        self.scales = [torch.ones(pair.channels, dtype=torch.float64) for pair in chain]

    def incoming(self, index: int) -> Tensor | None:
        """What an operator's input features are multiplied by."""
        return None if index == 0 else self.scales[index - 1].repeat_interleave(self._blocks[index - 1])

    def outgoing(self, index: int) -> Tensor | None:
        """What an operator's outputs are divided by."""
        return None if index == len(self.scales) else self.scales[index]

    def outputs(self, index: int) -> Tensor:
        """Range of each output channel."""
        largest = self._scaled(index)
        return largest if largest.dim() == 1 else largest.amax(1)

    def inputs(self, index: int) -> Tensor:
        """Range of each channel that an operator reads."""
        largest = self._scaled(index)
        if largest.dim() == 1:
            return largest
        return largest.amax(0).reshape(-1, self._blocks[index - 1]).amax(1)

    def _scaled(self, index: int) -> Tensor:
        largest, incoming, outgoing = self._largest[index], self.incoming(index), self.outgoing(index)
        if incoming is not None:
            largest = largest * incoming
        if outgoing is not None:
            largest = largest / (outgoing if largest.dim() == 1 else outgoing[:, None])
        return largest

    def even_out(self, run: range) -> float:
        """Give every operator of a run the same range, channel by channel; returns the largest |log| of a change."""
        found = torch.stack([self.outputs(run[0]), *(self.inputs(index) for index in run[1:])])
        smallest = torch.finfo(torch.float32).tiny
        is_alive = (torch.isfinite(found) & (found >= smallest)).all(0)
        logs = torch.where(is_alive, found, 1.0).log()
        steps = (logs - logs.mean(0)).cumsum(0)  # log of r1 / g, of r1 r2 / g^2, ...
        for index, step in zip(run[:-1], steps, strict=False):
            self.scales[index] = self.scales[index] * step.exp()
        return float(steps[:-1].abs().max()) if steps.numel() else 0.0


def _spread(ranges: Tensor) -> float:
    alive = ranges[ranges > 0]
    return float(alive.max() / alive.min()) if len(alive) else 1.0


def _rescale(graph: Graph, operator: Operator, incoming: Tensor | None, outgoing: Tensor | None) -> None:
    weight = graph.tensor(str(operator.weight)).detach()
    scaled = weight.double()
    if incoming is not None:
        scaled = scaled * along_features(incoming, operator, weight)
    if outgoing is not None:
        scaled = scaled / along_outputs(outgoing, operator, weight)
        if operator.bias is not None:
            bias = graph.tensor(operator.bias).detach()
            graph.set_tensor(operator.bias, (bias.double() / outgoing).to(bias.dtype))
    graph.set_tensor(str(operator.weight), scaled.to(weight.dtype))


def _chains(pairs: Sequence[Pair]) -> Iterator[list[Pair]]:
    """Pairs as chains: each goes on where the one before ends."""
    by_first = {pair.first.name: pair for pair in pairs}
    seconds = {pair.second.name for pair in pairs}
    for pair in pairs:
        if pair.first.name not in seconds:
            chain = [pair]
            while chain[-1].second.name in by_first:
                chain.append(by_first[chain[-1].second.name])
            yield chain


def _runs(chain: Sequence[Pair]) -> Iterator[range]:
    """Operators, by number in the chain, whose channels are tied one to one: all but the ends are depthwise."""
    start = 0
    for index, pair in enumerate(chain, start=1):
        if pair.second.kind != "DepthwiseConv" or index == len(chain):
            yield range(start, index + 1)
            start = index


def _verdict(pair: Pair | Reason, hosted: set[str]) -> Verdict:
    if isinstance(pair, Reason):
        return Verdict(taken=False, reasons=(pair,))
    if pair.first.name in hosted and pair.second.name in hosted:
        rule = f"it runs on the {{value}}, and so does {pair.second.name}: neither is quantized"
        reason = Reason(subject=f"placement.{pair.first.name}.where", value="host", rule=rule)
        return Verdict(taken=False, reasons=(reason,))
    return Verdict(taken=True)


def _format_reasons(pairs: Sequence[Pair], points: Placement, target: TargetSpec) -> tuple[Reason, ...]:
    """One reason for each sharing of weight scales among the operators that are equalized."""
    names = {name for pair in pairs for name in (pair.first.name, pair.second.name)}
    found: dict[str, Reason] = {}
    for point in points.points:
        if point.role == "weight" and point.operator in names:
            per = str(target.formats[point.format].per)
            rule = _PER_RULES.get(per, "weights have a scale per {value}")
            words = per.replace("_", " ")
            found.setdefault(per, Reason(subject=f"formats.{point.format}.per", value=words, rule=rule))
    return tuple(found.values())


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Cross-layer equalization.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [CrossLayerEqualization]
