# SPDX-License-Identifier: Apache-2.0
"""A narrow bias in training: rounded to the product of the scales that learn."""

from typing import Any

import torch
from torch import Tensor, nn

from qhw.numerics import FakeQuantizer, fake_quantize_broadcast

__all__ = ["BiasQuantizer"]


class BiasQuantizer(nn.Module):
    """Moves a bias onto the grid of its accumulator: scale = input scale * weight scale, zero point 0.

    The gradient passes straight to the bias inside the range; the scales learn from their own tensors.

    Args:
        bits: Width of the bias.
        scaled_by: Quantizers of the operator's input and weight.
    """

    def __init__(self, bits: int, scaled_by: tuple[FakeQuantizer, FakeQuantizer]) -> None:
        super().__init__()
        self.quant_min = -(2 ** (bits - 1))
        self.quant_max = 2 ** (bits - 1) - 1
        self.enabled = True
        # In a tuple: they are submodules of the model already, and stand in its state dict once.
        self._scaled_by: Any = scaled_by

    def forward(self, bias: Tensor) -> Tensor:
        """bias float32 [out_channels] -> the same, rounded."""
        if not self.enabled:
            return bias
        source, weight = self._scaled_by
        scale = (source.scale * weight.scale).detach()
        if scale.dim():
            # A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
            scale = scale.repeat(len(bias) // len(scale))
        zero = torch.zeros_like(scale)
        return fake_quantize_broadcast(bias, scale, zero, self.quant_min, self.quant_max)
