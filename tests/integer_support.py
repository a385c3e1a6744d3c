# SPDX-License-Identifier: Apache-2.0
"""Whole operators in numpy int64 and Python integers, and targets and results of one operator to compare with them.

Nothing here computes with qhw: a reference that shared code with what it checks would agree with its mistakes.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qhw
from qhw.decisions import Pipeline, StagePreference
from qhw.engine import QuantizedModel
from qhw.extension import PluginInfo, Registry, hookimpl, load_plugins
from qhw.graph import QuantPoint
from qhw.numerics import PerAxis, PerTensor, QParams
from qhw.schema import TargetSpec, parse_target
from qhw_plugins import batch_norm_folding, min_max, nearest

Array = np.ndarray[Any, Any]

FLOAT32 = 'kind = "float32", rounding = "half_even"'
DOUBLE = 'kind = "fixed_point", rounding = "double", multiplier_bits = 31, shift = { min = -30, max = 31 }'
SHIFT = 'kind = "shift", rounding = "half_to_plus_infinity", shift = { min = -31, max = 31 }'

S8 = 'bits = 8, signed = true, per = "tensor"'
U8 = 'bits = 8, signed = false, per = "tensor"'
S16 = 'bits = 16, signed = true, per = "tensor"'
W8 = 'bits = 8, signed = true, per = "out_channel"'

_PRODUCTS = ("Conv", "DepthwiseConv", "ConvTranspose", "Gemm")
_ELEMENTWISE = (
    "MatMul", "Add", "Sub", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum",
)  # fmt: skip
_SAME = ("MaxPool", "GlobalMaxPool", "ReduceMax", "ReduceMin", "Relu", "Clip")
_TABLES = ("Sigmoid", "LeakyRelu", "Tanh")
_MOVERS = ("Transpose", "Slice", "Gather", "Pad", "Expand", "Tile", "DepthToSpace", "ChannelShuffle")
_VIEWS = ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Split", "Identity")


def fixed_point(rounding: str, bits: int = 31, low: int = -30, high: int = 31, more: str = "") -> str:
    """A requantization by an integer multiplier."""
    return (
        f'kind = "fixed_point", rounding = "{rounding}", multiplier_bits = {bits}, '
        f"shift = {{ min = {low}, max = {high} }}{more}"
    )


def text(
    requantize: str = FLOAT32,
    *,
    activation: str = S8,
    weight: str = W8,
    order: str = "zero_point_after",
    accumulator: str = 'bits = 32, overflow = "wrap"',
    bias: str = 'bits = 32, scale = "input*weight", applied = "before_requantize"',
    outputs: str = "quantized",
    concat: str = "none",
    without: Sequence[str] = (),
    more: str = "",
) -> str:
    """A target that runs everything qhw executes, in one format, by one requantization."""
    rows = {
        **{kind: 'kernels = ["mac"], fused = ["Relu", "Clip", "Dropout"]' for kind in _PRODUCTS},
        **{kind: 'kernels = ["two"], fused = ["Relu", "Clip"]' for kind in _ELEMENTWISE},
        **{kind: 'kernels = ["two"], same_scale = "input_output"' for kind in _SAME},
        **{kind: 'kernels = ["two"], approximation = { kind = "table" }' for kind in _TABLES},
        **dict.fromkeys((*_MOVERS, *_VIEWS), 'same_scale = "input_output"'),
    }
    rows["Concat"] += f', same_scale = "{concat}"'
    rows |= {kind: f'{rows[kind]}, rounding_order = "{order}"' for kind in (*_PRODUCTS, *_ELEMENTWISE)}
    rows["Add"] += ", preshift_bits = { a = 20 }"
    rows["Sub"] += ", preshift_bits = { a = 20 }"
    operators = "\n".join(f"operators.{kind} = {{ {row} }}" for kind, row in rows.items() if kind not in without)
    return f"""
schema_version = 1
name = "acme/exact"
fallback = "host"
formats.a = {{ {activation} }}
formats.w = {{ {weight} }}
biases.b = {{ {bias} }}
accumulators.acc = {{ {accumulator} }}
requantize.r = {{ {requantize} }}
kernels.mac = {{ input = ["a"], weight = ["w"], bias = "b", output = ["a"], accumulator = "acc", requantize = "r" }}
kernels.two = {{ input = ["a"], output = ["a"], bias = "none", accumulator = "acc", requantize = "r" }}
{operators}
boundary = {{ inputs = "quantized", outputs = "{outputs}" }}
{more}
"""


def target(*arguments: str, **named: Any) -> TargetSpec:
    """`text` as a target."""
    return parse_target(text(*arguments, **named))


class Function(nn.Module):
    """A function of one input, which is called `input`, as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, input: Tensor) -> Tensor:
        return self.function(input)


