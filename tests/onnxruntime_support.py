# SPDX-License-Identifier: Apache-2.0
"""Random small models of what onnxruntime/cpu-x86-vnni runs in integers, on scales that put results on ties or near."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.integer.site import PointIndex
from qhw.numerics import QParams, dequantize
from qhw_plugins.onnx_qdq import OnnxQdq, OnnxQdqOptions
from qhw_plugins.onnxruntime_executor import optimized_operators

TARGET = "onnxruntime/cpu-x86-vnni"
SCALES = ("random", "decimal", "power_of_two")
FORMATS: tuple[dict[str, str], ...] = (
    {},
    {"*.weight": "w8t"},
    {"*.weight": "w8u"},
    {"*": "s8", "*.weight": "w8"},
    {"*": "s8", "*.weight": "w8t"},
)

_INTEGER = {
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool",
    "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "NhwcMaxPool",
}  # fmt: skip
_EITHER = {
    "MaxPool", "ReduceMax", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather",
    "Split", "Expand", "Tile", "DepthToSpace", "Identity",
}  # fmt: skip
_SHAPES = {"Shape", "Constant", "ConstantOfShape"}
_MOVING = _EITHER - {"MaxPool", "ReduceMax", "Concat"}


class Program(nn.Module):
    """Steps one after another; the results that nothing reads are the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        self.kinds: list[str] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values = [x]
        for step, sources in self.steps:
            values.append(step(*(values[i] for i in sources)))
        used = {i for _, sources in self.steps for i in sources}
        return tuple(value for i, value in enumerate(values) if i not in used)


