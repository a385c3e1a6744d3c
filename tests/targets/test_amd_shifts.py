# SPDX-License-Identifier: Apache-2.0
"""AMD's shifts by hand: what a plan keeps of them, and what it would do without the bounds.

Positions are the vendor's, p = -log2(scale), and so are the bounds and the tensor that gives way: of `shift_cut` the
weight, of `shift_read` the operand on the finer scale, of `shift_write` the result. Data is chosen so that each range
has one power of two that fits it: 127 codes of it, or within 1 % of that.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.schema import TargetSpec, load_target_file

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets" / "amd"
NAMES = ("xdna-xint8", "dpuczdx8g", "dpucvdx8g")
each_target = pytest.mark.parametrize("name", ["xdna-xint8", pytest.param("dpuczdx8g", marks=pytest.mark.slow)])
SIGNS = torch.tensor([1.0, -1.0]).repeat(32)


class Sum(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


class Product(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x * y


def shipped(name: str) -> TargetSpec:
    return load_target_file(ROOT / f"{name}.toml")


def unbound(spec: TargetSpec) -> TargetSpec:
    """The target without a word on shifts."""
    kernels = {name: kernel.model_copy(update={"exponents": None}) for name, kernel in spec.kernels.items()}
    steps = {name: step.model_copy(update={"shift": None}) for name, step in spec.requantize.items()}
    biases = {name: bias.model_copy(update={"shift": None}) for name, bias in spec.biases.items()}
    return spec.model_copy(update={"kernels": kernels, "requantize": steps, "biases": biases})


def convolution(weights: Tensor, bias: float = 0.0) -> nn.Module:
    layer = nn.Conv2d(weights.numel(), 1, 1)
    with torch.no_grad():
        layer.weight.copy_(weights.reshape(1, -1, 1, 1))
        layer.bias.fill_(bias)
    return layer


def quantized(net: nn.Module, spec: TargetSpec, *inputs: Tensor) -> QuantizedModel:
    data = inputs if len(inputs) > 1 else inputs[0]
    wishes: dict[str, Any] = {"pipeline": "ranges-ptq", "progress": SilentProgress()}
    return qhw.quantize(net.eval(), spec, example_inputs=data, calibration=[data], **wishes)


def positions(result: QuantizedModel) -> dict[str, int]:
    """Position of every tensor: by role, inputs as input.0, input.1."""
    found: dict[str, int] = {}
    encodings = result.encodings()
    for point in result.plan.points:
        scale = float(encodings[point.group].scale)
        mantissa, exponent = math.frexp(scale)
        assert mantissa == 0.5, f"{point.name}: {scale} is no power of two"
        role = f"input.{sum(name.startswith('input.') for name in found)}" if point.role == "input" else point.role
        found[role] = 1 - exponent
    return found


def image(values: Tensor) -> Tensor:
    """64 samples of one pixel: the values of each channel with alternating signs."""
    return (SIGNS[:, None] * values[None, :])[:, :, None, None]


@each_target
def test_a_shift_cut_of_17_becomes_16_by_the_weight(name: str) -> None:
    # 1024 products of 127 x 127 in units of 2^-30: 127 x 127 x 2^10, which 127 codes of 2^-13 hold.
    net, x = convolution(torch.full((1024,), 127 * 2.0**-20)), image(torch.full((1024,), 127 * 2.0**-10))
    wanted = {"input.0": 10, "weight": 20, "activation": 13}
    free = positions(quantized(net, unbound(shipped(name)), x))
    assert {role: free[role] for role in wanted} == wanted
    assert free["weight"] + free["input.0"] - free["activation"] == 17
    held = positions(quantized(net, shipped(name), x))
    assert {role: held[role] for role in wanted} == {**wanted, "weight": 19}
    assert held["weight"] + held["input.0"] - held["activation"] == 16


@each_target
def test_a_shift_bias_of_16_becomes_15(name: str) -> None:
    # One product of 127 x 127 in units of 2^-30, and a bias of 126 x 2^-14.
    net = convolution(torch.tensor([127 * 2.0**-20]), bias=126 * 2.0**-14)
    x = image(torch.tensor([127 * 2.0**-10]))
    free, held = (positions(quantized(net, spec, x)) for spec in (unbound(shipped(name)), shipped(name)))
    assert free == {"input.0": 10, "weight": 20, "bias": 14, "activation": 14}
    assert free["weight"] + free["input.0"] - free["bias"] == 16
    assert held == {**free, "weight": 19}


@each_target
def test_a_shift_read_of_10_becomes_7_by_the_finer_operand(name: str) -> None:
    x, y = image(torch.tensor([127 * 2.0**-10])), image(torch.tensor([127 * 2.0**-20]))
    free, held = (positions(quantized(Sum(), spec, x, y)) for spec in (unbound(shipped(name)), shipped(name)))
    assert free == {"input.0": 10, "input.1": 20, "activation": 10}
    assert held == {**free, "input.1": 17}


@each_target
def test_a_shift_write_of_a_sum_of_minus_11_becomes_minus_7_by_the_result(name: str) -> None:
    # Operands that cancel but for 127 x 2^-15: the sum fits a scale that is 2^11 times finer than theirs.
    x = image(torch.tensor([127 * 2.0**-4]))
    y = -x + image(torch.tensor([127 * 2.0**-15]))
    free, held = (positions(quantized(Sum(), spec, x, y)) for spec in (unbound(shipped(name)), shipped(name)))
    assert free == {"input.0": 4, "input.1": 4, "activation": 15}
    assert held == {**free, "activation": 11}


@each_target
def test_a_shift_write_of_a_product_of_minus_2_becomes_0_by_the_result(name: str) -> None:
    # Where one operand is large, the other is a quarter of a code.
    large, small = torch.tensor([127.0, 0.25]) * 2.0**-10, torch.tensor([0.25, 127.0]) * 2.0**-10
    x, y = image(large), image(small)
    free, held = (positions(quantized(Product(), spec, x, y)) for spec in (unbound(shipped(name)), shipped(name)))
    assert free == {"input.0": 10, "input.1": 10, "activation": 22}
    assert held == {**free, "activation": 20}


@settings(max_examples=4, deadline=None)
@given(st.sampled_from(NAMES), st.tuples(*[st.integers(-7, 2)] * 3), st.booleans())
def test_whatever_the_data_every_shift_is_legal(name: str, powers: tuple[int, int, int], is_sum: bool) -> None:
    random = torch.Generator().manual_seed(0)
    a, b, c = (2.0**power for power in powers)
    spec = shipped(name)
    net = convolution(b * torch.randn(16, generator=random), bias=c)
    p = positions(quantized(net, spec, a * torch.randn(64, 16, 1, 1, generator=random)))
    cut, offset = p["weight"] + p["input.0"] - p["activation"], p["weight"] + p["input.0"] - p["bias"]
    assert 0 <= cut <= 16
    assert min(0, -(24 - (8 + cut))) <= offset <= 15
    x, y = (scale * torch.randn(64, 4, 1, 1, generator=random) for scale in (a, b))
    p = positions(quantized(Sum() if is_sum else Product(), spec, x, y))
    first, second = p["input.0"], p["input.1"]
    if is_sum:
        assert 0 <= max(first, second) - min(first, second) <= 7
        assert -7 <= min(first, second) - p["activation"] <= 25
    else:
        assert 0 <= first + second - p["activation"] <= 32


class Gate(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


@each_target
@pytest.mark.parametrize("function", [torch.sigmoid, nn.functional.hardsigmoid])
def test_a_sigmoid_has_an_output_position_of_7_at_least_and_an_input_position_of_15_at_most(
    name: str, function: Callable[[Tensor], Tensor]
) -> None:
    for size, wanted in ((127 * 2.0**-4, 4), (127 * 2.0**-20, 15)):
        p = positions(quantized(Gate(function), shipped(name), image(torch.tensor([size]))))
        assert p["activation"] >= 7
        assert p["input.0"] == wanted
        assert 0 <= 14 + p["input.0"] - p["activation"] <= 31
