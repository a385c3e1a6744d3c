# SPDX-License-Identifier: Apache-2.0
"""Requantizations in stages, zero points before rounding, open ends of shifts: against fractions and integers."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import SINGLE, Grid, fill, fixed_point, multiplier_of, quantized, result_of, rounded

Stages = tuple[tuple[str, str], ...]
BITS = 15


class Sums(nn.Module):
    """Sums of one input and no other, so that accumulators are codes times one weight code."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self.layer(input)
        return found


def stated(stages: Stages) -> str:
    """Stages as a target has them."""
    rows = [f'{{ operation = "{name}"{f", rounding = {rule!r}" if rule else ""} }}' for name, rule in stages]
    return f"stages = [{', '.join(rows)}]".replace("'", '"')


def staged(acc: int, ratio: float, stages: Stages, zero_point: int, kind: str) -> int:
    """Every stage on the integer of the one before it, in fractions."""
    multiplier, shift = multiplier_of(ratio, BITS)
    if kind == "shift":
        shift = -round(np.log2(ratio))
    value, rest, is_added = Fraction(acc), shift, False
    for name, rule in stages:
        if name == "multiply":
            value = Fraction(rounded(value * multiplier / 2**BITS, rule))
        elif name == "shift":
            value, rest = Fraction(rounded(value / Fraction(2) ** rest, rule)), 0
        else:
            value, is_added = value + zero_point * Fraction(2) ** rest, True
    return int(value) + (0 if is_added else zero_point)


def codes_of(text: str, x: Grid, weight: int, scale: float, out: Grid, order: str = "zero_point_after") -> Any:
    """Codes of every input code times one weight code."""
    model, codes = Sums(), np.arange(-128, 128).reshape(-1, 1)
    w = Grid([scale], [0])
    fill(model.layer.weight, w.reals(np.array([[weight]])))
    grids = {"input": x, "layer.weight": w, "result": out}
    result = quantized(model, reference.target(text, order=order), x.reals(codes), grids)
    return result_of(IntegerModel(result).codes(x.reals(codes))).ravel()


def expected(x: Grid, weight: int, out: Grid, one: Any) -> Any:
    return np.clip([one(int(q - x.zero_point) * weight) for q in range(-128, 128)], out.low, out.high)


ORDERS: list[tuple[str, ...]] = [
    ("multiply", "shift"), ("shift", "multiply"), ("multiply", "shift", "add_zero_point"),
    ("multiply", "add_zero_point", "shift"),
]  # fmt: skip


@pytest.mark.slow
@given(
    order=st.sampled_from(ORDERS),
    rules=st.tuples(st.sampled_from(SINGLE), st.sampled_from(SINGLE)),
    zeros=st.tuples(st.integers(-128, 127), st.integers(-128, 127)),
    ratio=st.floats(2.0**-9, 4.0),
    weight=st.integers(1, 127),
)
@settings(max_examples=40, deadline=None)
def test_every_stage_rounds_the_integer_of_the_one_before_it(
    order: tuple[str, ...], rules: tuple[str, str], zeros: tuple[int, int], ratio: float, weight: int
) -> None:
    named = dict(zip(("multiply", "shift"), rules, strict=True))
    stages = tuple((name, named.get(name, "")) for name in order)
    x, out, scale = Grid(1.0, zeros[0]), Grid(1.0, zeros[1]), float(np.float32(ratio))
    kind = f'kind = "fixed_point", multiplier_bits = {BITS}, shift = {{ min = -40, max = 40 }}, {stated(stages)}'
    found = codes_of(kind, x, weight, scale, out)
    np.testing.assert_array_equal(
        found, expected(x, weight, out, lambda acc: staged(acc, scale, stages, zeros[1], "fixed_point"))
    )


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("order", [("shift",), ("shift", "add_zero_point"), ("add_zero_point", "shift")])
@pytest.mark.parametrize("exponent", [-3, 0, 2])
def test_a_shift_is_a_stage_of_its_own(exponent: int, order: tuple[str, ...], rule: str) -> None:
    stages = tuple((name, rule if name == "shift" else "") for name in order)
    x, out = Grid(1.0, 5), Grid(1.0, -7)
    text = f'kind = "shift", shift = {{ min = -40, max = 40 }}, {stated(stages)}'
    found = codes_of(text, x, 3, 2.0**exponent, out)
    np.testing.assert_array_equal(
        found, expected(x, 3, out, lambda acc: staged(acc, 2.0**exponent, stages, -7, "shift"))
    )


