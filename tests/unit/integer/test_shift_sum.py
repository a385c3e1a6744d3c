# SPDX-License-Identifier: Apache-2.0
"""Sums of two operands on power-of-two scales against Python integers, for every clause of their alignment."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from tests import integer_support as reference
from tests.integer_support import SINGLE, FunctionOf, Grid, quantized, result_of, rounded

pytestmark = pytest.mark.slow

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b}
WIDE = 'bits = 32, overflow = "saturate"'


def rule(to: str, rounding: str, align_rounding: str, least: int = -40, most: int = 40) -> str:
    """A requantization by shifts, and an alignment."""
    return (
        f'kind = "shift", rounding = "{rounding}", shift = {{ min = -40, max = 40 }}, align = {{ to = "{to}", '
        f'rounding = "{align_rounding}", shift = {{ min = {least}, max = {most} }} }}'
    )


def two(a: int, b: int, out: int, zeros: tuple[int, int, int], codes: tuple[int, int] = (-128, 127)) -> Any:
    """Grids of two operands and a result, by exponents of their scales."""
    return tuple(Grid(2.0**e, z, *codes) for e, z in zip((a, b, out), zeros, strict=True))


def aligned_sum(a: Grid, b: Grid, out: Grid, x: int, y: int, sign: int, clause: tuple[str, str, str]) -> int:
    """One code before the clamp, in fractions and integers."""
    to, rounding, align_rounding = clause
    scales = Fraction(float(a.scale)), Fraction(float(b.scale))
    unit = min(scales) if to == "finer" else max(scales)
    left, right = (
        rounded((v - g.zero_point) * s / unit, align_rounding)  # whole already where it goes to the finer scale
        for v, g, s in zip((x, y), (a, b), scales, strict=True)
    )
    return int(rounded((left + sign * right) * unit / Fraction(float(out.scale)), rounding)) + int(out.zero_point)


def codes_of(kind: str, text: str, grids: Any, x_q: Any, y_q: Any, accumulator: str = WIDE) -> Any:
    a, b, out = grids
    example = a.reals(x_q), b.reals(y_q)
    spec = reference.target(text, accumulator=accumulator)
    result = quantized(FunctionOf(SUMS[kind]), spec, example, {"inputs_0": a, "inputs_1": b, "result": out})
    return result_of(IntegerModel(result).codes(*example))


def pairs(seed: int = 0, count: int = 600) -> tuple[Any, Any]:
    """Pairs of int8 codes, the corners among them."""
    rng = np.random.default_rng(seed)
    x, y = rng.integers(-128, 128, (2, 2, count))
    corners = np.array([-128, -128, 127, 127, 0]), np.array([-128, 127, -128, 127, 0])
    x[:, :5], y[:, :5] = corners
    return x, y


@pytest.mark.parametrize("kind", SUMS)
@pytest.mark.parametrize("to", ["finer", "coarser"])
@given(
    exponents=st.tuples(st.integers(-9, 9), st.integers(-9, 9), st.integers(-9, 9)),
    zeros=st.tuples(st.integers(-128, 127), st.integers(-128, 127), st.integers(-128, 127)),
    rounding=st.sampled_from(SINGLE),
    align_rounding=st.sampled_from(SINGLE),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
def test_a_sum_by_shifts_is_that_of_integers(
    kind: str, to: str, exponents: Any, zeros: Any, rounding: str, align_rounding: str, seed: int
) -> None:
    grids = two(exponents[0], exponents[1], exponents[2], zeros)
    x_q, y_q = pairs(seed, 40)
    clause, sign = (to, rounding, align_rounding), -1 if kind == "sub" else 1
    a, b, out = grids
    flat = zip(x_q.ravel().tolist(), y_q.ravel().tolist(), strict=True)
    whole: Any = np.array([aligned_sum(a, b, out, x, y, sign, clause) for x, y in flat], dtype=np.int64)
    found = codes_of(kind, rule(*clause), grids, x_q, y_q)
    np.testing.assert_array_equal(found, out.clamped(whole.reshape(x_q.shape)))


def test_every_clause_of_a_sum_by_shifts_changes_a_code() -> None:
    # The first operand is 8 times coarser, the result 2 times coarser than the finer one: halves occur everywhere.
    grids, (x_q, y_q) = two(0, -3, -2, (3, -7, 5)), pairs()
    base = codes_of("add", rule("coarser", "floor", "half_even"), two(0, -3, 1, (3, -7, 5)), x_q, y_q)
    for clause in (
        ("finer", "floor", "half_even"),
        ("coarser", "half_even", "half_even"),
        ("coarser", "floor", "floor"),
    ):
        changed = codes_of("add", rule(*clause), two(0, -3, 1, (3, -7, 5)), x_q, y_q)
        assert (changed != base).any(), clause
    assert (codes_of("sub", rule("finer", "floor", "floor"), grids, x_q, y_q) != base).any()


def test_sixteen_bit_operands_are_summed_without_a_table_too() -> None:
    a, b, out = two(-14, -10, -9, (0, 100, -5), (-(2**15), 2**15 - 1))
    rng = np.random.default_rng(3)
    x_q, y_q = a.codes(rng, 2, 300), b.codes(rng, 2, 300)
    clause = ("finer", "half_even", "floor")
    flat = zip(x_q.ravel().tolist(), y_q.ravel().tolist(), strict=True)
    expected = np.array([aligned_sum(a, b, out, x, y, 1, clause) for x, y in flat]).reshape(x_q.shape)
    spec = reference.target(rule(*clause), activation=reference.S16, accumulator=WIDE)
    example = a.reals(x_q), b.reals(y_q)
    result = quantized(FunctionOf(SUMS["add"]), spec, example, {"inputs_0": a, "inputs_1": b, "result": out})
    found = result_of(IntegerModel(result).codes(*example))
    np.testing.assert_array_equal(found, out.clamped(expected))


@pytest.mark.parametrize("overflow", ["wrap", "saturate"])
@pytest.mark.parametrize("bits", [9, 11, 12])
def test_a_sum_past_its_register_wraps_or_saturates(overflow: str, bits: int) -> None:
    grids, (x_q, y_q) = two(0, -3, 0, (0, 0, 5)), pairs(4)
    total = 8 * x_q + y_q
    half = 1 << (bits - 1)
    held = (total + half) % (2 * half) - half if overflow == "wrap" else np.clip(total, -half, half - 1)
    exact = [rounded(Fraction(v, 8), "half_even") + 5 for v in held.ravel().tolist()]
    expected = np.clip(np.array(exact).reshape(total.shape), -128, 127)
    text = rule("finer", "half_even", "floor")
    found = codes_of("add", text, grids, x_q, y_q, f'bits = {bits}, overflow = "{overflow}"')
    np.testing.assert_array_equal(found, expected)
    # -128 * 8 - 128 = -1152: 12 bits hold every sum, 11 do not, and the wide register tells the difference.
    wide = codes_of("add", text, grids, x_q, y_q)
    assert (found != wide).any() == (bits < 12)


def test_a_product_past_the_register_that_its_kernel_names_wraps() -> None:
    a, b, out = two(-3, -3, -4, (-128, 127, 0))
    x_q, y_q = pairs(5)
    held = ((x_q + 128) * (y_q - 127) + 2**14) % 2**15 - 2**14
    expected = np.clip([rounded(Fraction(v, 4), "floor") for v in held.ravel().tolist()], -128, 127)
    example = a.reals(x_q), b.reals(y_q)
    text = 'kind = "shift", rounding = "floor", shift = { min = 0, max = 31 }'
    spec = reference.target(text, accumulator='bits = 15, overflow = "wrap"')
    model = FunctionOf(lambda x, y: x * y)
    result = quantized(model, spec, example, {"inputs_0": a, "inputs_1": b, "result": out})
    found = result_of(IntegerModel(result).codes(*example))
    np.testing.assert_array_equal(found.ravel(), expected)


SHIFT = 'kind = "shift", rounding = "half_even", shift = { min = -40, max = 40 }'
OPEN: dict[str, tuple[str, str, str]] = {
    "no alignment": (SHIFT, WIDE, r"requantize\.r\.align is not stated, and must be \{ to = \"finer\", \.\.\. \} or"),
    "an unknown alignment": (f'{SHIFT}, align = "unknown"', WIDE, r"requantize\.r\.align is 'unknown'"),
    "no side": (
        f'{SHIFT}, align = {{ rounding = "floor" }}', WIDE,
        r"requantize\.r\.align\.to is not stated, and must be finer or coarser",
    ),
    "no shift to the left": (
        f'{SHIFT}, align = {{ to = "finer" }}', WIDE,
        r"requantize\.r\.align\.shift is not stated, and this operator shifts right by -3",
    ),
    "an open end on the other side": (
        f'{SHIFT}, align = {{ to = "finer", shift = {{ max = 9 }} }}', WIDE,
        r"requantize\.r\.align\.shift\.min is not stated, and this operator shifts right by -3",
    ),
    "too far to the left": (
        f'{SHIFT}, align = {{ to = "finer", shift = {{ min = -2, max = 0 }} }}', WIDE,
        r"requantize\.r\.align\.shift goes from -2 to 0, and this operator needs -3\. Change a scale",
    ),
    "no rounding": (
        f'{SHIFT}, align = {{ to = "coarser", shift = {{ min = 0, max = 9 }} }}', WIDE,
        r"requantize\.r\.align\.rounding is not stated, and must be half_even or ",
    ),
    "a double rounding": (
        f'{SHIFT}, align = {{ to = "coarser", rounding = "double", shift = {{ min = 0, max = 9 }} }}', WIDE,
        r"requantize\.r\.align\.rounding = \"double\" names no single rounding",
    ),
    "no width": (rule("finer", "floor", "floor"), 'overflow = "wrap"', r"accumulators\.acc\.bits is not stated"),
    "no overflow": (
        rule("finer", "floor", "floor"), "bits = 11",
        r"accumulators\.acc\.overflow is not stated, and must be wrap or saturate",
    ),
    "an overflow that cannot be": (
        rule("finer", "floor", "floor"), 'bits = 11, overflow = "exact"',
        r"it may need 12 bits, and accumulators\.acc\.bits = 11 with overflow = \"exact\"\. Change a scale",
    ),
    "a float register": (
        rule("finer", "floor", "floor"), 'kind = "float", bits = 32',
        r"accumulators\.acc\.kind = \"float\" cannot be executed exactly",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OPEN)
def test_what_a_sum_by_shifts_leaves_open_is_named(name: str) -> None:
    text, accumulator, message = OPEN[name]
    x_q, y_q = pairs()
    with pytest.raises(IntegerError, match=message):
        codes_of("add", text, two(0, -3, 0, (0, 0, 0)), x_q, y_q, accumulator)


def test_operands_on_one_scale_need_no_alignment() -> None:
    x_q, y_q = pairs()
    found = codes_of("add", 'kind = "shift", rounding = "half_even"', two(1, 1, 1, (3, -4, 5)), x_q, y_q)
    np.testing.assert_array_equal(found, np.clip(x_q - 3 + y_q + 4 + 5, -128, 127))


def test_scales_that_are_no_power_of_two_apart_are_named() -> None:
    x_q, y_q = pairs()
    grids = Grid(0.3), Grid(0.25), Grid(0.5)
    with pytest.raises(IntegerError, match=r"needs operands whose scales are a power of two apart; got 1\.2"):
        codes_of("add", rule("finer", "floor", "floor"), grids, x_q, y_q)


def test_operands_too_far_apart_for_any_integer_are_named() -> None:
    x_q, y_q = pairs()
    grids = two(40, -20, 40, (0, 0, 0))
    text = rule("finer", "floor", "floor", -62, 62).replace("max = 40 }, align", "max = 62 }, align")
    with pytest.raises(IntegerError, match=r"its sum needs 69 bits, more than the 62 that can be executed"):
        codes_of("add", text, grids, x_q, y_q)