class Maker:
    """Draws a program, keeping an example of every value."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        torch.manual_seed(seed)
        self.program = Program()
        rank = self.rng.choice((4, 4, 4, 3, 2))
        channels = self.rng.randint(1, 9)
        sides = [self.rng.randint(5, 9) for _ in range(rank - 2)]
        batch = self.rng.randint(2, 4) if sides else self.rng.randint(32, 64)
        self.values = [torch.randn(batch, channels, *sides)]
        self.hidden: set[int] = set()  # before a clip, which the operator takes in only where nothing else reads it

    def make(self) -> tuple[Program, Tensor]:
        self.computing(0)
        for _ in range(self.rng.randint(1, 4)):
            self.step()
        return self.program.eval(), self.values[0]

    def step(self) -> None:
        """One more step that its operand allows."""
        shown = self.shown()
        source = self.rng.choice((shown[-1], self.rng.choice(shown)))
        if self.rng.random() < 0.6:
            self.computing(source)
        else:
            makers = (self.elementwise, self.elementwise, self.movement, self.concat)
            self.rng.choice(makers)(source, self.values[source])

    def computing(self, source: int) -> None:
        """A step of one operand that changes its grid."""
        x = self.values[source]
        makers = [self.function]
        if x.dim() >= 3:
            makers += [self.conv, self.conv, self.conv, self.pool, self.pool, self.whole, self.matmul]
        else:
            makers += [self.linear, self.linear, self.linear]
        self.rng.choice(makers)(source, x)

    def shown(self) -> list[int]:
        return [i for i in range(len(self.values)) if i not in self.hidden]

    def add(self, kind: str, step: Callable[..., Tensor], *sources: int) -> None:
        if isinstance(step, nn.Module):
            self.program.layers.append(step)
        with torch.no_grad():
            found = step(*(self.values[i] for i in sources))
        self.program.steps.append((step, sources))
        self.program.kinds.append(kind)
        self.values.append(found)

    def clipped(self, source: int) -> None:
        """Sometimes a Relu or Clip, which the operator before takes in."""
        kind = self.rng.choice(("", "", "relu", "relu6", "clip"))
        steps: dict[str, Callable[[Tensor], Tensor]] = {
            "relu": torch.relu, "relu6": F.relu6, "clip": lambda x: torch.clamp(x, -1.5, 2.0),
        }  # fmt: skip
        if kind:
            self.hidden.add(source)
            self.add(kind, steps[kind], source)

    def conv(self, source: int, x: Tensor) -> None:
        channels, sides = x.shape[1], x.shape[2:]
        kind = self.rng.choice(("conv", "conv", "depthwise", "grouped"))
        out, groups = self.rng.randint(1, 9), 1
        if kind == "depthwise":
            groups, out = channels, channels * self.rng.choice((1, 1, 2))
        elif kind == "grouped":
            groups = self.rng.choice([g for g in range(1, channels + 1) if channels % g == 0])
            out = groups * self.rng.randint(1, 3)
        dilation = [self.rng.choice((1, 1, 2)) for _ in sides]
        kernel = [self.rng.randint(1, max(1, min(3, (n - 1) // d + 1))) for n, d in zip(sides, dilation, strict=True)]
        padding = [self.rng.randint(0, (k - 1) * d) for k, d in zip(kernel, dilation, strict=True)]
        stride = [self.rng.choice((1, 1, 2)) for _ in sides]
        layer = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(sides) - 1]
        module: Any = layer(
            channels,
            out,
            kernel,
            stride,
            padding,
            dilation,
            groups,
            bias=self.rng.random() < 0.7,  # type: ignore[arg-type]
        )
        self.add(kind, module, source)
        self.clipped(len(self.values) - 1)

    def linear(self, source: int, x: Tensor) -> None:
        self.add("linear", nn.Linear(x.shape[-1], self.rng.randint(1, 12), bias=self.rng.random() < 0.8), source)
        self.clipped(len(self.values) - 1)

    def matmul(self, source: int, x: Tensor) -> None:
        self.add("transpose", lambda a: a.transpose(-1, -2), source)
        operands = [source, len(self.values) - 1]
        self.rng.shuffle(operands)
        self.add("matmul", torch.matmul, *operands)
        self.clipped(len(self.values) - 1)

    def elementwise(self, source: int, x: Tensor) -> None:
        kind = self.rng.choice(("add", "add", "mul"))

        def fits(y: Tensor) -> bool:
            if y.dim() != x.dim() or y.shape[0] != x.shape[0]:
                return False
            both = [(m, n) for m, n in zip(x.shape, y.shape, strict=True) if m != n]
            one_way = all(m == 1 for m, _ in both) or all(n == 1 for _, n in both)
            return one_way or (kind == "mul" and all(1 in pair for pair in both))

        others = [i for i in self.shown() if fits(self.values[i])]
        operands = [source, self.rng.choice([i for i in others if i != source] or others)]
        self.rng.shuffle(operands)
        self.add(kind, {"add": torch.add, "mul": torch.mul}[kind], *operands)
        self.clipped(len(self.values) - 1)

    def concat(self, source: int, x: Tensor) -> None:
        axis = self.rng.randrange(1, x.dim())

        def fits(y: Tensor) -> bool:
            return y.dim() == x.dim() and all(
                m == n for i, (m, n) in enumerate(zip(x.shape, y.shape, strict=True)) if i != axis
            )

        others = [i for i in self.shown() if fits(self.values[i])]
        sources = [source, *self.rng.choices(others, k=self.rng.choice((1, 1, 2)))]
        self.add("concat", lambda *parts: torch.cat(parts, axis), *sources)

    def pool(self, source: int, x: Tensor) -> None:
        sides = x.shape[2:]
        kernel = [self.rng.randint(1, min(3, n)) for n in sides]
        stride = [self.rng.choice((1, 2)) for _ in sides]
        dims = len(sides) - 1
        if self.rng.random() < 0.15:
            kernel = list(sides)
        if self.rng.random() < 0.6:
            padding = [self.rng.randint(0, k // 2) for k in kernel] if self.rng.random() < 0.3 else [0] * len(sides)
            average = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[dims]
            self.add("average_pool", lambda a: average(a, kernel, stride, padding), source)
        else:
            padding = [self.rng.randint(0, k // 2) for k in kernel]
            maximum: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[dims]
            self.add("max_pool", lambda a: maximum(a, kernel, stride, padding), source)

    def whole(self, source: int, x: Tensor) -> None:
        pool = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d)[x.dim() - 3]
        self.add("global_average_pool", lambda a: pool(a, 1), source)

    def function(self, source: int, x: Tensor) -> None:
        slope = self.rng.choice((0.01, 0.1, 0.125, 0.3))
        kind = self.rng.choice(("sigmoid", "leaky_relu"))
        self.add(kind, torch.sigmoid if kind == "sigmoid" else lambda a: F.leaky_relu(a, slope), source)

    def movement(self, source: int, x: Tensor) -> None:
        kind = self.rng.choice(("flatten", "reshape", "transpose", "slice"))
        if x.dim() == 2:
            kind = "slice"
        channels = x.shape[1]
        first = self.rng.randrange(channels)
        steps: dict[str, Callable[[Tensor], Tensor]] = {
            "flatten": lambda a: torch.flatten(a, 1),
            "reshape": lambda a: a.reshape(a.shape[0], channels, -1),
            "transpose": lambda a: a.transpose(1, -1),
            "slice": lambda a: a[:, first:],
        }
        self.add(kind, steps[kind], source)


def calibrated(seed: int) -> tuple[QuantizedModel, Tensor]:
    """The model of a seed, quantized by the plain pipeline in formats that the seed draws, and an example input."""
    program, x = Maker(seed).make()
    graph = qhw.capture(program, x)
    formats = FORMATS[seed % len(FORMATS)]
    wishes = {pattern: name for pattern, name in formats.items() if pattern == "*" or program.layers}
    plan = qhw.plan(graph, TARGET, calibration=x, pipeline="ranges-ptq", formats=wishes)
    return qhw.quantize(graph, plan, calibration=x, progress=SilentProgress()), x


def rescaled(result: QuantizedModel, kind: str, seed: int, spread: float = 2.0) -> QuantizedModel:
    """The same model on other grids: scales of a kind, other zero points where no clip needs them.

    Args:
        result: The model.
        kind: One of `SCALES`.
        seed: Of the draws.
        spread: How far a scale may be from the calibrated one, as a factor.
    """
    rng = random.Random(seed)
    grids = result.encodings()
    graph, index = result.float_graph, PointIndex(result.plan)
    operators = {operator.name: operator for operator in graph.operators}
    clips: dict[str, list[Any]] = {}
    for point in result.plan.points:
        operator = operators.get(point.tensor)
        if operator is not None and operator.kind in ("Relu", "Clip"):
            clips.setdefault(point.group, []).append(operator.attributes)
    found: dict[str, QParams] = {}
    for point in result.plan.points:
        if point.role == "bias" or point.group in found:
            continue
        q = grids[point.group]
        scale = _scale(q.scale, kind, rng, 1.0 if point.group in clips else spread)
        zero = q.zero_point
        if point.role != "weight":
            low, high = q.quant_min, q.quant_max
            for bounds in clips.get(point.group, ()):  # the grid ends at the clip
                if (maximum := bounds.get("maximum")) is not None:
                    low = max(low, q.quant_max - int(maximum / float(scale)))
                if (minimum := bounds.get("minimum")) is not None:
                    high = min(high, q.quant_min - int(minimum / float(scale)))
            high = max(low, high)
            near = int(zero) + rng.randint(-24, 24)  # so that most codes stay off the ends
            drawn = rng.choice((near, near, near, near, low, high, rng.randint(low, high)))
            zero = torch.tensor(min(max(drawn, low), high), dtype=zero.dtype)
        found[point.group] = replace(q, scale=scale, zero_point=zero)
        if point.role == "activation" and point.group not in clips and rng.random() < 0.2:
            source = index.read(graph, operators[point.tensor], 0)
            if source is not None and source.group in found and source.format == point.format:
                found[point.group] = found[source.group]
    for point in result.plan.points:
        if point.role == "bias":
            source = index.read(graph, operators[point.operator], 0)
            assert source is not None
            weight = found[index.weights[point.operator].group]
            scale = found[source.group].scale * weight.scale
            found[point.group] = replace(grids[point.group], scale=scale.expand(grids[point.group].scale.shape).clone())
    return QuantizedModel(graph, result.plan, result.target, found)


def _scale(scale: Tensor, kind: str, rng: random.Random, spread: float) -> Tensor:
    down = spread == 1.0  # a grid that must not reach past a clip
    factors = [spread ** rng.uniform(-1, 1) for _ in range(scale.numel())]
    wanted = scale.double() * torch.tensor(factors, dtype=torch.float64).reshape(scale.shape)
    whole = torch.floor if down else torch.round
    if kind == "power_of_two":
        return (2.0 ** whole(wanted.log2())).float()
    if kind == "decimal":
        unit = 10.0 ** wanted.log10().floor()
        if rng.random() < 0.2:
            return (whole(wanted / unit) * unit).float()
        digits = torch.tensor([1.0, 2.0, 5.0, 10.0], dtype=torch.float64)  # their quotients put many sums next to ties
        place = torch.searchsorted(digits if down else digits[:-1] * 1.5, wanted / unit, right=True)
        return (digits[place - int(down)] * unit).float()
    return (wanted * (0.9 if down else 1.0)).float()


def grid_of(result: QuantizedModel, name: str) -> QParams:
    """Of an input."""
    point = next(p for p in result.plan.points if p.tensor == name)
    return result.encodings()[point.group]


def input_of(result: QuantizedModel, like: Tensor, seed: int) -> Tensor:
    """Reals of random codes of the input's grid, shaped as another input."""
    q = grid_of(result, result.input_names[0])
    codes = torch.randint(q.quant_min, q.quant_max + 1, like.shape, generator=torch.Generator().manual_seed(seed))
    return dequantize(codes, q)


