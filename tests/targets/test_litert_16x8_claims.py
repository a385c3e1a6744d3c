# SPDX-License-Identifier: Apache-2.0
"""google/litert-16x8 against LiteRT's reference kernels: no code of IntegerModel differs, and a changed target's do."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType

import qhw
from qhw.engine import QuantizedModel
from qhw.extension import default_registry
from qhw.integer import IntegerModel
from qhw.numerics import PerAxis, PerTensor, QParams
from qhw.schema import TargetSpec, parse_target
from tests import litert_writer
from tests.integer_support import FunctionOf
from tests.litert_writer import Encoding, Writer

Array = np.ndarray[Any, Any]
RUNS = 3
VERSIONS = {"FULLY_CONNECTED": 11, "CONV_2D": 6, "DEPTHWISE_CONV_2D": 6, "ADD": 3, "SUB": 3, "BATCH_MATMUL": 3}


class Writer16(Writer):
    """Tensors that are computed have int16 codes."""

    def _new(self, shape: Sequence[int], encoding: Encoding) -> int:
        self._graph.tensors.append(litert_writer._tensor(shape, "INT16", encoding, 0))
        return len(self._graph.tensors) - 1


@pytest.fixture(autouse=True)
def wide_types(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = {np.dtype(np.int16): "INT16", np.dtype(np.int64): "INT64"}
    monkeypatch.setattr(litert_writer, "_KINDS", litert_writer._KINDS | kinds)
    monkeypatch.setattr(litert_writer, "_VERSIONS", litert_writer._VERSIONS | VERSIONS)


@dataclass
class Case:
    """One operator: what torch calls it, its codes and scales, and how LiteRT writes it."""

    module: nn.Module
    inputs: list[tuple[Array, float]]
    output: float
    name: str
    options: Any
    constants: tuple[tuple[Array, Encoding | None], ...] = ()
    weight: tuple[Array, Array] | None = None  # codes in torch's layout, a scale per output channel
    bias: Array | None = None
    is_image: bool = False


def codes_of_runtime(case: Case) -> Array:
    writer = Writer16()
    arrays = [np.moveaxis(x, 1, -1) if case.is_image else x for x, _ in case.inputs]
    given = [writer.given(x.shape, Encoding(scale)) for x, (_, scale) in zip(arrays, case.inputs, strict=True)]
    stored = [writer.constant(array, encoding) for array, encoding in case.constants]
    result = writer.add(case.name, case.options, [*given, *stored], Encoding(case.output))
    file = writer.finish(given, [result])
    run = Interpreter(model_content=file, experimental_op_resolver_type=OpResolverType.BUILTIN_REF, num_threads=1)
    run.allocate_tensors()
    for place, x in zip(run.get_input_details(), arrays, strict=True):
        run.set_tensor(place["index"], np.ascontiguousarray(x))
    run.invoke()
    found = run.get_tensor(run.get_output_details()[0]["index"])
    return np.moveaxis(found, -1, 1) if case.is_image else found


def codes_of_qhw(case: Case, specs: Sequence[TargetSpec]) -> list[Array]:
    """Under each target, planned once for the first."""
    example = tuple(torch.from_numpy(x.astype(np.float32)) * torch.tensor(scale) for x, scale in case.inputs)
    grids = {"output": grid(case.output)}
    if case.weight is not None and case.bias is not None:
        codes, scales = case.weight
        layer = next(m for m in case.module.modules() if hasattr(m, "weight"))
        scale = torch.from_numpy(scales)
        unit = torch.tensor(case.inputs[0][1]) * scale
        zeros = torch.zeros(len(scale), dtype=torch.int32)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(codes).float() * scale.reshape(-1, *[1] * (codes.ndim - 1)))
            layer.bias.copy_(torch.from_numpy(case.bias).float() * unit)
        grids["weight"] = QParams(scale, zeros, -127, 127, PerAxis(0))
        grids["bias"] = QParams(unit, zeros, -(2**47), 2**47 - 1, PerAxis(0))
    graph = qhw.capture(case.module.eval(), example)
    plan = qhw.plan(graph, specs[0], calibration=dict(zip(graph.inputs, example, strict=True)))
    assert all(op.where == "accelerator" for op in plan.operators), plan.operators
    scales_in = dict(zip(graph.inputs, (scale for _, scale in case.inputs), strict=True))
    found = {
        p.group: grid(scales_in[p.tensor])
        if p.role == "input"
        else grids["output" if p.role == "activation" else p.role]
        for p in sorted(plan.points, key=lambda p: p.role == "input")
    }
    results = [IntegerModel(QuantizedModel(graph, plan, spec, found)).codes(*example) for spec in specs]
    return [list(result.values())[-1].numpy() for result in results]


def grid(scale: float) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(0, dtype=torch.int32), -32768, 32767, PerTensor())


def target(clause: str = "") -> TargetSpec:
    text = f'schema_version = 1\nname = "acme/mutant"\nextends = "google/litert-16x8"\n{clause}\n'
    return parse_target(text, find_base=default_registry().target_path)


def codes(draw: np.random.Generator, *shape: int) -> Array:
    return draw.integers(-32768, 32768, shape).astype(np.int16)


def scale(draw: np.random.Generator, low: float, high: float, *shape: int) -> Any:
    found = np.exp(draw.uniform(np.log(low), np.log(high), shape)).astype(np.float32)
    return found if shape else float(found)


def layer(draw: np.random.Generator, module: nn.Module, shape: tuple[int, ...], name: str, options: Any) -> Case:
    """A layer with weights of int8 and a bias of int64."""
    x, x_scale = codes(draw, *shape), scale(draw, 1e-4, 1e-3)
    sizes = tuple(next(iter(module.parameters())).shape)
    w, w_scale = draw.integers(-127, 128, sizes).astype(np.int8), scale(draw, 1e-3, 2e-2, sizes[0])
    bias = draw.integers(-(2**20), 2**20, sizes[0])
    axis = 3 if name == "DEPTHWISE_CONV_2D" else 0
    stored = w if w.ndim == 2 else w.transpose(1, 2, 3, 0) if axis else w.transpose(0, 2, 3, 1)
    unit = Encoding(np.float32(x_scale) * w_scale)
    output = scale(draw, 3e-4, 3e-3)
    constants = ((stored, Encoding(w_scale, 0, axis)), (bias, unit))
    return Case(module, [(x, x_scale)], output, name, options, constants, (w, w_scale), bias, w.ndim == 4)


def convolution(draw: np.random.Generator) -> Case:
    options = schema.Conv2DOptionsT()
    options.strideH = options.strideW = options.dilationHFactor = options.dilationWFactor = 1
    options.padding = schema.Padding.VALID
    return layer(draw, nn.Conv2d(3, 7, 3), (2, 3, 6, 6), "CONV_2D", options)


def depthwise(draw: np.random.Generator) -> Case:
    options = schema.DepthwiseConv2DOptionsT()
    options.strideH = options.strideW = options.dilationHFactor = options.dilationWFactor = 1
    options.depthMultiplier, options.padding = 1, schema.Padding.VALID
    return layer(draw, nn.Conv2d(6, 6, 3, groups=6), (2, 6, 7, 7), "DEPTHWISE_CONV_2D", options)


def linear(draw: np.random.Generator) -> Case:
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    return layer(draw, nn.Linear(24, 9), (16, 24), "FULLY_CONNECTED", options)


def two(name: str, options: Callable[[], Any], function: Callable[[Tensor, Tensor], Tensor], high: float) -> Any:
    def case(draw: np.random.Generator) -> Case:
        chosen = options()
        if hasattr(chosen, "potScaleInt16"):
            chosen.potScaleInt16 = False
        inputs = [(codes(draw, 4, 50), scale(draw, 1e-4, 1e-3)) for _ in range(2)]
        return Case(FunctionOf(function), inputs, scale(draw, 5e-4, high), name, chosen)

    return case


def average(draw: np.random.Generator) -> Case:
    options = schema.Pool2DOptionsT()
    options.filterHeight = options.filterWidth = 2
    options.strideH = options.strideW = 1
    options.padding = schema.Padding.VALID
    x_scale = scale(draw, 1e-4, 1e-3)
    small = draw.integers(-9, 10, (2, 4, 8, 8)).astype(np.int16)  # sums around 0, with ties of both signs
    return Case(nn.AvgPool2d(2, 1), [(small, x_scale)], x_scale, "AVERAGE_POOL_2D", options, is_image=True)


def rectified(draw: np.random.Generator) -> Case:
    return Case(
        FunctionOf(F.relu), [(codes(draw, 4, 50), scale(draw, 1e-4, 1e-3))], scale(draw, 1e-4, 1e-3), "RELU", None
    )


def mean(draw: np.random.Generator) -> Case:
    options = schema.ReducerOptionsT()
    options.keepDims = True
    axes = ((np.array([1, 2], np.int32), None),)
    x, y = [(codes(draw, 3, 6, 5, 7), scale(draw, 1e-4, 1e-3))], scale(draw, 1e-5, 1e-4)
    module = FunctionOf(lambda t: t.mean(dim=(2, 3), keepdim=True))
    return Case(module, x, y, "MEAN", options, axes, is_image=True)


def product(draw: np.random.Generator) -> Case:
    inputs = [(codes(draw, 2, 5, 9), scale(draw, 1e-4, 1e-3)), (codes(draw, 2, 9, 6), scale(draw, 1e-4, 1e-3))]
    options = schema.BatchMatMulOptionsT()
    return Case(FunctionOf(torch.matmul), inputs, scale(draw, 1e-3, 1e-2), "BATCH_MATMUL", options)


FLOOR = 'requantize.rescale = { rounding = "floor", source = "memory" }'
WIDE = 'requantize.reduced = { multiplier_bits = 31, source = "memory" }'
CASES: dict[str, tuple[Callable[[np.random.Generator], Case], str]] = {
    "Conv": (convolution, WIDE),
    "DepthwiseConv": (depthwise, WIDE),
    "Gemm": (linear, 'kernels.fully_connected = { requantize = "reduced", source = "memory" }'),
    "MatMul": (product, WIDE),
    "Add": (two("ADD", schema.AddOptionsT, torch.add, 3e-3), FLOOR.replace("rescale", "sum")),
    "Sub": (two("SUB", schema.SubOptionsT, torch.sub, 3e-3), FLOOR.replace("rescale", "sum")),
    "Mul": (two("MUL", schema.MulOptionsT, torch.mul, 1e-2), FLOOR),
    "AveragePool": (average, 'operators.AveragePool = { rounding = "half_to_plus_infinity", source = "memory" }'),
    "ReduceMean": (mean, FLOOR),
    "Relu": (rectified, FLOOR),
}


@pytest.mark.parametrize("kind", CASES)
def test_no_code_differs_from_the_runtime_and_some_of_a_changed_target_do(kind: str) -> None:
    draw_case, clause = CASES[kind]
    shipped, changed = target(), target(clause)
    differing = [0, 0]
    for seed in range(RUNS):
        case = draw_case(np.random.default_rng(seed))
        expected = codes_of_runtime(case)
        for index, found in enumerate(codes_of_qhw(case, (shipped, changed))):
            differing[index] += int((found != expected).sum())
    assert differing[0] == 0
    assert differing[1] > 0