def test_an_operator_with_a_rounding_of_its_own_has_no_stages() -> None:
    stages = (("multiply", "floor"), ("shift", "floor"))
    kind = f'kind = "fixed_point", multiplier_bits = {BITS}, shift = {{ min = -40, max = 40 }}'
    x, out, w = Grid(1.0, 5), Grid(1.0, -7), Grid([np.float32(0.3)], [0])
    model, codes = Sums(), np.arange(-128, 128).reshape(-1, 1)
    fill(model.layer.weight, w.reals(np.array([[3]])))
    text = reference.text(f"{kind}, {stated(stages)}").replace(
        "operators.Gemm = {", 'operators.Gemm = { rounding = "half_even",'
    )
    grids = {"input": x, "layer.weight": w, "result": out}
    result = quantized(model, parse_target(text), x.reals(codes), grids)
    found = result_of(IntegerModel(result).codes(x.reals(codes))).ravel()
    np.testing.assert_array_equal(found, codes_of(f'{kind}, rounding = "half_even"', x, 3, float(np.float32(0.3)), out))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fixed_point", "shift", "float32", "float64"])
@pytest.mark.parametrize("rule", SINGLE)
@given(zeros=st.tuples(st.integers(-128, 127), st.integers(-128, 127)), weight=st.integers(1, 9))
@settings(max_examples=8, deadline=None)
def test_a_zero_point_goes_before_a_rounding(kind: str, rule: str, zeros: tuple[int, int], weight: int) -> None:
    x, out = Grid(1.0, zeros[0]), Grid(1.0, zeros[1])
    text = {
        "fixed_point": fixed_point(rule),
        "shift": f'kind = "shift", rounding = "{rule}", shift = {{ min = -31, max = 31 }}',
    }.get(kind, f'kind = "{kind}", rounding = "{rule}"')
    # A quarter: every sum is exact in float32, and halves are ties in all four.
    found = codes_of(text, x, weight, 0.25, out, "zero_point_before")
    np.testing.assert_array_equal(
        found, expected(x, weight, out, lambda acc: rounded(Fraction(acc, 4) + zeros[1], rule))
    )


@pytest.mark.parametrize("kind", ["fixed_point", "shift"])
@pytest.mark.parametrize(
    ("rule", "zero_point", "decides"),
    [
        ("floor", 3, False), ("half_to_plus_infinity", 3, False), ("half_even", 4, False), ("half_even", 3, True),
        ("half_away_from_zero", 4, True), ("toward_zero", 4, True), ("half_away_from_zero", 0, False),
    ],
)  # fmt: skip
def test_the_order_is_asked_for_where_it_changes_a_code(kind: str, rule: str, zero_point: int, decides: bool) -> None:
    text = fixed_point(rule) if kind == "fixed_point" else f'kind = "shift", rounding = "{rule}", shift = {{ max = 9 }}'
    x, out = Grid(1.0, 5), Grid(1.0, zero_point)
    after, before = (codes_of(text, x, 3, 0.25, out, order) for order in ("zero_point_after", "zero_point_before"))
    assert (after != before).any() == decides
    if not decides:
        np.testing.assert_array_equal(codes_of(text, x, 3, 0.25, out, "unknown"), after)
        return
    with pytest.raises(IntegerError, match=r"operators\.Gemm\.rounding_order is 'unknown', and must be zero_point_af"):
        codes_of(text, x, 3, 0.25, out, "unknown")


