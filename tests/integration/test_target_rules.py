# SPDX-License-Identifier: Apache-2.0
"""Rules of targets from plan to integers: biases, sums of weights, exponents, float results, hosts, the edge.

Expected values are counted by hand or in numpy from the stored codes.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.errors import PlanError
from qhw.integer import IntegerModel
from qhw.schema import parse_target

TARGET = """
schema_version = 1
name = "acme/npu"
fallback = "host"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.u8 = { bits = 8, signed = false, per = "tensor" }
formats.p8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.own = { bits = 8, scale = "own", applied = "before_requantize" }
biases.wide = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.sum = { bits = 32, overflow = "wrap" }
requantize.own = { kind = "fixed_point", rounding = "double", multiplier_bits = 31, shift = { min = -30, max = 31 } }
requantize.power = { kind = "shift", rounding = "half_even", shift = { min = -31, max = 31 }, align = { to = "coarser", rounding = "half_even", shift = { min = 0, max = 31 } } }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "wide", accumulator = "sum", requantize = "own" }
kernels.mac16 = { input = ["a16"], weight = ["w8"], output = ["a16"], bias = "wide", accumulator = "sum", requantize = "own" }
kernels.pair = { input = ["p8"], output = ["p8"], bias = "none", accumulator = "sum", requantize = "power" }
kernels.to_float = { input = ["a8"] }
operators.Gemm = { kernels = ["mac", "mac16"], rounding_order = "zero_point_after" }
operators.Conv = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Add = { kernels = ["pair"] }
operators.Mul = { kernels = ["pair"] }
operators.Softmax = { kernels = ["to_float"], output = "float" }
operators.Split = { same_scale = "input_output" }
"""  # noqa: E501
X = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))


def quantized(
    model: nn.Module, *changes: tuple[str, str], inputs: Any = X, more: str = "", **wishes: Any
) -> QuantizedModel:
    text = TARGET
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    target = parse_target(text + more)
    graph = qhw.capture(model.eval(), inputs)
    batch = dict(zip(graph.inputs, inputs, strict=True)) if isinstance(inputs, tuple) else inputs
    plan = qhw.plan(graph, target, calibration=batch, pipeline="ranges-ptq", **wishes)
    return qhw.quantize(graph, plan, calibration=batch, target=target, progress=SilentProgress())


def linear(bias: bool = True, inputs: int = 8) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, 3, bias=bias)


def codes_of(result: QuantizedModel, role: str) -> "np.ndarray[Any, Any]":
    return result.codes(next(p for p in result.plan.points if p.role == role)).numpy().astype(np.int64)


def as_integers(result: QuantizedModel, *inputs: Tensor) -> float:
    """Largest distance of the integer result from the simulation, in codes of the output."""
    point = [p for p in result.plan.points if p.role == "activation"][-1]
    with torch.no_grad():
        return float(
            (IntegerModel(result)(*inputs) - result(*inputs)).abs().max() / result.encodings()[point.group].scale
        )


# Biases


def test_a_bias_that_must_be_there_is_one_of_zeros() -> None:
    required = ("biases.wide = { bits", "biases.wide = { required = true, bits")
    without, result = quantized(linear(bias=False)), quantized(linear(bias=False), required)
    assert [p.name for p in without.plan.points if p.role == "bias"] == []
    assert [p.name for p in result.plan.points if p.role == "bias"] == ["bias"]
    assert result.float_graph.operators[0].bias == "bias"
    assert codes_of(result, "bias").tolist() == [0, 0, 0]
    assert torch.equal(result(X), without(X))
    assert as_integers(result, X) < 1.01


@pytest.mark.parametrize(("rule", "low", "high", "zero"), [
    ("", -128, 127, 0),
    ("signed = false, zero_point = 100, ", 0, 255, 100),
    ("zero_point = -20, ", -128, 127, -20),
])  # fmt: skip
def test_codes_of_a_bias_have_its_sign_and_zero_point(rule: str, low: int, high: int, zero: int) -> None:
    layer = linear()
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-0.5, 0.25, 1.0]))
    row = 'kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "%s"'
    result = quantized(layer, ("biases.own = {", f"biases.own = {{ {rule}"), (row % "wide", row % "own"))
    codes, qparams = codes_of(result, "bias"), result.encodings()["bias"]
    assert (qparams.quant_min, qparams.quant_max, int(qparams.zero_point)) == (low, high, zero)
    # The finest scale that holds -0.5 below and 1.0 above the zero point; around 0 the lowest code is left out.
    below = 127 if zero == 0 else zero - low
    scale = max(0.5 / below, 1.0 / (high - zero))
    assert float(qparams.scale) == pytest.approx(scale, rel=1e-6)
    assert codes.tolist() == [round(value / scale) + zero for value in (-0.5, 0.25, 1.0)]


def test_a_bias_without_negative_codes_holds_no_negative_value() -> None:
    layer = linear()
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([-0.5, 0.25, 1.0]))
    unsigned = ("biases.wide = { bits", "biases.wide = { signed = false, bits")
    with pytest.raises(
        PlanError, match=r"bias: has values on the side of the zero point 0 where biases\.wide has no codes"
    ):
        quantized(layer, unsigned)
    with torch.no_grad():
        layer.bias.abs_()
    result = quantized(layer, unsigned)
    assert codes_of(result, "bias").min() > 0
    assert as_integers(result, X) < 1.01


# Sums of weights


@pytest.mark.parametrize(("limit", "kernel"), [(200, "mac"), (60, "mac"), (150, "mac16")])
def test_weights_of_a_channel_sum_to_no_more_than_the_kernel_allows(limit: int, kernel: str) -> None:
    """Limits follow the width of the activation: they stand in its kernel."""
    change = (f"kernels.{kernel} = {{", f"kernels.{kernel} = {{ weight_abs_sum_max = {limit},")
    formats = {"input": "a16", "gemm": "a16"} if kernel == "mac16" else {}
    free = np.abs(codes_of(quantized(linear(), formats=formats), "weight")).sum(1)
    assert (free > limit).any()
    result = quantized(linear(), change, formats=formats)
    sums = np.abs(codes_of(result, "weight")).sum(1)
    assert (sums <= limit).all()
    assert (sums > limit * 0.8).all()  # and not much less
    with pytest.raises(
        PlanError, match=rf"weight codes of \d+ together; kernels\.{kernel}\.weight_abs_sum_max allows {limit}"
    ):
        quantized(linear(), change, formats=formats, without=("accumulator_projection",))


def test_a_limit_of_another_width_does_not_bind() -> None:
    change = ("kernels.mac16 = {", "kernels.mac16 = { weight_abs_sum_max = 10,")
    free, other = quantized(linear()), quantized(linear(), change)
    assert np.array_equal(codes_of(free, "weight"), codes_of(other, "weight"))


def test_the_limit_that_follows_from_the_accumulator() -> None:
    change = ("kernels.mac = {", 'kernels.mac = { weight_abs_sum_max = "from_accumulator",')
    narrow = ("accumulators.sum = { bits = 32,", "accumulators.sum = { bits = 16,")
    layer = linear(bias=False)
    result = quantized(layer, change, narrow)
    x = result.encodings()[next(p.group for p in result.plan.points if p.role == "input")]
    reach = max(127 - int(x.zero_point), int(x.zero_point) + 128)
    assert (np.abs(codes_of(result, "weight")).sum(1) * reach <= 2**15 - 1).all()
    assert (np.abs(codes_of(quantized(layer), "weight")).sum(1) * reach > 2**15 - 1).any()


# Exponents


class Pair(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y if self.kind == "Add" else x * y


@pytest.mark.parametrize("kind", ["Add", "Mul"])
def test_exponents_of_the_smallest_and_the_largest_operand_are_held_together(kind: str) -> None:
    """A DPU's shift_read: inputs_max - inputs_min, at most 3 here; shift_write: output - inputs_max, at least -1."""
    bounds = (
        'exponents = [{ name = "shift_read", terms = { inputs_max = 1, inputs_min = -1 }, min = 0, max = 3 }, '
        '{ name = "shift_write", terms = { output = 1, inputs_max = -1 }, min = -1, max = 7 }],'
    )
    inputs = (X, X.flip(0) / 64)

    def exponents(result: QuantizedModel) -> list[int]:
        scales = [float(result.encodings()[p.group].scale) for p in result.plan.points]
        return [int(np.log2(scale)) for scale in scales]

    x, y, _ = exponents(quantized(Pair(kind), inputs=inputs))
    assert x - y > 3
    first, second, out = exponents(
        quantized(Pair(kind), ("kernels.pair = {", f"kernels.pair = {{ {bounds}"), inputs=inputs)
    )
    assert 0 <= max(first, second) - min(first, second) <= 3
    assert -1 <= out - max(first, second) <= 7
    assert (first, second) == (x, x - 3)  # the finer one grew, just so far


