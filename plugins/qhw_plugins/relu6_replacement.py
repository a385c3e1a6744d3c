# SPDX-License-Identifier: Apache-2.0
"""ReLU6 replaced by ReLU, so that equalization can pass: where channels need it more than the model needs the bound."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from pydantic import Field
from torch import Tensor
from torch.utils import _pytree as pytree

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict
from qhw.errors import PlanError
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Operator, Placement, place
from qhw.schema import TargetSpec
from qhw_plugins.batch_norm_folding import factor_of
from qhw_plugins.equalization_pairs import Pair, PairFinder, folded_norms, largest_weights


class Relu6ReplacementOptions(AlgorithmOptions):
    """What may be set."""

    min_precision: float = Field(
        4.0, ge=0, le=32, description="A bound stays where channels get this many bits of their own range on average."
    )
    min_sqnr_db: float = Field(
        10.0, ge=-100, le=200, description="Float outputs that a replacement moves further, on the data, are an error."
    )


class Relu6Replacement(Algorithm):
    """Replaces ReLU6, or another clip at 0 and above, by ReLU between two layers whose channels differ too much.

    A bound is not scale-equivariant, so that equalization stops there. Taking it away costs accuracy of the float
    model: the step measures that on the calibration data, as SQNR of the outputs and as predictions that stay, and
    refuses to go on below `min_sqnr_db`; without data nothing is measured. It is done only where one scale serves a
    whole weight tensor and leaves its channels few bits of their own range:

        precision = mean over channels of (bits - log2(max over j of r[j] / r[i]))

    with r[i] = max |W| over output channel i of the layer before, or input channel i of the layer behind.

    Reference:
        Nagel et al., 2019, arXiv:1906.04721, section 5.1.1 (ReLU6 replaced throughout); Nagel et al., 2021,
        arXiv:2106.08295, section 3.1 (precision of a channel). Differs: site by site, by need. The other way, a bound
        6 / s[i] per channel, is exact but needs a clip per channel, which no kernel we know computes along.
    """

    name = "relu6_replacement"
    stage = "equalize"
    summary = "Replace ReLU6 by ReLU where channel ranges need equalization across it."
    Options = Relu6ReplacementOptions

    options: Relu6ReplacementOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Each clip at 0 and above is a site."""
        clips = {operator.name: operator for operator in graph.operators if _is_bounded_relu(operator)}
        if not clips:
            reason = Reason(subject="graph.clips", value=0, rule="the model has no ReLU6 or other bounded ReLU")
            return Survey(verdict=Verdict(taken=False, reasons=(reason,)))
        finder = PairFinder(graph, folded_norms(points), clips)
        across: dict[str, Pair] = {}
        for found in map(finder.after, finder.firsts()):
            if isinstance(found, Pair):
                across |= {operator.name: found for operator in found.between if operator.name in clips}
        unfit = _without_kernel(graph, points, target, across)
        sites = []
        for name in clips:
            obstacle = _out_of_place(name) if name not in across else unfit.get(name)
            verdict = obstacle or self._verdict(graph, across[name], finder, points, target)
            sites.append(Site(name=name, verdict=verdict, becomes={name: "Relu"} if verdict.taken else {}))
        count = sum(site.verdict.taken for site in sites)
        rule = "{value} bounded ReLUs stand between layers whose channels need equalization"
        reason = Reason(subject="graph.clips", value=f"{count} of {len(sites)}", rule=rule)
        return Survey(verdict=Verdict(taken=count > 0, reasons=(reason,) if count else ()), sites=tuple(sites))

    def _verdict(self, graph: Graph, pair: Pair, finder: PairFinder, points: Placement, target: TargetSpec) -> Verdict:
        formats = {point.tensor: point.format for point in points.points if point.role == "weight"}
        found: list[tuple[float, str]] = []
        for operator in (pair.first, pair.second):
            spec = target.formats.get(formats.get(str(operator.weight), ""))
            if spec is not None and spec.per == "tensor" and isinstance(spec.element_bits, int):
                ranges = _channel_ranges(graph, operator, finder, behind=operator is pair.second, block=pair.block)
                found.append((spec.element_bits - _spread_bits(ranges), operator.name))
        if not found:
            name = next((formats[str(o.weight)] for o in (pair.first, pair.second) if str(o.weight) in formats), None)
            if name is None:
                return _refused(f"placement.{pair.first.name}.where", "host", "the layers around it run on the {value}")
            per = str(target.formats[name].per).replace("_", " ")
            return _refused(f"formats.{name}.per", per, "weights have a scale per {value}: they need no equalization")
        precision, name = min(found)
        value = round(precision, 2)
        subject = f"graph.{name}.weight.precision"
        if precision >= self.options.min_precision:
            rule = "channels get {value} bits of their own range on average, enough with the bound in place "
            return _refused(subject, value, f"{rule}(--set {self.name}.min_precision)")
        rule = f"channels get only {{value}} bits of their own range on average, below {self.options.min_precision:g}"
        return Verdict(taken=True, reasons=(Reason(subject=subject, value=value, rule=rule),))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Replace the planned clips; with data, measure what that changes."""
        figures: dict[str, dict[str, Json]] = {
            name: {"maximum": work.graph.operator(name).attributes["maximum"]} for name in step.becomes
        }
        before = work.graph.copy(share_tensors=True)
        work.graph.become(step.becomes)
        cost = "the cost is not measured without calibration data"
        if work.plan.resources.calibration:
            change = _Change()
            context.run_over(lambda *x: change.add(before.module(*x), work.graph.module(*x)), self.name)
            cost = change.words()
            self._check(change)
            for site in figures.values():
                site |= change.figures()
        count = f"{len(step.becomes)} bounded ReLU{'s' * (len(step.becomes) > 1)} replaced"
        return StepReport(stage=step.stage, algorithm=self.name, summary=f"{count}; {cost}", sites=figures)

    def _check(self, change: "_Change") -> None:
        found = change.sqnr_db
        if found < self.options.min_sqnr_db:
            raise PlanError(
                f"{self.name}: float outputs must keep {self.options.min_sqnr_db:g} dB without the bounds; "
                f"{change.words()}. Plan again with --without {self.name}, or lower --set {self.name}.min_sqnr_db."
            )


class _Change:
    """How far the outputs of two float models lie apart, over all data."""

    def __init__(self) -> None:
        self._signal = self._noise = 0.0
        self._same = self._samples = 0
        self._has_classes = True

    def add(self, before: Any, after: Any) -> None:
        """One micro-batch of outputs."""
        pairs = [
            (a, b)
            for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(after), strict=True)
            if isinstance(a, Tensor) and a.is_floating_point()
        ]
        for a, b in pairs:
            self._signal += float(a.double().square().sum())
            self._noise += float((a.double() - b.double()).square().sum())
        is_scores = len(pairs) == 1 and pairs[0][0].dim() == 2 and pairs[0][0].shape[1] > 1
        self._has_classes &= is_scores
        if is_scores:
            a, b = pairs[0]
            self._same += int((a.argmax(1) == b.argmax(1)).sum())
            self._samples += len(a)

    @property
    def sqnr_db(self) -> float:
        """SQNR of the outputs: infinite where nothing changed."""
        if not self._noise:
            return math.inf
        return 10 * math.log10(self._signal / self._noise) if self._signal else -math.inf

    def figures(self) -> dict[str, Json]:
        """SQNR of the outputs in dB (absent where nothing changed), and the share of predictions that stay."""
        found: dict[str, Json] = {}
        if math.isfinite(self.sqnr_db):
            found["float_sqnr_db"] = self.sqnr_db
        if self._has_classes and self._samples:
            found["float_agreement"] = self._same / self._samples
        return found

    def words(self) -> str:
        """The figures in a sentence."""
        if not self._noise:
            return "the float outputs stay the same"
        stay = f", {100 * self._same / self._samples:.1f} % of predictions stay" if self._samples else ""
        return f"the float outputs change (at {self.sqnr_db:.1f} dB{stay if self._has_classes else ''})"


def _is_bounded_relu(operator: Operator) -> bool:
    facts = operator.attributes
    return operator.kind == "Clip" and facts["minimum"] == 0 and facts["maximum"] is not None


def _without_kernel(graph: Graph, points: Placement, target: TargetSpec, clips: Iterable[str]) -> dict[str, Verdict]:
    """Clips that the target runs, or a kernel computes along, where neither goes for Relu."""
    trial = graph.copy(share_tensors=True)
    trial.become(dict.fromkeys(clips, "Relu"))
    lenient = target.model_copy(update={"fallback": "host"})
    placed = place(trial, lenient, absorbed=folded_norms(points))
    found: dict[str, Verdict] = {}
    for name in clips:
        now, then = points.operator(name), placed.operator(name)
        is_worse = then.where != "accelerator" or (now.fused_into is not None and then.fused_into is None)
        if now.where == "accelerator" and is_worse:
            rule = "'{value}' does not list Relu where it lists Clip"
            found[name] = _refused(now.subject, target.name, rule)
    return found


def _out_of_place(name: str) -> Verdict:
    rule = "{value} layers hand their scale on through it"
    return _refused(f"graph.{name}.pairs", 0, rule)


def _refused(subject: str, value: Json, rule: str) -> Verdict:
    return Verdict(taken=False, reasons=(Reason(subject=subject, value=value, rule=rule),))


def _channel_ranges(graph: Graph, operator: Operator, finder: PairFinder, behind: bool, block: int) -> Tensor:
    """max |W| per channel that lies between the pair: float64 [channels], the batch norm folded."""
    largest = largest_weights(graph, operator)
    norm = finder.batch_norm_of(operator)
    if norm is not None:
        factor = factor_of(graph, norm).abs()
        largest = largest * (factor if largest.dim() == 1 else factor[:, None])
    if largest.dim() == 1:
        return largest
    return largest.amax(0).reshape(-1, block).amax(1) if behind else largest.amax(1)


def _spread_bits(ranges: Tensor) -> float:
    """mean log2(largest / own) over the channels that have weights."""
    alive = ranges[torch.isfinite(ranges) & (ranges > 0)]
    return float((alive.max() / alive).log2().mean()) if len(alive) else 0.0


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="ReLU6 replaced by ReLU where equalization needs it.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [Relu6Replacement]
