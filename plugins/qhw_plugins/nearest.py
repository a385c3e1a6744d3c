# SPDX-License-Identifier: Apache-2.0
"""Nearest rounding of weights: each weight goes to the closest code."""

import math
from typing import Any

from qhw.decisions import Reason, Resources, Step, StepReport, Survey, counted
from qhw.extension import Algorithm, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.schema import TargetSpec
from qhw_plugins.sites import all_sites, weight_sites


class Nearest(Algorithm):
    """Rounds every weight to the nearest code, ties to even.

    The float weights stay as they are: their quantizer rounds to nearest, and training may still move them.
    """

    name = "nearest"
    stage = "round"
    summary = "Round every weight to the nearest code."

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weight points."""
        names = weight_sites(points)
        rule = "each weight goes to the nearest code"
        count = Reason(subject="points.weights", value=len(names), rule=rule)
        return all_sites(names, (count,))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Report the signal-to-noise ratio of each weight on its grid, in dB."""
        figures: dict[str, Any] = {}
        for group in step.sites:
            weight = work.weight(group).double()
            error = (weight - work.quantized_weight(group).double()).square().sum()
            power = weight.square().sum()
            figures[group] = {"sqnr_db": round(10 * math.log10(float(power / error)), 2) if error and power else None}
        known = [f["sqnr_db"] for f in figures.values() if f["sqnr_db"] is not None]
        worst = f", lowest SQNR {min(known):.1f} dB" if known else ""
        summary = f"{counted(len(figures), 'weight')} rounded to nearest{worst}"
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Nearest rounding of weights.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [Nearest]
