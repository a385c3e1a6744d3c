# SPDX-License-Identifier: Apache-2.0
"""Grid: what is refused, and the legal scales next to a wanted one."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import Grid, legal_scale, scale_candidates
from qhw.testing import reference

FLOAT32_MAX = float(np.finfo(np.float32).max)
positive = st.floats(0, FLOAT32_MAX, width=32) | st.sampled_from([1e-45, 2.0**-126, 1.0, 1e30, FLOAT32_MAX])


@given(positive)
@settings(max_examples=200, deadline=None)
def test_a_float32_scale_stays_within_normal_and_finite(scale):
    got = legal_scale(torch.tensor(scale, dtype=torch.float64), Grid(0, 255))
    assert got.dtype == torch.float32
    assert got.item() == reference.legal_scale(Fraction(scale), 255).item()


@given(positive, st.sampled_from([(None, None), (2.0**-12, None), (1e-6, 1e-2), (1e-4 / 255, 3.0)]))
@settings(max_examples=200, deadline=None)
@pytest.mark.parametrize("kind", ["float32", "power_of_two"])
def test_scale_bounds_hold_exactly(kind, scale, bounds):
    low, high = bounds
    grid = Grid(-128, 127, 0, kind, scale_min=low, scale_max=high)
    got = legal_scale(torch.tensor(scale, dtype=torch.float64), grid).item()
    assert got == reference.legal_scale(Fraction(scale), 255, kind, low, high).item()
    assert got >= (low or 2.0**-126) and got <= (high or FLOAT32_MAX)


@given(st.floats(2.0**-126, 2.0**100, width=32))
@settings(max_examples=200, deadline=None)
def test_a_power_of_two_is_the_smallest_that_is_not_below(scale):
    got = legal_scale(torch.tensor(scale), Grid(-128, 127, 0, "power_of_two")).item()
    assert np.log2(got) == round(np.log2(got))
    assert got / 2 < scale <= got


@pytest.mark.parametrize(
    ("wanted", "up", "nearest"),
    [(0.25, 0.25, 0.25), (0.2500001, 0.5, 0.25), (0.35, 0.5, 0.25), (0.36, 0.5, 0.5), (0.5, 0.5, 0.5)],
)
def test_nearest_power_of_two_is_by_ratio(wanted, up, nearest):
    # The middle between 1/4 and 1/2 by ratio is sqrt(1/8) = 0.3536.
    grid = Grid(-128, 127, 0, "power_of_two")
    assert legal_scale(torch.tensor(wanted), grid).item() == up
    assert legal_scale(torch.tensor(wanted), grid, "nearest").item() == nearest


def test_exponent_bounds_hold():
    grid = Grid(-128, 127, 0, "power_of_two", exponent_min=-8, exponent_max=-2)
    assert legal_scale(torch.tensor([1e-9, 2.0**-5, 7.0]), grid).tolist() == [2.0**-8, 2.0**-5, 2.0**-2]


@pytest.mark.parametrize(
    ("wanted", "up", "nearest"),
    [
        (0.0, 1 / 256, 1 / 256),
        (0.0625, 0.0625, 0.0625),
        (0.07, 1.0, 0.0625),
        (8.5, 16.0, 1.0),
        (99.0, 16.0, 16.0),
    ],
    ids=["below-all", "listed", "just-above-one", "tie-goes-down", "above-all"],
)
def test_an_enumerated_scale_comes_from_the_list(wanted, up, nearest):
    # The four scales of Gaudi 2.
    grid = Grid(-128, 127, 0, "enumerated", scale_values=(16.0, 1.0, 1 / 16, 1 / 256))
    assert legal_scale(torch.tensor(wanted), grid).item() == up
    assert legal_scale(torch.tensor(wanted), grid, "nearest").item() == nearest


def test_a_fixed_scale_is_always_itself():
    grid = Grid(-128, 127, 0, "fixed", scale_values=(1 / 128,))
    assert legal_scale(torch.tensor([0.0, 1e-3, 5.0]), grid).tolist() == [1 / 128] * 3
    assert scale_candidates(torch.tensor([0.1, 3.0]), grid).tolist() == [[1 / 128, 1 / 128]]


def test_float32_candidates_are_fractions_of_the_covering_scale():
    got = scale_candidates(torch.tensor([1.0, 8.0]), Grid(0, 255), count=4)
    assert got.tolist() == [[1.0, 8.0], [0.75, 6.0], [0.5, 4.0], [0.25, 2.0]]
    assert got.dtype == torch.float32


def test_power_of_two_candidates_are_the_covering_one_and_eight_below():
    got = scale_candidates(torch.tensor(0.3), Grid(0, 255, 0, "power_of_two"))
    assert got.tolist() == [2.0**e for e in range(-1, -10, -1)]


def test_enumerated_candidates_are_the_list():
    got = scale_candidates(torch.tensor(0.3), Grid(0, 255, 0, "enumerated", scale_values=(1.0, 16.0)))
    assert got.tolist() == [16.0, 1.0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quant_max": -128}, r"quant_min must be below quant_max; got -128 and -128. Swap or widen them"),
        ({"zero_point": 128}, r"zero_point must lie in \[-128, 127\]; got 128. Use a code of the grid"),
        ({"zero_point": (0, -200)}, r"zero_point must lie in \[-128, 127\]; got -200"),
        (
            {"scale_kind": "fp16"},
            "scale_kind must be one of float32, float16, .*, e8m0, fixed, enumerated; got 'fp16'",
        ),
        ({"scale_kind": "enumerated"}, r"normal positive float32 numbers for a enumerated scale; got \(\). List"),
        ({"scale_kind": "fixed", "scale_values": (0.0,)}, r"for a fixed scale; got \(0.0,\). List the legal scales"),
        ({"scale_kind": "fixed", "scale_values": (1.0, 2.0)}, r"a fixed scale has exactly one value; got 2. Use enum"),
        ({"scale_min": 2.0, "scale_max": 1.0}, r"must not exceed the highest; got 2.0 and 1.0. Widen the bounds"),
        (
            {"scale_kind": "power_of_two", "scale_min": 0.26, "scale_max": 0.4},
            r"must not exceed the highest; got 0.5 and 0.25. Widen",
        ),
        (
            {"scale_kind": "power_of_two", "exponent_min": 3, "exponent_max": 2},
            r"must not exceed the highest; got 8.0 and 4.0. Widen",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(RangeError, match=message):
        Grid(**{"quant_min": -128, "quant_max": 127, **fields})
