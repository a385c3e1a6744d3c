# SPDX-License-Identifier: Apache-2.0
"""AdaRound: for each weight, learn whether to round up or down, layer by layer."""

import math
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qhw.decisions import Json, Resources, Step, StepReport, Survey
from qhw.engine import Layer, improve_layers
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.schema import TargetSpec
from qhw_plugins.layer_rows import LayerRounding, LayerRows, RowGrid, gain_words
from qhw_plugins.sites import DATA_GIVEN, needs_calibration, weight_width_sites

# The rectified sigmoid's stretch (AdaRound paper, eq. 23): h(V) reaches 0 and 1 at finite V.
_ZETA, _GAMMA = 1.1, -0.1
_DECIDED = 0.01  # h this close to 0 or 1 for every weight: nothing is left to decide
_LOOK_EVERY = 50


class AdaRoundOptions(AlgorithmOptions):
    """What may be set."""

    max_bits: int = Field(6, ge=2, le=16, description="Weights of more bits are left to other rounding algorithms.")
    samples: int = Field(512, ge=1, description="Calibration samples to learn from, whole micro-batches of 32.")
    iterations: int = Field(1000, ge=0, le=100_000, description="Steps per layer; fewer where all is decided earlier.")
    learning_rate: float = Field(1e-2, gt=0, le=1, description="Of Adam.")
    regularization: float = Field(0.01, ge=0, description="lambda of eq. 35.")
    warm_start: float = Field(0.2, ge=0, lt=1, description="Share of the steps before the regularizer sets in.")
    rows: int = Field(16384, ge=64, description="Output positions sampled from each layer, about.")
    batch_rows: int = Field(
        1024, ge=16, description="Output positions in one step, at most; twice the inputs of an output do."
    )
    held_back: float = Field(0.2, gt=0, lt=1, description="Share of the samples that judges the result.")


class AdaRound(Algorithm):
    """Rounds each weight up or down so that the layer's output, behind its activation, changes least.

        W~ = s (clamp(floor(W / s) + h(V), n, p)),  h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1)       (33)
        f_reg(V) = sum 1 - |2 h(V) - 1|^beta,  beta from 20 down to 2 by cosine                                (34)
        argmin over V of ||f_a(W x) - f_a(W~ x^)||^2 + lambda f_reg(V)                                         (35)

    x^ is the input as the layers before give it with their weights quantized, x the float model's; f_a is the ReLU or
    clip that the layer's kernel computes along, otherwise nothing. At the end V >= 0 rounds up. Each output channel
    keeps nearest rounding where that is no worse on samples held back. The chosen codes are written into the working
    copy as real weights on their grid.

    Per step it costs one product of `batch_rows` sampled output positions and one for the gradient, instead of
    convolutions over whole maps. The time grows with iterations x batch_rows x weights; memory is 64 MiB of rows.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.5; Nagel et al., 2020, arXiv:2004.10568. Differs: output
        positions are sampled; Adam's rate is 1e-2 for 1,000 steps (theirs 1e-3 for 10,000).
    """

    name = "adaround"
    stage = "round"
    summary = "Learn for each weight whether to round up or down, layer by layer."
    Options = AdaRoundOptions

    options: AdaRoundOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights of few bits, given calibration data."""
        refusal = needs_calibration(resources)
        return refusal or weight_width_sites(points, target, self.options.max_bits, self.name, (DATA_GIVEN,))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Learn the rounding of each layer in execution order."""
        figures = improve_layers(work, context, step, self._round, samples=self.options.samples, label="adaround")
        return StepReport(stage=step.stage, algorithm=self.name, summary=gain_words(figures), sites=figures)

    def _round(self, work: Any, layer: Layer, seed: int) -> dict[str, Json]:
        rounding = LayerRounding(work, layer, self.options.rows, self.options.held_back, seed)
        up, steps = learn_rounding(rounding.learn, rounding.grid, rounding.bias_rows, self.options)
        return {**rounding.settle(rounding.grid.floor + up), "steps": steps}


