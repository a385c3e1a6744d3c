# SPDX-License-Identifier: Apache-2.0
"""A depthwise-separable CNN for 8x8 digits, with one of each thing that makes such networks hard to quantize.

Batch norm to fold, ReLU and ReLU6, depthwise layers (one range for all channels fits them badly), a residual add whose
inputs differ in range, a stride, global average pooling, and a linear layer with a bias.
"""

from torch import Tensor, nn

__all__ = ["DigitsNet", "SeparableBlock"]


class SeparableBlock(nn.Module):
    """Depthwise 3x3, batch norm, ReLU6, pointwise 1x1, batch norm, an optional residual add, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Of the depthwise convolution.
        residual: Add the input before the last ReLU; needs equal channels and stride 1.
    """

    def __init__(self, in_channels: int, out_channels: int, *, stride: int = 1, residual: bool = False) -> None:
        super().__init__()
        self.residual = residual
        self.depthwise = nn.Conv2d(in_channels, in_channels, 3, stride, padding=1, groups=in_channels, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(in_channels)
        self.relu6 = nn.ReLU6()
        self.pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.pointwise_norm = nn.BatchNorm2d(out_channels)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """float32 [batch, in, height, width] to [batch, out, height / stride, width / stride]."""
        y = self.relu6(self.depthwise_norm(self.depthwise(x)))
        y = self.pointwise_norm(self.pointwise(y))
        return self.relu(x + y if self.residual else y)


class DigitsNet(nn.Module):
    """Images float32 [batch, 1, 8, 8] in [-1, 1] to logits float32 [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 32, 3, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(32)
        self.stem_relu = nn.ReLU()
        self.blocks = nn.Sequential(
            SeparableBlock(32, 64),
            SeparableBlock(64, 64, residual=True),
            SeparableBlock(64, 160, stride=2),
            SeparableBlock(160, 160),
        )
        self.classifier = nn.Linear(160, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of the ten digits."""
        x = self.blocks(self.stem_relu(self.stem_norm(self.stem(x))))
        return self.classifier(x.mean((2, 3)))