class Pair(nn.Module):
    """A sum or product of two inputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a + b if self.kind == "add" else a * b


def pairs(kind: str, formats: dict[str, str], broadcast: str) -> QuantizedModel:
    """A sum or product of inputs [256, 256]; `broadcast` names the one that has one column, if any."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 1 if name == broadcast else 256, generator=generator) for name in "ab")
    graph = qhw.capture(Pair(kind), (a, b))
    plan = qhw.plan(graph, TARGET, calibration=[(a, b)], pipeline="ranges-ptq", formats=formats)
    return qhw.quantize(graph, plan, calibration=[(a, b)], progress=SilentProgress())


def every_pair(result: QuantizedModel, broadcast: str) -> tuple[Tensor, Tensor]:
    """Reals of every pair of codes."""
    a, b = (grid_of(result, name) for name in "ab")
    first, second = (torch.arange(q.quant_min, q.quant_max + 1).expand(256, 256) for q in (a, b))
    if broadcast == "a":
        return dequantize(first.t()[:, :1].contiguous(), a), dequantize(second, b)
    return dequantize(first, a), dequantize(second.t()[:, : 1 if broadcast else 256].contiguous(), b)


def exported(result: QuantizedModel, folder: Path) -> Path:
    """model.onnx of a result."""
    return OnnxQdq(OnnxQdqOptions()).export(result, folder)[0]


def float_islands(path: Path, folder: Path) -> tuple[str, ...]:
    """Operators that the runtime runs in float, of the artefact with its codes shown; empty where all is integer.

    Moving reals is none, nor is quantizing them again on the grid that they come from: their codes stay.
    """
    optimized_operators(path, folder, codes=True)
    graph = onnx.load(folder / "optimized.onnx").graph
    grids = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    allowed = _INTEGER | _EITHER | _SHAPES | {"QuantizeLinear", "DequantizeLinear"}
    islands = {node.op_type for node in graph.node if node.op_type not in allowed}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            for reader in (other for other in graph.node if node.output[0] in other.input):
                is_same = reader.op_type == "QuantizeLinear" and _is_one_grid(node, reader, grids)
                if not is_same and reader.op_type not in _MOVING:
                    islands.add(f"{reader.op_type} of reals")
    return tuple(sorted(islands))


def _is_one_grid(a: onnx.NodeProto, b: onnx.NodeProto, grids: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(grids[m], grids[n]) for m, n in zip(a.input[1:], b.input[1:], strict=True))
