# SPDX-License-Identifier: Apache-2.0
"""Average pools that dequantize first, against numpy float32, and what a target must state for them."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from tests.integer_support import Array, Grid, registry

X, OUT = Grid(0.02, 131, 0, 255), Grid(0.03, 77, 0, 255)
TARGET = """
schema_version = 1
name = "acme/reals"
formats.a = { bits = 8, signed = false, per = "tensor" }
accumulators.sum = { bits = 32, overflow = "wrap" }
accumulators.reals = { kind = "float", bits = BITS }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.reals = { input = ["a"], output = ["a"], accumulator = "reals", requantize = "r" }
kernels.codes = { input = ["a"], output = ["a"], accumulator = "sum", requantize = "r" }
operators.AveragePool = { kernels = ["reals"], rounding_order = "ORDER"WHOLE }
"""
WHOLE = ', whole_image = "GlobalAveragePool"'
GLOBAL = 'operators.GlobalAveragePool = { kernels = ["codes"], rounding_order = "zero_point_after" }\n'


def model(
    folder: Path, pool: nn.Module, codes: Array, *, bits: int = 32, order: str = "zero_point_before", whole: str = "",
    more: str = "",
) -> IntegerModel:  # fmt: skip
    """A pool alone, on the grids above."""
    path = folder / "target.toml"
    path.write_text(TARGET.replace("BITS", str(bits)).replace("ORDER", order).replace("WHOLE", whole) + more)
    spec = qhw.load_target(path, registry=registry())
    graph = qhw.capture(pool.eval(), X.reals(codes))
    plan = qhw.plan(graph, spec, calibration=[X.reals(codes)], registry=registry())
    groups = {point.group: (X if point.role == "input" else OUT).qparams for point in plan.points}
    return IntegerModel(QuantizedModel(graph, plan, spec, groups))


def averaged(codes: Array, kernel: tuple[int, int], padding: int = 0, inside: bool = False) -> Array:
    """Row by row in float32, stride 1."""
    reals = (codes.astype(np.float32) - np.float32(X.zero_point)) * np.float32(X.scale)
    edges = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    reals, ones = np.pad(reals, edges), np.pad(np.ones_like(reals), edges)
    rows, columns = (n - k + 1 for n, k in zip(reals.shape[2:], kernel, strict=True))
    total, count = (np.zeros((*codes.shape[:2], rows, columns), np.float32) for _ in range(2))
    for i, j in itertools.product(*map(range, kernel)):
        total += reals[..., i : i + rows, j : j + columns]
        count += ones[..., i : i + rows, j : j + columns] if inside else np.float32(1)
    return OUT.clamped(np.rint(total / count / np.float32(OUT.scale) + np.float32(OUT.zero_point)))


@pytest.mark.parametrize(("kernel", "padding", "inside"), [((2, 3), 0, False), ((3, 3), 1, False), ((3, 3), 1, True)])
def test_reals_are_summed_row_by_row_in_float32(tmp_path, kernel, padding, inside):
    codes = X.codes(np.random.default_rng(0), 4, 5, 9, 8)
    pool = nn.AvgPool2d(kernel, 1, padding, count_include_pad=not inside)
    found = list(model(tmp_path, pool, codes).codes(X.reals(codes)).values())[-1]
    np.testing.assert_array_equal(found.numpy(), averaged(codes, kernel, padding, inside))


def test_a_window_over_the_whole_image_goes_as_the_target_says(tmp_path):
    # 4 codes of 0.02 over 4 * 0.03: the sum of centred codes, 3, times float32(0.02 / 0.12) is the tie 0.5.
    codes = np.full((2, 1, 2, 2), 131) + np.array([[0, 1], [1, 1]])
    pool = nn.AvgPool2d(2)
    plain = list(model(tmp_path, pool, codes).codes(X.reals(codes)).values())[-1]
    other = list(model(tmp_path, pool, codes, whole=WHOLE, more=GLOBAL).codes(X.reals(codes)).values())[-1]
    ratio = np.float32(0.02) / (np.float32(0.03) * np.float32(4))
    assert plain.flatten().tolist() == averaged(codes, (2, 2)).flatten().tolist()
    assert other.flatten().tolist() == [int(np.rint(np.float32(3) * ratio)) + 77] * 2
    assert not torch.equal(plain, other)


def test_a_window_over_the_whole_image_needs_the_kind_that_it_names(tmp_path):
    with pytest.raises(
        IntegerError, match=r"AveragePool\.whole_image = \"GlobalAveragePool\": the target has no kernel"
    ):
        model(tmp_path, nn.AvgPool2d(2), np.zeros((1, 1, 2, 2), int), whole=WHOLE)


@pytest.mark.parametrize("wrong", [{"bits": 16}, {"order": "zero_point_after"}])
def test_sums_of_reals_of_another_width_or_order_are_refused(tmp_path, wrong):
    with pytest.raises(IntegerError, match=r"accumulators\.reals: sums of reals need bits = 32"):
        model(tmp_path, nn.AvgPool2d(2), np.zeros((1, 1, 4, 4), int), **wrong)


def test_windows_that_reach_past_the_image_count_what_they_hold(tmp_path):
    codes = X.codes(np.random.default_rng(0), 4, 5, 7, 5)
    found = list(model(tmp_path, nn.AvgPool2d(2, ceil_mode=True), codes).codes(X.reals(codes)).values())[-1]
    # One row and one column more than the image has: windows of 2, 1 and 1 values at the end.
    ends = np.pad(codes, [(0, 0), (0, 0), (0, 1), (0, 1)], constant_values=X.zero_point)
    inside = averaged(codes, (2, 2))[..., ::2, ::2]
    reals = (ends.astype(np.float32) - np.float32(X.zero_point)) * np.float32(X.scale)
    total = sum((reals[..., i::2, j::2] for i in (0, 1) for j in (0, 1)), np.float32(0))
    count = np.multiply.outer([2, 2, 2, 1], [2, 2, 1]).astype(np.float32)
    expected = OUT.clamped(np.rint(total / count / np.float32(OUT.scale) + np.float32(OUT.zero_point)))
    np.testing.assert_array_equal(expected[..., :3, :2], inside)
    np.testing.assert_array_equal(found.numpy(), expected)


@pytest.mark.parametrize("pool", [nn.AvgPool2d(3, 2, 1, ceil_mode=True), nn.AvgPool2d(2, divisor_override=3)])
def test_windows_that_reach_past_padding_that_counts_are_refused(tmp_path, pool):
    with pytest.raises(IntegerError, match="reach past padding that counts"):
        model(tmp_path, pool, np.zeros((1, 1, 6, 6), int))
