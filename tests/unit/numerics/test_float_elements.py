# SPDX-License-Identifier: Apache-2.0
"""Small floats bit for bit as ml_dtypes has them: every code, every middle between two values and its neighbours."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import FloatElements, Grid, PerTensor, legal_scale, qparams_from_range
from qhw.numerics.grid import block_scale

BFLOAT16_MAX = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
TYPES: dict[str, tuple[FloatElements, Any]] = {
    "e4m3fn": (FloatElements(4, 3, 448.0), ml_dtypes.float8_e4m3fn),
    "e4m3-240": (FloatElements(4, 3, 240.0), ml_dtypes.float8_e4m3),
    "e4m3fnuz": (FloatElements(4, 3, 240.0, exponent_bias=8), ml_dtypes.float8_e4m3fnuz),
    "e3m4": (FloatElements(3, 4, 15.5), ml_dtypes.float8_e3m4),
    "e5m2": (FloatElements(5, 2, 57344.0), ml_dtypes.float8_e5m2),
    "e3m2fn": (FloatElements(3, 2, 28.0), ml_dtypes.float6_e3m2fn),
    "e2m3fn": (FloatElements(2, 3, 7.5), ml_dtypes.float6_e2m3fn),
    "e2m1fn": (FloatElements(2, 1, 6.0), ml_dtypes.float4_e2m1fn),
    "float16": (FloatElements(5, 10, 65504.0), np.float16),
    "bfloat16": (FloatElements(8, 7, BFLOAT16_MAX), ml_dtypes.bfloat16),
}
ALL = pytest.mark.parametrize("name", TYPES)


def codes_of(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Every code of a type, and its values as ml_dtypes has them; the zero below 0, which fnuz lacks, left out."""
    elements, dtype = TYPES[name]
    codes = np.arange(2**elements.bits).astype(np.uint8 if elements.bits <= 8 else np.uint16)
    return codes.astype(np.int64), codes.view(dtype).astype(np.float32)


@ALL
def test_every_code_stands_for_its_value(name: str) -> None:
    elements, _ = TYPES[name]
    codes, values = codes_of(name)
    found = elements.decode(torch.from_numpy(codes)).numpy()
    finite = np.isfinite(values)
    assert np.array_equal(found[finite], values[finite])
    if name != "e4m3fnuz":  # its only pattern without a number is that of -0.0
        assert np.isnan(found[~finite]).all()
    assert values[finite].max() == elements.highest == -elements.lowest


@ALL
def test_every_value_has_its_code(name: str) -> None:
    elements, _ = TYPES[name]
    codes, values = codes_of(name)
    finite = np.isfinite(values)
    found = elements.encode(torch.from_numpy(values[finite]))
    assert np.array_equal(found.numpy().astype(np.int64), codes[finite])
    assert found.dtype == (torch.uint8 if elements.bits <= 8 else torch.int32)


@ALL
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_value_middle_and_neighbour_rounds_as_it_should(name: str, dtype: Any) -> None:
    elements, reference = TYPES[name]
    _, values = codes_of(name)
    values = np.unique(values[np.isfinite(values)])
    middles = ((values[1:].astype(np.float64) + values[:-1]) / 2).astype(np.float32)
    points = np.concatenate([values, middles])
    ends = np.float32([np.inf, -np.inf])
    points = np.concatenate([points, *(np.nextafter(points, end) for end in ends)])
    points = points[np.isfinite(points)]
    most = np.float32(elements.highest)
    wanted = np.clip(points, -most, most).astype(reference).astype(np.float32)
    found = elements.round_to(torch.from_numpy(points.astype(dtype))).numpy()
    assert found.dtype == dtype
    assert np.array_equal(found.astype(np.float32), wanted)


@ALL
@settings(max_examples=40, deadline=None)
@given(bits=st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_any_float32_rounds_as_it_should(name: str, bits: list[int]) -> None:
    elements, reference = TYPES[name]
    x = np.array(bits, dtype=np.uint32).view(np.float32)
    x = x[~np.isnan(x)]
    most = np.float32(elements.highest)
    found = elements.round_to(torch.from_numpy(x))
    assert np.array_equal(found.numpy(), np.clip(x, -most, most).astype(reference).astype(np.float32))
    decoded = elements.decode(elements.encode(found))
    assert torch.equal(decoded.nan_to_num(0.0), found)  # -0.0 has no code in fnuz


@ALL
def test_what_is_no_number_stays_and_what_is_too_large_saturates(name: str) -> None:
    elements, _ = TYPES[name]
    found = elements.round_to(torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0]))
    assert found[0].isnan() and found[1:].tolist() == [elements.highest, -elements.highest, 0.0]
    assert bool(found[3].signbit())


def test_the_input_is_left_as_it_is() -> None:
    x = torch.tensor([500.0, 0.3])
    FloatElements(4, 3, 448.0).round_to(x)
    assert x.tolist() == torch.tensor([500.0, 0.3]).tolist()


