# SPDX-License-Identifier: Apache-2.0
"""MSE ranges: clip where that lowers the squared error."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor

from qhw.decisions import Json, Resources, Step, StepReport, Survey, counted
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import Histogram, mse_qparams_from_histogram, mse_qparams_from_tensor
from qhw.schema import TargetSpec
from qhw_plugins.sites import (
    DATA_GIVEN,
    activation_sites,
    all_sites,
    needs_calibration,
    ranged_weight_sites,
    scale_reasons,
)

_LEAST = "the {value} scale with the smallest squared error"


class MseOptions(AlgorithmOptions):
    """What may be set."""

    search: Literal["grid", "golden"] = Field(
        "grid",
        description=(
            "grid: 100 fractions of the range, then tenths around the best; golden: 8 fractions, then a golden section "
            "around the best, within 1 % of the grid's error; 0.7 of its time for weights, 3 times as long for the "
            "histograms of activations (1 ms each), which the grid tries at once. A free zero point and scales that are"
            " powers of two or listed are searched by grid either way."
        ),
    )


class MseWeightsOptions(MseOptions):
    """What may be set."""

    clipping_weight: float = Field(
        1.0,
        ge=1.0,
        le=1000.0,
        description="How much the squared error of a clipped weight counts; 1 is the paper's criterion, 3 clips less.",
    )


class MseWeights(Algorithm):
    """Weight ranges with the smallest squared error.

        argmin over (q_min, q_max) of ||W - W_hat||_F^2                             (16)

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1. Only scales that the target can hold are tried.
    """

    name = "mse_weights"
    stage = "weight_range"
    summary = "Weight ranges with the smallest squared error."
    Options = MseWeightsOptions

    options: MseWeightsOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weight points."""
        names = ranged_weight_sites(points, target)
        return all_sites(names, scale_reasons(points, target, names, _LEAST))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Ranges of all planned weights, each scale by itself."""
        for group in context.progress.track(step.sites, "weight ranges, MSE", len(step.sites)):
            qparams = mse_qparams_from_tensor(
                work.weight(group),
                work.grid(group),
                work.granularity(group),
                group,
                clipping_weight=self.options.clipping_weight,
                search=self.options.search,
            )
            work.set_qparams(group, qparams)
        return StepReport(stage=step.stage, algorithm=self.name, summary=counted(len(step.sites), "weight range"))


class MseActivations(Algorithm):
    """Activation ranges with the smallest squared error over the calibration data.

        argmin over (q_min, q_max) of ||X - X_hat||_F^2                             (16)

    The data is seen once, as an exact histogram of 8,192 bins per sign that is independent of order and batching;
    values count as their bin's centre. A tensor that left the range which the target states for it is seen again, cut
    to that range, as the hardware cuts it.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1.
    """

    name = "mse"
    stage = "activation_range"
    summary = "Activation ranges with the smallest squared error over the calibration data."
    Options = MseOptions

    options: MseOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All activation points, given calibration data."""
        names = activation_sites(points)
        reasons = (DATA_GIVEN, *scale_reasons(points, target, names, _LEAST))
        return needs_calibration(resources) or all_sites(names, reasons)

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """One pass over the data; then a search per group."""
        seen = work.observe(step.sites, lambda group: Histogram(name=group), context, "activation ranges, MSE")
        bounds = {group: work.bounded(group, s.min, s.max) for group, s in seen.items()}
        beyond = [group for group, s in seen.items() if bounds[group] != (s.min, s.max)]
        if beyond:
            cut = work.observe(beyond, lambda group: _Cut(group, *bounds[group]), context, "activation ranges, cut")
            seen |= {group: statistic.histogram for group, statistic in cut.items()}
        for group in context.progress.track(step.sites, "activation ranges, search", len(step.sites)):
            qparams = mse_qparams_from_histogram(seen[group], work.grid(group), search=self.options.search)
            work.set_qparams(group, qparams)
        figures: dict[str, dict[str, Json]] = {
            group: {"min": float(s.min), "max": float(s.max)} for group, s in seen.items()
        }
        summary = (
            f"{counted(len(seen), 'activation range')} from {counted(context.calibration.num_samples or 0, 'sample')}"
        )
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


class _Cut:
    """A histogram of values that saturate at the ends of a range."""

    def __init__(self, name: str, low: Tensor, high: Tensor) -> None:
        self.histogram = Histogram(name=name)
        self._low, self._high = low, high

    def update(self, x: Tensor) -> None:
        """Take in one tensor."""
        self.histogram.update(x.clamp(self._low, self._high))


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Ranges of weights and activations with the smallest squared error.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [MseWeights, MseActivations]
