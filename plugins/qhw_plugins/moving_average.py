# SPDX-License-Identifier: Apache-2.0
"""Moving-average min-max ranges: the running range that training frameworks keep, exact and in a fixed order."""

from typing import Any

from pydantic import Field

from qhw.decisions import Json, Resources, Step, StepReport, Survey, counted
from qhw.engine import MICRO_BATCH
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import MinMaxSeries, qparams_from_range, running_average
from qhw.schema import TargetSpec
from qhw_plugins.sites import DATA_GIVEN, activation_sites, all_sites, needs_calibration, scale_reasons

_COVER = "the finest {value} scale that covers the average range of a micro-batch"


class MovingAverageOptions(AlgorithmOptions):
    """What may be set."""

    momentum: float = Field(
        0.9, ge=0.0, lt=1.0, description="Share of the average that each micro-batch of 32 samples leaves as it was."
    )


class MovingAverage(Algorithm):
    """Activation ranges from moving averages of the smallest and largest values of successive micro-batches.

        m_0 = x_0;  m_i = momentum * m_(i-1) + (1 - momentum) * x_i

    Over the canonical micro-batches of 32 samples, in the order of the data, the shorter last one among them: the
    order of the samples counts, the loader's batch size does not. What a micro-batch shows beyond the bounds that the
    target states counts as the bound. Tensors that share a scale count as one.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1 (running min-max; momentum 0.9 in the authors' code).
    """

    name = "moving_average"
    stage = "activation_range"
    summary = "Activation ranges from moving averages of each micro-batch's range."
    Options = MovingAverageOptions

    options: MovingAverageOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All activation points, given calibration data."""
        names = activation_sites(points)
        reasons = (DATA_GIVEN, *scale_reasons(points, target, names, _COVER))
        return needs_calibration(resources) or all_sites(names, reasons)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One pass over the data; then a range per group."""
        label = "activation ranges, moving average"
        seen = work.observe(step.sites, lambda group: MinMaxSeries(group), context, label)
        num_micro_batches = -(-context.calibration.num_samples // MICRO_BATCH)
        figures: dict[str, dict[str, Json]] = {}
        for group, series in seen.items():
            series.join_updates(num_micro_batches)
            bounds = work.bounded(group, series.min, series.max)
            low, high = (running_average(values, self.options.momentum) for values in bounds)
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), name=group))
            figures[group] = {
                "min": float(series.min.min()),
                "max": float(series.max.max()),
                "low": float(low),
                "high": float(high),
            }
        summary = (
            f"{counted(len(seen), 'activation range')} from {counted(context.calibration.num_samples or 0, 'sample')}"
        )
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Activation ranges from moving averages of minima and maxima.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [MovingAverage]
