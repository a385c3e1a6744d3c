# SPDX-License-Identifier: Apache-2.0
"""Batch-norm ranges: activation ranges without data, from the statistics that batch norms keep."""

from typing import Any

from pydantic import Field

from qhw.decisions import Json, Reason, Resources, Site, Step, StepReport, Survey, Verdict, counted
from qhw.errors import PlanError
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import qparams_from_range
from qhw.schema import TargetSpec
from qhw_plugins.moments import InputOptions, batch_norms, folded_normals, told_channels, why_untold
from qhw_plugins.sites import activation_sites, scale_reasons

_COVER = "the finest {value} scale that covers the range that batch norms tell"


class BatchNormRangesOptions(InputOptions):
    """What may be set."""

    alpha: float = Field(
        6.0, gt=0.0, le=100.0, description="How many standard deviations on both sides of the mean a range covers."
    )


class BatchNormRanges(Algorithm):
    """Activation ranges from the mean beta and standard deviation |gamma| of each channel behind a batch norm.

        q_min = min over channels (beta - alpha |gamma|)                            (18)
        q_max = max over channels (beta + alpha |gamma|)                            (19)

    cut by the activation that follows: q_min = 0 after ReLU, q_max = 6 after ReLU6. No data is needed. A tensor without
    a batch norm of its own (a residual sum, a pooling, the last layer's output) has mean and standard deviation
    propagated through the operators before it, see `qhw_plugins.moments`; a model input has those of the options. A
    group of several tensors gets a range that covers each of them.

    Without data it is taken when the ranges of all tensors can be told, since nothing else could set the others.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.1. Differs: |gamma|, and propagated moments.
    """

    name = "batch_norm_ranges"
    stage = "activation_range"
    summary = "Activation ranges from the statistics of batch norms, without data."
    Options = BatchNormRangesOptions

    options: BatchNormRangesOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All activation groups whose tensors can be told."""
        names = activation_sites(points)
        norms = batch_norms(graph)
        if not norms or not names:
            what = "batch norm with running statistics" if names else "activation range to set"
            subject = "graph.batch_norms" if names else "points"
            reason = Reason(subject=subject, value=0, rule=f"there is no {what}")
            return Survey(verdict=Verdict(taken=False, reasons=(reason,)))
        told = told_channels(graph, folded_normals(graph, points), self.options.inputs(graph))
        sites = []
        for name in names:
            tensors = [point.tensor for point in points.points if point.group == name]
            untold = [tensor for tensor in tensors if tensor not in told]
            if untold:
                verdict = Verdict(taken=False, reasons=(why_untold(graph, told, untold[0]),))
            else:
                given = [tensor for tensor in tensors if tensor in graph.inputs]
                reasons = tuple(self.options.reason(self.name, tensor) for tensor in given)
                verdict = Verdict(taken=True, reasons=reasons)
            sites.append(Site(name=name, verdict=verdict))
        count = sum(site.verdict.taken for site in sites)
        tell = "{value} batch norms tell ranges" if len(norms) > 1 else "{value} batch norm tells ranges"
        norms_tell = Reason(subject="graph.batch_norms", value=len(norms), rule=tell)
        if count < len(sites) and not resources.calibration:
            rule = "{value} activation ranges can be told from batch norms, and without data nothing tells the others"
            own = Reason(subject="points.activations", value=f"{count} of {len(sites)}", rule=rule)
            refused = tuple(site for site in sites if not site.verdict.taken)
            return Survey(verdict=Verdict(taken=False, reasons=(norms_tell, own)), sites=refused)
        verdict = Verdict(taken=count > 0, reasons=(norms_tell, *scale_reasons(points, target, names, _COVER)))
        return Survey(verdict=verdict, sites=tuple(sites))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Ranges of all planned groups, in the units of the float model."""
        graph = work.reference
        told = told_channels(graph, work.normals, self.options.inputs(graph))
        figures: dict[str, dict[str, Json]] = {}
        for group in context.progress.track(step.sites, "activation ranges, batch norms", len(step.sites)):
            tensors = [point.tensor for point in work.group(group)]
            untold = [tensor for tensor in tensors if tensor not in told]
            if untold:
                why = why_untold(graph, told, untold[0]).sentence()
                raise PlanError(f"{group}: {why}. Plan again, or give calibration data.")
            ends = [told[tensor].reach(self.options.alpha) for tensor in tensors]
            low, high = work.bounded(group, min(low for low, _ in ends), max(high for _, high in ends))
            work.set_qparams(group, qparams_from_range(low, high, work.grid(group), name=group))
            figures[group] = {"min": float(low), "max": float(high)}
        ranges = counted(len(figures), "activation range")
        summary = f"{ranges} from batch norms, {self.options.alpha:g} standard deviations wide"
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Activation ranges from batch norms, without data.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [BatchNormRanges]
