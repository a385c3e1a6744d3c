# SPDX-License-Identifier: Apache-2.0
"""Bytes of parameters, by hand."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, float_bytes, quantized_bytes
from qhw.schema import TargetSpec

Quantize = Callable[..., QuantizedModel]


def test_int8_per_channel(images: Tensor, quantize: Quantize) -> None:
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images[:2])
    assert float_bytes(graph) == 4 * (4 * 27 + 4)
    # codes 108 bytes, biases 4 x 4, weight scales 4 x 4 (zero point fixed at 0),
    # input and output: scale 4 and zero point 1 each.
    assert quantized_bytes(quantize(graph, images[:32])) == 108 + 16 + 16 + 2 * (4 + 1)


def test_int4_per_tensor_is_packed(images: Tensor, quantize: Quantize) -> None:
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 3, 1)).eval(), images[:2])
    result = quantize(graph, images[:32], formats={"0.weight": "w4"})
    # 9 codes of 4 bits and two zero points of 8 bits: 52 bits, so 7 bytes; scales 3 x 4; biases 3 x 4.
    assert quantized_bytes(result) == 7 + 12 + 12


def test_the_wide_bias_counts_its_width(images: Tensor, quantize: Quantize) -> None:
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images[:2])
    result = quantize(graph, images[:32], formats={"0": "a16"})
    assert quantized_bytes(result) == 108 + 4 * 5 + 16 + 2 * 4  # 40-bit biases; 16-bit formats have zero point 0


def test_what_stays_in_float_counts_as_float(images: Tensor, quantize: Quantize) -> None:
    layers = (nn.Conv2d(3, 4, 3), nn.Tanh(), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2))
    graph = qhw.capture(nn.Sequential(*layers).eval(), images[:2])
    batch_norm = 4 * 4 * 4 + 8  # gamma, beta, mean, variance, and the count of batches in int64
    linear = 4 * (288 + 2)
    assert float_bytes(graph) == 4 * (108 + 4) + batch_norm + linear
    result = quantize(graph, images[:32], keep_float=["5"])
    assert quantized_bytes(result) == 108 + 16 + 16 + 2 * 5 + batch_norm + linear


def test_shared_weights_count_once(quantize: Quantize) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))  # type: ignore[no-any-return]

    graph = qhw.capture(Tied().eval(), torch.randn(2, 4))
    assert float_bytes(graph) == 64
    assert quantized_bytes(quantize(graph, torch.randn(32, 4))) == 16 + 16 + 3 * 5  # codes, scales, three tensors


def test_one_scale_for_several_tensors_counts_once(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    tied = target_with(("fallback", 'operators.MaxPool = { same_scale = "all" }\nfallback'))
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2)).eval(), images[:2])
    result = quantize(graph, images[:32], tied)
    assert result.plan.point("1").group == "0"
    assert quantized_bytes(result) == 108 + 16 + 16 + 2 * 5
