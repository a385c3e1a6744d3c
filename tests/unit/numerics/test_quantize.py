# SPDX-License-Identifier: Apache-2.0
"""Quantize and dequantize against a loop in exact fractions, and against ONNX's own reference."""

import math

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from qhw.errors import RangeError
from qhw.numerics import (
    ROUNDING_RULES,
    PerAxis,
    PerGroup,
    PerTensor,
    QParams,
    code_dtype,
    dequantize,
    fake_quantize,
    parameter_shape,
    quantize,
)
from qhw.testing import reference

GRIDS = [
    (0, 255),
    (-128, 127),
    (-127, 127),
    (0, 15),
    (-8, 7),
    (-2, 1),
    (0, 65535),
    (-32768, 32767),
    (-(2**31), 2**31 - 1),
]
SCALES = [float(np.float32(s)) for s in (0.1, 0.02, 1 / 3, 1.0, 0.5, 2.0**-126, 1e-30, 1e30, 127.0)]
EDGES = [float(np.float32(v)) for v in (0.0, -0.0, 1e30, -1e30, 1e-40, -1e-45, 3e38)]


@st.composite
def cases(draw):
    """x, qparams, and the keywords of `reference.expand`; half of the elements are exact ties (k + 1/2) * scale."""
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=0, max_size=3)))
    granularity, keywords = PerTensor(), {}
    if shape and draw(st.booleans()):
        axis = draw(st.integers(0, len(shape) - 1))
        granularity, keywords = PerAxis(axis), {"axis": axis}
        if draw(st.booleans()):
            size = draw(st.integers(1, 5))
            granularity, keywords = PerGroup(axis, size), {"axis": axis, "group_size": size}
    size = parameter_shape(granularity, shape)
    count = int(np.prod(size))
    quant_min, quant_max = draw(st.sampled_from(GRIDS))
    scale = np.float32(draw(st.lists(st.sampled_from(SCALES), min_size=count, max_size=count))).reshape(size)
    codes = st.sampled_from([0, quant_min, quant_max]) | st.integers(quant_min, quant_max)
    zero_point = np.int32(draw(st.lists(codes, min_size=count, max_size=count)))
    zero_point = zero_point.reshape(size)
    numbers = int(np.prod(shape))
    ties = st.integers(-300, 300).map(lambda k: k + 0.5)
    x = np.empty(shape, dtype=np.float32)
    x[...] = np.reshape(draw(st.lists(ties, min_size=numbers, max_size=numbers)), shape)
    with np.errstate(over="ignore"):
        x *= reference.expand(scale, shape, **keywords)
    x[~np.isfinite(x)] = 3e38
    others = (
        st.floats(width=32, allow_nan=False, allow_infinity=False)
        | st.floats(-50, 50, width=32)
        | st.sampled_from(EDGES)
    )
    for index in np.ndindex(*shape):
        if draw(st.booleans()):
            x[index] = draw(others)
    qparams = QParams(torch.from_numpy(scale), torch.from_numpy(zero_point), quant_min, quant_max, granularity)
    return x, qparams, keywords


def expanded(qparams, shape, keywords):
    scale, zero_point = qparams.scale.numpy(), qparams.zero_point.numpy()
    return reference.expand(scale, shape, **keywords), reference.expand(zero_point, shape, **keywords)


@given(cases(), st.sampled_from(ROUNDING_RULES))
@settings(max_examples=300, deadline=None)
def test_codes_and_reals_match_the_loop(case, rule):
    x, qparams, keywords = case
    scale, zero_point = expanded(qparams, x.shape, keywords)
    x_q = quantize(torch.from_numpy(x), qparams, rule)
    expected = reference.quantize(x, scale, zero_point, qparams.quant_min, qparams.quant_max, rule)
    np.testing.assert_array_equal(x_q.numpy(), expected)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(
            dequantize(x_q, qparams).numpy(), reference.dequantize(expected, scale, zero_point)
        )


