# SPDX-License-Identifier: Apache-2.0
"""Qparams from a range: by hand, against exact fractions, and at the edges of float32."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from qhw.errors import RangeError
from qhw.numerics import Grid, PerAxis, affine_qparams, qparams_from_range, quantize, symmetric_qparams
from qhw.testing import reference

EDGES = [float(np.float32(value)) for value in (0.0, 1e30, -1e30, 1e-40, -1e-45, 2.0**-126)]
# Up to 2**120: nearer to the end of float32 the scale is capped so that no real on the grid overflows.
reals = st.floats(-(2.0**120), 2.0**120, width=32) | st.sampled_from(EDGES)
grids = st.sampled_from([(0, 255), (-128, 127), (-127, 127), (0, 15), (-8, 7), (-2, 1), (0, 65535), (-1, 0), (0, 1)])


@given(st.tuples(reals, reals).map(sorted), grids)
@settings(max_examples=300, deadline=None)
def test_a_free_zero_point_matches_exact_fractions(bounds, codes):
    low, high = bounds
    got = affine_qparams(tensor(low), tensor(high), quant_min=codes[0], quant_max=codes[1])
    scale, zero_point = reference.qparams_from_range(low, high, *codes)
    assert (got.scale.item(), got.zero_point.item()) == (scale.item(), zero_point)


@given(st.tuples(reals, reals).map(sorted), grids, st.data())
@settings(max_examples=300, deadline=None)
@pytest.mark.parametrize("kind", ["float32", "power_of_two", "enumerated"])
def test_a_fixed_zero_point_matches_exact_fractions(kind, bounds, codes, data):
    (low, high), zero_point = bounds, data.draw(st.integers(*codes))
    values = (16.0, 1.0, 1 / 16, 1 / 256) if kind == "enumerated" else ()
    got = qparams_from_range(tensor(low), tensor(high), Grid(*codes, zero_point, kind, scale_values=values))
    scale, _ = reference.qparams_from_range(low, high, *codes, zero_point, kind, values=values)
    assert (got.scale.item(), got.zero_point.item()) == (scale.item(), zero_point)


@given(st.tuples(reals, reals).map(sorted), st.sampled_from([(0, 255), (-128, 127), (0, 65535)]))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("zero_point", [None, "middle"])
@pytest.mark.parametrize("kind", ["float32", "power_of_two"])
def test_the_range_is_covered_and_zero_is_exact(kind, zero_point, bounds, codes):
    middle = (codes[0] + codes[1] + 1) // 2
    grid = Grid(*codes, middle if zero_point else None, kind)
    got = qparams_from_range(tensor(bounds[0]), tensor(bounds[1]), grid)
    scale, offset = Fraction(got.scale.item()), got.zero_point.item()
    # The zero point is rounded, so an end may lie half a code outside; 1 % more for the scale's own rounding.
    slack = scale * Fraction(51, 100)
    assert scale * (codes[0] - offset) <= Fraction(bounds[0]) + slack or bounds[0] >= 0
    assert scale * (codes[1] - offset) >= Fraction(bounds[1]) - slack or bounds[1] <= 0
    assert codes[0] <= offset <= codes[1]


def test_the_docstring_example():
    # scale = 4 / 255; 0 - round(-1 * 255 / 4) = round(63.75) = 64.
    got = affine_qparams(tensor(-1.0), tensor(3.0), quant_min=0, quant_max=255)
    assert got.zero_point == tensor(64, dtype=torch.int32)
    assert got.scale.item() == np.float32(4 / 255)


@pytest.mark.parametrize(
    ("codes", "zero_point", "scale"),
    [((-128, 127), 0, 4 / 127), ((-127, 127), 0, 4 / 127), ((0, 255), 0, 4 / 255), ((0, 255), 128, 4 / 127)],
    ids=["int8-by-its-smaller-side", "narrow-int8", "uint8-covers-the-positive-side", "uint8-around-128"],
)
def test_symmetric_scale_by_hand(codes, zero_point, scale):
    got = symmetric_qparams(tensor(4.0), quant_min=codes[0], quant_max=codes[1], zero_point=zero_point)
    assert got.scale.item() == np.float32(scale)
    assert got.zero_point.item() == zero_point


def test_the_lowest_code_is_used_where_it_exists():
    # -1 sits on code -128 with the step 1/128; the paper's max(|x|) / 127 would be coarser.
    got = qparams_from_range(tensor(-1.0), tensor(0.5), Grid(-128, 127, 0, "power_of_two"))
    assert got.scale.item() == 1 / 128
    assert quantize(tensor([-1.0, 0.5]), got).tolist() == [-128, 64]


@pytest.mark.parametrize(
    ("low", "high", "zero_point"),
    [(0.0, 5.0, 0), (-5.0, 5.0, 32768), (-1e-3, 5.0, 32768), (0.0, 0.0, 0)],
    ids=["one-sided", "two-sided", "slightly-negative", "dead"],
)
def test_one_of_several_zero_points_covers_with_the_smallest_scale(low, high, zero_point):
    # Ethos-U85 uint16: the zero point is 0 or 32768.
    got = qparams_from_range(tensor(low), tensor(high), Grid(0, 65535, (0, 32768)))
    assert got.zero_point.item() == zero_point
    assert got.scale.item() == np.float32(high / (65535 - zero_point) if high else 1.0)


def test_the_zero_point_follows_the_legal_scale():
    # Wanted scale 4/255 = 0.0157; the bound lifts it to 0.1, so -1 lies 10 codes below zero, not 64.
    got = qparams_from_range(tensor(-1.0), tensor(3.0), Grid(0, 255, scale_min=0.1))
    assert got.zero_point.item() == 10
    # A scale capped at 2**-8 clips the range at both ends and puts zero at round(-256) clamped to 255.
    got = qparams_from_range(tensor(-1.0), tensor(3.0), Grid(0, 255, scale_max=2.0**-8))
    assert (got.scale.item(), got.zero_point.item()) == (2.0**-8, 255)


@pytest.mark.parametrize("constant", [3.7, -3.7, 1e-20, 1e30], ids=["positive", "negative", "tiny", "huge"])
@pytest.mark.parametrize("grid", [Grid(0, 255), Grid(-128, 127, 0)], ids=["free-zero-point", "symmetric"])
def test_a_constant_lies_on_the_last_code(constant, grid):
    got = qparams_from_range(tensor(constant), tensor(constant), grid)
    edge = grid.quant_max if constant > 0 else grid.quant_min
    code = quantize(tensor([constant]), got).item()
    assert code == edge
    # One rounding of the scale to float32 and one of the product: two halves of an ulp.
    assert abs(got.scale.item() * (code - got.zero_point.item()) - constant) <= abs(constant) * 2.0**-23


@pytest.mark.parametrize("grid", [Grid(0, 255), Grid(-128, 127, 0, "power_of_two"), Grid(-8, 7, scale_max=0.5)])
def test_an_all_zero_tensor_gets_the_scale_one_or_the_highest_legal(grid):
    got = qparams_from_range(tensor(0.0), tensor(0.0), grid)
    assert got.scale.item() == min(1.0, grid.scale_max or 1.0)
    assert quantize(torch.zeros(3), got).tolist() == [got.zero_point.item()] * 3


def test_a_dead_channel_gets_the_largest_scale_of_the_others():
    got = qparams_from_range(tensor([-1.27, 0.0, -2.54]), tensor([0.5, 0.0, 1.0]), Grid(-127, 127, 0), PerAxis(0))
    np.testing.assert_allclose(got.scale.numpy(), np.float32([0.01, 0.02, 0.02]), rtol=2**-23)


@pytest.mark.parametrize("low, high", [(0.0, 1e-45), (-1e-45, 1e-45), (-1e-40, 0.0)], ids=str)
def test_a_denormal_range_gets_the_smallest_normal_scale(low, high):
    assert affine_qparams(tensor(low), tensor(high), quant_min=0, quant_max=255).scale.item() == 2.0**-126


@pytest.mark.parametrize("grid", [Grid(0, 255), Grid(-128, 127, 0), Grid(-128, 127, 0, "power_of_two")], ids=str)
def test_the_largest_floats_stay_finite_on_the_grid(grid):
    largest = torch.finfo(torch.float32).max
    got = qparams_from_range(tensor(-largest), tensor(largest), grid)
    ends = got.scale * (tensor([grid.quant_min, grid.quant_max]) - got.zero_point)
    assert torch.isfinite(ends).all()


def test_one_scale_per_channel():
    low, high = np.float32([-1, 0, -3]), np.float32([3, 5, -1])
    got = affine_qparams(
        torch.from_numpy(low), torch.from_numpy(high), quant_min=-8, quant_max=7, granularity=PerAxis(1)
    )
    expected = [reference.qparams_from_range(*map(float, pair), -8, 7) for pair in zip(low, high, strict=True)]
    assert got.scale.tolist() == [scale.item() for scale, _ in expected]
    assert got.zero_point.tolist() == [zero_point for _, zero_point in expected]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_refused_by_name(bad):
    message = rf"features\.3\.weight: values must be finite; got {bad} in 1 of 2 ranges. Remove what makes NaN or inf"
    with pytest.raises(RangeError, match=message):
        qparams_from_range(tensor([0.0, bad]), tensor([1.0, bad]), Grid(0, 255), PerAxis(0), "features.3.weight")
    with pytest.raises(RangeError, match="must be finite"):
        symmetric_qparams(tensor(bad), quant_min=-128, quant_max=127)


def test_a_range_in_the_wrong_order_is_refused():
    with pytest.raises(RangeError, match=r"tensor: min_val must not exceed max_val; got 2.0 and 1.0. Swap them"):
        affine_qparams(tensor(2.0), tensor(1.0), quant_min=0, quant_max=255)
    with pytest.raises(RangeError, match=r"min_val must not exceed max_val; got 1.0 and -1.0"):
        symmetric_qparams(tensor(-1.0), quant_min=-128, quant_max=127)