# Parameters on a grid


@pytest.mark.parametrize(("denominator", "slope"), [(256.0, 26 / 256), (16.0, 2 / 16), (None, 0.1)])
def test_a_slope_is_one_that_the_hardware_has(denominator: float | None, slope: float) -> None:
    """0.1 x 256 = 25.6 is 26, 0.1 x 16 = 1.6 is 2."""
    stated = "" if denominator is None else f", constants = {{ denominator = {denominator} }}"
    more = (
        'kernels.act = { input = ["a8"], output = ["a8"], requantize = "own" }\n'
        'operators.LeakyRelu = { kernels = ["act"], rounding_order = "zero_point_after", '
        f'approximation = {{ kind = "rounded_parameter"{stated} }} }}\n'
    )
    result = quantized(nn.LeakyReLU(0.1), more=more)
    assert float(result.float_graph.operators[0].attributes["slope"]) == slope
    x, out = (result.encodings()[p.group] for p in result.plan.points)
    reals = (np.clip(np.rint(X.numpy() / float(x.scale)) + int(x.zero_point), -128, 127) - int(x.zero_point)) * float(
        x.scale
    )
    codes = np.clip(
        np.rint(np.where(reals < 0, reals * slope, reals) / float(out.scale)) + int(out.zero_point), -128, 127
    )
    found = IntegerModel(result).codes(X)
    assert np.abs(found[result.plan.points[-1].tensor].numpy() - codes).max() <= 1


