# SPDX-License-Identifier: Apache-2.0
"""IntegerModel against LiteRT's reference kernels, operator by operator: 0 codes differ for google/litert-int8.

Each case is a model of one operator on random codes, shapes and grids. Scales come in three kinds: random; short
decimals, whose ratios lie next to ties; powers of two, which put results on ties. A run counts only if each mutant, the
target with one clause changed, gives other codes on it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

import qhw
from qhw.engine import QuantizedModel
from qhw.extension import default_registry
from qhw.integer import IntegerModel
from qhw.numerics import PerAxis, PerTensor, QParams
from qhw.schema import TargetSpec, parse_target
from tests import litert_support as litert
from tests.integer_support import FunctionOf
from tests.litert_support import Codes, Encoding, schema

pytestmark = pytest.mark.slow

TARGET = "google/litert-int8"
KINDS = ("random", "decimal", "power_of_two")


class Draws:
    """Random codes, zero points and scales of one kind."""

    def __init__(self, kind: str, seed: int) -> None:
        self.kind, self.generator = kind, torch.Generator().manual_seed(seed)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers from low to high, both included."""
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def one(self, low: int, high: int) -> int:
        return int(self.integers(low, high))

    def choose(self, *options: Any) -> Any:
        return options[self.one(0, len(options) - 1)]

    def scale(self, low: float, high: float, *shape: int) -> Tensor:
        """float32, spread evenly over the decades between low and high."""
        scale = low * (high / low) ** torch.rand(shape, generator=self.generator, dtype=torch.float64)
        if self.kind == "power_of_two":
            scale = 2.0 ** scale.log2().round()
        if self.kind == "decimal":
            unit = 10.0 ** scale.log10().floor() / self.integers(0, 1, *shape).mul(9).add(1)
            scale = (scale / unit).round() * unit
        return scale.float()

    def tensor(self, *shape: int, scale: tuple[float, float] = (0.01, 0.1), codes: int = 128) -> Codes:
        """An activation in torch's layout."""
        return Codes(
            self.integers(-codes, codes - 1, *shape).numpy(), float(self.scale(*scale)), self.one(-codes, codes - 1)
        )

    def near_an_eighth(self) -> tuple[float, float, float]:
        """Scales with a b / y = 1/8 but for their rounding: ties, if the ratio is formed in float32."""
        i, j = self.one(2, 99), self.one(2, 99)
        return i / 100, j / 100, 8 * i * j / 10_000

    def output(self, low: float = 0.01, high: float = 0.3) -> Encoding:
        return Encoding(float(self.scale(low, high)), self.one(-60, 60))


@dataclass(frozen=True)
class Case:
    """One operator on given codes.

    Attributes:
        module: What torch calls it.
        inputs: In torch's layout.
        output: Where the result lies.
        expected: Its codes, in torch's layout.
        weight: Codes in torch's layout, scales per output channel.
        bias: int32 codes.
    """

    module: nn.Module
    inputs: Sequence[Codes]
    output: Encoding
    expected: np.ndarray
    weight: Codes | None = None
    bias: Tensor | None = None


class Behind(nn.Module):
    """A module, and an activation behind it."""

    def __init__(self, module: nn.Module, activation: str) -> None:
        super().__init__()
        self.module, self.activation = module, ACTIVATIONS[activation]

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.activation(self.module(*inputs))


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "NONE": lambda x: x,
    "RELU": F.relu,
    "RELU6": F.relu6,
    "RELU_N1_TO_1": lambda x: F.hardtanh(x, -1.0, 1.0),
}


def last(codes: Codes) -> Codes:
    """Channels last, as LiteRT has them."""
    return Codes(np.moveaxis(codes.array, 1, -1), codes.scale, codes.zero_point)


def first(codes: np.ndarray) -> np.ndarray:
    return np.moveaxis(codes, -1, 1)


def padded(x: Codes, edges: Sequence[int]) -> Codes:
    """An image behind a PAD: the code of 0.0 around it."""
    pads = [(0, 0), (0, 0), *((edge, edge) for edge in edges)]
    return Codes(np.pad(x.array, pads, constant_values=x.zero_point), x.scale, x.zero_point)


