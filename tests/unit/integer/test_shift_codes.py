# SPDX-License-Identifier: Apache-2.0
"""Requantization by shifts alone, of sums carried in float32: the codes that fractions give."""

import math
from fractions import Fraction

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.integer.arithmetic import Requantization
from qhw.integer.finish import finish_of

RULES = {
    "half_even": round,
    "half_to_plus_infinity": lambda x: math.floor(x + Fraction(1, 2)),
    "half_away_from_zero": lambda x: int(math.copysign(math.floor(abs(x) + Fraction(1, 2)), x)) if x else 0,
    "floor": math.floor,
    "toward_zero": math.trunc,
}


@settings(max_examples=300, deadline=None)
@given(
    acc=st.lists(st.one_of(st.integers(-(2**24) + 1, 2**24 - 1), st.integers(-300, 300)), min_size=1, max_size=9),
    shift=st.integers(-40, 62),
    rule=st.sampled_from(sorted(RULES)),
    zero_point=st.integers(-128, 127),
)
def test_codes_are_those_of_fractions(acc: list[int], shift: int, rule: str, zero_point: int) -> None:
    rescale = Requantization("shift", rule, zero_point, shift=torch.tensor(shift))  # type: ignore[arg-type]
    found = torch.empty(len(acc))
    finish_of(rescale, (-128, 127), 2**24 - 1)(torch.tensor(acc, dtype=torch.float32), found)
    wanted = [min(127, max(-128, RULES[rule](Fraction(a) / Fraction(2) ** shift) + zero_point)) for a in acc]
    assert found.long().tolist() == wanted