class FunctionOf(nn.Module):
    """A function of any inputs, and of constants behind them, as a module."""

    def __init__(self, function: Callable[..., Tensor], *constants: Tensor) -> None:
        super().__init__()
        self.function = function
        self.constants = nn.ParameterList(nn.Parameter(c, requires_grad=False) for c in constants)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs, *self.constants)


class _MinMax:
    """A pipeline of three algorithms, so that a plan does not depend on the shipped ones."""

    @hookimpl
    def qhw_plugin_info(self) -> PluginInfo:
        return PluginInfo(api=1, summary="min-max and nearest.")

    @hookimpl
    def qhw_register_pipelines(self) -> list[Pipeline]:
        stages = (
            StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
            StagePreference(stage="weight_range", algorithms=("min_max_weights",)),
            StagePreference(stage="round", algorithms=("nearest",)),
            StagePreference(stage="activation_range", algorithms=("min_max",)),
        )
        return [Pipeline(name="min-max", summary="Min-max ranges.", is_default=True, stages=stages)]


@functools.cache
def registry() -> Registry:
    """The plugins that these tests need, without an installation."""
    modules = [(module.__name__.rpartition(".")[2], module) for module in (batch_norm_folding, min_max, nearest)]
    return load_plugins(block=(), entry_points=(), extra=[*modules, ("min-max-pipeline", _MinMax())])


def points(model: nn.Module, spec: TargetSpec, example: Any) -> tuple[QuantPoint, ...]:
    """What is quantized."""
    return qhw.plan(model.eval(), spec, example, calibration=[example], registry=registry()).points


@dataclass(frozen=True)
class Grid:
    """real = scale * (code - zero point), codes within low and high; a list of scales lies along an axis."""

    scale: Any
    zero_point: Any = 0
    low: int = -128
    high: int = 127
    axis: int = 0

    @property
    def qparams(self) -> QParams:
        scale = torch.tensor(np.asarray(self.scale, np.float32))
        zero = torch.tensor(np.broadcast_to(np.asarray(self.zero_point, np.int32), tuple(scale.shape)).copy())
        return QParams(scale, zero, self.low, self.high, PerAxis(self.axis) if scale.dim() else PerTensor())

    def reals(self, codes: Array) -> Tensor:
        """float32: what the codes stand for."""
        scale, zero = (self._along(np.asarray(v), codes.ndim) for v in (self.scale, self.zero_point))
        return torch.from_numpy((codes - zero).astype(np.float32) * scale.astype(np.float32))

    def centred(self, codes: Array) -> Array:
        """Codes minus zero point."""
        return codes.astype(np.int64) - self._along(np.asarray(self.zero_point, np.int64), codes.ndim)

    def codes(self, rng: np.random.Generator, *shape: int) -> Array:
        """Random codes, the ends of the range among them."""
        found = rng.integers(self.low, self.high + 1, shape)
        ends = rng.random(shape)
        return np.where(ends < 0.1, self.low, np.where(ends > 0.9, self.high, found))

    def quantized(self, reals: Array) -> Array:
        """Nearest codes, a tie to the even quotient: as ONNX QuantizeLinear; one scale."""
        quotient = np.rint(reals.astype(np.float32) / np.float32(self.scale)).astype(np.float64)
        return np.clip(quotient + self.zero_point, self.low, self.high).astype(np.int64)

    def clamped(self, codes: Array) -> Array:
        return np.clip(codes, self.low, self.high)

    def _along(self, values: Array, rank: int) -> Array:
        return values if values.ndim == 0 else values.reshape([-1 if i == self.axis else 1 for i in range(rank)])


def quantized(
    model: nn.Module, spec: TargetSpec, example: Any, grids: Mapping[str, Grid], **wishes: Any
) -> QuantizedModel:
    """A model on grids that the test chose: group of points -> grid; `result` is what the last operator writes."""
    graph = qhw.capture(model.eval(), example)
    plan = qhw.plan(graph, spec, calibration=[example], registry=registry(), **wishes)
    written = [point.group for point in plan.points if point.role == "activation"]
    named = {written[-1] if written and name == "result" else name: g.qparams for name, g in grids.items()}
    return QuantizedModel(graph, plan, spec, named)


