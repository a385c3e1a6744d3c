# SPDX-License-Identifier: Apache-2.0
"""Sums of two neighbouring products, against every input of small ranges."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import PerTensor, QParams, multiplied_offset, multiplied_range, pair_sums


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=5), st.integers(-3, 1), st.integers(1, 4))
def test_the_ends_of_pairs_are_those_of_all_inputs(weights: list[int], low: int, high: int) -> None:
    lowest, highest = pair_sums(torch.tensor(weights), low, high)
    for pair, least, most in zip(range(0, len(weights), 2), lowest.tolist(), highest.tolist(), strict=True):
        met = weights[pair : pair + 2]
        sums = [
            sum(w * x for w, x in zip(met, inputs, strict=True))
            for inputs in itertools.product(range(low, high + 1), repeat=len(met))
        ]
        assert (least, most) == (min(sums), max(sums))


@pytest.mark.parametrize(
    ("low", "high", "zero", "expected"),
    [
        (-128, 127, 3, {"centred": (-131, 124), "stored": (-128, 127), "unsigned": (0, 255)}),
        (-127, 127, 0, {"centred": (-127, 127), "stored": (-127, 127), "unsigned": (1, 255)}),
        (0, 255, 100, {"centred": (-100, 155), "stored": (0, 255), "unsigned": (0, 255)}),
        (-8, 7, -8, {"centred": (0, 15), "stored": (-8, 7), "unsigned": (0, 15)}),
        (-1, 0, 0, {"centred": (-1, 0), "stored": (-1, 0), "unsigned": (0, 1)}),
    ],
    ids=["s8", "narrow-s8", "u8", "s4", "binary"],
)
def test_what_is_multiplied_by_hand(low: int, high: int, zero: int, expected: dict[str, tuple[int, int]]) -> None:
    x = QParams(torch.tensor(1.0), torch.tensor(zero, dtype=torch.int32), low, high, PerTensor())
    assert {form: multiplied_range(x, form) for form in expected} == expected  # type: ignore[arg-type]
    for form, (start, _) in expected.items():
        assert multiplied_offset(x, form) == start - (low - zero)  # type: ignore[arg-type]


def test_real_weights_are_no_codes() -> None:
    with pytest.raises(
        RangeError, match=r"pairs: weight_q must be integer codes; got torch\.float32\. Quantize it first"
    ):
        pair_sums(torch.ones(4), 0, 255)
