# SPDX-License-Identifier: Apache-2.0
"""The ONNX standard's own node cases of quantization, as `onnx.backend.test` brings them, against qhw."""

import importlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.integer import IntegerModel
from qhw.numerics import PerAxis, PerGroup, PerTensor, QParams, affine_qparams, dequantize, quantize
from tests.integer_support import Grid

TARGET = "onnxruntime/cpu-x86-vnni"
KINDS = (
    "QuantizeLinear", "DequantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger", "MatMulInteger",
    "DynamicQuantizeLinear",
)  # fmt: skip
BOUNDS = {
    TensorProto.UINT2: (0, 3), TensorProto.INT2: (-2, 1), TensorProto.UINT4: (0, 15), TensorProto.INT4: (-8, 7),
    TensorProto.UINT8: (0, 255), TensorProto.INT8: (-128, 127), TensorProto.UINT16: (0, 65535),
    TensorProto.INT16: (-32768, 32767),
}  # fmt: skip
FLOAT8_AND_4 = {TensorProto.FLOAT8E4M3FN, TensorProto.FLOAT8E5M2, TensorProto.FLOAT4E2M1}


def _cases() -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kind in KINDS:
            importlib.import_module(f"onnx.backend.test.case.node.{kind.lower()}")
        found = importlib.import_module("onnx.backend.test.case.node")._NodeTestCases
    for case in {case.name: case for case in found}.values():
        nodes = case.model.graph.node
        if len(nodes) == 1 and nodes[0].op_type in KINDS:
            yield case


CASES = tuple(_cases())


def of(*kinds: str) -> Any:
    """Parametrizes over the standard's cases of some kinds that hold integer codes, by name."""
    chosen = [case for case in CASES if case.model.graph.node[0].op_type in kinds and not _types(case) & FLOAT8_AND_4]
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case.name)


def _types(case: Any) -> set[int]:
    graph = case.model.graph
    return {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}


def arrays(case: Any) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Inputs and outputs, narrow codes as int64."""
    return tuple([_array(value) for value in side] for side in case.data_sets[0])  # type: ignore[return-value]


def _array(value: Any) -> np.ndarray:
    found = numpy_helper.to_array(value) if isinstance(value, TensorProto) else np.asarray(value)
    return found.astype(np.float32) if found.dtype == np.float16 else found


def bounds(case: Any, side: str, index: int) -> tuple[int, int]:
    """Lowest and highest code of the type of an input or output."""
    return BOUNDS[getattr(case.model.graph, side)[index].type.tensor_type.elem_type]


def qparams(case: Any, rank: int, scale: np.ndarray, zero: np.ndarray | None, low: int, high: int) -> QParams:
    """As the node's attributes lay them out."""
    given = {a.name: helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}
    axis = given.get("axis", 1) % rank
    layout: PerTensor | PerAxis | PerGroup = PerTensor()
    if given.get("block_size"):
        layout = PerGroup(axis, given["block_size"])
    elif scale.ndim == 1 and rank > 1:
        layout = PerAxis(axis)
    elif scale.ndim == 1:
        scale = scale.reshape(())
    codes = np.zeros(scale.shape) if zero is None else zero.astype(np.int64).reshape(scale.shape)
    return QParams(torch.tensor(scale), torch.tensor(codes, dtype=torch.int32), low, high, layout)


def test_the_cases_that_are_left_out_hold_floats_of_8_and_4_bits_in_place_of_codes() -> None:
    left = [case.name for case in CASES if _types(case) & FLOAT8_AND_4]
    assert all("e4m3" in name or "e5m2" in name or "float4" in name for name in left)
    assert {case.model.graph.node[0].op_type for case in CASES} == set(KINDS)
    assert len(CASES) - len(left) >= 30


@of("QuantizeLinear")
def test_quantize_gives_the_codes_of_quantize_linear(case: Any) -> None:
    (x, scale, *zero), (expected,) = arrays(case)
    q = qparams(case, x.ndim, scale, zero[0] if zero else None, *bounds(case, "output", 0))
    np.testing.assert_array_equal(quantize(torch.tensor(x), q).numpy(), expected.astype(np.int64))


@of("DequantizeLinear")
def test_dequantize_gives_the_reals_of_dequantize_linear(case: Any) -> None:
    (codes, scale, *zero), (expected,) = arrays(case)
    q = qparams(case, codes.ndim, scale, zero[0] if zero else None, *bounds(case, "input", 0))
    np.testing.assert_array_equal(dequantize(torch.tensor(codes.astype(np.int32)), q).numpy(), expected)


