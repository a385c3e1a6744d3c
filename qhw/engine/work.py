# SPDX-License-Identifier: Apache-2.0
"""The runner's working copy: the graph and the qparams that algorithms may change, and nothing else."""

import logging
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from qhw.decisions import QuantPlan
from qhw.engine.calibration import MICRO_BATCH, Calibration, running
from qhw.engine.grids import granularity_of, grid_of
from qhw.engine.progress import Progress
from qhw.engine.taps import Statistic, insert_taps
from qhw.engine.work_folder import KeptStep
from qhw.errors import PlanError, RangeError
from qhw.extension import Registry
from qhw.graph import Graph, QuantPoint, input_point
from qhw.numerics import (
    ChannelNormal,
    ElementSet,
    FoldedBatchNorm,
    Granularity,
    Grid,
    QParams,
    fake_quantize,
    legal_scale,
    qparams_from_range,
)
from qhw.schema import TargetSpec

__all__ = ["Context", "Statistic", "Work"]


S = TypeVar("S", bound=Statistic)
_log = logging.getLogger("qhw")


class Context:
    """What a step works with.

    Attributes:
        progress: Where progress is shown.
        seed: For algorithms that draw random numbers.
        memory_bytes: Activations that `layers` keeps in memory; what is beyond lies in temporary files. 2 GiB.
        kept: Layers of this step that `improve_layers` reads and writes; None: nothing is kept. The runner sets it.
    """

    def __init__(
        self, calibration: Calibration | None, progress: Progress, seed: int, memory_bytes: int = 2**31
    ) -> None:
        self._calibration = calibration
        self.progress = progress
        self.seed = seed
        self.memory_bytes = memory_bytes
        self.kept: KeptStep | None = None

    @property
    def calibration(self) -> Calibration:
        """The calibration data.

        Raises:
            PlanError: none was given.
        """
        if self._calibration is None:
            raise PlanError("plan: a step needs calibration data, and none was given. Pass calibration=.")
        return self._calibration

    def run_over(self, model: Callable[..., Any], label: str) -> None:
        """Run a model on every micro-batch of the calibration data, without gradients, progress shown.

        Args:
            model: Takes the inputs in order; what it returns is dropped.
            label: What the progress bar says.

        Raises:
            CalibrationError: the model was captured for another number of samples.
        """
        calibration = self.calibration
        total = None if calibration.num_samples is None else -(-calibration.num_samples // MICRO_BATCH)
        with torch.inference_mode():
            for batch in self.progress.track(calibration, label, total):
                with running(len(batch[0])):
                    model(*batch)


class Work:
    """A model while it is being quantized.

    Attributes:
        graph: The working copy of the model.
        target: The accelerator.
        plan: What is to be done.
        qparams: Group of points -> QParams found so far.
        normals: Operator -> the distribution of its output's channels, where a batch norm that is folded into it tells.
            Whoever rescales or shifts channels afterwards keeps it in step.
        folded_norms: Operator -> the batch norm that was folded into it, as it was then.

    Args:
        graph: The working copy.
        target: The accelerator.
        plan: What is to be done.
        registry: Plugins that know kinds of numbers; absent: all that are installed.
    """

    def __init__(self, graph: Graph, target: TargetSpec, plan: QuantPlan, registry: Registry | None = None) -> None:
        self.graph = graph
        self.target = target
        self.plan = plan
        self.qparams: dict[str, QParams] = {}
        self.normals: dict[str, ChannelNormal] = {}
        self.folded_norms: dict[str, FoldedBatchNorm] = {}
        self.registry = registry
        self._reference: Graph | None = None
        self._points = {point.name: point for point in plan.points}
        self._groups: dict[str, list[QuantPoint]] = {}
        for point in plan.points:
            self._groups.setdefault(point.group, []).append(point)

    @property
    def reference(self) -> Graph:
        """The float model in the state of the stages that preserve its function: what quantization is measured by.

        Before the first step that does not preserve the function it is the working graph itself. Not to be changed.
        """
        return self.graph if self._reference is None else self._reference

    def keep_reference(self) -> None:
        """Keep the float model as it is now, once; the runner calls this."""
        if self._reference is None:
            self._reference = self.graph.copy()

    def group(self, name: str) -> tuple[QuantPoint, ...]:
        """The points that share one scale and zero point."""
        if name not in self._groups:
            raise PlanError(f"plan: no point or group '{name}'. Points: {', '.join(self._points)}")
        return tuple(self._groups[name])

    def input_group(self, operator: str) -> str:
        """The group of the tensor that an operator multiplies with its weights.

        Raises:
            PlanError: it is not quantized.
        """
        point = input_point(self.plan.points, operator)
        if point is None:
            raise PlanError(f"{operator}: its input is not quantized, so its sums have no scale. Plan again.")
        return point.group

    def grid(self, group: str) -> Grid:
        """What the group's format allows."""
        return grid_of(self.target, self.group(group)[0].format, self.registry)

    def granularity(self, group: str) -> Granularity:
        """Which elements of the group's tensors share a scale."""
        point = self.group(group)[0]
        return granularity_of(self.target.formats[point.format], point)

    def weight(self, group: str) -> Tensor:
        """The float weight behind a weight point.

        Raises:
            RangeError: it holds NaN or infinite values; names the parameter.
        """
        name = self.group(group)[0].tensor
        value = self.graph.tensor(name).detach()
        if not bool(torch.isfinite(value).all()):
            raise RangeError(f"{name}: weights hold NaN or infinite values. Repair the checkpoint before quantizing.")
        return value

    def quantized_weight(self, group: str) -> Tensor:
        """The weight as its quantizer gives it: float32 on the grid.

        Raises:
            PlanError: no step gave it a scale yet.
        """
        return fake_quantize(self.weight(group), self.weight_qparams(group))

    def weight_qparams(self, group: str) -> QParams:
        """The scale and zero point that an earlier step chose for a weight.

        Raises:
            PlanError: none did.
        """
        if group not in self.qparams:
            raise PlanError(f"{group}: has no scale yet. Add a weight_range step to the plan, before this one.")
        return self.qparams[group]

    def bounded(self, group: str, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """A range cut to the real bounds that the graph and the target state for the group's tensors.

        A group of several tensors is cut to what any of them can reach. A range that no scale of the format holds is
        named in the log: it will be clipped.
        """
        minima = [point.minimum for point in self.group(group)]
        maxima = [point.maximum for point in self.group(group)]
        known_minima, known_maxima = [m for m in minima if m is not None], [m for m in maxima if m is not None]
        if len(known_minima) == len(minima):
            low, high = low.clamp(min=min(known_minima)), high.clamp(min=min(known_minima))
        if len(known_maxima) == len(maxima):
            low, high = low.clamp(max=max(known_maxima)), high.clamp(max=max(known_maxima))
        self._tell_clipped(group, low.min(), high.max())
        return low, high

    def _tell_clipped(self, group: str, low: Tensor, high: Tensor) -> None:
        grid = self.grid(group)
        widest = qparams_from_range(low, high, grid, name=group)
        scale = float(widest.scale)
        least, most = (end * scale for end in grid.ends(int(widest.zero_point)))
        if low < least - scale or high > most + scale:  # more than rounding to the last code takes
            _log.warning(
                "%s: its values reach from %g to %g, and formats.%s holds [%g, %g]: the rest is clipped. Scale the "
                "model's data into that, or give it another format (--format).",
                group, low, high, self.group(group)[0].format, least, most,
            )  # fmt: skip

    def set_qparams(self, group: str, qparams: QParams) -> None:
        """Fix the scale and zero point of a group.

        Raises:
            PlanError: they do not lie on the grid of the group's format.
        """
        grid, granularity = self.grid(group), self.granularity(group)
        where = f"{group} (formats.{self.group(group)[0].format})"
        if (qparams.quant_min, qparams.quant_max) != (grid.quant_min, grid.quant_max):
            raise PlanError(
                f"{where}: codes must be [{grid.quant_min}, {grid.quant_max}]; got [{qparams.quant_min}, "
                f"{qparams.quant_max}]. Plugin author: build QParams from work.grid(group)."
            )
        if not _are_of(qparams.elements, grid.elements):
            raise PlanError(
                f"{where}: codes must stand for the numbers of the format. "
                "Plugin author: build QParams with work.grid(group).qparams."
            )
        if qparams.granularity != granularity:
            raise PlanError(
                f"{where}: must have {granularity}; got {qparams.granularity}. "
                "Plugin author: build QParams with work.granularity(group)."
            )
        if not torch.equal(legal_scale(qparams.scale.double(), grid, "nearest"), qparams.scale):
            raise PlanError(
                f"{where}: scale is not one that the format can hold. "
                "Plugin author: take scales from qhw.numerics.legal_scale or scale_candidates."
            )
        wrong = [zero for zero in qparams.zero_point.flatten().tolist() if zero not in grid.zero_points]
        if grid.zero_points and wrong:
            raise PlanError(
                f"{where}: zero_point must be {' or '.join(map(str, grid.zero_points))}; got {wrong[0]}. "
                "Plugin author: take zero points from work.grid(group)."
            )
        if self.group(group)[0].role == "weight":
            qparams.check_fits(tuple(self.graph.tensor(self.group(group)[0].tensor).shape), group)
        self.qparams[group] = qparams

    def observe(
        self, groups: Iterable[str], make: Callable[[str], S], context: Context, label: str = "calibration"
    ) -> dict[str, S]:
        """Run the calibration data once through the model, weights quantized as far as they are, and collect.

        Activations are float: each range is that of the tensor itself, not of the ranges chosen before it. Scores that
        only a softmax reads are shown without what it cannot tell from 0: masks have no part in a range.

        Args:
            groups: Groups of activation points.
            make: Empty statistic for a group.
            context: Data and progress.
            label: What the progress bar says.

        Returns:
            Group -> filled statistic.
        """
        wanted = list(groups)
        statistics = {group: make(group) for group in wanted}
        observed = self.graph.copy()
        for group, qparams in self.qparams.items():
            first = self.group(group)[0]
            if first.role == "weight":
                observed.set_tensor(first.tensor, fake_quantize(observed.tensor(first.tensor).detach(), qparams))
        insert_taps(observed, {group: self.group(group) for group in wanted}, statistics)
        context.run_over(observed.module, label)
        return statistics


def _are_of(elements: ElementSet | None, of_format: ElementSet | None) -> bool:
    """Whether elements are those that a format allows; None: integers."""
    if elements is None or of_format is None:
        return elements is of_format
    return elements.is_of(of_format)