def result_of(codes: Mapping[str, Tensor]) -> Array:
    """The codes of what the last operator writes."""
    return list(codes.values())[-1].numpy()


def calibrated(model: nn.Module, spec: TargetSpec, data: Any, **wishes: Any) -> QuantizedModel:
    """A model quantized by min-max; inputs come as one batch."""
    return qhw.quantize(model.eval(), spec, example_inputs=data, calibration=[data], registry=registry(), **wishes)


def grid_of(result: QuantizedModel, name: str) -> Grid:
    """The grid of a group of points, one scale."""
    found = result.encodings()[name]
    return Grid(float(found.scale), int(found.zero_point), found.quant_min, found.quant_max)


def fill(parameter: Tensor, values: Tensor) -> None:
    """Overwrite a parameter of a test's model."""
    with torch.no_grad():
        parameter.copy_(values)


# Sums of products.


def convolution(
    x: Array, w: Array, stride: Sequence[int], edges: Sequence[tuple[int, int]], dilation: Sequence[int], groups: int
) -> Array:
    """int64 x [n, in, *size], w [out, in / groups, *kernel], zeros at the edges -> [n, out, *size]."""
    x = np.pad(x, [(0, 0), (0, 0), *edges])
    kernel = w.shape[2:]
    size = [(n - d * (k - 1) - 1) // s + 1 for n, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True)]
    total = np.zeros((x.shape[0], w.shape[0], *size), np.int64)
    per_in, per_out = w.shape[1], w.shape[0] // groups
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in zip(tap, dilation, size, stride, strict=True)
        )
        for group in range(groups):
            inside = x[(slice(None), slice(group * per_in, (group + 1) * per_in), *window)]
            weights = w[(slice(group * per_out, (group + 1) * per_out), slice(None), *tap)]
            total[:, group * per_out : (group + 1) * per_out] += np.einsum("ni...,oi->no...", inside, weights)
    return total


def transposed_convolution(
    x: Array,
    w: Array,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Array:
    """int64 x [n, in, *size], w [in, out / groups, *kernel] -> [n, out, *size]: every input spreads its taps."""
    kernel = w.shape[2:]
    sizes = zip(x.shape[2:], kernel, stride, dilation, output_padding, strict=True)
    full = [(n - 1) * s + d * (k - 1) + 1 + o for n, k, s, d, o in sizes]
    per_in, per_out = w.shape[0] // groups, w.shape[1]
    total = np.zeros((x.shape[0], per_out * groups, *full), np.int64)
    for tap in itertools.product(*map(range, kernel)):
        window = tuple(
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilation, x.shape[2:], stride, strict=True)
        )
        for group in range(groups):
            inside = x[:, group * per_in : (group + 1) * per_in]
            weights = w[(slice(group * per_in, (group + 1) * per_in), slice(None), *tap)]
            found = np.einsum("ni...,io->no...", inside, weights)
            total[(slice(None), slice(group * per_out, (group + 1) * per_out), *window)] += found
    return total[(..., *(slice(p, n - p) for p, n in zip(padding, full, strict=True)))]


# From the accumulator to the code.


def rounded(value: Fraction, rule: str) -> int:
    """A whole number next to a fraction, by a named rule."""
    low = math.floor(value)
    rest = value - low
    if rule == "floor":
        return low
    if rule == "toward_zero":
        return low if value >= 0 or rest == 0 else low + 1
    if rest != Fraction(1, 2):
        return low + (rest > Fraction(1, 2))
    up = {"half_to_plus_infinity": True, "half_away_from_zero": value > 0, "half_even": low % 2 == 1}[rule]
    return low + up


def _each(acc: Array, *others: Array, function: Any) -> Array:
    spread = np.broadcast_arrays(acc, *others)
    flat = [function(*row) for row in zip(*(a.ravel().tolist() for a in spread), strict=True)]
    return np.array(flat, dtype=object).reshape(spread[0].shape)


def by_float32(acc: Array, factor: Array, zero_point: int, rule: str = "half_even", before: bool = False) -> Array:
    """One float32 product; the zero point comes after rounding, or in a float32 sum before it."""
    product = acc.astype(np.float32) * factor.astype(np.float32)
    if before:
        product = product + np.float32(zero_point)
    whole = _each(product.astype(np.float64), function=lambda v: rounded(Fraction(v), rule))
    return whole + (0 if before else zero_point)


