# SPDX-License-Identifier: Apache-2.0
"""Re-estimated ranges: the minimum and maximum of each training step set the scales, as before scales were learned."""

from typing import Any

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor

from qhw.decisions import Resources, Step, Survey
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, TrainingAlgorithm, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import FakeQuantizer, Grid, QParams, qparams_from_range, range_of
from qhw.schema import TargetSpec
from qhw.training import is_distributed
from qhw_plugins.sites import free_scales


class ReestimatedRangesOptions(AlgorithmOptions):
    """How long the ranges of activations remember."""

    momentum: float = Field(0.1, gt=0, le=1, description="Share of each batch in the running range of activations.")


class RangeQuantizer(FakeQuantizer):
    """A quantizer whose range follows what it sees in training.

    Args:
        qparams: Where it starts.
        grid: What the format allows.
        momentum: Share of each batch in the running range; 1.0: the last one alone.
        name: The tensor's name.
    """

    low: Tensor
    high: Tensor

    def __init__(self, qparams: QParams, grid: Grid, momentum: float, name: str) -> None:
        super().__init__(qparams, name=name)
        self.grid = grid
        self.momentum = momentum
        low, high = grid.ends(0)
        zero = qparams.zero_point.float()
        self.register_buffer("low", (low - zero) * qparams.scale)
        self.register_buffer("high", (high - zero) * qparams.scale)

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x; in training its range counts first."""
        if self.enabled and self.training:
            self._see(x.detach())
        return super().forward(x)

    @torch.no_grad()
    def _see(self, x: Tensor) -> None:
        low, high = range_of(x.float(), self.granularity)
        if is_distributed():
            dist.all_reduce(low, dist.ReduceOp.MIN)
            dist.all_reduce(high, dist.ReduceOp.MAX)
        self.low.lerp_(low.to(self.low.dtype), self.momentum)
        self.high.lerp_(high.to(self.high.dtype), self.momentum)
        found = qparams_from_range(self.low, self.high, self.grid, self.granularity, self.name)
        self.scale.copy_(found.scale)
        self.zero_point.copy_(found.zero_point)


class ReestimatedRanges(TrainingAlgorithm):
    """Weights: the range of each step. Activations: a running average of the ranges of all steps.

    The paper's history and its baseline; learned ranges are better, most at few bits.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.1; Krishnamoorthi, 2018, arXiv:1806.08342, section 4.
    """

    name = "reestimated_ranges"
    summary = "Ranges follow the minimum and maximum of every training step."
    Options = ReestimatedRangesOptions
    options: ReestimatedRangesOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """All weights and activations but those whose scale the format prescribes."""
        return free_scales(points, target, "a {value} scale follows every step", "no scale is free to follow")

    def attach(self, form: Any, step: Step) -> None:
        """A following quantizer for every planned group."""
        for group in step.sites:
            is_weight = form.group(group)[0].role == "weight"
            momentum = 1.0 if is_weight else self.options.momentum
            form.set_quantizer(group, RangeQuantizer(form.qparams[group], form.grid(group), momentum, group))


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Ranges re-estimated at every training step.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [ReestimatedRanges]
