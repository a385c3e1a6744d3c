# SPDX-License-Identifier: Apache-2.0
"""Accumulator bounds against every input and every order, and against head-room known from the literature."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.errors import RangeError
from qhw.numerics import accumulator_bits_needed, accumulator_bounds


@given(
    weight=st.lists(st.integers(-8, 7), min_size=1, max_size=3),
    input_min=st.integers(-3, 0),
    span=st.integers(1, 3),
    input_offset=st.integers(0, 3),
    weight_zero_point=st.integers(-2, 2),
    bias=st.none() | st.integers(-20, 20),
)
@settings(max_examples=80, deadline=None)
def test_bounds_hold_for_every_input_and_every_order(weight, input_min, span, input_offset, weight_zero_point, bias):
    input_max = input_min + span
    zero_point = min(input_min + input_offset, input_max)
    reached = {0}
    for x in itertools.product((input_min, input_max), repeat=len(weight)):
        terms = [(w - weight_zero_point) * (v - zero_point) for w, v in zip(weight, x, strict=True)]
        for order in itertools.permutations([*terms, bias] if bias is not None else terms):
            reached.update(itertools.accumulate(order))
    lowest, highest = accumulator_bounds(
        torch.tensor([weight], dtype=torch.int8),
        input_quant_min=input_min,
        input_quant_max=input_max,
        input_zero_point=zero_point,
        weight_zero_point=weight_zero_point,
        bias_q=None if bias is None else torch.tensor([bias], dtype=torch.int32),
    )
    assert (lowest.item(), highest.item()) == (min(reached), max(reached))


def test_a_channel_by_hand():
    # w = [2, -3], x in [0, 255] with zero point 10, so x - z in [-10, 245].
    # highest = 2*245 + (-3)*(-10) = 520; lowest = 2*(-10) + (-3)*245 = -755; 11 bits hold [-1024, 1023].
    lowest, highest = accumulator_bounds(
        torch.tensor([[2, -3]], dtype=torch.int8), input_quant_min=0, input_quant_max=255, input_zero_point=10
    )
    assert (lowest.item(), highest.item()) == (-755, 520)
    assert accumulator_bits_needed(lowest, highest).tolist() == [11]


@pytest.mark.parametrize(
    ("low", "high", "bits"),
    [
        (0, 0, 1),
        (-1, 0, 1),
        (0, 1, 2),
        (-128, 127, 8),
        (-129, 0, 9),
        (0, 128, 9),
        (-(2**31), 2**31 - 1, 32),
        (0, 2**31, 33),
        (-(2**63), 2**63 - 1, 64),
    ],
)
def test_bits_at_the_edges_of_twos_complement(low, high, bits):
    assert accumulator_bits_needed(torch.tensor([low]), torch.tensor([high])).tolist() == [bits]


@pytest.mark.parametrize(
    ("products", "bits"), [(2**17 - 1, 32), (2**17, 33)], ids=["131071-products-fit-32-bits", "131072-do-not"]
)
def test_int8_by_int8_head_room_of_the_white_paper(products, bits):
    # Each product is at most (-128) * (-128) = 2**14; 2**17 of them make 2**31, one more than int32 holds.
    weight = torch.full((1, products), -128, dtype=torch.int8)
    bounds = accumulator_bounds(weight, input_quant_min=-128, input_quant_max=127)
    assert accumulator_bits_needed(*bounds).tolist() == [bits]


def test_convolution_weights_give_one_bound_per_output_channel():
    weight = torch.tensor([[[[1, -1], [2, 0]]], [[[3, 3], [3, 3]]]], dtype=torch.int8)
    lowest, highest = accumulator_bounds(weight, input_quant_min=0, input_quant_max=10)
    assert (lowest.tolist(), highest.tolist()) == ([-10, 0], [30, 120])


def test_float_weights_are_refused():
    with pytest.raises(RangeError, match=r"weight_q must be integer codes; got torch.float32. Quantize it first"):
        accumulator_bounds(torch.ones(1, 1), input_quant_min=0, input_quant_max=1)


def test_an_input_zero_point_off_the_grid_is_refused():
    with pytest.raises(RangeError, match=r"input_zero_point must lie in \[0, 255\]; got 256. Use a code of the input"):
        accumulator_bounds(
            torch.ones(1, 1, dtype=torch.int8), input_quant_min=0, input_quant_max=255, input_zero_point=256
        )