# What is float, what is the host's, what crosses the edge


def test_a_float_result_is_the_function_of_the_reals_that_it_reads() -> None:
    model = nn.Sequential(linear(), nn.Softmax(1))
    result = quantized(model)
    assert [p.name for p in result.plan.points if p.role == "activation"] == ["0"]
    codes = IntegerModel(result).codes(X)["0"].numpy().astype(np.float32)
    q = result.encodings()["0"]
    reals = (codes - np.float32(q.zero_point)) * np.float32(q.scale)
    e = np.exp(reals - reals.max(1, keepdims=True))
    np.testing.assert_allclose(IntegerModel(result)(X).detach().numpy(), e / e.sum(1, keepdims=True), rtol=1e-5)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(2, 4, 1), nn.Conv2d(1, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts: Tensor = self.second(self.first(x).split(1, 1)[2])
        return parts


@pytest.mark.parametrize("most", [4, 3])
def test_a_split_on_the_host_is_computed_in_float_and_quantized_anew(most: int) -> None:
    image = torch.randn(16, 2, 5, 5, generator=torch.Generator().manual_seed(2))
    change = ("operators.Split = {", f"operators.Split = {{ limits = {{ outputs = {{ max = {most} }} }},")
    result = quantized(Parts(), change, inputs=image)
    read = [p.name for p in result.plan.points if p.role == "input"]
    assert len(read) == (1 if most == 4 else 2)
    codes, grids = IntegerModel(result).codes(image), result.encodings()
    assert as_integers(result, image) < 4  # a code of the first convolution times the weights of the second
    if most == 3:
        written, part = grids["first"], grids[read[1]]
        reals = (codes["first"].numpy() - float(written.zero_point)) * np.float32(written.scale)
        wanted = np.rint(reals[:, 2:3] / np.float32(part.scale)) + float(part.zero_point)
        assert np.array_equal(codes[read[1]].numpy(), np.clip(wanted, part.quant_min, part.quant_max))


def test_an_input_is_quantized_as_the_edge_says_and_then_as_its_reader_wants() -> None:
    result = quantized(linear(), more='boundary.input_formats = ["u8"]\n')
    named = {p.name: result.encodings()[p.group] for p in result.plan.points if p.role in ("input", "edge")}
    outer, inner = named["input"], named["gemm.input.0"]
    assert ((outer.quant_min, outer.quant_max), (inner.quant_min, inner.quant_max)) == ((0, 255), (-128, 127))

    def onto(x: "np.ndarray[Any, Any]", q: Any) -> "np.ndarray[Any, Any]":
        codes = np.clip(np.rint(x / np.float32(q.scale)) + int(q.zero_point), q.quant_min, q.quant_max)
        return ((codes - int(q.zero_point)) * np.float32(q.scale)).astype(np.float32)

    twice = onto(onto(X.numpy(), outer), inner)
    weight, w = codes_of(result, "weight"), result.encodings()["weight"]
    reals = (weight * w.scale.numpy()[:, None]).astype(np.float32)
    bias = codes_of(result, "bias") * result.encodings()["bias"].scale.numpy()
    out = result.encodings()["gemm"]
    expected = onto(twice @ reals.T + bias, out)
    assert np.abs(result(X).detach().numpy() - expected).max() <= float(out.scale) * 1.001  # sums may tie in float32
    assert as_integers(result, X) < 1.01