def test_a_shift_that_rounds_nothing_has_no_order() -> None:
    text = 'kind = "shift", rounding = "half_even", shift = { min = -1 }'
    found = codes_of(text, Grid(1.0, 5), 3, 2.0, Grid(1.0, 7), "unknown")
    np.testing.assert_array_equal(found, np.clip((np.arange(-128, 128) - 5) * 6 + 7, -128, 127))


ENDS = [
    ("", 0.25, r"requantize\.r\.shift is not stated, and this operator shifts right by 2"),
    (', shift = "unknown"', 0.25, r"requantize\.r\.shift is 'unknown', and this operator shifts right by 2"),
    (", shift = { min = 0 }", 0.25, r"requantize\.r\.shift\.max is not stated, and this operator shifts right by 2"),
    (
        ', shift = { max = 9, min = "unknown" }',
        4.0,
        r"requantize\.r\.shift\.min is 'unknown', and this operator shifts",
    ),
]


@pytest.mark.parametrize(("shift", "scale", "message"), ENDS)
@pytest.mark.parametrize("kind", ['kind = "shift"', 'kind = "fixed_point", multiplier_bits = 7'])
def test_an_open_end_is_named_where_the_operator_shifts_its_way(
    kind: str, shift: str, scale: float, message: str
) -> None:
    # The significand of a power of two is 2^6 of 7 bits: its shift is one less to the right.
    factor = 0.5 if "fixed" in kind else 1.0
    with pytest.raises(IntegerError, match=message):
        codes_of(f'{kind}, rounding = "floor"{shift}', Grid(1.0), 3, scale * factor, Grid(1.0))


@pytest.mark.parametrize("shift", ["", ", shift = { min = 0 }", ", shift = { max = 0 }"])
def test_no_shift_needs_no_range(shift: str) -> None:
    found = codes_of(f'kind = "shift", rounding = "floor"{shift}', Grid(1.0), 1, 1.0, Grid(1.0))
    np.testing.assert_array_equal(found, np.arange(-128, 128))


REFUSED = [
    ('[{ rounding = "floor" }]', r"stages\[0\]\.operation is not stated, and must be multiply or shift or add_zero"),
    ('[{ operation = "shift" }]', r"stages\[0\]\.rounding is not stated, and must be half_even or"),
    ('[{ operation = "shift", rounding = "double" }]', r'stages\[0\]\.rounding = "double" names no single rounding'),
    (
        '[{ operation = "activation", rounding = "half_even" }]',
        r'stages\[0\]\.operation = "activation" cannot be executed: no field says by what it multiplies',
    ),
    (
        '[{ operation = "shift", rounding = "floor" }]',
        r"requantize\.r\.stages must have multiply and shift once each; got shift",
    ),
    (
        '[{ operation = "add_zero_point" }, { operation = "multiply", rounding = "floor" }, '
        '{ operation = "shift", rounding = "floor" }]',
        r"must add the zero point once, behind multiply; got add_zero_point, multiply, shift",
    ),
    ('"unknown"', r"requantize\.r\.stages is 'unknown'"),
]


@pytest.mark.parametrize(("stages", "message"), REFUSED)
def test_stages_that_say_no_arithmetic_are_named(stages: str, message: str) -> None:
    text = f'kind = "fixed_point", multiplier_bits = 15, shift = {{ min = -40, max = 40 }}, stages = {stages}'
    with pytest.raises(IntegerError, match=message):
        codes_of(text, Grid(1.0), 3, 0.3, Grid(1.0))


def test_stages_say_themselves_where_a_zero_point_comes_first() -> None:
    stages = (("multiply", "floor"), ("shift", "half_even"))
    text = f'kind = "fixed_point", multiplier_bits = 15, shift = {{ min = -40, max = 40 }}, {stated(stages)}'
    with pytest.raises(
        IntegerError, match=r'= "zero_point_before" needs a step add_zero_point in requantize\.r\.stages'
    ):
        codes_of(text, Grid(1.0), 3, 0.3, Grid(1.0, 3), "zero_point_before")
