# SPDX-License-Identifier: Apache-2.0
"""Bounds of ratios of scales: against multipliers made with Python's integers."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qhw.numerics import LegalRatios, legal_ratios
from qhw.schema import Requantize


def made(**fields: Any) -> LegalRatios | None:
    return legal_ratios("requantize.r", Requantize.model_validate(fields))


def held(ratio: float, bits: int, least: int, most: int) -> bool:
    """Whether some multiplier of `bits` bits, its highest set, and some legal shift round to the ratio."""
    exact, shift = Fraction(ratio), 0
    while exact >= 1:
        exact, shift = exact / 2, shift - 1
    while exact < Fraction(1, 2):
        exact, shift = exact * 2, shift + 1
    multiplier = math.floor(exact * 2**bits + Fraction(1, 2))  # ties away from 0
    if multiplier == 2**bits:
        shift -= 1
    return least <= shift <= most


@given(
    st.integers(-20, 40),
    st.floats(0.5, 1.0, exclude_max=True),
    st.integers(1, 31),
    st.integers(-8, 8),
    st.integers(0, 24),
)
def test_fixed_point_by_python_integers(exponent: int, significand: float, bits: int, least: int, more: int) -> None:
    most = least + more
    legal = made(kind="fixed_point", multiplier_bits=bits, shift={"min": least, "max": most})
    assert legal is not None
    ratio = math.ldexp(significand, -exponent)
    assert bool(legal.is_legal(torch.tensor(ratio, dtype=torch.float64))) == held(ratio, bits, least, most)
    for bound in (legal.low, legal.high):  # what is repaired goes to the bounds
        assert held(bound, bits, least, most)


@given(st.integers(-40, 40), st.integers(-8, 8), st.integers(0, 24))
def test_shifts_are_powers_of_two_between_the_bounds(exponent: int, least: int, more: int) -> None:
    legal = made(kind="shift", shift={"min": least, "max": least + more})
    assert legal is not None
    assert bool(legal.is_legal(torch.tensor(2.0**-exponent, dtype=torch.float64))) == (
        least <= exponent <= least + more
    )
    assert (legal.low, legal.high) == (2.0 ** -(least + more), 2.0**-least)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "shift"},
        {"kind": "shift", "shift": "unknown"},
        {"kind": "shift", "shift": {"min": "unknown"}},
        {"kind": "fixed_point", "shift": {"min": 0, "max": 31}},
        {"kind": "fixed_point", "multiplier_bits": "unknown", "shift": {"min": 0, "max": 31}},
        {"kind": "fixed_point", "multiplier_bits": 40, "shift": {"min": 0, "max": 31}},
        {"kind": "unknown"},
        {"kind": "thresholds"},
        {},
        {"ratio": "unknown"},
        {"ratio": {"min": "unknown"}},
    ],
)
def test_what_is_not_stated_bounds_nothing(fields: dict[str, Any]) -> None:
    assert made(**fields) is None


@pytest.mark.parametrize(("given_bound", "low", "high"), [("max", 2.0**-13, math.inf), ("min", 0.0, 2.0**-12)])
def test_one_stated_end_leaves_the_other_open(given_bound: str, low: float, high: float) -> None:
    legal = made(kind="fixed_point", multiplier_bits=31, shift={given_bound: 12})
    assert legal is not None
    assert legal.low == low and (legal.high == high or legal.high == high * (1 - 2.0**-31))
    wide = torch.tensor([2.0**-100, 2.0**100], dtype=torch.float64)
    assert legal.is_legal(wide).tolist() == [given_bound == "min", given_bound == "max"]


@pytest.mark.parametrize("kind", ["float32", "float64"])
def test_floats_hold_what_is_positive_and_finite(kind: str) -> None:
    legal = made(kind=kind)
    assert legal is not None
    ratios = torch.tensor([0.0, -1.0, math.inf, math.nan, 1e-40, 1e38], dtype=torch.float64)
    assert legal.is_legal(ratios).tolist() == [False, False, False, False, True, True]


def test_a_stated_ratio_narrows_what_the_kind_holds() -> None:
    legal = made(kind="fixed_point", multiplier_bits=31, shift={"min": -8, "max": 31}, ratio={"min": 0.25, "max": 4.0})
    assert legal is not None
    assert (legal.low, legal.high) == (0.25, 4.0)
    assert (legal.low_field, legal.high_field) == ("requantize.r.ratio.min", "requantize.r.ratio.max")
    ratios = torch.tensor([0.24, 0.25, 4.0, 4.1], dtype=torch.float64)
    assert legal.is_legal(ratios).tolist() == [False, True, True, False]
    alone = made(ratio={"max": 2.0})
    assert alone is not None and alone.high == 2.0
    assert alone.is_legal(torch.tensor([1.0, 3.0], dtype=torch.float64)).tolist() == [True, False]


@pytest.mark.parametrize(
    ("word", "defined"), [(None, False), ("refuse", False), ("wrap", False), ("saturate", True), ("zero_scale", True)]
)
def test_where_too_small_a_ratio_gives_0(word: str | None, defined: bool) -> None:
    legal = made(kind="fixed_point", multiplier_bits=31, shift={"min": 0, "max": 31}, out_of_range=word)
    assert legal is not None and legal.zero_is_defined is defined
