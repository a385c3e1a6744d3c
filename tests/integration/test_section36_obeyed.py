# SPDX-License-Identifier: Apache-2.0
"""Every fact of the section 36 fragments that the schema calls used is obeyed: change it, and the plan changes.

What is recorded only is checked by tests/unit/schema/test_section36.py, what only the integer result reads by
tests/integration/test_integer_obeyed.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.engine import SilentProgress
from qhw.errors import PlanError
from qhw.graph import Graph
from qhw.numerics import PerAxis, PerGroup, PerTensor
from qhw.schema import parse_target

FOLDER = Path(__file__).parents[1] / "data" / "section36"


class Conv(nn.Module):
    """One convolution with a bias, then a ReLU."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, **options)
        nn.init.uniform_(self.conv.weight, -0.1, 0.3)  # a mean that is not 0: a free zero point is then not 0 either

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x))


class TwoConvs(nn.Module):
    """A depthwise convolution, a host operator between, and a plain convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 3, groups=4)
        self.second = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.sin(self.first(x)))


class Join(nn.Module):
    """Add, concatenate, pool: operators with rules on scales."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        joined = torch.cat([x + y, x * y], 1)
        return F.max_pool2d(joined, 2)


class Unary(nn.Module):
    """Three functions with known ranges."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.sigmoid(x), torch.tanh(x), F.relu(x)


IMAGE = torch.randn(8, 4, 8, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "conv": (Conv, IMAGE),
    "plain conv": (lambda: nn.Conv2d(4, 8, 3), IMAGE),
    "strided conv": (lambda: Conv(stride=2), IMAGE),
    "dilated conv": (lambda: Conv(dilation=2), IMAGE),
    "grouped conv": (lambda: Conv(groups=2), IMAGE),
    "plain depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), IMAGE),
    "two convs": (TwoConvs, IMAGE),
    "join": (Join, (IMAGE, 3 * IMAGE.flip(0))),
    "unary": (Unary, IMAGE),
    "linear": (lambda: nn.Linear(512, 8), torch.randn(8, 512, generator=torch.Generator().manual_seed(1))),
    "small": (Conv, IMAGE * 1e-6),
}


@pytest.fixture(scope="module")
def graphs() -> dict[str, tuple[Graph, Any]]:
    """The models, captured once."""
    torch.manual_seed(0)
    return {name: (qhw.capture(make().eval(), inputs), inputs) for name, (make, inputs) in MODELS.items()}


@dataclass(frozen=True)
class Case:
    """One fact: what is seen with it, and what when the text of the fragment is changed."""

    item: int
    fact: str
    model: str
    seen: Callable[[Any], Any]
    expected: Any
    change: tuple[str, str]
    then: Any
    wishes: dict[str, Any] = field(default_factory=dict)


def weight(result: Any) -> Any:
    """QParams of the first weight."""
    return result.quantizer(next(p.name for p in result.plan.points if p.role == "weight")).qparams


def activation(result: Any) -> Any:
    """QParams of the model's input, or of the first activation."""
    return result.quantizer(next(p.name for p in result.plan.points if p.role != "weight")).qparams


def codes(result: Any) -> tuple[int, int]:
    return weight(result).quant_min, weight(result).quant_max


def input_format(result: Any) -> str:
    return str(next(p.format for p in result.plan.points if p.role == "input"))


def output_format(result: Any) -> str:
    return str(next(p.format for p in result.plan.points if p.role == "activation"))


def where(name: str) -> Callable[[Any], str]:
    return lambda result: str(next(op.where for op in result.plan.operators if op.name == name))


def groups(result: Any) -> dict[str, str]:
    return {point.name: point.group for point in result.plan.points}


def fixed(name: str) -> Callable[[Any], tuple[float, int]]:
    def of(result: Any) -> tuple[float, int]:
        qparams = result.quantizer(name).qparams
        return float(qparams.scale), int(qparams.zero_point)

    return of


def bias(result: Any) -> Any:
    """Format and width of the bias point; None without one."""
    point = next((p for p in result.plan.points if p.role == "bias"), None)
    return None if point is None else (point.format, result.quantizer(point.name).qparams.bits)


def scale_ratio(result: Any) -> float:
    """Largest input scale times weight scale over output scale."""
    x, y = (result.quantizer(name).qparams.scale for name in ("x", "conv"))
    return float((x * result.quantizer("conv.weight").qparams.scale / y).max())


def notes(result: Any) -> set[str]:
    return {note.subject for note in result.plan.notes}