@given(cases(), st.sampled_from(ROUNDING_RULES))
@settings(max_examples=300, deadline=None)
def test_fake_quantize_is_dequantize_of_quantize_bit_for_bit(case, rule):
    x, qparams, _ = case
    x = torch.from_numpy(x)
    expected = dequantize(quantize(x, qparams, rule), qparams)
    assert torch.equal(fake_quantize(x, qparams, rule).view(torch.int32), expected.view(torch.int32))


def test_ties_by_hand():
    # x / scale = -1.5, -0.5, 0.5, 1.5, 2.5 rounds to -2, 0, 0, 2, 2; the zero point 1 comes after rounding.
    # Adding it first would give round(-0.5), round(0.5), round(1.5), round(2.5), round(3.5) = 0, 0, 2, 2, 4.
    qparams = QParams(torch.tensor(2.0), torch.tensor(1, dtype=torch.int32), -8, 7, PerTensor())
    x = torch.tensor([-3.0, -1.0, 1.0, 3.0, 5.0])
    assert quantize(x, qparams).tolist() == [-1, 1, 1, 3, 3]
    assert dequantize(quantize(x, qparams), qparams).tolist() == [-4.0, 0.0, 0.0, 4.0, 4.0]


def test_division_and_not_multiplication_by_the_reciprocal():
    scale = np.float32(0.02)
    x = (np.arange(-128, 128, dtype=np.float32) + np.float32(0.5)) * scale
    divided, multiplied = np.rint(x / scale), np.rint(x * (np.float32(1) / scale))
    assert (divided != multiplied).any(), "the inputs must tell the two apart"
    qparams = QParams(torch.tensor(0.02), torch.tensor(0, dtype=torch.int32), -128, 127, PerTensor())
    np.testing.assert_array_equal(quantize(torch.from_numpy(x), qparams).numpy(), divided.clip(-128, 127))


@pytest.mark.parametrize(
    ("quant_min", "quant_max", "dtype"),
    [
        (-128, 127, torch.int8),
        (-1, 0, torch.int8),
        (0, 15, torch.int8),
        (0, 255, torch.uint8),
        (-1, 128, torch.int16),
        (0, 65535, torch.int32),
        (-(2**31), 2**31 - 1, torch.int32),
        (-(2**39), 2**39 - 1, torch.int64),
    ],
)
def test_codes_come_in_the_smallest_dtype(quant_min, quant_max, dtype):
    assert code_dtype(quant_min, quant_max) == dtype
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), quant_min, quant_max, PerTensor())
    x_q = quantize(torch.tensor([-1e30, 0.0, 1e30]), qparams)
    assert x_q.dtype == dtype
    assert x_q.tolist() == [quant_min, 0, quant_max]


