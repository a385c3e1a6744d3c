# SPDX-License-Identifier: Apache-2.0
"""Sequential MSE: weight scales with the smallest error of the layer's output, layer after layer."""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from qhw.decisions import Json, Resources, Step, StepReport, Survey, counted
from qhw.engine import Layer, improve_layers
from qhw.extension import Algorithm, AlgorithmOptions, PluginInfo, hookimpl
from qhw.graph import Graph, Placement
from qhw.numerics import PerTensor, QParams, fake_quantize, qparams_from_range, range_of
from qhw.schema import TargetSpec
from qhw_plugins.layer_rows import LayerRows, sample_rows
from qhw_plugins.sites import DATA_GIVEN, needs_calibration, weight_width_sites


class SequentialMseOptions(AlgorithmOptions):
    """What may be set."""

    max_bits: int = Field(6, ge=2, le=16, description="Weights of more bits are left to other range algorithms.")
    samples: int = Field(256, ge=1, description="Calibration samples to judge by, whole micro-batches of 32.")
    candidates: int = Field(20, ge=2, le=200, description="Shares of the full range that are tried, evenly spaced.")
    smallest: float = Field(0.3, gt=0, lt=1, description="The smallest share that is tried.")
    rows: int = Field(8192, ge=64, description="Output positions sampled from each layer, about.")


class SequentialMse(Algorithm):
    """Weight ranges with the smallest squared error behind the layer's activation.

        argmin over the share c of E ||f_a(W x) - f_a(q(W; c max|W|) x^)||^2

    x^ is the input as the layers before give it with their weights quantized. Scales per output channel are chosen
    each by its own output, a scale per tensor by their sum; every candidate is made legal by the grid.

    Reference:
        The criterion of Nagel et al., 2020, arXiv:2004.10568, table 8 ("MSE of W x"), one layer after the other.
    """

    name = "sequential_mse"
    stage = "weight_range"
    summary = "Weight ranges with the smallest error of the layer's output, layer after layer."
    Options = SequentialMseOptions

    options: SequentialMseOptions

    def survey(self, graph: Graph, points: Placement, target: TargetSpec, resources: Resources) -> Survey:
        """Weights of few bits with a scale per tensor or output channel, given calibration data."""
        refusal = needs_calibration(resources)
        if refusal is not None:
            return refusal
        return weight_width_sites(
            points, target, self.options.max_bits, self.name, (DATA_GIVEN,), per=("tensor", "out_channel")
        )

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        """Choose the scales of each layer in execution order."""
        figures = improve_layers(
            work, context, step, self._choose, samples=self.options.samples, label="sequential MSE"
        )
        summary = f"{counted(len(figures), 'weight range')} by the error of outputs"
        return StepReport(stage=step.stage, algorithm=self.name, summary=summary, sites=figures)

    def _choose(self, work: Any, layer: Layer, seed: int) -> dict[str, Json]:
        rows, _ = sample_rows(layer, self.options.rows, 0.0, seed)
        bias = layer.operator.bias
        bias_rows = layer.form.bias_rows(None if bias is None else work.graph.tensor(bias).detach())
        qparams, share = self._best(work, layer, rows, bias_rows)
        work.set_qparams(layer.group, qparams)
        return {"mean_share": round(share, 4)}

    def _best(self, work: Any, layer: Layer, rows: LayerRows, bias_rows: Tensor) -> tuple[QParams, float]:
        weight, grid, granularity = work.weight(layer.group), work.grid(layer.group), work.granularity(layer.group)
        low, high = range_of(weight, granularity)
        shares = torch.linspace(1.0, self.options.smallest, self.options.candidates)
        found = [qparams_from_range(low * s, high * s, grid, granularity, layer.group) for s in shares.tolist()]
        errors = []
        for qparams in found:
            errors.append(rows.errors(layer.form.weight_rows(fake_quantize(weight, qparams)), bias_rows))
        stacked = torch.stack(errors)  # [candidates, groups, outputs of a group]
        if isinstance(granularity, PerTensor):
            index = stacked.sum((1, 2)).argmin()
        else:
            index = _per_scale(stacked.flatten(1), len(found[0].scale)).argmin(0)
        scale = torch.stack([q.scale for q in found]).gather(0, index.reshape(1, *found[0].scale.shape))[0]
        zero = torch.stack([q.zero_point for q in found]).gather(0, index.reshape(1, *found[0].scale.shape))[0]
        return grid.qparams(scale, zero, granularity), float(shares[index].mean())


def _per_scale(errors: Tensor, scales: int) -> Tensor:
    """Errors per scale [candidates, scales] from errors per output [candidates, outputs].

    A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
    """
    return errors.reshape(len(errors), -1, scales).sum(1)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Weight ranges by the error of the layer's output.")


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [SequentialMse]
