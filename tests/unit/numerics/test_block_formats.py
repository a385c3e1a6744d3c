# SPDX-License-Identifier: Apache-2.0
"""OCP's block formats against the specification's formulas in plain numpy: exponents, elements, whole tensors."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import (
    DynamicQuantizer,
    FloatElements,
    Grid,
    PerAxis,
    PerGroup,
    PerTensor,
    fake_quantize,
    qparams_from_range,
    quantize,
    range_of,
)

# Exponent bits, mantissa bits, bias and largest value of OCP MX v1.0, table 1; None: the 8-bit integers over 2^6.
FLOATS: dict[str, tuple[int, int, int, float]] = {
    "e5m2": (5, 2, 15, 57344.0),
    "e4m3": (4, 3, 7, 448.0),
    "e3m2": (3, 2, 3, 28.0),
    "e2m3": (2, 3, 1, 7.5),
    "e2m1": (2, 1, 1, 6.0),
}
NAMES = [*FLOATS, "int8"]


def grid(name: str) -> Grid:
    if name == "int8":
        return Grid(-127, 127, 0, scale_kind="e8m0", exponent_min=-133, exponent_max=121)
    exponent, mantissa, _, most = FLOATS[name]
    elements = FloatElements(exponent, mantissa, most)
    return Grid(*elements.code_bounds, 0, scale_kind="e8m0", elements=elements)


def values_of(name: str) -> tuple[np.ndarray, int]:
    """All elements of a format, the even codes at even places counted from 0, and its emax."""
    if name == "int8":
        return np.arange(-127, 128) / 64.0, 0
    exponent_bits, mantissa_bits, bias, most = FLOATS[name]
    sizes = []
    for exponent in range(2**exponent_bits):
        for fraction in range(2**mantissa_bits):
            if exponent == 0:
                sizes.append(2.0 ** (1 - bias) * fraction / 2**mantissa_bits)
            else:
                sizes.append(2.0 ** (exponent - bias) * (1 + fraction / 2**mantissa_bits))
    positive = np.array([size for size in sizes if size <= most])
    return np.concatenate([-positive[:0:-1], positive]), math.floor(math.log2(most))


def block(x: np.ndarray, name: str) -> np.ndarray:
    """Section 6.3: X is the largest power of two not above max |V|, over that of the element format; P_i = V_i / X."""
    values, emax = values_of(name)
    x = x.astype(np.float64)
    largest = np.abs(x).max(initial=0.0)
    if largest == 0:
        return np.zeros_like(x)
    shared = min(max(math.frexp(largest)[1] - 1 - emax, -127), 127)
    scaled = x / 2.0**shared
    middle = len(values) // 2
    distance = np.abs(scaled[:, None] - values)
    best = distance.min(1)
    picked = []
    for row, least in zip(distance, best, strict=True):
        near = np.flatnonzero(row == least)
        picked.append(next((i for i in near if (i - middle) % 2 == 0), near[0]))
    return np.asarray(values[picked] * 2.0**shared)


def whole(x: np.ndarray, name: str, axis: int, size: int = 32) -> np.ndarray:
    """Block by block along an axis; the last one may be shorter."""
    moved = np.moveaxis(x.astype(np.float64), axis, -1).copy()
    for index in np.ndindex(*moved.shape[:-1]):
        row = moved[index]
        for start in range(0, len(row), size):
            row[start : start + size] = block(row[start : start + size], name)
    return np.moveaxis(moved, -1, axis)


def samples(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Blocks of very different sizes, powers of two and zeros among them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=shape) * 2.0 ** rng.integers(-12, 12, size=shape)
    x[rng.random(shape) < 0.1] = 0.0
    ties = rng.random(shape) < 0.1
    x[ties] = np.sign(x[ties]) * 2.0 ** np.round(np.log2(np.abs(x[ties]) + 1e-9))
    return x.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "axis"), [((6, 64), 1), ((6, 70), 1), ((40, 5), 0), ((4, 35, 3, 3), 1)])
def test_a_weight_in_blocks_is_what_the_specification_says(name: str, shape: tuple[int, ...], axis: int) -> None:
    x = samples(shape, len(name) + axis)
    granularity = PerGroup(axis, 32)
    tensor = torch.from_numpy(x)
    low, high = range_of(tensor, granularity)
    qparams = qparams_from_range(low, high, grid(name), granularity)
    found = fake_quantize(tensor, qparams)
    assert np.array_equal(found.double().numpy(), whole(x, name, axis))
    codes = quantize(tensor, qparams)
    assert codes.dtype == (torch.int8 if name == "int8" else torch.uint8)


@settings(max_examples=60, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    values=st.lists(st.floats(-1e6, 1e6, width=32, allow_subnormal=False), min_size=1, max_size=32),
)
def test_any_block_is_what_the_specification_says(name: str, values: list[float]) -> None:
    x = np.array(values, dtype=np.float32)
    tensor = torch.from_numpy(x)[None]
    low, high = range_of(tensor, PerGroup(1, 32))
    found = fake_quantize(tensor, qparams_from_range(low, high, grid(name), PerGroup(1, 32)))
    assert np.array_equal(found[0].double().numpy(), block(x, name))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "axis"), [((3, 40), -1), ((2, 7, 33), -1), ((2, 33, 5), -2), ((2, 33, 4, 3), 1)])
def test_live_tensors_are_cut_into_blocks_along_the_axis(name: str, shape: tuple[int, ...], axis: int) -> None:
    x = samples(shape, 5)
    live = grid(name)
    start = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), live)
    quantizer = DynamicQuantizer(start, live, axis=axis, block=32)
    assert np.array_equal(quantizer(torch.from_numpy(x)).double().numpy(), whole(x, name, axis))
    # Samples do not meet in a block: computed together or apart, they are the same.
    apart = torch.cat([quantizer(torch.from_numpy(part[None])) for part in x])
    assert torch.equal(apart, quantizer(torch.from_numpy(x)))


def test_a_layer_that_flattens_gets_blocks_of_what_it_sums_up() -> None:
    x = samples((3, 8, 3, 2), 6)
    live = grid("e2m1")
    start = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), live)
    found = DynamicQuantizer(start, live, axis=-1, block=32, reduced=48)(torch.from_numpy(x))
    assert np.array_equal(found.double().numpy(), whole(x.reshape(3, 48), "e2m1", 1).reshape(x.shape))


def test_rows_and_tensors_may_have_live_scales_of_any_kind() -> None:
    x = torch.from_numpy(samples((4, 9), 7))
    for live in (Grid(-128, 127), Grid(-127, 127, 0), Grid(*FloatElements(4, 3, 448.0).code_bounds, 0,
                 elements=FloatElements(4, 3, 448.0))):  # fmt: skip
        start = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), live)
        by_row = DynamicQuantizer(start, live, axis=-1)(x)
        wanted = [fake_quantize(row, qparams_from_range(row.min(), row.max(), live)) for row in x]
        assert torch.equal(by_row, torch.stack(wanted))
        whole_tensor = DynamicQuantizer(start, live, axis=None)(x)
        assert torch.equal(whole_tensor, fake_quantize(x, qparams_from_range(x.min(), x.max(), live)))


def test_gradients_pass_and_the_switch_lets_the_float_through() -> None:
    live = grid("e4m3")
    quantizer = DynamicQuantizer(
        qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), live), live, axis=1, block=32, name="x"
    )
    # The block's scale is 2^0: 500 lies more than half a step past 448, and saturates.
    x = torch.tensor([[500.0, 449.0, 1.0]], requires_grad=True)
    assert quantizer(x).tolist() == [[448.0, 448.0, 1.0]]
    quantizer(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [[0.0, 1.0, 1.0]]
    assert "32 along axis 1" in repr(quantizer) and quantizer(torch.zeros(0, 3)).shape == (0, 3)
    quantizer.enabled = False
    assert quantizer(x) is x


@pytest.mark.parametrize(
    "change", [{"axis": 2}, {"axis": 1, "qparams": "per axis"}], ids=["another axis", "qparams per axis"]
)
def test_a_live_quantizer_of_another_form_is_refused(change: dict[str, Any]) -> None:
    live = Grid(-127, 127, 0)
    qparams = qparams_from_range(torch.tensor(-1.0), torch.tensor(1.0), live, PerTensor())
    if change.pop("qparams", None):
        qparams = qparams_from_range(-torch.ones(2), torch.ones(2), live, PerAxis(0))
    with pytest.raises(RangeError, match="axis must be 1, -1, -2 or None, with qparams per tensor"):
        DynamicQuantizer(qparams, live, **change)