def learn_rounding(rows: LayerRows, grid: RowGrid, bias_rows: Tensor, options: AdaRoundOptions) -> tuple[Tensor, int]:
    """Minimize eq. 35 by Adam with gradients written out.

    Args:
        rows: Inputs and wanted outputs.
        grid: The weights' grid, [groups, outputs, inputs].
        bias_rows: float32 [groups, 1, outputs].
        options: Steps, rates.

    Returns:
        tuple: 1.0 where a weight is rounded up, else 0.0, like the weights; and the steps taken.
    """
    low, high = rows.clip
    problem = LayerRows(rows.inputs, rows.outputs.clamp(low, high), rows.clip)
    size = min(options.batch_rows, max(256, 2 * grid.floor.shape[2]), rows.inputs.shape[1])
    starts = range(0, rows.inputs.shape[1] - size + 1, size)
    v = start_of(grid.rest)
    # Where rounding up leaves the grid there is nothing to choose.
    free = ((grid.floor >= grid.low) & (grid.floor < grid.high)).float()
    first, second = torch.zeros_like(v), torch.zeros_like(v)
    warm = int(options.warm_start * options.iterations)
    done = 0
    for step in range(options.iterations):
        start = starts[step % len(starts)]
        part = slice(start, start + size)
        batch = LayerRows(problem.inputs[:, part], problem.outputs[:, part], rows.clip)
        strength = options.regularization if step >= warm else 0.0
        beta = annealed((step - warm) / max(1, options.iterations - warm))
        gradient = gradient_of(v, batch, grid, bias_rows, strength, beta).mul_(free)
        _adam(v, gradient, first, second, step + 1, options.learning_rate)
        done = step + 1
        if step >= warm and done % _LOOK_EVERY == 0 and _is_decided(v, free):
            break
    return (v >= 0).float(), done


def start_of(rest: Tensor) -> Tensor:
    """The V whose h is the fraction that rounding down cuts off: the weights start where they are."""
    rest = rest.clamp(1e-3, 1 - 1e-3)  # 0 and 1 have no finite V
    return -torch.log((_ZETA - _GAMMA) / (rest - _GAMMA) - 1)


def annealed(share: float) -> float:
    """beta of eq. 34 after a share of the steps since the warm start: from 20 down to 2 by cosine."""
    return 2.0 + 9.0 * (1.0 + math.cos(math.pi * share))


def gradient_of(v: Tensor, batch: LayerRows, grid: RowGrid, bias_rows: Tensor, strength: float, beta: float) -> Tensor:
    """Gradient by V of eq. 35, the squared error summed over outputs and averaged over rows.

    Args:
        v: float32 [groups, outputs, inputs].
        batch: Rows whose outputs are clipped already.
        grid: The weights' grid.
        bias_rows: float32 [groups, 1, outputs].
        strength: lambda.
        beta: Exponent of the regularizer.
    """
    low, high = batch.clip
    sigmoid = torch.sigmoid(v)
    h = (sigmoid * (_ZETA - _GAMMA) + _GAMMA).clamp_(0, 1)
    weight = (grid.floor + h).clamp_(grid.low, grid.high).mul_(grid.scale)
    error = torch.baddbmm(bias_rows, batch.inputs, weight.transpose(1, 2))
    if math.isfinite(low) or math.isfinite(high):
        passing = (error > low) & (error < high)
        error.clamp_(low, high).sub_(batch.outputs).mul_(passing)
    else:
        error.sub_(batch.outputs)
    gradient = torch.bmm(error.transpose(1, 2), batch.inputs).mul_(2.0 / error.shape[1]).mul_(grid.scale)
    if strength:
        centred = 2 * h - 1
        gradient.sub_(centred.abs().pow_(beta - 1).mul_(centred.sign()), alpha=2 * beta * strength)
    slope = sigmoid * (1 - sigmoid) * (_ZETA - _GAMMA)
    return gradient.mul_(slope).mul_((h > 0) & (h < 1))


def _adam(v: Tensor, gradient: Tensor, first: Tensor, second: Tensor, step: int, rate: float) -> None:
    """One step of Adam in place (Kingma and Ba, 2015), with its usual constants."""
    first.lerp_(gradient, 0.1)
    second.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
    denominator = second.sqrt().div_(math.sqrt(1 - 0.999**step)).add_(1e-8)
    v.addcdiv_(first, denominator, value=-rate / (1 - 0.9**step))


def _is_decided(v: Tensor, free: Tensor) -> bool:
    h = (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp_(0, 1)
    return bool(((torch.minimum(h, 1 - h) * free) < _DECIDED).all())


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Learned rounding of weights (AdaRound).")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [AdaRound]
