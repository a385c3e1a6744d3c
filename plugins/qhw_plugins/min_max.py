# SPDX-License-Identifier: Apache-2.0
"""Min-max ranges: cover every value seen. No clipping; sensitive to outliers."""

from typing import Any

from qhw.decisions import Json, Resources, Step, StepReport, Survey, counted
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import MinMax, qparams_from_range, range_of
from qhw.schema import TargetSpec
from qhw_plugins.sites import (
    DATA_GIVEN,
    activation_sites,
    all_sites,
    needs_calibration,
    ranged_weight_sites,
    scale_reasons,
)

_COVER = "the finest {value} scale that clips nothing"


class MinMaxWeights(Algorithm):
    """Weight ranges from the smallest and largest weight.

        q_min = min W, q_max = max W                                                (14, 15)

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1. The scale is legal on the target by construction.
    """

    name = "min_max_weights"
    stage = "weight_range"
    summary = "Weight ranges that cover every weight."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weight points."""
        names = ranged_weight_sites(points, target)
        return all_sites(names, scale_reasons(points, target, names, _COVER))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Ranges of all planned weights."""
        for group in context.progress.track(step.sites, "weight ranges, min-max", len(step.sites)):
            weight, granularity = work.weight(group), work.granularity(group)
            low, high = range_of(weight, granularity)
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), granularity, group))
        return StepReport(stage=step.stage, algorithm=self.name, summary=counted(len(step.sites), "weight range"))


class MinMaxActivations(Algorithm):
    """Activation ranges from the smallest and largest value over the calibration data.

        q_min = min X, q_max = max X                                                (14, 15)

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1. Independent of the order and batching of the data.
    """

    name = "min_max"
    stage = "activation_range"
    summary = "Activation ranges that cover every value seen in calibration."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All activation points, given calibration data."""
        names = activation_sites(points)
        reasons = (DATA_GIVEN, *scale_reasons(points, target, names, _COVER))
        return needs_calibration(resources) or all_sites(names, reasons)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One pass over the data; then a range per group."""
        seen = work.observe(step.sites, lambda group: MinMax(name=group), context, "activation ranges, min-max")
        for group, statistic in seen.items():
            low, high = work.bounded(group, statistic.min, statistic.max)
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), name=group))
        figures: dict[str, dict[str, Json]] = {
            group: {"min": float(s.min), "max": float(s.max)} for group, s in seen.items()
        }
        summary = (
            f"{counted(len(seen), 'activation range')} from {counted(context.calibration.num_samples or 0, 'sample')}"
        )
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Min-max ranges of weights and activations.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [MinMaxWeights, MinMaxActivations]