def weights(name: str) -> dict[str, Any]:
    return {"formats": {"*.weight": name}}


def weight_numbers(result: Any) -> int:
    """How many different numbers the first weight has, counted apart for each scale."""
    point = next(p for p in result.plan.points if p.role == "weight")
    found = result.quantizer(point.name)(result.float_graph.tensor(point.tensor).detach())
    rows = found.detach().reshape(weight(result).scale.numel(), -1)
    return sum(row.unique().numel() for row in rows)


def is_float16(scale: Tensor) -> bool:
    return bool(torch.equal(scale.half().float(), scale))


HOST, CHIP = "host", "accelerator"
CASES = [
    Case(1, "weight formats of a kernel", "plain conv", codes, (-127, 127), ('["w8", "w4"]', '["w4", "w8"]'), (-7, 7)),
    Case(1, "fallback", "two convs", where("sin"), PlanError, ('fallback = "refuse"', 'fallback = "host"'), HOST),
    Case(2, "codes [-127, 127]", "conv", codes, (-127, 127), ("[-127, 127], zero", "[-100, 100], zero"), (-100, 100)),
    *[
        Case(2, f"codes of {name}", "conv", codes, (low, high), (f"{name} = {{ codes = [{low}, {high}]",
             f"{name} = {{ codes = [{low}, {high - 1 if high else high}]" if high else f"{name} = {{ codes = [-1, 0]"),
             (low, high - 1) if high else (low, high), weights(name))
        for name, low, high in [("reduced", -64, 64), ("seven", -64, 63), ("four_narrow", -7, 7),
                                ("four_full", -8, 7), ("two", -2, 1)]
    ],
    Case(2, "codes [-1, 0]", "conv", codes, (-1, 0), ("codes = [-1, 0], bits = 1", "codes = [-2, 0], bits = 2"),
         (-2, 0), weights("binary_zero")),
    Case(2, "a set of codes", "conv", weight_numbers, 2,
         ("code_set = [-1, 1], bits = 1", "code_set = [-1, 1, 2], bits = 3"), 3, weights("bipolar")),
    Case(5, "palette", "conv", lambda r: (weight_numbers(r), weight(r).granularity), (16, PerTensor()),
         ('index_bits = 4, entry = "int8"', 'index_bits = 2, entry = "int8", channel_scale = true'),
         (4 * 8, PerAxis(0)), weights("lut_int8")),
    Case(6, "largest finite value", "linear", lambda r: float(activation(r).elements.highest), 240.0,
         ("finite_max = 240.0", "finite_max = 448.0"), 448.0),
    Case(6, "exponent and mantissa", "linear", lambda r: (weight(r).bits, weight(r).elements.mantissa_bits), (8, 3),
         ("bits = 8, exponent_bits = 4, mantissa_bits = 3, finite_max = 240.0",
          "bits = 8, exponent_bits = 5, mantissa_bits = 2, finite_max = 57344.0"), (8, 2)),
    Case(3, "order of input formats", "conv", input_format, "a8u", ('input = ["a8u", "a8"]', 'input = ["a8"]'), "a8"),
    Case(3, "signed", "conv", lambda r: activation(r).quant_min, 0,
         ("a8u = { bits = 8, signed = false", "a8u = { bits = 8, signed = true"), -128),
    Case(4, "fixed zero point", "conv", lambda r: int(activation(r).zero_point), 128,
         ("zero_point = 128", "zero_point = 100"), 100),
    Case(4, "listed zero points", "conv", lambda r: int(activation(r).zero_point), 32768,
         ("zero_point = [0, 32768]", "zero_point = [0]"), 0, {"formats": {"x": "u85_u16"}}),
    Case(4, "free zero point", "conv", lambda r: bool((weight(r).zero_point > 0).all()), True,
         ('zero_point = "free"', "zero_point = 0"), False, weights("ne16_w8")),
    Case(7, "power of two", "conv", lambda r: float(torch.frexp(activation(r).scale)[0]), 0.5,
         ('kind = "power_of_two", exponent_min = -15, exponent_max = 15', 'kind = "fixed", values = [0.3]'),
         float(torch.frexp(torch.tensor(0.3))[0]), {"formats": {"x": "shifted"}}),
    Case(7, "lowest exponent", "small", lambda r: float(activation(r).scale), 2.0**-15,
         ("exponent_min = -15", "exponent_min = -3"), 2.0**-3, {"formats": {"x": "shifted"}}),
    Case(7, "one fixed scale", "conv", lambda r: float(activation(r).scale), 1 / 128,
         ("values = [0.0078125]", "values = [0.015625]"), 1 / 64, {"formats": {"x": "q7"}}),
    Case(7, "listed scales", "conv", lambda r: float(activation(r).scale), 1 / 16,
         ("values = [16, 1, 0.0625, 0.00390625]", "values = [16, 1]"), 1.0, {"formats": {"x": "gaudi2"}}),
    Case(7, "scale of a float type", "conv", lambda r: is_float16(activation(r).scale), True,
         ('kind = "float16"', 'kind = "float32"'), False, {"formats": {"x": "half"}}),
    Case(7, "shared exponent", "conv", lambda r: bool((torch.frexp(weight(r).scale)[0] == 0.5).all()), True,
         ('group_size = 32, scale = { kind = "e8m0", exponent_min = -127, exponent_max = 127 }',
          'group_size = 4, scale = { kind = "float16" }'), False, weights("mx")),
    Case(8, "smallest scale", "small", lambda r: float(activation(r).scale), 2.0**-16,
         ("min = 0.0000152587890625", "min = 0.5"), 0.5),
    Case(8, "largest scale", "conv", lambda r: float(activation(r).scale) <= 1e-3, False,
         ("max = 1e6", "max = 1e-3"), True, {"formats": {"x": "mtk_a8"}}),
    Case(9, "requantization of a kernel", "conv", lambda r: "kernels.mac.requantize" in notes(r), False,
         (', requantize = "scaled"', ""), True),
    Case(10, "group size", "linear", lambda r: weight(r).granularity, PerGroup(1, 256),
         ("[32, 64, 128, 256]", "[64]"), PerGroup(1, 64)),
    Case(10, "per group", "linear", lambda r: weight(r).granularity, PerGroup(1, 256),
         ('per = "group", group_size = [32, 64, 128, 256]', 'per = "tensor"'), PerTensor()),
    Case(8, "largest ratio", "conv", lambda r: scale_ratio(r) > 1e-4, True,
         ("max = 255.99999 }", "max = 1e-4 }"), False),
    Case(11, "bound of exponents", "conv", lambda r: scale_ratio(r) <= 2.0**-14, False,
         ("min = 0, max = 16", "min = 14, max = 16"), True),
    Case(12, "kernels of an operator", "conv", lambda r: weight(r).granularity, PerTensor(),
         ('Conv = { kernels = ["layerwise"] }', 'Conv = { kernels = ["mac"] }'), PerAxis(0)),
    Case(13, "per channel is symmetric", "conv", lambda r: bool((weight(r).zero_point == 0).all()), True,
         ('["w_channel", "w_tensor"]', '["w_tensor"]'), False),
    Case(14, "bias width", "conv", bias, ("narrow", 20), ("bits = 20", "bits = 24"), ("narrow", 24)),
    Case(14, "bias in float", "conv", bias, ("narrow", 20), ("bits = 20", 'bits = "float"'), None),
    Case(14, "bias rule of a kernel", "conv", bias, ("narrow", 20), ('bias = "narrow"', 'bias = "wide"'), ("wide", 40)),
    Case(14, "no bias", "conv", where("conv"), CHIP,
         ('kernels = ["mac8", "mac16", "ncnn", "ne16", "max78000"]', 'kernels = ["plain"]'), HOST),
    Case(14, "sharing of a bias scale", "conv", lambda r: r.quantizer("conv.bias").scale.dim(), 0,
         ('kernels = ["mac8", "mac16", "ncnn", "ne16", "max78000"]', 'kernels = ["ne16"]'), 1),
    Case(15, "accumulator width", "conv", lambda r: "accumulators.vpmaddubsw.bits" in notes(r), False,
         ("vpmaddubsw = { bits = 32", 'vpmaddubsw = { bits = "unknown"'), True),
    Case(15, "accumulator of a kernel", "conv", lambda r: "kernels.avx2.accumulator" in notes(r), False,
         (', accumulator = "vpmaddubsw"', ""), True),
    Case(18, "fixed output", "unary", fixed("sigmoid"), (1 / 256, -128),
         ("scale = 0.00390625, zero_point = -128", "scale = 0.0078125, zero_point = -100"), (1 / 128, -100)),
    Case(18, "range", "unary", lambda r: next(p.maximum for p in r.plan.points if p.name == "tanh"), 1.0,
         ("range = { min = -1, max = 1 }", "range = { min = -1, max = 0.5 }"), 0.5),
    Case(19, "input and output", "join", lambda r: groups(r)["maxpool"] == groups(r)["concat"], True,
         ('MaxPool = { kernels = ["unary"], same_scale = "input_output" }', 'MaxPool = { kernels = ["unary"] }'),
         False),
    Case(19, "inputs", "join", lambda r: groups(r)["x"] == groups(r)["y"], True,
         ('Add = { kernels = ["unary"], same_scale = "inputs" }', 'Add = { kernels = ["unary"] }'), False),
    Case(19, "all", "join", lambda r: groups(r)["add"] == groups(r)["mul"] == groups(r)["concat"], True,
         ('Concat = { kernels = ["unary"], same_scale = "all" }', 'Concat = { kernels = ["unary"] }'), False),
    Case(19, "none", "join", lambda r: groups(r)["mul"] == groups(r)["x"], False,
         ('same_scale = "none"', 'same_scale = "all"'), True),
    Case(21, "fused", "conv", where("relu"), CHIP, ('"Relu", "PRelu"', '"PRelu"'), HOST),
    Case(22, "output precision", "conv", output_format, "u8",
         ('a8_w8 = { input = ["u8"], weight = ["w8"], output = ["u8"] }',
          'a8_w8 = { input = ["u8"], weight = ["w8"], output = ["u16"] }'), "u16"),
    Case(23, "kernel size", "conv", where("conv"), CHIP, ("[[1, 1], [3, 3]]", "[[1, 1], [5, 5]]"), HOST),
    Case(23, "stride", "strided conv", where("conv"), HOST, ("stride = [1]", "stride = [1, 2]"), CHIP),
    Case(23, "dilation", "dilated conv", where("conv"), HOST, ("dilation = [1]", "dilation = [1, 2]"), CHIP),
    Case(23, "groups", "grouped conv", where("conv"), HOST, ('groups = ["1"]', "groups = [1, 2]"), CHIP),
    Case(23, "most channels", "conv", where("conv"), CHIP, ("min = 1, max = 1024 }", "min = 1, max = 3 }"), HOST),
    Case(23, "multiple of", "conv", where("conv"), CHIP, ("multiple_of = 4", "multiple_of = 3"), HOST),
    Case(23, "rank", "conv", where("conv"), CHIP, ("rank = [4]\n", "rank = [3]\n"), HOST),
    Case(23, "no depthwise", "plain depthwise", lambda r: r.plan.operators[0].where, HOST,
         ('[operators.DepthwiseConv]\nkernels = []', '[operators.DepthwiseConv]\nkernels = ["mac"]'), CHIP),
    Case(23, "one partition", "two convs", where("second"), HOST,
         ('fallback = "single_partition"', 'fallback = "host"'), CHIP),
    Case(23, "quantized outputs", "plain conv", lambda r: any(p.role == "activation" for p in r.plan.points), True,
         ('outputs = "quantized"', 'outputs = "float"'), False),
    Case(26, "unknown fusions fuse nothing", "conv", where("relu"), HOST,
         ('fused = "unknown"', 'fused = ["Relu"]'), CHIP),
    Case(26, "bias width beside its source", "conv", bias, ("narrow", 20), ("bits = 20, scale", "bits = 21, scale"),
         ("narrow", 21)),
]  # fmt: skip


def outcome(case: Case, text: str, graphs: dict[str, tuple[Graph, Any]]) -> Any:
    """What is seen of a model quantized for the target in `text`; the error's class where it is refused."""
    graph, inputs = graphs[case.model]
    target = parse_target(text, name_of_file=f"{case.item:02}.toml")
    batch = dict(zip(graph.inputs, inputs, strict=True)) if isinstance(inputs, tuple) else inputs
    try:
        plan = qhw.plan(graph, target, calibration=batch, prefer=("min_max", "min_max_weights"), **case.wishes)
        return case.seen(qhw.quantize(graph, plan, calibration=batch, target=target, progress=SilentProgress()))
    except PlanError:
        return PlanError


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.item:02} {case.fact}")
def test_a_used_fact_is_obeyed(case: Case, graphs: dict[str, tuple[Graph, Any]]) -> None:
    text = (FOLDER / f"{case.item:02}.toml").read_text()
    assert outcome(case, text, graphs) == case.expected
    old, new = case.change
    assert old in text, "the change does not apply to this fragment"
    assert outcome(case, text.replace(old, new), graphs) == case.then