@of("DynamicQuantizeLinear")
def test_a_range_gives_the_scale_zero_point_and_codes_of_dynamic_quantize_linear(case: Any) -> None:
    (x,), (codes, scale, zero) = arrays(case)
    q = affine_qparams(torch.tensor(x.min()), torch.tensor(x.max()), quant_min=0, quant_max=255)
    assert (q.scale.numpy(), int(q.zero_point)) == (scale, int(zero))
    np.testing.assert_array_equal(quantize(torch.tensor(x), q).numpy(), codes)


class Product(nn.Module):
    """A product of two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b."""
        return torch.matmul(a, b)


def grid(scale: Any, zero: Any, limits: tuple[int, int]) -> Grid:
    """One scale and zero point, also where the standard writes them as lists."""
    scales, zeros = (np.unique(np.asarray(values)) for values in (scale, zero))
    assert scales.size == zeros.size == 1
    return Grid(scales[0], int(zeros[0]), *limits)


def lowered(model: nn.Module, reals: Sequence[Tensor], grids: Sequence[Grid], formats: dict[str, str]) -> IntegerModel:
    """A model of one operator in onnxruntime's arithmetic, on grids of its inputs, its weight and its result."""
    graph = qhw.capture(model.eval(), tuple(reals))
    plan = qhw.plan(graph, TARGET, calibration=[tuple(reals)], pipeline="ranges-ptq", formats=formats)
    points = sorted(plan.points, key=lambda point: ("input", "weight", "activation").index(point.role))
    qparams = {point.group: grid.qparams for point, grid in zip(points, grids, strict=True)}
    return IntegerModel(QuantizedModel(graph, plan, qhw.load_target(TARGET), qparams))


def convolution(x: Grid, w: Grid, out: Grid, codes: np.ndarray, weight: np.ndarray, padding: int = 0) -> IntegerModel:
    """A convolution with these weight codes."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], tuple(weight.shape[2:]), padding=padding, bias=False)
    layer.weight = nn.Parameter(w.reals(weight))
    return lowered(layer, [x.reals(codes)], [x, w, out], {"*weight": "w8u"})


@of("QLinearConv")
def test_a_convolution_gives_the_codes_of_qlinear_conv(case: Any) -> None:
    (x, xs, xz, w, ws, wz, ys, yz), (expected,) = arrays(case)
    grids = grid(xs, xz, (0, 255)), grid(ws, wz, (0, 255)), grid(ys, yz, (0, 255))
    found = list(convolution(*grids, x, w).codes(grids[0].reals(x)).values())[-1]
    np.testing.assert_array_equal(found.numpy(), expected)


@of("QLinearMatMul")
def test_a_product_gives_the_codes_of_qlinear_matmul(case: Any) -> None:
    (a, sa, za, b, sb, zb, sy, zy), (expected,) = arrays(case)
    limits = bounds(case, "input", 0)
    grids = grid(sa, za, limits), grid(sb, zb, limits), grid(sy, zy, limits)
    reals = [grids[0].reals(a), grids[1].reals(b)]
    model = lowered(Product(), reals, grids, {"*": "u8" if limits[0] == 0 else "s8"})
    np.testing.assert_array_equal(list(model.codes(*reals).values())[-1].numpy(), expected)


@of("ConvInteger")
def test_accumulators_of_a_convolution_are_those_of_conv_integer(case: Any) -> None:
    (x, w, xz, *wz), (expected,) = arrays(case)
    given = {a.name: helper.get_attribute_value(a) for a in case.model.graph.node[0].attribute}
    zeros = np.broadcast_to(wz[0] if wz else 0, len(w))
    for channel, zero in enumerate(zeros):  # the target's weights have one zero point
        grids = grid(1.0, xz, (0, 255)), grid(1.0, zero, (0, 255)), grid(1.0, 0, (0, 255))
        model = convolution(*grids, x, w[channel : channel + 1], given.get("pads", [0])[0])
        found = model.accumulators(next(iter(model.sites)), torch.tensor(x))
        np.testing.assert_array_equal(found[:, 0].numpy(), expected[:, channel])


@of("MatMulInteger")
def test_accumulators_of_a_product_are_those_of_matmul_integer(case: Any) -> None:
    (a, b, za, zb), (expected,) = arrays(case)
    grids = grid(1.0, za, (0, 255)), grid(1.0, zb, (0, 255)), grid(1.0, 0, (0, 255))
    model = lowered(Product(), [grids[0].reals(a), grids[1].reals(b)], grids, {})
    found = model.accumulators(next(iter(model.sites)), torch.tensor(a), torch.tensor(b))
    np.testing.assert_array_equal(found.numpy(), expected)
