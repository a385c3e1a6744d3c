# SPDX-License-Identifier: Apache-2.0
"""Learned ranges: scales, and zero points where they are free, learn by gradient with the weights."""

import math
from typing import Any, Literal

from pydantic import Field

from qhw.decisions import Resources, Step, Survey
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, TrainingAlgorithm, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import LearnedQuantizer, PerAxis, PerGroup, ScaleDomain
from qhw.schema import TargetSpec
from qhw_plugins.sites import free_scales


class LearnedRangesOptions(AlgorithmOptions):
    """What learns, and in which form."""

    domain: ScaleDomain = Field(
        "log2", description="What learns: a scale's base-2 logarithm (powers of two: always), or (linear) the scale."
    )
    zero_point: bool = Field(True, description="Whether free zero points learn, too.")
    gradient_scale: Literal["none", "lsq"] = Field(
        "none", description="lsq: gradients of scales are divided by sqrt(elements * largest code), as in LSQ."
    )


class LearnedRanges(TrainingAlgorithm):
    """Makes every scale a parameter, every free zero point another one, from the ranges that are set.

    Gradients: eqs. 38 to 40; see `qhw.numerics.learned_fake_quantize`. Scales stay legal on the target at every step.
    The paper takes the gradients as they are and leaves their size to the optimizer; so does this.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.1. Differs by default: what learns is a scale's logarithm, so
        that a step of the optimizer changes large and small scales by the same ratio. With the scale itself Adam drives
        scales of 1e-3 to their lower bound at rates that suit weights; `domain="linear"` is the paper's.
        `gradient_scale="lsq"`: Esser et al., 2020, arXiv:1902.08153, section 2.2.
    """

    name = "learned_ranges"
    summary = "Scales and zero points learn by gradient."
    Options = LearnedRangesOptions
    options: LearnedRangesOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weights and activations but those whose scale the format prescribes."""
        return free_scales(points, target, "a {value} scale learns with the weights", "no scale is free to learn")

    def attach(self, form: Any, step: Step) -> None:
        """A learning quantizer for every planned group."""
        for group in step.sites:
            form.set_quantizer(group, self.quantizer(form, group))

    def quantizer(self, form: Any, group: str, kind: type[LearnedQuantizer] = LearnedQuantizer) -> LearnedQuantizer:
        """The quantizer of a group, starting from the range that is set."""
        return kind(
            form.qparams[group],
            form.grid(group),
            domain=self.options.domain,
            learn_zero_point=self.options.zero_point,
            gradient_scale=_lsq_factor(form, group) if self.options.gradient_scale == "lsq" else 1.0,
            name=group,
        )


def _lsq_factor(form: Any, group: str) -> float:
    """1 / sqrt(N highest): N the elements that share the scale, of one sample where they are activations."""
    point, qparams = form.group(group)[0], form.qparams[group]
    shape = form.graph.tensor(point.tensor).shape if point.role == "weight" else form.shape(point)[1:]
    count = math.prod(shape)
    if isinstance(qparams.granularity, PerAxis):
        count //= max(shape[qparams.granularity.axis], 1)
    elif isinstance(qparams.granularity, PerGroup):
        count = qparams.granularity.group_size
    highest = qparams.quant_max if qparams.elements is None else qparams.elements.highest
    return 1.0 / math.sqrt(max(count, 1) * max(highest, 1))


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Scales and zero points that learn by gradient.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [LearnedRanges]
