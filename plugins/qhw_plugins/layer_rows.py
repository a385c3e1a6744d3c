# SPDX-License-Identifier: Apache-2.0
"""Samples of one layer as matrix rows, for algorithms that choose its rounding: some to learn from, some held back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.engine import Layer

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
