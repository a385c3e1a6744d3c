# SPDX-License-Identifier: Apache-2.0
"""Percentile ranges: leave out a share of the outermost values."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qhw.decisions import Json, Resources, Step, StepReport, Survey, counted
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import Histogram, percentile_range_of, qparams_from_range, range_of
from qhw.schema import TargetSpec
from qhw_plugins.sites import (
    DATA_GIVEN,
    activation_sites,
    all_sites,
    needs_calibration,
    ranged_weight_sites,
    scale_reasons,
)

_COVER = "the finest {value} scale that covers all but the outermost values"


class PercentileOptions(AlgorithmOptions):
    """What may be set."""

    percentile: float = Field(
        99.99,
        gt=50.0,
        le=100.0,
        description="Percent of the values that lie at or below the upper end of the range; as many lie at or above "
        "its lower end. 100 leaves out nothing.",
    )


class PercentileWeights(Algorithm):
    """Weight ranges between two quantiles of the weights that share a scale.

    The ends are weights: of n of them, floor(n * (100 - percentile) / 100) lie below the range and as many above, so
    that with the default a share of fewer than 10,000 is covered whole. A share of which only the outermost values
    differ from zero is covered whole, too.

    Reference:
        Wu et al., 2020, arXiv:2004.09602, section 5 (percentile calibration, there for activations).
    """

    name = "percentile_weights"
    stage = "weight_range"
    summary = "Weight ranges that leave out the outermost weights."
    Options = PercentileOptions

    options: PercentileOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weight points."""
        names = ranged_weight_sites(points, target)
        return all_sites(names, scale_reasons(points, target, names, _COVER))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Ranges of all planned weights, each share by itself."""
        figures: dict[str, dict[str, Json]] = {}
        for group in context.progress.track(step.sites, "weight ranges, percentile", len(step.sites)):
            weight, granularity = work.weight(group), work.granularity(group)
            whole = range_of(weight, granularity)
            low, high = _alive(percentile_range_of(weight, granularity, self.options.percentile), whole)
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), granularity, group))
            figures[group] = {"clipped": int(((low > whole[0]) | (high < whole[1])).sum())}
        summary = counted(len(step.sites), "weight range")
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


class PercentileActivations(Algorithm):
    """Activation ranges between two quantiles of the values over the calibration data.

    The data is seen once, as an exact histogram of 8,192 bins per sign that is independent of order and batching. The
    ends are edges of its bins, on the outer side, so that no more than the share that is asked for is left out.

    Reference:
        Wu et al., 2020, arXiv:2004.09602, section 5. Differs: quantiles of the values at both ends, where the paper
        takes one of their magnitudes.
    """

    name = "percentile"
    stage = "activation_range"
    summary = "Activation ranges that leave out the outermost values seen in calibration."
    Options = PercentileOptions

    options: PercentileOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All activation points, given calibration data."""
        names = activation_sites(points)
        reasons = (DATA_GIVEN, *scale_reasons(points, target, names, _COVER))
        return needs_calibration(resources) or all_sites(names, reasons)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One pass over the data; then a range per group."""
        seen = work.observe(step.sites, lambda group: Histogram(name=group), context, "activation ranges, percentile")
        figures: dict[str, dict[str, Json]] = {}
        for group, histogram in seen.items():
            low, high = work.bounded(group, *histogram.percentile_range(self.options.percentile))
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), name=group))
            figures[group] = {
                "min": float(histogram.min),
                "max": float(histogram.max),
                "low": float(low),
                "high": float(high),
            }
        summary = (
            f"{counted(len(seen), 'activation range')} from {counted(context.calibration.num_samples or 0, 'sample')}"
        )
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


def _alive(found: tuple[Tensor, Tensor], whole: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """The ranges found, but the whole range where nothing but zero is left of one: its scale would be a dead one's."""
    dead = (found[0] == 0) & (found[1] == 0)
    return torch.where(dead, whole[0], found[0]), torch.where(dead, whole[1], found[1])


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Ranges of weights and activations that leave out the outermost values.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [PercentileWeights, PercentileActivations]