def multiplier_of(ratio: float, bits: int) -> tuple[int, int]:
    """QuantizeMultiplier of TFLite with `bits` bits: significand, and how far to shift right behind the multiply."""
    significand, exponent = math.frexp(ratio)
    multiplier = rounded(Fraction(significand) * 2**bits, "half_away_from_zero")
    if multiplier == 2**bits:
        multiplier, exponent = multiplier // 2, exponent + 1
    return multiplier, -exponent


def by_fixed_point(acc: Array, ratio: Array, zero_point: int, rule: str, bits: int = 31) -> Array:
    """A multiplier and a shift: one rounding by a rule, or `double` as gemmlowp's reference code has it."""

    def one(value: int, real: float) -> int:
        multiplier, right = multiplier_of(real, bits)
        if rule != "double":
            return rounded(Fraction(value * multiplier, 2**bits) / Fraction(2) ** right, rule) + zero_point
        return divide_by_power(high_multiply(value << max(-right, 0), multiplier, bits), max(right, 0)) + zero_point

    return _each(acc.astype(object), ratio.astype(np.float64), function=lambda v, r: one(int(v), r))


def high_multiply(a: int, b: int, bits: int = 31) -> int:
    """SaturatingRoundingDoublingHighMul of gemmlowp: truncates (a b + nudge) / 2^bits toward zero."""
    nudge = 1 << (bits - 1) if a * b >= 0 else 1 - (1 << (bits - 1))
    total = a * b + nudge
    return total >> bits if total >= 0 else -(-total >> bits)


def divide_by_power(value: int, exponent: int) -> int:
    """RoundingDivideByPOT of gemmlowp."""
    mask = (1 << exponent) - 1
    threshold = (mask >> 1) + (1 if value < 0 else 0)
    return (value >> exponent) + ((value & mask) > threshold)


def by_shift(acc: Array, ratio: Array, zero_point: int, rule: str) -> Array:
    """A ratio that is a power of two, exact."""
    return _each(
        acc.astype(object), ratio, function=lambda v, r: rounded(Fraction(int(v)) * Fraction(r), rule) + zero_point
    )


@dataclass(frozen=True)
class Rule:
    """One requantization: how the target says it, and how numpy computes it.

    Attributes:
        text: For the target.
        kind: float32, fixed_point or shift.
        rounding: As named there.
        bits: Of a multiplier.
        before: Whether the zero point comes before rounding.
    """

    text: str
    kind: str
    rounding: str
    bits: int = 31
    before: bool = False

    @property
    def order(self) -> str:
        return "zero_point_before" if self.before else "zero_point_after"

    def codes(self, acc: Array, unit: Any, out: Grid) -> Array:
        """Codes of an accumulator before the clamp.

        Args:
            acc: Whole numbers.
            unit: Real values of one unit of it: a list of float32 factors, multiplied in their order.
            out: Grid of the result.
        """
        kind: Any = np.float32 if self.kind == "float32" else np.float64
        scale = functools.reduce(lambda a, b: a * b, (np.asarray(factor, np.float32).astype(kind) for factor in unit))
        ratio = scale / np.float32(out.scale).astype(kind)
        if self.kind == "float32":
            return by_float32(acc, np.asarray(ratio), out.zero_point, self.rounding, self.before)
        if self.kind == "shift":
            return by_shift(acc, np.asarray(ratio), out.zero_point, self.rounding)
        return by_fixed_point(acc, np.asarray(ratio), out.zero_point, self.rounding, self.bits)


SINGLE = ("half_even", "half_away_from_zero", "half_to_plus_infinity", "floor", "toward_zero")
RULES = (
    *(Rule(f'kind = "float32", rounding = "{r}"', "float32", r) for r in SINGLE),
    Rule(FLOAT32, "float32", "half_even", before=True),
    Rule(DOUBLE, "fixed_point", "double"),
    *(Rule(fixed_point(r), "fixed_point", r) for r in SINGLE),
    Rule(fixed_point("half_to_plus_infinity", 15), "fixed_point", "half_to_plus_infinity", bits=15),
    *(Rule(f'kind = "shift", rounding = "{r}", shift = {{ min = -31, max = 31 }}', "shift", r) for r in SINGLE),
)
