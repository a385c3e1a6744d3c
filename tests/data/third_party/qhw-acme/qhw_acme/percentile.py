# SPDX-License-Identifier: Apache-2.0
"""Activation ranges that leave out the outermost values."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qhw.decisions import Rank, Reason, Resources, Site, Step, StepReport, Survey, Verdict
from qhw.extension import Algorithm, AlgorithmOptions
from qhw.graph import Graph, Placement
from qhw.numerics import Histogram, qparams_from_range
from qhw.schema import TargetSpec

VENDOR = "acme/"


class AcmePercentile(Algorithm):
    """Activation ranges that may clip a small share of the values at each end.

    The bounds are edges of histogram bins, so at most the share that is asked for is clipped, and the result does not
    depend on the order or the batching of the data.
    """

    name = "acme_percentile"
    stage = "activation_range"
    summary = "Activation ranges that may clip the outermost values."
    ranks = (Rank(pipeline="whitepaper-ptq", before="cross_entropy"), Rank(pipeline="ranges-ptq", before="mse"))

    class Options(AlgorithmOptions):
        """What may be set."""

        outside: float = Field(1e-4, ge=0, lt=0.5, description="Largest share of the values clipped at each end.")

    options: Options

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All open activation ranges of a target of ours, given calibration data."""
        if not target.name.startswith(VENDOR):
            return _answer(False, "name", target.name, "tuned on ACME's chips only, and this is {value}")
        if not resources.calibration:
            return _answer(False, "resources.calibration", False, "needs calibration data")
        fixed = {point.group for point in points.points if point.is_given}
        roles = ("activation", "input", "edge")
        groups = dict.fromkeys(p.group for p in points.points if p.role in roles and p.group not in fixed)
        sites = tuple(Site(name=group, verdict=Verdict(taken=True)) for group in groups)
        return _answer(True, "name", target.name, "tuned on ACME's chips, as {value} is one", sites)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One pass over the data; then a range per group."""
        seen = work.observe(step.sites, lambda group: Histogram(name=group), context, "activation ranges, percentile")
        figures = {}
        for group, histogram in seen.items():
            low, high = work.bounded(group, *percentile_range(histogram, self.options.outside))
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), name=group))
            figures[group] = {"low": float(low), "high": float(high)}
        summary = f"{len(seen)} activation ranges from {context.calibration.num_samples} samples"
        return StepReport(stage=self.stage, algorithm=self.name, summary=summary, sites=figures)


def percentile_range(histogram: Histogram, outside: float) -> tuple[Tensor, Tensor]:
    """The narrowest range of whole bins with no more than a share of the values below it, and above it.

    Args:
        histogram: What was seen.
        outside: The share, from 0 (the exact range) to below 0.5.

    Returns:
        Lowest and highest value, float32 [].
    """
    allowed = int(outside * histogram.count)
    counts, edges = histogram.counts, histogram.edges
    first = int((counts.cumsum(0) > allowed).nonzero()[0])
    last = len(counts) - 1 - int((counts.flip(0).cumsum(0) > allowed).nonzero()[0])
    low = torch.maximum(histogram.min, edges[first].float())
    high = torch.minimum(histogram.max, edges[last + 1].float())
    return low, high


def _answer(taken: bool, subject: str, value: str | bool, rule: str, sites: tuple[Site, ...] = ()) -> Survey:
    reason = Reason(subject=subject, value=value, rule=rule)
    return Survey(verdict=Verdict(taken=taken, reasons=(reason,)), sites=sites)
