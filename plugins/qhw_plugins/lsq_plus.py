# SPDX-License-Identifier: Apache-2.0
"""LSQ+: a zero point that learns as a real offset, with the gradients of Bhalgat et al."""

from typing import Any, Literal

from pydantic import Field
from torch import Tensor, nn

from qhw.decisions import Reason, Resources, Site, Step, Survey, Verdict
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import Grid, LearnedQuantizer, QParams
from qhw.schema import TargetSpec
from qhw_plugins.learned_ranges import LearnedRanges, LearnedRangesOptions
from qhw_plugins.sites import TAKEN, activation_sites


class LsqPlusOptions(LearnedRangesOptions):
    """As learned ranges; gradients are scaled."""

    gradient_scale: Literal["none", "lsq"] = Field(
        "lsq", description="lsq: gradients of scales are divided by sqrt(elements * largest code)."
    )


class OffsetQuantizer(LearnedQuantizer):
    """A learning quantizer whose zero point is z = round(-offset / s), with a real offset that learns.

        d x_hat / d offset = 0 inside, 1 outside
        d x_hat / ds = round(x / s) - x / s inside, the clipped code outside

    Both follow from eqs. 38 and 40 by the chain rule, rounding passed straight through.
    """

    offset: nn.Parameter

    def __init__(self, qparams: QParams, grid: Grid, **named: Any) -> None:
        super().__init__(qparams, grid, **named)
        if self.learns_zero_point:
            del self.zero_point
            self.register_buffer("zero_point", qparams.zero_point.float())
            self.offset = nn.Parameter(-qparams.zero_point.float() * qparams.scale)

    def zero_points(self) -> Tensor:
        """-offset / s: float32 [*P]."""
        return -self.offset / self.scale if self.learns_zero_point else self.zero_point


class LsqPlus(LearnedRanges):
    """Learned ranges where the zero point learns as a real offset of the range.

    Reference:
        Bhalgat et al., 2020, arXiv:2004.09576, section 3. Differs: real 0 stays exact, for the offset is used as the
        whole zero point nearest to it; ranges start from those that are set, not from the first batches.
    """

    name = "lsq_plus"
    summary = "Scales learn, and zero points as real offsets (LSQ+)."
    Options = LsqPlusOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Activations whose zero point is free."""
        sites = []
        for group in activation_sites(points):
            name = next(point.format for point in points.points if point.group == group)
            zero_point = target.formats[name].zero_point
            if zero_point in (None, "free"):
                sites.append(Site(name=group, verdict=TAKEN))
            else:
                rule = "zero point is prescribed as {value}: it has no offset to learn"
                value = ", ".join(map(str, zero_point)) if isinstance(zero_point, tuple) else str(zero_point)
                reason = Reason(subject=f"formats.{name}.zero_point", value=value, rule=rule)
                sites.append(Site(name=group, verdict=Verdict(taken=False, reasons=(reason,))))
        taken = any(site.verdict.taken for site in sites)
        reason = Reason(subject="points", value=len(sites), rule="activation ranges learn with an offset")
        return Survey(verdict=Verdict(taken=taken, reasons=(reason,) if taken else ()), sites=tuple(sites))

    def attach(self, form: Any, step: Step) -> None:
        """A learning quantizer with an offset for every planned group."""
        for group in step.sites:
            form.set_quantizer(group, self.quantizer(form, group, OffsetQuantizer))


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="LSQ+: learned scales and offsets.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [LsqPlus]
