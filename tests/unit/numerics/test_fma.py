# SPDX-License-Identifier: Apache-2.0
"""One rounding of a * b + c, against exact fractions."""

import math
import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import fma_float32
from qhw.testing.reference import round_exact

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
LARGEST = 2.0**128 - 2.0**104


def float32(x: Fraction) -> float:
    """The float32 next to an exact number, half to even; infinite from half a unit past the largest one."""
    exponent = -149
    while abs(x) >= Fraction(2) ** (exponent + 24):
        exponent += 1
    nearest = round_exact(x / Fraction(2) ** exponent) * Fraction(2) ** exponent
    return math.copysign(math.inf, nearest) if abs(nearest) > LARGEST else float(nearest)


def fma(a: float, b: float, c: float) -> float:
    tensors = (torch.tensor([x], dtype=torch.float32) for x in (a, b, c))
    return fma_float32(*tensors).item()


@given(a=FLOATS, b=FLOATS, c=FLOATS)
@settings(max_examples=500, deadline=None)
def test_any_three_numbers(a, b, c):
    assert fma(a, b, c) == float32(Fraction(a) * Fraction(b) + Fraction(c))


@given(
    a=st.integers(2**23, 2**24 - 1),
    b=st.integers(2**23, 2**24 - 1),
    c=st.integers(-(2**24), 2**24),
    exponents=st.tuples(st.integers(-60, 30), st.integers(-60, 30), st.integers(-126, 60)),
    signs=st.tuples(st.sampled_from([1, -1]), st.sampled_from([1, -1])),
)
@settings(max_examples=500, deadline=None)
def test_numbers_of_like_size(a, b, c, exponents, signs):
    x, y, z = (
        math.ldexp(a * signs[0], exponents[0]),
        math.ldexp(b * signs[1], exponents[1]),
        math.ldexp(c, exponents[2]),
    )
    assert fma(x, y, z) == float32(Fraction(x) * Fraction(y) + Fraction(z))


@given(
    small=st.integers(1, 2**11 - 1),
    large=st.integers(0, 2**20),
    sticky=st.integers(-149, -31),
    signs=st.tuples(st.sampled_from([1, -1]), st.sampled_from([1, -1])),
)
@settings(max_examples=300, deadline=None)
def test_ties_that_a_float64_sum_forgets(small, large, sticky, signs):
    # An odd product of 25 bits lies between two float32 numbers; c decides, far below the last bit of float64.
    a = 2 * small + 1
    b = (2**24 // a + 1 + large % (2**24 // a)) | 1
    assert a * b % 2 == 1 and a * b > 2**24
    x, c = float(a * signs[0]), math.ldexp(signs[1], sticky)
    assert fma(x, float(b), c) == float32(Fraction(x) * b + Fraction(c))


def test_a_sum_in_float64_would_be_wrong_here():
    # 4097 * 4097 = 2**24 + 2**13 + 1 lies between two float32 numbers.
    a = b = 4097.0
    for c, expected in ((2.0**-60, 2**24 + 2**13 + 2), (-(2.0**-60), 2**24 + 2**13), (0.0, 2**24 + 2**13)):
        assert fma(a, b, c) == expected
    assert torch.tensor(a * b + 2.0**-60, dtype=torch.float64).float().item() == 2**24 + 2**13


@pytest.mark.parametrize(
    ("a", "b", "c", "expected"),
    [
        (math.inf, 1.0, 1.0, math.inf),
        (1.0, 1.0, -math.inf, -math.inf),
        (LARGEST, 2.0, -LARGEST, LARGEST),
        (LARGEST, 2.0, 0.0, math.inf),
        (LARGEST, 1.0, 2.0**102, LARGEST),
        (LARGEST, 1.0, 2.0**103, math.inf),
        (2.0**-149, 0.5, 0.0, 0.0),
        (2.0**-149, 0.5, 2.0**-149, 2.0**-148),
        (2.0**-149, 0.5, -(2.0**-149), -0.0),
        (-0.0, 1.0, -0.0, -0.0),
        (1.0, 1.0, -1.0, 0.0),
    ],
)
def test_edges(a, b, c, expected):
    assert struct.pack("f", fma(a, b, c)) == struct.pack("f", expected)


def test_not_a_number_and_infinity_less_infinity():
    assert all(math.isnan(fma(*case)) for case in ((math.nan, 1, 1), (math.inf, 0, 1), (math.inf, 1, -math.inf)))


def test_broadcasts_and_refuses_other_dtypes():
    found = fma_float32(torch.tensor([1.0, 2.0]), torch.tensor([[3.0], [4.0]]), torch.tensor(1.0))
    assert found.dtype == torch.float32 and found.tolist() == [[4.0, 7.0], [5.0, 9.0]]
    with pytest.raises(RangeError, match=r"fma_float32: b must be float32; got torch.float64\. Convert it\."):
        fma_float32(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0))
