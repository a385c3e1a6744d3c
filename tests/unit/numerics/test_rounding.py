# SPDX-License-Identifier: Apache-2.0
"""Rounding rules on floats and integer shifts, against exact fractions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import ROUNDING_RULES, round_real, shift_right
from qhw.testing import reference

# Rows: rule and what it makes of -2.5, -1.5, -1.2, -0.5, 0.5, 1.5, 2.5, 2.7; by the definitions, by hand.
TIES = (-2.5, -1.5, -1.2, -0.5, 0.5, 1.5, 2.5, 2.7)
BY_HAND = {
    "half_even": (-2, -2, -1, 0, 0, 2, 2, 3),
    "half_away_from_zero": (-3, -2, -1, -1, 1, 2, 3, 3),
    "half_to_plus_infinity": (-2, -1, -1, 0, 1, 2, 3, 3),
    "floor": (-3, -2, -2, -1, 0, 1, 2, 2),
    "toward_zero": (-2, -1, -1, 0, 0, 1, 2, 2),
}
EXTREME_SHIFTS = [2**63 - 1, -(2**63), 2**62, -(2**62), 3 * 2**61, 0, 1, -1]


def test_every_rule_is_tested():
    assert set(BY_HAND) == set(ROUNDING_RULES)


@pytest.mark.parametrize("rule", ROUNDING_RULES)
def test_ties_by_hand(rule):
    assert round_real(torch.tensor(TIES), rule).tolist() == list(BY_HAND[rule])
    assert [reference.round_exact(Fraction(x), rule) for x in TIES] == list(BY_HAND[rule])
    # The ties again as integers: x = q / 2**1 with q = 2 * x.
    halves = [(int(2 * x), want) for x, want in zip(TIES, BY_HAND[rule], strict=True) if (2 * x).is_integer()]
    q = torch.tensor([q for q, _ in halves])
    assert shift_right(q, 1, rule).tolist() == [want for _, want in halves]


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@given(x=st.floats(width=32, allow_nan=False, allow_infinity=False))
@settings(max_examples=200, deadline=None)
def test_any_float_rounds_as_its_exact_value(rule, x):
    assert Fraction(round_real(torch.tensor(x), rule).item()) == reference.round_exact(Fraction(x), rule)


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@pytest.mark.parametrize("x", [0.49999997, -0.49999997, 8388609.0, -8388609.0, 4194304.5, 1e30, 1e-45, -1e-45])
def test_floats_where_adding_a_half_goes_wrong(rule, x):
    x = torch.tensor(x)
    assert Fraction(round_real(x, rule).item()) == reference.round_exact(Fraction(x.item()), rule)


@pytest.mark.parametrize("rule", ROUNDING_RULES)
def test_infinite_and_nan_stay(rule):
    result = round_real(torch.tensor([float("inf"), -float("inf"), float("nan")]), rule)
    assert result[0] == float("inf") and result[1] == -float("inf") and result[2].isnan()


@pytest.mark.parametrize("rule", ROUNDING_RULES)
@given(q=st.integers(-(2**63), 2**63 - 1) | st.sampled_from(EXTREME_SHIFTS), shift=st.integers(0, 62))
@settings(max_examples=200, deadline=None)
def test_any_shift_is_the_rounded_quotient(rule, q, shift):
    expected = reference.round_exact(Fraction(q, 2**shift), rule)
    assert shift_right(torch.tensor([q]), shift, rule).tolist() == [expected]


@pytest.mark.parametrize("rule", ROUNDING_RULES)
def test_shifts_per_channel_broadcast(rule):
    q, shifts = torch.tensor([[5, -5], [6, -6]]), torch.tensor([[1], [2]])
    expected = [
        [reference.round_exact(Fraction(v, 2**s), rule) for v in row] for row, s in (((5, -5), 1), ((6, -6), 2))
    ]
    assert shift_right(q, shifts, rule).tolist() == expected


def test_an_unknown_rule_is_refused_with_the_known_ones():
    message = (
        "rule must be one of half_even, half_away_from_zero, half_to_plus_infinity, floor, toward_zero; got 'half_up'"
    )
    with pytest.raises(RangeError, match=message):
        round_real(torch.tensor(1.0), "half_up")
    with pytest.raises(RangeError, match=message):
        shift_right(torch.tensor([1]), 1, "half_up")


@pytest.mark.parametrize("shift", [-1, 63])
def test_a_shift_out_of_bounds_is_refused(shift):
    with pytest.raises(RangeError, match=f"shift must lie in 0 to 62; got {shift}. Multiply to shift left"):
        shift_right(torch.tensor([1]), shift)


def test_a_shift_of_other_integers_is_refused():
    with pytest.raises(RangeError, match=r"q must be int64; got torch.int32. Convert it"):
        shift_right(torch.tensor([1], dtype=torch.int32), 1)