def test_edges_are_half_a_step_beyond_the_ends() -> None:
    assert FloatElements(4, 3, 448.0).edges == (-464.0, 464.0)  # steps of 32 below 448
    assert FloatElements(2, 1, 6.0).edges == (-7.0, 7.0)
    assert FloatElements(1, 2, 0.75, exponent_bias=2).edges == (-0.8125, 0.8125)  # subnormals and two binades by 1/8


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ((4, 3, 449.0), "finite_max must be one of its values, at most 480; got 449.0"),
        ((4, 3, 512.0), "at most 480; got 512.0"),
        ((2, 1, 0.0), "finite_max must be one of its values"),
        ((2, 1, 0.25), "finite_max must be one of its values"),
        ((9, 3, 1.0), "must have 1 to 8 and 0 to 20"),
        ((4, 21, 1.0), "must have 1 to 8 and 0 to 20"),
        ((4, 3, 448.0 / 2**140, 147), "its values must fit float32"),
    ],
)
def test_floats_that_are_none_are_refused(fields: Any, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        FloatElements(*fields)


# Scales of float types: never below what covers the range, and the next below is too small.
SCALES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "e4m3": ml_dtypes.float8_e4m3fn}


@pytest.mark.parametrize("kind", SCALES)
def test_a_scale_of_a_float_type_is_the_smallest_that_covers(kind: Any) -> None:
    grid = Grid(-127, 127, 0, scale_kind=kind)
    positive = np.arange(1, 0x7F if kind == "e4m3" else 0x7F80 if kind == "bfloat16" else 0x7C00)
    values = positive.astype(np.uint8 if kind == "e4m3" else np.uint16).view(SCALES[kind]).astype(np.float64)
    low, high = grid.scale_bounds
    values = values[(values >= low) & (values <= high)]
    assert (values[0], values[-1]) == (low, high)
    wanted = 10 ** np.random.default_rng(0).uniform(np.log10(low), np.log10(high), 2000)
    wanted = np.concatenate([wanted, values, np.nextafter(values[:-1], np.inf)])
    up = values[np.searchsorted(values, wanted)]
    assert np.array_equal(legal_scale(torch.from_numpy(wanted), grid).double().numpy(), up)
    nearest = legal_scale(torch.from_numpy(wanted), grid, "nearest").double().numpy()
    assert (np.abs(nearest - wanted) <= np.abs(up - wanted)).all() and np.isin(nearest, values).all()
    kept = legal_scale(torch.from_numpy(values), grid, "nearest")
    assert np.array_equal(kept.double().numpy(), values)


@pytest.mark.parametrize("kind", SCALES)
def test_a_range_is_covered_by_a_scale_of_a_float_type(kind: Any) -> None:
    grid = Grid(-7, 7, 0, scale_kind=kind, scale_min=0.01)
    low, high = torch.tensor(-0.3), torch.tensor(1.9)
    scale = float(qparams_from_range(low, high, grid, PerTensor()).scale)
    assert scale * 7 >= 1.9 and np.float64(scale).astype(SCALES[kind]).astype(np.float64) == scale


def test_e8m0_is_every_power_of_two_that_the_type_holds() -> None:
    values = np.arange(255).astype(np.uint8).view(ml_dtypes.float8_e8m0fnu).astype(np.float64)
    grid = Grid(*FloatElements(2, 1, 6.0).code_bounds, 0, scale_kind="e8m0", elements=FloatElements(2, 1, 6.0))
    low, high = grid.scale_bounds
    assert (low, high) == (values[0], 2.0**124)  # 12 times a scale past 2^124 is no float32
    legal = values[values <= high]
    assert np.array_equal(legal_scale(torch.from_numpy(legal), grid).double().numpy(), legal)


# floor(log2(max)) - floor(log2(highest element)): E2M1 has 6 = 1.5 * 2^2, E4M3 448 = 1.75 * 2^8, int8 127 = 1.98 * 2^6.
@pytest.mark.parametrize(
    ("elements", "size", "exponent"),
    [
        ((2, 1, 6.0), 6.0, 0),
        ((2, 1, 6.0), 7.99, 0),
        ((2, 1, 6.0), 8.0, 1),
        ((2, 1, 6.0), 3.999, -1),
        ((4, 3, 448.0), 1.0, -8),
        ((4, 3, 448.0), 511.0, 0),
        ((5, 2, 57344.0), 1.0, -15),
        ((3, 2, 28.0), 1.0, -4),
        ((2, 3, 7.5), 1.0, -2),
        (None, 1.0, -6),
        (None, 1.999, -6),
        ((4, 3, 448.0), 1e-38, -127),
        ((4, 3, 448.0), 0.0, 0),
    ],
)
def test_the_exponent_that_a_block_shares(elements: Any, size: float, exponent: int) -> None:
    found = None if elements is None else FloatElements(*elements)
    grid = (
        Grid(-127, 127, 0, scale_kind="e8m0")
        if found is None
        else Grid(*found.code_bounds, 0, scale_kind="e8m0", elements=found)
    )
    scale = block_scale(torch.tensor([-size, 0.0]), torch.tensor([0.0, size]), grid)
    assert scale.double().log2().tolist() == [exponent, exponent]
