# SPDX-License-Identifier: Apache-2.0
"""GPTQ: round weights one input after the other; the inputs not yet rounded make up for the error."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qhw.decisions import Json, Resources, Step, StepReport, Survey
from qhw.engine import Layer, improve_layers
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.schema import TargetSpec
from qhw_plugins.layer_rows import LayerRounding, RowGrid, gain_words
from qhw_plugins.sites import DATA_GIVEN, needs_calibration, weight_width_sites


class GptqOptions(AlgorithmOptions):
    """What may be set."""

    max_bits: int = Field(6, ge=2, le=16, description="Weights of more bits are left to other rounding algorithms.")
    samples: int = Field(512, ge=1, description="Calibration samples to learn from, whole micro-batches of 32.")
    damping: float = Field(0.01, gt=0, le=1, description="Share of the mean diagonal added to the Hessian's.")
    rows: int = Field(16384, ge=64, description="Output positions sampled from each layer, about.")
    held_back: float = Field(0.2, gt=0, lt=1, description="Share of the samples that judges the result.")


class Gptq(Algorithm):
    """Rounds the inputs of all outputs in order, the most active first, by the Hessian of the layer's squared error.

        H = X^T X + damping mean(diag) I,  U upper with U^T U = H^-1
        q_i = round(w_i),  w_j <- w_j - (w_i - q_i) U_ij / U_ii  for the inputs j after i

    X is the input as the layers before give it with their weights quantized. Each output keeps nearest rounding where
    that is no worse on samples held back. Time grows with inputs^3 for the Hessian and outputs x inputs^2 for the rest.

    Reference:
        Frantar et al., 2022, arXiv:2210.17323, algorithm 1. Differs: scales stay as the range step chose them; all
        inputs are one block.
    """

    name = "gptq"
    stage = "round"
    summary = "Round weights one input after the other, making up for the error by the Hessian."
    Options = GptqOptions

    options: GptqOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights of few bits, given calibration data."""
        refusal = needs_calibration(resources)
        return refusal or weight_width_sites(points, target, self.options.max_bits, self.name, (DATA_GIVEN,))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Round each layer in execution order."""
        figures = improve_layers(work, context, step, self._round, samples=self.options.samples, label="gptq")
        return StepReport(stage=step.stage, algorithm=self.name, summary=gain_words(figures), sites=figures)

    def _round(self, work: Any, layer: Layer, seed: int) -> dict[str, Json]:
        rounding = LayerRounding(work, layer, self.options.rows, self.options.held_back, seed)
        x = rounding.learn.inputs.double()
        return rounding.settle(compensated_codes(rounding.grid, x.transpose(1, 2) @ x, self.options.damping))


def compensated_codes(grid: RowGrid, hessian: Tensor, damping: float) -> Tensor:
    """Codes of weights rounded one input after the other.

    Args:
        grid: The weights on their grid, [groups, outputs, inputs].
        hessian: float64 [groups, inputs, inputs], X^T X.
        damping: Share of the mean diagonal that is added.

    Returns:
        Tensor: float32 like the weights, whole numbers within the grid, relative to the zero point.
    """
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    # An input that is never active has no say; 1 keeps an all-zero layer invertible.
    extra = (damping * diagonal.mean(1)).clamp(min=1e-12)
    extra = torch.where(diagonal.sum(1) > 0, extra, 1.0)
    order = diagonal.argsort(dim=1, descending=True, stable=True)
    pick = order.unsqueeze(1)
    damped = hessian + torch.diag_embed(extra.unsqueeze(1).expand_as(diagonal))
    damped = damped.gather(1, order.unsqueeze(2).expand_as(damped)).gather(2, pick.expand_as(damped))
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)

    def sorted_rows(rows: Tensor) -> Tensor:
        return rows.double().gather(2, pick.expand_as(rows))

    scale, low, high = (sorted_rows(rows) for rows in (grid.scale, grid.low, grid.high))
    weight = sorted_rows(grid.floor + grid.rest) * scale
    codes = torch.zeros_like(weight)
    for index in range(weight.shape[2]):
        here = weight[:, :, index] / scale[:, :, index]
        codes[:, :, index] = here.round().clamp(low[:, :, index], high[:, :, index])
        wrong = (weight[:, :, index] - codes[:, :, index] * scale[:, :, index]) / upper[:, index, index].unsqueeze(1)
        weight[:, :, index + 1 :] -= wrong.unsqueeze(2) * upper[:, index, index + 1 :].unsqueeze(1)
    return torch.zeros_like(codes).scatter(2, pick.expand_as(codes), codes).float()


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Rounding of weights by the Hessian (GPTQ).")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [Gptq]