def convolution(draws: Draws) -> Case:
    kernel, dilation = draws.choose(1, 2, 3), draws.choose(1, 1, 2)
    stride = 1 if dilation > 1 else draws.choose(1, 2)
    groups = draws.choose(1, 1, 2)
    inner, outer = groups * draws.one(1, 4), groups * draws.one(1, 12)
    padding = draws.one(0, 2)
    x = draws.tensor(2, inner, draws.one(6, 11), draws.one(6, 11), scale=(0.01, 0.03))
    module = nn.Conv2d(inner, outer, kernel, stride, padding, dilation, groups)
    weight = Codes(
        draws.integers(-20, 20, outer, inner // groups, kernel, kernel).numpy(), draws.scale(0.01, 0.03, outer)
    )
    bias, output, activation = draws.integers(-500, 500, outer), draws.output(0.01, 0.06), draws.choose(*ACTIVATIONS)
    if draws.kind == "decimal" and draws.choose(True, False):
        scale_x, scale_w, scale_y = draws.near_an_eighth()
        x = Codes(x.codes, scale_x, x.zero_point)
        weight = Codes(weight.array // 16, torch.full((outer,), scale_w))  # small sums, few clamped
        output = Encoding(scale_y, output.zero_point)
    y = litert.conv_2d(
        last(padded(x, (padding, padding))), last(weight), bias, output, stride=stride, dilation=dilation,
        activation=activation,
    )  # fmt: skip
    return Case(Behind(module, activation), [x], output, first(y), weight, bias)


def depthwise_convolution(draws: Draws) -> Case:
    channels, multiplier, kernel = draws.one(1, 6), draws.choose(1, 1, 2), draws.choose(1, 3)
    stride = draws.choose(1, 2)
    x = draws.tensor(2, channels, draws.one(6, 11), draws.one(6, 11), scale=(0.01, 0.03))
    outer = channels * multiplier
    module = nn.Conv2d(channels, outer, kernel, stride, kernel // 2, groups=channels)
    weight = Codes(draws.integers(-60, 60, outer, 1, kernel, kernel).numpy(), draws.scale(0.01, 0.03, outer))
    theirs = Codes(weight.array.transpose(1, 2, 3, 0), weight.scale, axis=3)
    bias, output, activation = draws.integers(-500, 500, outer), draws.output(0.01, 0.06), draws.choose(*ACTIVATIONS)
    edge = kernel // 2
    y = litert.depthwise_conv_2d(
        last(padded(x, (edge, edge))), theirs, bias, output, stride=stride, activation=activation
    )
    return Case(Behind(module, activation), [x], output, first(y), weight, bias)


def transposed_convolution(draws: Draws) -> Case:
    inner, outer, kernel, stride = draws.one(1, 4), draws.one(1, 8), draws.choose(2, 3), draws.choose(1, 2)
    x = draws.tensor(2, inner, draws.one(4, 7), draws.one(4, 7), scale=(0.01, 0.03))
    module = nn.ConvTranspose2d(inner, outer, kernel, stride)
    weight = Codes(draws.integers(-20, 20, inner, outer, kernel, kernel).numpy(), draws.scale(0.01, 0.03, outer))
    theirs = Codes(weight.array.transpose(1, 2, 3, 0), weight.scale)
    bias, output = draws.integers(-500, 500, outer), draws.output(0.01, 0.06)
    size = [2, *((n - 1) * stride + kernel for n in x.array.shape[2:]), outer]
    options = schema.TransposeConvOptionsT()
    options.strideH = options.strideW = stride
    options.padding = schema.Padding.VALID
    scale = np.float32(x.scale) * np.asarray(weight.scale)
    constants = [np.asarray(size, np.int32), theirs, Codes(bias.numpy().astype(np.int32), scale)]
    y = litert.run_operator("TRANSPOSE_CONV", options, [last(x)], output, constants, order=[1, 2, 0, 3])
    return Case(module, [x], output, first(y), weight, bias)


def fully_connected(draws: Draws) -> Case:
    inner, outer = draws.one(1, 40), draws.one(1, 40)
    x = draws.tensor(*draws.choose((9,), (3, 5)), inner, scale=(0.01, 0.03), codes=40)
    weight = Codes(draws.integers(-20, 20, outer, inner).numpy(), draws.scale(0.01, 0.03, outer))
    bias, output, activation = draws.integers(-500, 500, outer), draws.output(0.01, 0.06), draws.choose(*ACTIVATIONS)
    y = litert.fully_connected(x, weight, bias, output, activation=activation)
    return Case(Behind(nn.Linear(inner, outer), activation), [x], output, y, weight, bias)


def matrix_product(draws: Draws) -> Case:
    rows, inner, columns = draws.one(3, 30), draws.one(1, 6), draws.one(3, 30)
    a = draws.tensor(2, rows, inner, codes=20)
    b = draws.tensor(2, inner, columns, codes=20)
    output = draws.output(0.01, 0.3)
    if draws.kind == "decimal":
        first_scale, second_scale, scale = draws.near_an_eighth()
        a, b = Codes(a.codes, first_scale, a.zero_point), Codes(b.codes, second_scale, b.zero_point)
        output = Encoding(scale, output.zero_point)
    y = litert.run_operator("BATCH_MATMUL", schema.BatchMatMulOptionsT(), [a, b], output)
    return Case(FunctionOf(torch.matmul), [a, b], output, y)


def elementwise(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Draws], Case]:
    def draw(draws: Draws) -> Case:
        shape = (2, 40, 8, 8)
        a, b = draws.tensor(*shape), draws.tensor(*draws.choose(shape, (2, 40, 1, 1)))
        output = draws.output(0.005, 0.5) if name == "MUL" else draws.output()
        if name == "MUL" and draws.kind == "decimal":
            first_scale, second_scale, scale = draws.near_an_eighth()
            a, b = Codes(a.codes, first_scale, a.zero_point), Codes(b.codes, second_scale, b.zero_point)
            output = Encoding(scale, output.zero_point)
        activation = draws.choose(*ACTIVATIONS)
        options = getattr(schema, f"{name.capitalize()}OptionsT")()
        options.fusedActivationFunction = getattr(schema.ActivationFunctionType, activation)
        y = litert.run_operator(name, options, [last(a), last(b)], output)
        return Case(Behind(FunctionOf(function), activation), [a, b], output, first(y))

    return draw


def extremum(name: str, function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Draws], Case]:
    def draw(draws: Draws) -> Case:
        a = draws.tensor(2, 3, 8, 8)
        b = Codes(draws.integers(-128, 127, 2, 3, 8, 8).numpy(), a.scale, a.zero_point)
        y = litert.run_operator(name, None, [a, b], a.encoding)
        return Case(FunctionOf(function), [a, b], a.encoding, y)

    return draw


def mean(draws: Draws, is_same: bool = False) -> Case:
    x = draws.tensor(4, draws.one(2, 9), draws.one(2, 9), 16)
    axes = draws.choose((1, 2), (2, 3), (1,), (-1,), (1, 2, 3))
    keep = draws.choose(True, False)
    output = x.encoding if is_same else draws.output(0.003, 0.1)
    if draws.kind == "decimal" and not is_same:  # three times the scale but for its rounding
        n = draws.one(1, 30)
        x, output = Codes(x.codes, 3 * n / 100, x.zero_point), Encoding(n / 100, output.zero_point)
    y = litert.mean(x, output, axes=axes, keep_dims=keep)
    return Case(FunctionOf(lambda v: v.mean(axes, keepdim=keep)), [x], output, y)


def global_average(draws: Draws) -> Case:
    x, output = draws.tensor(2, 8, draws.one(2, 9), draws.one(2, 9)), draws.output(0.003, 0.1)
    return Case(nn.AdaptiveAvgPool2d(1), [x], output, first(litert.mean(last(x), output)))


def average_pool(draws: Draws) -> Case:
    x, size = draws.tensor(2, 4, 9, 11), draws.choose(2, 3, 4)
    if size == 3 and draws.choose(True, False):
        y = litert.average_pool_2d(last(x), size=3, padding="SAME")
        module = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
    else:
        edge, stride = draws.one(0, size // 2), draws.choose(1, 2)
        y = litert.average_pool_2d(last(padded(x, (edge, edge))), size=size, stride=stride)
        module = nn.AvgPool2d(size, stride, edge)
    return Case(module, [x], x.encoding, first(y))


def max_pool(draws: Draws) -> Case:
    x, size, stride = draws.tensor(2, 4, 9, 11), draws.choose(2, 3), draws.choose(1, 2)
    if size == 3 and stride == 1:
        return Case(nn.MaxPool2d(3, 1, 1), [x], x.encoding, first(litert.max_pool_2d(last(x), size=3, padding="SAME")))
    y = litert.max_pool_2d(last(x), size=size, stride=stride)
    return Case(nn.MaxPool2d(size, stride), [x], x.encoding, first(y))


def concatenation(draws: Draws) -> Case:
    a, axis = draws.tensor(2, 3, 4, 5), draws.one(0, 3)
    b = Codes(draws.integers(-128, 127, 2, 3, 4, 5).numpy(), a.scale, a.zero_point)
    y = litert.concatenation([a, b], a.encoding, axis=axis)
    return Case(FunctionOf(lambda v, w: torch.cat([v, w], axis)), [a, b], a.encoding, y)


def pad(draws: Draws) -> Case:
    x, edges = draws.tensor(2, 3, 5, 4), draws.integers(0, 3, 2, 2).numpy()
    table = np.concatenate([np.zeros((2, 2), np.int32), edges.astype(np.int32)])
    y = litert.run_operator("PAD", schema.PadOptionsT(), [x], x.encoding, [table])
    left, right = edges[1].tolist(), edges[0].tolist()
    # With a pool of single codes behind it: what only moves data is left where it is.
    return Case(FunctionOf(lambda v: F.max_pool2d(F.pad(v, [*left, *right]), 1)), [x], x.encoding, y)


EVERY_CODE = np.arange(-128, 128).reshape(2, 2, 8, 8)


def function(
    name: str, called: Callable[[Tensor], Tensor], fixed: Encoding | None = None, version: int = 2
) -> Callable[[Draws], Case]:
    def draw(draws: Draws) -> Case:
        x, output = draws.tensor(2, 2, 8, 8), fixed or draws.output(0.01, 3.0)
        x = Codes(EVERY_CODE, x.scale, x.zero_point)
        if draws.kind == "decimal" and fixed is None:  # 3 / 2 or 5 / 2, but for the rounding of scales
            n, times = draws.one(1, 30), draws.choose(1.5, 2.5)
            x, output = Codes(EVERY_CODE, times * n / 10, x.zero_point), Encoding(n / 10, output.zero_point)
        if draws.kind == "power_of_two" and fixed is None and draws.choose(True, False):
            output = Encoding(float(np.float32(6 / (draws.one(0, 20) + 0.5))), output.zero_point)  # 6 is a tie
        y = litert.run_operator(name, None, [x], output)
        return Case(FunctionOf(called), [x], output, y)

    return draw


def leaky_relu(draws: Draws) -> Case:
    x, output, slope = draws.tensor(2, 2, 8, 8), draws.output(), draws.choose(0.01, 0.1, 0.125, 0.25, 0.3)
    x = Codes(EVERY_CODE, x.scale, x.zero_point)
    if draws.kind == "decimal":  # a ratio of 5 times the slope, but for the rounding of scales
        n, slope = draws.one(1, 30), draws.choose(0.1, 0.3, 0.5)
        x, output = Codes(EVERY_CODE, 5 * n / 10, x.zero_point), Encoding(n / 10, output.zero_point)
    options = schema.LeakyReluOptionsT()
    options.alpha = slope
    y = litert.run_operator("LEAKY_RELU", options, [x], output)
    return Case(FunctionOf(lambda v: F.leaky_relu(v, slope)), [x], output, y)


ROUNDING = 'requantize.rescale = {{ rounding = "{}", source = "memory" }}'
PRODUCT = {
    "rounded once, half away from zero": ROUNDING.format("half_away_from_zero"),
    "rounded once, half even": ROUNDING.format("half_even"),
    "last ties upwards": ROUNDING.format("double_half_to_plus_infinity"),
    "a multiplier of 16 bits": 'requantize.rescale = { multiplier_bits = 16, source = "memory" }',
    "bounds half even": 'formats.a8 = { rounding = "half_even", source = "memory" }',
    "float32": 'requantize.rescale = { kind = "float32", rounding = "half_even", source = "memory" }',
}


def but(changes: Mapping[str, str], *names: str) -> dict[str, str]:
    return {name: text for name, text in changes.items() if name not in names}


def own(kind: str, clause: str) -> str:
    return f'operators.{kind} = {{ {clause}, source = "memory" }}'


@dataclass(frozen=True)
class Operator:
    """How cases are drawn, how many of each kind of scales, and the clauses that decide."""

    draw: Callable[[Draws], Case]
    count: int = 20
    mutants: Mapping[str, str] = field(default_factory=dict)


SUM = {
    name: text.replace("requantize.rescale", "requantize.sum")
    for name, text in but(PRODUCT, "float32", "a multiplier of 16 bits", "bounds half even").items()
}
OPERATORS = {
    "Conv": Operator(convolution, 15, but(PRODUCT, "bounds half even") | {
        "ratio in float32": own("Conv", 'ratio = "float32"')}),
    "DepthwiseConv": Operator(depthwise_convolution, 12, but(PRODUCT, "bounds half even")),
    "ConvTranspose": Operator(transposed_convolution, 12, but(PRODUCT, "bounds half even")),
    "Gemm": Operator(fully_connected, 15, {
        "fixed point": 'requantize.real = { kind = "fixed_point", rounding = "double", multiplier_bits = 31, '
                       'shift = { min = -30, max = 31 }, source = "memory" }',
        "half even": 'requantize.real = { rounding = "half_even", source = "memory" }',
        "float32": 'requantize.real = { kind = "float32", source = "memory" }'}),
    "MatMul": Operator(matrix_product, 12, but(PRODUCT, "bounds half even") | {
        "ratio in float64": own("MatMul", 'ratio = "float64"')}),
    "Add": Operator(elementwise("ADD", torch.add), 8, SUM | {
        "a pre-shift of 8 bits": own("Add", "preshift_bits = { a8 = 8 }")}),
    "Sub": Operator(elementwise("SUB", torch.sub), 8, SUM | {
        "a pre-shift of 8 bits": own("Sub", "preshift_bits = { a8 = 8 }")}),
    "Mul": Operator(elementwise("MUL", torch.mul), 8, but(PRODUCT, "bounds half even") | {
        "ratio in float64": own("Mul", 'ratio = "float64"')}),
    "Max": Operator(extremum("MAXIMUM", torch.maximum), 4),
    "Min": Operator(extremum("MINIMUM", torch.minimum), 4),
    "ReduceMean": Operator(mean, 24, but(PRODUCT, "bounds half even", "float32") | {
        "count in the ratio": own("ReduceMean", 'mean_count = "ratio"'),
        "ratio in float32": own("ReduceMean", 'ratio = "float32"')}),
    "ReduceMean on one grid": Operator(partial(mean, is_same=True), 12, {
        "rounded once, half even": ROUNDING.format("half_even")}),
    "GlobalAveragePool": Operator(global_average, 10, {
        "count in the ratio": own("ReduceMean", 'mean_count = "ratio"')}),
    "AveragePool": Operator(average_pool, 10, {
        "half even": own("AveragePool", 'rounding = "half_even"'),
        "zero point after": own("AveragePool", 'rounding_order = "zero_point_after"')}),
    "MaxPool": Operator(max_pool, 4),
    "Concat": Operator(concatenation, 4),
    "Pad": Operator(pad, 4),
    "Relu": Operator(function("RELU", F.relu), 12, {"ratio in float64": own("Relu", 'ratio = "float64"')}),
    "Clip": Operator(function("RELU6", F.relu6), 15, {
        "ratio in float64": own("Clip", 'ratio = "float64"'), "bounds half even": PRODUCT["bounds half even"]}),
    "LeakyRelu": Operator(leaky_relu, 15, {
        "ratio in float64": own("LeakyRelu", 'ratio = "float64"'),
        "rounded once": ROUNDING.format("half_away_from_zero")}),
    "Abs": Operator(function("ABS", torch.abs), 10, {"ratio in float64": own("Abs", 'ratio = "float64"')}),
    "Sigmoid": Operator(function("LOGISTIC", torch.sigmoid, Encoding(1 / 256, -128)), 6, {
        "entries rounded down": 'formats.a8 = { rounding = "floor", source = "memory" }'}),
    "Tanh": Operator(function("TANH", torch.tanh, Encoding(1 / 128, 0)), 6, {
        "entries rounded down": 'formats.a8 = { rounding = "floor", source = "memory" }'}),
}  # fmt: skip


def target(clause: str = "") -> TargetSpec:
    """The shipped target; with a clause, one that extends it."""
    text = f'schema_version = 1\nname = "acme/mutant"\nextends = "{TARGET}"\n{clause}\n'
    return parse_target(text, find_base=default_registry().target_path)


def results_of(case: Case, specs: Sequence[TargetSpec]) -> list[np.ndarray]:
    """Codes of the case under each target: planned once, on the grids of the case."""
    example = tuple(reals(x) for x in case.inputs)
    grids: dict[str, QParams] = {"output": grid(case.output)}
    if case.weight is not None and case.bias is not None:
        layer = next(m for m in case.module.modules() if hasattr(m, "weight"))
        scale = torch.as_tensor(case.weight.scale)
        unit = torch.tensor(case.inputs[0].scale, dtype=torch.float32) * scale
        axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
        shape = [-1 if i == axis else 1 for i in range(layer.weight.dim())]
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(case.weight.array).float() * scale.reshape(shape))
            layer.bias.copy_(case.bias.float() * unit)
        grids["weight"] = QParams(scale, torch.zeros(len(scale), dtype=torch.int32), -127, 127, PerAxis(axis))
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        grids["bias"] = QParams(unit, zeros, -(2**31), 2**31 - 1, PerAxis(0))
    graph = qhw.capture(case.module.eval(), example)
    batch = dict(zip(graph.inputs, example, strict=True))
    plan = qhw.plan(graph, specs[0], calibration=batch)
    assert all(op.where == "accelerator" for op in plan.operators), plan.operators
    inputs = dict(zip(graph.inputs, case.inputs, strict=True))
    found = {
        p.group: grid(inputs[p.tensor].encoding)
        if p.role == "input"
        else grids["output" if p.role == "activation" else p.role]
        for p in sorted(plan.points, key=lambda p: p.role == "input")
    }
    codes = [IntegerModel(QuantizedModel(graph, plan, spec, found)).codes(*example) for spec in specs]
    return [list(one.values())[-1].numpy() for one in codes]


def reals(x: Codes) -> Tensor:
    return torch.from_numpy(x.array.astype(np.float32) - x.zero_point) * torch.tensor(x.scale, dtype=torch.float32)


def grid(encoding: Encoding) -> QParams:
    scale = torch.tensor(encoding.scale, dtype=torch.float32)
    return QParams(scale, torch.tensor(encoding.zero_point, dtype=torch.int32), -128, 127, PerTensor())


def check_operator(name: str, operator: "Operator", record_property: Callable[[str, Any], None]) -> None:
    """No code of random models differs from the runtime's, and some of every mutant do."""
    specs = [target(), *(target(clause) for clause in operator.mutants.values())]
    total, differing = 0, np.zeros(len(specs), np.int64)
    for kind in KINDS:
        for seed in range(operator.count):
            case = operator.draw(Draws(kind, seed))
            differing += [int((found != case.expected).sum()) for found in results_of(case, specs)]
            total += case.expected.size
    mutants = dict(zip(operator.mutants, differing[1:].tolist(), strict=True))
    record_property("codes", total)
    record_property("mutants", mutants)
    print(f"{name}: {differing[0]} of {total} codes differ; mutants {mutants}")
    assert differing[0] == 0
    assert all(mutants.values()), f"{total} codes do not tell these apart: {mutants}"


def check_many_more(operator: "Operator") -> None:
    """No code of 50 more models of every kind differs."""
    spec = [target()]
    for kind in KINDS:
        for seed in range(1000, 1050):
            case = operator.draw(Draws(kind, seed))
            assert int((results_of(case, spec)[0] != case.expected).sum()) == 0, (kind, seed)


@pytest.mark.parametrize("name", OPERATORS)
def test_no_code_differs_from_the_runtime_and_some_of_every_mutant_do(name, record_property):
    check_operator(name, OPERATORS[name], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_no_code_differs_on_many_more_models(name):
    check_many_more(OPERATORS[name])