def qdq_model(onnx_type, scale, zero_point, shape, attributes):
    """x -> QuantizeLinear -> codes, DequantizeLinear -> reals, opset 21."""
    initializers = [
        helper.make_tensor("s", TensorProto.FLOAT, scale.shape, scale.flatten()),
        helper.make_tensor("z", onnx_type, zero_point.shape, zero_point.flatten()),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x_q"], **attributes),
        helper.make_node("DequantizeLinear", ["x_q", "s", "z"], ["x_dq"], **attributes),
    ]
    outputs = [
        helper.make_tensor_value_info("x_q", onnx_type, shape),
        helper.make_tensor_value_info("x_dq", TensorProto.FLOAT, shape),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    graph = helper.make_graph(nodes, "qdq", inputs, outputs, initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    onnx.checker.check_model(model)
    return ReferenceEvaluator(model)


@pytest.mark.parametrize("onnx_type, bounds", [(TensorProto.INT8, (-128, 127)), (TensorProto.UINT8, (0, 255))], ids=str)
@pytest.mark.parametrize(
    ("granularity", "attributes"),
    [
        (PerTensor(), {}),
        (PerAxis(0), {"axis": 0}),
        (PerAxis(1), {"axis": 1}),
        (PerGroup(1, 4), {"axis": 1, "block_size": 4}),
    ],
    ids=["per_tensor", "per_axis0", "per_axis1", "per_group-blocked"],
)
def test_onnx_reference_gives_the_same_codes_and_reals(onnx_type, bounds, granularity, attributes):
    rng = np.random.default_rng(0)
    shape = (6, 8)
    size = parameter_shape(granularity, shape)
    # Short decimals: their multiples land on ties and near-ties.
    scale = rng.choice(np.float32([0.1, 0.02, 0.05]), size)
    zero_point = rng.integers(*bounds, size, endpoint=True)
    x = np.float32((rng.integers(-200, 200, shape) + 0.5) * 0.05)
    evaluator = qdq_model(onnx_type, scale, zero_point, shape, attributes)
    expected_q, expected_dq = evaluator.run(None, {"x": x})
    qparams = QParams(
        torch.from_numpy(np.asarray(scale)), torch.from_numpy(np.asarray(zero_point, np.int32)), *bounds, granularity
    )
    x_q = quantize(torch.from_numpy(x), qparams)
    np.testing.assert_array_equal(x_q.numpy(), expected_q)
    np.testing.assert_array_equal(dequantize(x_q, qparams).numpy(), expected_dq)


def test_what_is_no_number_is_refused_by_name():
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), 0, 255, PerTensor())
    with pytest.raises(RangeError, match=r"^conv1\.weight: values must not be NaN; got 2 of 3 elements"):
        quantize(torch.tensor([math.nan, 1.0, math.nan]), qparams, name="conv1.weight")


def test_infinite_values_are_the_ends_of_the_grid():
    """As QuantizeLinear of ONNX saturates them."""
    qparams = QParams(torch.tensor(1.0), torch.tensor(3, dtype=torch.int32), 0, 255, PerTensor())
    assert quantize(torch.tensor([math.inf, 1.0, -math.inf]), qparams).tolist() == [255, 4, 0]


def test_fake_quantize_keeps_nan_and_clamps_infinite_values():
    qparams = QParams(torch.tensor(0.5), torch.tensor(1, dtype=torch.int32), -8, 7, PerTensor())
    result = fake_quantize(torch.tensor([float("nan"), float("inf"), -float("inf")]), qparams)
    assert result[0].isnan()
    assert result[1:].tolist() == [3.0, -4.5]


@pytest.mark.parametrize("function", [quantize, fake_quantize, dequantize])
def test_a_scale_that_does_not_fit_the_tensor_is_refused(function):
    qparams = QParams(torch.ones(3), torch.zeros(3, dtype=torch.int32), 0, 255, PerAxis(1))
    x = torch.zeros(3, 4, dtype=torch.int32 if function is dequantize else torch.float32)
    with pytest.raises(RangeError, match=r"fc: scale must have shape \(4,\) for PerAxis\(axis=1\); got \(3,\)"):
        function(x, qparams, name="fc")


def test_codes_beyond_float64_are_refused():
    qparams = QParams(torch.tensor(1.0), torch.tensor(0, dtype=torch.int32), -(2**63), 2**63 - 1, PerTensor())
    with pytest.raises(
        RangeError, match=r"x: codes must stay within 2\*\*53; got 9223372036854775807. Narrow the grid"
    ):
        quantize(torch.tensor([1.0]), qparams, name="x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_fake_quantize_returns_the_dtype_it_got(dtype):
    qparams = QParams(torch.tensor(0.5), torch.tensor(0, dtype=torch.int32), -8, 7, PerTensor())
    result = fake_quantize(torch.tensor([0.3, 9.0], dtype=dtype), qparams)
    assert result.dtype == dtype
    assert result.tolist() == [0.5, 3.5]
