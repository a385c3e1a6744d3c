# SPDX-License-Identifier: Apache-2.0
"""Samples of one layer as matrix rows, for algorithms that choose its rounding: some to learn from, some held back."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import Json, counted
from qhw.engine import Layer
from qhw.numerics import QParams, expand

_BYTES = 2**26  # rows of one layer: 64 MiB of inputs


@dataclass(frozen=True)
class LayerRows:
    """Inputs and wanted outputs of a layer at sampled positions.

    Attributes:
        inputs: float32 [groups, rows, inputs of a group], as the quantized layers before give them.
        outputs: float32 [groups, rows, outputs of a group], of the float model, before the activation.
        clip: Bounds of the activation behind the layer.
    """

    inputs: Tensor
    outputs: Tensor
    clip: tuple[float, float]

    def errors(self, weight_rows: Tensor, bias_rows: Tensor) -> Tensor:
        """Mean squared error behind the activation, per output: float64 [groups, outputs of a group].

        Args:
            weight_rows: float32 [groups, outputs, inputs].
            bias_rows: float32 [groups, 1, outputs].
        """
        wrong = torch.baddbmm(bias_rows, self.inputs, weight_rows.transpose(1, 2)).clamp_(*self.clip)
        wrong.sub_(self.outputs.clamp(*self.clip))
        return wrong.square_().double().mean(1)


def sample_rows(layer: Layer, rows: int, held_back: float, seed: int) -> tuple[LayerRows, LayerRows]:
    """Rows to learn from and rows held back, of different samples; the last ones are held back.

    Positions are drawn evenly from all samples. A layer with many inputs gets fewer rows, so that they stay within
    64 MiB, but never fewer than 512.

    Args:
        layer: The layer.
        rows: How many rows in all, about.
        held_back: Share of the samples that is held back; at least one where there are two or more.
        seed: For the positions, and for the order of the rows.
    """
    generator = torch.Generator().manual_seed(seed)
    samples = sum(len(x) for x in layer.inputs)
    num_inputs = layer.form.weight_rows(torch.empty(layer.form.weight_shape)).shape[-1]
    fitting = max(512, _BYTES // (4 * layer.form.groups * num_inputs))
    per_sample = max(1, -(-min(rows, fitting) // samples))
    held = min(max(1, round(samples * held_back)), samples - 1)
    learn, check = _Parts(layer.clip), _Parts(layer.clip)
    seen = 0
    for x, y in zip(layer.inputs, layer.outputs, strict=True):
        border = min(max(samples - held - seen, 0), len(x))
        for part, piece in ((learn, slice(0, border)), (check, slice(border, None))):
            if len(x[piece]):
                found, index = layer.form.patches(x[piece], per_sample, generator)
                part.add(found, layer.form.output_rows(y[piece], index))
        seen += len(x)
    kept = learn.whole(generator)
    return kept, check.whole(generator) if check.inputs else kept


class _Parts:
    def __init__(self, clip: tuple[float, float]) -> None:
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []
        self.clip = clip

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        self.inputs.append(inputs)
        self.outputs.append(outputs)

    def whole(self, generator: torch.Generator) -> LayerRows:
        """All rows in random order, so that any run of them is a fair sample."""
        inputs, outputs = torch.cat(self.inputs, 1), torch.cat(self.outputs, 1)
        order = torch.randperm(inputs.shape[1], generator=generator)
        return LayerRows(inputs[:, order], outputs[:, order], self.clip)


class RowGrid:
    """A weight's grid, as rows: codes relative to the zero point, and the reals they stand for."""

    def __init__(self, weight: Tensor, qparams: QParams, form: Any) -> None:
        shape = tuple(weight.shape)

        def rows(parameter: Tensor) -> Tensor:
            full = expand(parameter, qparams.granularity, shape).expand(shape)
            return form.weight_rows(full).contiguous()  # type: ignore[no-any-return]

        self.scale = rows(qparams.scale)
        zero_point = rows(qparams.zero_point.float())
        self.low, self.high = qparams.quant_min - zero_point, qparams.quant_max - zero_point
        ratio = form.weight_rows(weight).contiguous() / self.scale
        self.floor = ratio.floor()
        self.rest = ratio - self.floor
        self.nearest = ratio.round()

    def real(self, code: Tensor) -> Tensor:
        """The reals of codes, clamped to the grid."""
        return code.clamp(self.low, self.high) * self.scale


class LayerRounding:
    """One layer whose rounding is being chosen: samples, grid, and the judge at the end.

    Args:
        work: The runner's working copy.
        layer: The layer.
        rows: Output positions to sample, about.
        held_back: Share of the samples that judges.
        seed: For the positions.
    """

    def __init__(self, work: Any, layer: Layer, rows: int, held_back: float, seed: int) -> None:
        self._work = work
        self._layer = layer
        self.grid = RowGrid(work.weight(layer.group), work.weight_qparams(layer.group), layer.form)
        bias = layer.operator.bias
        self.bias_rows = layer.form.bias_rows(None if bias is None else work.graph.tensor(bias).detach())
        self.learn, self._check = sample_rows(layer, rows, held_back, seed)

    def settle(self, code: Tensor) -> dict[str, Json]:
        """Write a rounding into the working copy, for each output only where held-back samples like it better.

        Args:
            code: float32 [groups, outputs, inputs], whole numbers relative to the zero point.

        Returns:
            Plain figures: the error behind the activation, summed over outputs, of nearest rounding and of what is
            kept; whether the samples that judged were held back; outputs that keep nearest rounding; share of weights
            that do not go to the nearest code.
        """
        nearest, chosen = self.grid.real(self.grid.nearest), self.grid.real(code)
        before, after = (self._check.errors(rows, self.bias_rows) for rows in (nearest, chosen))
        better = after < before
        final = torch.where(better.unsqueeze(2), chosen, nearest)
        group = self._layer.group
        self._work.graph.set_tensor(self._work.group(group)[0].tensor, self._layer.form.weight_of(final))
        return {
            "loss_nearest": float(f"{before.sum().item():.4g}"),
            "loss": float(f"{torch.minimum(before, after).sum().item():.4g}"),
            "is_held_back": self._check is not self.learn,
            "outputs_kept_nearest": int((~better).sum()),
            "moved": round(float((final != nearest).double().mean()), 4),
        }


def gain_words(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """How much better than nearest rounding, over all layers (geometric mean)."""
    gains = [site["loss_nearest"] / site["loss"] for site in figures.values() if site["loss"]]
    gain = math.exp(sum(map(math.log, gains)) / len(gains)) if gains else 1.0
    # One sample alone cannot be held back: then the rows that were learned from are the judge.
    judge = "held-back output error" if all(s["is_held_back"] for s in figures.values()) else "output error as learned"
    return f"{counted(len(figures), 'weight')}; {judge} {1 / gain:.2f} of nearest rounding's"
