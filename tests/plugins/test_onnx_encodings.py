# SPDX-License-Identifier: Apache-2.0
"""Storage types, packing, biases and QDQ pairs of the ONNX exporter, against numpy, onnx and hand arithmetic."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from qhw.numerics import PerAxis, PerGroup, PerTensor, QParams
from qhw_plugins.onnx_builder import Builder, packed
from qhw_plugins.onnx_encodings import dequantized, implies, int32_bias, quantized, storage_of


def grid(low: int, high: int, scale: float = 0.5, zero_point: int = 0) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), low, high, PerTensor())


@pytest.mark.parametrize(
    ("low", "high", "weights", "activations"),
    [
        (-8, 7, "int4", "int8"),
        (-7, 7, "int4", "int8"),
        (0, 15, "uint4", "uint8"),
        (-128, 127, "int8", "int8"),
        (-127, 127, "int8", "int8"),
        (0, 127, "uint8", "uint8"),
        (0, 255, "uint8", "uint8"),
        (-32, 31, "int8", "int8"),
        (-128, 128, "int16", "int16"),
        (0, 65535, "uint16", "uint16"),
        (-32768, 32767, "int16", "int16"),
        (-(2**19), 2**19 - 1, "int32", None),
        (-(2**39), 2**39 - 1, None, None),
    ],
)
def test_a_grid_goes_into_the_smallest_type_that_holds_it(
    low: int, high: int, weights: str | None, activations: str | None
) -> None:
    found = [storage_of(grid(low, high), activation=activation) for activation in (False, True)]
    assert [None if storage is None else storage.name for storage in found] == [weights, activations]


def test_four_bits_go_into_eight_when_asked() -> None:
    storage = storage_of(grid(-8, 7), activation=False, int4=False)
    assert storage is not None and storage.name == "int8"


def test_int32_needs_zero_point_0() -> None:
    assert storage_of(grid(-(2**19), 2**19 - 1, zero_point=1), activation=False) is None


@pytest.mark.parametrize("codes", [[-8, 7, 0, -1], [3, -3, 5], [7]], ids=["even", "odd", "one"])
def test_int4_is_packed_as_onnx_unpacks_it(codes: list[int]) -> None:
    tensor = packed(np.array(codes, dtype=np.int8), TensorProto.INT4)
    assert numpy_helper.to_array(tensor).astype(np.int64).tolist() == codes
    assert len(tensor.raw_data) == (len(codes) + 1) // 2


def test_the_first_code_is_in_the_low_half() -> None:
    # 1 | 15 << 4 = 0xF1; 2 alone = 0x02
    assert packed(np.array([1, 15, 2], dtype=np.uint8), TensorProto.UINT4).raw_data == bytes([0xF1, 0x02])


@pytest.mark.parametrize(
    ("scale", "zero_point", "low", "high", "expected"),
    [
        (0.1, 0, 0.0, None, True),  # codes [0, 255], 0 is code 0: saturation is a ReLU
        (0.1, 1, 0.0, None, False),  # code 0 is -0.1, which a ReLU forbids
        (6 / 255, 0, 0.0, 6.0, True),  # 6.0 is code 255
        (5 / 255, 0, 0.0, 6.0, True),  # 6.0 lies beyond the grid
        (7 / 255, 0, 0.0, 6.0, False),  # 6.0 is code 219 of 255
        (0.1, 0, None, None, True),
        (0.1, 0, float("-inf"), float("inf"), True),
    ],
)
def test_a_clip_is_implied_when_its_bounds_are_the_ends_of_the_grid(
    scale: float, zero_point: int, low: float | None, high: float | None, expected: bool
) -> None:
    assert implies(grid(0, 255, scale, zero_point), low, high) is expected


def test_a_bias_is_rounded_half_to_even_in_units_of_the_accumulator() -> None:
    # 0.25 / 0.5 = 0.5 -> 0, 0.75 / 0.5 = 1.5 -> 2, -1.25 / 0.5 = -2.5 -> -2
    codes, qparams, fits = int32_bias(torch.tensor([0.25, 0.75, -1.25]), torch.tensor(0.5))
    assert codes.tolist() == [0, 2, -2] and codes.dtype == torch.int32
    assert qparams.granularity == PerTensor() and fits


def test_a_bias_past_32_bits_is_clamped_and_said() -> None:
    codes, qparams, fits = int32_bias(torch.tensor([1.0, 1.0]), torch.tensor([1.0, 1e-10]))
    assert codes.tolist() == [1, 2**31 - 1]
    assert qparams.granularity == PerAxis(0) and not fits


def model_of(b: Builder, inputs: list[tuple[str, list[int]]], output: str) -> onnx.ModelProto:
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs]
    result = helper.make_empty_tensor_value_info(output)
    graph = helper.make_graph(b.nodes, "test", infos, [result], list(b.initializers.values()))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", b.opset)])


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20),
    scale=st.floats(2.0**-10, 2.0, width=32),
    codes=st.sampled_from([(0, 255), (-128, 127), (-127, 127), (0, 100), (-32, 31), (0, 65535), (-5, 3)]),
    part=st.floats(0, 1),
)
def test_a_pair_computes_the_quantizer_on_any_grid(
    values: list[float], scale: float, codes: tuple[int, int], part: float
) -> None:
    low, high = codes
    zero_point = low + round(part * (high - low))
    qparams = grid(low, high, scale, zero_point)
    storage = storage_of(qparams, activation=True)
    assert storage is not None
    b = Builder(21)
    name = quantized(b, "x", qparams, storage, "group", "result")
    x = np.array(values, dtype=np.float32)
    found = ReferenceEvaluator(model_of(b, [("x", [len(x)])], name)).run(None, {"x": x})[0]
    # ONNX QuantizeLinear by its text, on the grid's own bounds; DequantizeLinear is one float32 product.
    code = np.clip(np.rint(x / np.float32(scale)).astype(np.float64) + zero_point, low, high)
    np.testing.assert_array_equal(found, (code - zero_point).astype(np.float32) * np.float32(scale))


@pytest.mark.parametrize(("low", "high"), [(-7, 7), (-127, 127), (0, 255)], ids=["int4", "int8", "uint8"])
@pytest.mark.parametrize("granularity", [PerTensor(), PerAxis(1), PerGroup(1, 3)], ids=str)
def test_weights_are_dequantized_with_their_scales(
    low: int, high: int, granularity: PerTensor | PerAxis | PerGroup
) -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(low, high + 1, (4, 6))
    scale = {PerTensor: np.array(0.3), PerAxis: np.arange(1, 7) / 7, PerGroup: np.arange(1, 9).reshape(4, 2) / 9}[
        type(granularity)
    ].astype(np.float32)
    zero_point = np.zeros(scale.shape, dtype=np.int32)
    qparams = QParams(torch.from_numpy(scale.copy()), torch.from_numpy(zero_point), low, high, granularity)
    storage = storage_of(qparams, activation=False)
    assert storage is not None
    b = Builder(21)
    name = dequantized(b, torch.from_numpy(codes), qparams, storage, "w", "result")
    found = ReferenceEvaluator(model_of(b, [], name)).run(None, {})[0]
    blocks = np.repeat(scale, 3, axis=1) if isinstance(granularity, PerGroup) else scale
    np.testing.assert_array_equal(found, codes.astype(np.float32) * blocks)
    assert b.needs.get(21) is not None if storage.name == "int4" or isinstance(granularity, PerGroup) else True


def test_equal_groups_share_codes_and_scale() -> None:
    b = Builder(13)
    qparams = grid(-127, 127)
    storage = storage_of(qparams, activation=False)
    assert storage is not None
    for name in ("first", "second"):
        dequantized(b, torch.tensor([1, 2]), qparams, storage, "shared", name)
    assert sorted(b.initializers) == ["shared/codes", "shared/scale", "shared/zero_point"]
    assert len(b.nodes) == 2


def test_names_and_constants_are_unique() -> None:
    b = Builder(13)
    assert [b.unique("a"), b.unique("a"), b.unique("a")] == ["a", "a_2", "a_3"]
    assert b.constant(0.0, np.float32) == b.constant(0.0, np.float32)
    # Equal numbers of another type or sign are other constants.
    assert len({b.constant(0.0, np.float32), b.constant(0, np.int64), b.constant(-0.0, np.float32)}) == 3


def test_pruning_keeps_what_outputs_need(tmp_path: Path) -> None:
    b = Builder(13)
    kept = b.op("Relu", ["x"], "kept")
    b.op("Add", ["x", b.constant(1.0, np.float32)], "unread")
    b.prune([kept])
    assert [node.op_type for node in b.nodes] == ["Relu"] and not b.initializers
