# SPDX-License-Identifier: Apache-2.0
"""Operators with weights as matrix products: output rows = patches of the input times weight rows, group by group.

Algorithms that work on one layer (learned rounding, Hessians, bias terms) see one form for convolutions of any rank,
depthwise, grouped, dilated and transposed ones, and linear operators.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from qhw.graph import Operator

__all__ = ["MatrixForm"]


@dataclass(frozen=True)
class MatrixForm:
    """How one operator's input, weight and output are rows of matrices.

    With G groups, M outputs and K inputs of each: output[g, r] = weight_rows[g] @ patches[g, r], G x M x K weights.

    Args:
        operator: A Conv, DepthwiseConv, ConvTranspose or Gemm.
        weight_shape: Shape of its weight.
    """

    operator: Operator
    weight_shape: tuple[int, ...]

    @property
    def _is_linear(self) -> bool:
        return self.operator.kind == "Gemm"

    @property
    def _is_transposed(self) -> bool:
        return self.operator.kind == "ConvTranspose"

    @property
    def groups(self) -> int:
        """Groups that share no input and no output."""
        return 1 if self._is_linear else int(self.operator.attributes["groups"])

    @property
    def out_channels(self) -> int:
        """Channels of the output."""
        if self._is_linear:
            return self.weight_shape[0 if self.operator.weight_axis == 0 else 1]
        return self.weight_shape[1] * self.groups if self._is_transposed else self.weight_shape[0]

    def weight_rows(self, weight: Tensor) -> Tensor:
        """A weight-shaped tensor (weights, scales, codes) as rows.

        Args:
            weight: [*weight_shape].

        Returns:
            Tensor: [groups, outputs of a group, inputs of a group].
        """
        if self._is_linear:
            return (weight if self.operator.weight_axis == 0 else weight.t()).unsqueeze(0)
        if self._is_transposed:  # [in, out / groups, *kernel]; as a convolution its taps are reversed
            spatial = list(range(2, weight.dim()))
            split = weight.flip(spatial).reshape(self.groups, -1, *weight.shape[1:])
            return split.transpose(1, 2).reshape(self.groups, weight.shape[1], -1)
        return weight.reshape(self.groups, weight.shape[0] // self.groups, -1)

    def reduction_order(self, order: Literal["channel_fastest", "kernel_fastest"]) -> Tensor:
        """Where the inputs of an output stand in `weight_rows`, in an order of summation: int64 [inputs]."""
        positions = 1 if self._is_linear else prod(self.weight_shape[2:])
        index = torch.arange(prod(self.weight_shape) // self.out_channels)
        return index if order == "kernel_fastest" else index.reshape(-1, positions).t().reshape(-1)

    def weight_of(self, rows: Tensor) -> Tensor:
        """The inverse of `weight_rows`."""
        if self._is_linear:
            return rows[0] if self.operator.weight_axis == 0 else rows[0].t()
        if self._is_transposed:
            inputs, outputs, *kernel = self.weight_shape
            split = rows.reshape(self.groups, outputs, inputs // self.groups, *kernel).transpose(1, 2)
            return split.reshape(self.weight_shape).flip(list(range(2, len(self.weight_shape))))
        return rows.reshape(self.weight_shape)

    def patches(self, x: Tensor, per_sample: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Input patches at random output positions, and the positions.

        Args:
            x: float32 [samples, ...], the operator's input.
            per_sample: Positions drawn from each sample, without repetition as far as there are that many.
            generator: Where positions are drawn from.

        Returns:
            tuple: float32 [groups, rows, inputs of a group], and int64 [rows]: flat (sample, position) indices, as
            `output_rows` takes them.
        """
        if self._is_linear:
            rows = x.reshape(-1, x.shape[-1])
            index = _positions(len(x), len(rows) // max(len(x), 1), per_sample, generator)
            return rows[index].unsqueeze(0), index
        windows = self.windows(x)  # [samples, *out, channels, *kernel], a view
        out = windows.shape[1 : 1 + self._rank]
        index = _positions(len(x), prod(out), per_sample, generator)
        picked = windows[tuple(torch.unravel_index(index, (len(x), *out)))]  # [rows, channels, *kernel]
        return picked.reshape(len(index), self.groups, -1).transpose(0, 1).contiguous(), index

    def output_rows(self, y: Tensor, index: Tensor) -> Tensor:
        """Outputs at positions that `patches` drew.

        Args:
            y: float32, the operator's output.
            index: int64 [rows].

        Returns:
            Tensor: float32 [groups, rows, outputs of a group].
        """
        last = y if self._is_linear else y.movedim(1, -1)
        if self._is_linear:
            rows = last.reshape(-1, y.shape[-1])[index]
        else:
            rows = last[tuple(torch.unravel_index(index, last.shape[:-1]))]
        return rows.reshape(len(index), self.groups, -1).transpose(0, 1).contiguous()

    def bias_rows(self, bias: Tensor | None) -> Tensor:
        """A value per output channel, or zeros, as [groups, 1, outputs of a group]."""
        full = torch.zeros(self.out_channels) if bias is None else bias
        return full.reshape(self.groups, 1, -1)

    @property
    def _rank(self) -> int:
        return len(self.weight_shape) - 2

    def windows(self, x: Tensor) -> Tensor:
        """Every window of the padded input as a view: [samples, *out, channels, *kernel]."""
        facts: Any = self.operator.attributes
        kernel, stride, dilation = facts["kernel"], list(facts["stride"]), facts["dilation"]
        if x.dim() == self._rank + 1:
            x = x.unsqueeze(0)
        if self._is_transposed:
            x = _spread(x, stride)
            edges = [(d * (k - 1) - p, d * (k - 1) - p + o) for k, d, p, o in zip(
                kernel, dilation, facts["padding"], facts["output_padding"], strict=True)]  # fmt: skip
            stride = [1] * self._rank
        else:
            edges = _edges(facts["padding"], kernel, dilation)
        x = F.pad(x, [amount for pair in reversed(edges) for amount in pair]).contiguous()
        samples, channels, *size = x.shape
        out = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(size, kernel, stride, dilation, strict=True)]
        strides = x.stride()[2:]
        return x.as_strided(
            (samples, *out, channels, *kernel),
            (
                x.stride(0),
                *(s * step for s, step in zip(strides, stride, strict=True)),
                x.stride(1),
                *(s * d for s, d in zip(strides, dilation, strict=True)),
            ),
        )


def _edges(padding: Any, kernel: list[int], dilation: list[int]) -> list[tuple[int, int]]:
    """Zeros before and after each axis; `same` puts the odd one after."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in padding]


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """Zeros between neighbours: a transposed convolution is a convolution over that."""
    spread = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    result = x.new_zeros((*x.shape[:2], *spread))
    view = result
    for axis, step in enumerate(stride, start=2):
        view = view[(slice(None),) * axis + (slice(None, None, step),)]
    view.copy_(x)
    return result


def _positions(samples: int, positions: int, per_sample: int, generator: torch.Generator) -> Tensor:
    """Flat indices of random positions of each sample, sorted within the sample."""
    if positions <= per_sample:
        return torch.arange(samples * positions)
    keys = torch.rand(samples, positions, generator=generator)
    chosen = keys.topk(per_sample, dim=1).indices.sort(1).values
    return (chosen + torch.arange(samples)[:, None] * positions).reshape(-1)
