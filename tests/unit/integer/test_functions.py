# SPDX-License-Identifier: Apache-2.0
"""Softmax, roots, HardSwish and Resize without a runtime: hand-made codes, float64, and every reason against them."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.integer.fixed_point import (
    exp_of_negative,
    inverse_square_root,
    logarithm,
    multiply,
    reciprocal_of_one_plus,
    rounded_right,
)
from tests import integer_support as reference
from tests.integer_support import DOUBLE, Function, Grid, quantized, result_of

FIXED = 'approximation = { kind = "fixed_point", '
SOFTMAX = "integer_bits = 5, sum_integer_bits = 12"
BYTES = Grid(1 / 256, -128)
SAME = 'same_scale = "input_output", rounding = "half_even", rounding_order = "zero_point_after", '


def model(function: Callable[[Tensor], Tensor], kind: str, row: str, x: Grid, x_q: Any, out: Grid) -> IntegerModel:
    """An operator on given grids, on a target that has it besides what every test target has."""
    text = f'operators.{kind} = {{ kernels = ["two"], {row} }}'
    spec = reference.target(DOUBLE, without=(kind,), more=text)
    return IntegerModel(quantized(Function(function), spec, x.reals(x_q), {"input": x, "result": out}))


def codes_of(
    function: Callable[[Tensor], Tensor], kind: str, row: str, x: Grid, x_q: Any, out: Grid
) -> np.ndarray[Any, Any]:
    return result_of(model(function, kind, row, x, x_q, out).codes(x.reals(x_q)))


# Fixed point against float64.


def test_products_round_ties_upwards_and_shifts_away_from_zero() -> None:
    a = torch.tensor([2**30, -(2**30), 3, -3])
    assert multiply(a, torch.tensor(1)).tolist() == [1, 0, 0, 0]
    assert rounded_right(torch.tensor([3, -3, 5, -5, 6]), 1).tolist() == [2, -2, 3, -3, 3]


@pytest.mark.parametrize("bits", [0, 3, 5])
def test_the_exponential_lies_next_to_the_real_one(bits: int) -> None:
    x = -torch.linspace(0, 2.0**31 - 1, 5001, dtype=torch.float64).long()
    exact = torch.exp(x.double() / 2.0 ** (31 - bits)) * 2.0**31
    # What a polynomial of degree 4 leaves out, up to 1/8 from its middle, and a few roundings.
    assert float((exp_of_negative(x, bits).double() - exact).abs().max()) < 2**31 * (1 / 8) ** 5 / 120 + 32


def test_the_reciprocal_lies_next_to_the_real_one() -> None:
    x = torch.linspace(0, 2.0**31 - 1, 5001, dtype=torch.float64).long()
    exact = 2.0**31 / (1 + x.double() / 2.0**31)
    assert float((reciprocal_of_one_plus(x).double() - exact).abs().max()) < 32


def test_the_logarithm_lies_next_to_the_real_one() -> None:
    x = (2.0 ** torch.linspace(19, 30.9, 2001, dtype=torch.float64)).long()
    exact = torch.log(x.double() / 2.0**19) * 2.0**26
    assert float((logarithm(x, 12, 5).double() - exact).abs().max()) < 2**26 * 1e-6


def test_the_inverse_square_root_lies_next_to_the_real_one() -> None:
    values = torch.arange(1, 70_000, 7)
    multiplier, shift = inverse_square_root(values)
    found = multiplier.double() / 2.0**31 / 2.0 ** shift.double()
    assert float((found * values.double().sqrt() - 1).abs().max()) < 2e-6  # five Newton steps from 1


# Operators by hand.


@pytest.mark.parametrize("row", [f"{FIXED}{SOFTMAX} }}", 'approximation = { kind = "table" }'], ids=["fixed", "table"])
@pytest.mark.parametrize("axis", [1, -1])
def test_softmax_gives_the_codes_of_float64_away_from_ties(row: str, axis: int) -> None:
    x = Grid(np.float32(0.07), -20)
    x_q = x.codes(np.random.default_rng(0), 20, 9, 8)
    e = np.exp((x_q - x_q.max(axis, keepdims=True)) * np.float64(np.float32(0.07)))
    real = e / e.sum(axis, keepdims=True) * 256
    sure = np.abs(real - np.floor(real) - 0.5) > 1e-3
    expected = np.clip(np.rint(real) - 128, -128, 127)
    found = codes_of(lambda v: v.softmax(axis), "Softmax", row, x, x_q, BYTES)
    assert sure.mean() > 0.99
    np.testing.assert_array_equal(found[sure], expected[sure])


def test_log_softmax_gives_the_codes_of_float64_away_from_ties() -> None:
    x, out = Grid(np.float32(0.07), -20), Grid(1 / 16, 127)
    x_q = x.codes(np.random.default_rng(0), 200, 9)
    logits = (x_q - x_q.max(1, keepdims=True)) * np.float64(np.float32(0.07))
    real = (logits - np.log(np.exp(logits).sum(1, keepdims=True))) * 16
    sure = np.abs(real - np.floor(real) - 0.5) > 1e-3
    found = codes_of(lambda v: v.log_softmax(1), "LogSoftmax", f"{FIXED}{SOFTMAX} }}", x, x_q, out)
    np.testing.assert_array_equal(found[sure], np.clip(np.rint(real) + 127, -128, 127)[sure])


def test_one_code_alone_has_probability_one() -> None:
    found = codes_of(lambda v: v.softmax(1), "Softmax", f"{FIXED}{SOFTMAX} }}", Grid(0.1), np.array([[7], [-9]]), BYTES)
    assert found.tolist() == [[127], [127]]


def test_hard_swish_stays_within_a_code_of_float64() -> None:
    x, out, x_q = Grid(0.05, 3), Grid(0.03, -40), np.arange(-128, 128).reshape(4, 64)
    real = x.centred(x_q) * 0.05
    exact = real * np.clip(real + 3, 0, 6) / 6 / 0.03 - 40
    row = f"{FIXED}multiplier_bits = 15 }}"
    found = codes_of(F.hardswish, "HardSwish", row, x, x_q, out)
    assert np.abs(found - np.clip(exact, -128, 127)).max() < 1
    table = codes_of(F.hardswish, "HardSwish", 'approximation = { kind = "table" }', x, x_q, out)
    assert np.abs(table - np.clip(exact, -128, 127)).max() < 0.5001


def test_a_bilinear_resize_to_twice_the_size_by_hand() -> None:
    # Positions -1/4, 1/4, 3/4 and 5/4: of 10 and 17 come 10, 11.75, 15.25 and 17.
    x = Grid(0.5, 2)
    x_q = np.array([[[[10, 17]]], [[[0, 2]]]])
    named = f"{SAME.replace('half_even', 'half_away_from_zero')}{FIXED}fraction_bits = 2 }}"
    up: Any = lambda v: F.interpolate(v, size=(1, 4), mode="bilinear")  # noqa: E731
    found = codes_of(up, "Resize", named.replace("zero_point_after", "zero_point_before"), x, x_q, x)
    assert found.tolist() == [[[[10, 12, 15, 17]]], [[[0, 1, 2, 2]]]]  # 1/2 -> 1, 3/2 -> 2
    after = codes_of(up, "Resize", named, x, x_q, x)
    assert after.tolist()[1] == [[[0, 0, 1, 2]]]  # (0 - 2) + 1/2 -> -2, (0 - 2) + 3/2 -> -1


@pytest.mark.parametrize(("rule", "copied"), [("exact", 7), ("float32_ratio", 6), ("float32_quotient", 7)], ids=str)
def test_a_nearest_resize_rounds_positions_as_the_target_says(rule: str, copied: int) -> None:
    # 14 elements to 46: 23 * 14 / 46 is 7, and 23 * float32(14 / 46) lies below it.
    x = Grid(0.5, 2)
    x_q = np.arange(14).reshape(1, 1, 1, 14).repeat(2, 0)
    assert (np.float32(23) * (np.float32(14) / np.float32(46)) < 7) == (rule == "float32_ratio" or copied == 7)
    row = f'same_scale = "input_output", {FIXED}position = "{rule}" }}'
    found = codes_of(lambda v: F.interpolate(v, size=(1, 46)), "Resize", row, x, x_q, x)
    assert found[0, 0, 0, 23] == copied


def test_where_a_logarithm_has_no_value_the_target_says_which_code_stands() -> None:
    x, out, x_q = Grid(0.1, -100), Grid(0.05, -20), np.arange(-128, 128).reshape(4, 64)
    real = np.log(np.maximum(x.centred(x_q), 1) * np.float64(np.float32(0.1))) / np.float64(np.float32(0.05)) - 20
    for word, code in (("lowest", -128), ("highest", 127)):
        row = f'approximation = {{ kind = "table", outside = "{word}" }}'
        found = codes_of(torch.log, "Log", row, x, x_q, out)
        expected = np.where(x_q <= -100, code, np.clip(np.rint(real), -128, 127))
        np.testing.assert_array_equal(found, expected)


def test_a_root_is_correctly_rounded() -> None:
    # sqrt(72 * 0.02) / 0.3 is 3.9999995 in float32, and 4 if the root is rounded the other way.
    row = 'approximation = { kind = "table", outside = "refuse" }, rounding = "toward_zero"'
    found = codes_of(torch.sqrt, "Sqrt", row, Grid(np.float32(0.02), 0), np.array([[72], [18]]), Grid(np.float32(0.3)))
    assert found.tolist() == [[3], [math.floor(np.sqrt(np.float32(18) * np.float32(0.02)) / np.float32(0.3))]]


def test_gelu_by_erfc_keeps_the_tail_that_erf_loses() -> None:
    # 1 + erf(5.355 / sqrt(2)) is 2 in float32: a tie of 76.5 that erfc leaves below.
    x, out, x_q = Grid(np.float32(0.035), -128), Grid(np.float32(0.07), -40), np.array([[25], [25]])
    row = 'rounding = "half_away_from_zero", approximation = {{ kind = "table", quotient = "reciprocal"{} }}'
    by_erfc = codes_of(F.gelu, "Gelu", row.format(', function = "erfc"'), x, x_q, out)
    assert by_erfc.tolist() == [[76 - 40]] * 2
    assert codes_of(F.gelu, "Gelu", row.format(""), x, x_q, out).tolist() == [[77 - 40]] * 2


# What stands against them.

IMAGE, ROWS = np.zeros((2, 1, 3, 3), np.int64), np.zeros((2, 4), np.int64)
Reason = tuple[Callable[[Tensor], Tensor], str, str, Grid, Any, Grid, str]
REFUSED: dict[str, Reason] = {
    "no integer bits": (
        lambda v: v.softmax(1), "Softmax", f"{FIXED}sum_integer_bits = 12 }}", Grid(0.1), ROWS, BYTES,
        r"operators\.Softmax\.approximation\.integer_bits is not stated",
    ),
    "too many integer bits": (
        lambda v: v.softmax(1), "Softmax", f"{FIXED}integer_bits = 6, sum_integer_bits = 12 }}", Grid(0.1), ROWS, BYTES,
        r"operators\.Softmax\.approximation\.integer_bits must be at most 5 to be executed exactly; got 6",
    ),
    "another grid of probabilities": (
        lambda v: v.softmax(1), "Softmax", f"{FIXED}{SOFTMAX} }}", Grid(0.1), ROWS, Grid(1 / 128),
        r"operators\.Softmax in fixed point needs a result of scale 2\^-8 from its lowest code on",
    ),
    "more exponentials than their sum holds": (
        lambda v: v.softmax(1), "Softmax", f"{FIXED}integer_bits = 5, sum_integer_bits = 1 }}", Grid(0.1), ROWS, BYTES,
        r"operators\.Softmax: a sum of 4 exponentials leaves 1 integer bits",
    ),
    "an input scale too fine for a multiplier": (
        lambda v: v.softmax(1), "Softmax", f"{FIXED}{SOFTMAX} }}", Grid(np.float32(1e-9)), ROWS, BYTES,
        r"operators\.Softmax in fixed point needs an input scale of 2\^-26 or more",
    ),
    "another grid of their logarithms": (
        lambda v: v.log_softmax(1), "LogSoftmax", f"{FIXED}{SOFTMAX} }}", Grid(0.1), ROWS, Grid(0.1, 127),
        r"operators\.LogSoftmax in fixed point needs a result of scale 2\^-k whose zero point is its highest code",
    ),
    "multipliers narrower than codes": (
        F.hardswish, "HardSwish", f"{FIXED}multiplier_bits = 7 }}", Grid(0.1), ROWS, Grid(0.1),
        r"operators\.HardSwish\.approximation\.multiplier_bits = 7 is too narrow for the codes it reads",
    ),
    "an output scale too fine": (
        F.hardswish, "HardSwish", f"{FIXED}multiplier_bits = 15 }}", Grid(1.0), ROWS, Grid(1e-3),
        r"operators\.HardSwish in fixed point needs an output scale of 1 to 32768 times its input scale / 128; got",
    ),
    "no code outside": (
        torch.log, "Log", 'approximation = { kind = "table" }', Grid(0.1), ROWS, Grid(0.1),
        r"operators\.Log\.approximation\.outside is not stated",
    ),
    "no position": (
        lambda v: F.interpolate(v, size=(5, 5)), "Resize", f"{SAME}{FIXED}fraction_bits = 10 }}", Grid(0.1), IMAGE,
        Grid(0.1), r"operators\.Resize\.approximation\.position is not stated",
    ),
    "no fraction": (
        lambda v: F.interpolate(v, size=(5, 5), mode="bilinear"), "Resize", f'{SAME}{FIXED}position = "exact" }}',
        Grid(0.1), IMAGE, Grid(0.1), r"operators\.Resize\.approximation\.fraction_bits is not stated",
    ),
    "a fraction too coarse": (
        lambda v: F.interpolate(v, size=(3, 8), mode="bilinear"), "Resize", f"{SAME}{FIXED}fraction_bits = 2 }}",
        Grid(0.1), IMAGE, Grid(0.1),
        r"operators\.Resize: 3 elements resized to 8 have positions behind the last: too few fraction_bits",
    ),
    "a factor that is no ratio of sizes": (
        lambda v: F.interpolate(v, scale_factor=1.5), "Resize", f'{SAME}{FIXED}position = "exact" }}', Grid(0.1), IMAGE,
        Grid(0.1), r"Resize by a factor of 1\.5, 3 to 4 elements, cannot be executed exactly: its positions follow",
    ),
    "two grids": (
        lambda v: F.interpolate(v, size=(5, 5)), "Resize", f'{FIXED}position = "exact" }}', Grid(0.1), IMAGE, Grid(0.2),
        r"Resize between two grids cannot be executed exactly yet",
    ),
    "a clamp behind copied codes": (
        lambda v: F.relu(F.interpolate(v, size=(5, 5))), "Resize",
        f'{SAME}fused = ["Relu"], {FIXED}position = "exact" }}', Grid(0.1), IMAGE, Grid(0.1),
        r"Relu behind Resize cannot be executed exactly yet",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_the_reason_is_given_word_by_word(name: str) -> None:
    *arguments, reason = REFUSED[name]
    with pytest.raises(IntegerError, match=reason):
        model(*arguments)


@pytest.mark.parametrize("kind", ["Softmax", "LogSoftmax"])
def test_a_table_of_too_many_codes_is_named(kind: str) -> None:
    low, high = -(2**20), 2**20 - 1
    wide = Grid(0.1, 0, low, high)
    spec = reference.target(
        DOUBLE, activation='bits = 21, signed = true, per = "tensor"',
        more=f'operators.{kind} = {{ kernels = ["two"], {FIXED}{SOFTMAX} }} }}',
    )  # fmt: skip
    function: Any = {"Softmax": lambda v: v.softmax(1), "LogSoftmax": lambda v: v.log_softmax(1)}[kind]
    out = Grid(2.0**-21, low, low, high) if kind == "Softmax" else Grid(2.0**-4, high, low, high)
    with pytest.raises(IntegerError, match=rf"operators\.{kind}: a table for 2097152 codes cannot be executed yet"):
        IntegerModel(quantized(Function(function), spec, wide.reals(ROWS), {"input": wide, "result": out}))


def test_a_root_of_a_negative_code_ends_the_run_where_the_target_refuses_it() -> None:
    row = 'approximation = { kind = "table", outside = "refuse" }'
    built = model(torch.sqrt, "Sqrt", row, Grid(0.1, 5), np.array([[5], [9]]), Grid(0.1))
    built(Grid(0.1, 5).reals(np.array([[5], [9]])))
    words = r"sqrt: Sqrt has no value at code 4, and operators\.Sqrt\.approximation\.outside refuses it"
    with pytest.raises(IntegerError, match=words):
        built(Grid(0.1, 5).reals(np.array([[4], [9]])))


def test_a_sum_of_exponentials_at_which_the_kernel_ends_ends_here_too() -> None:
    x_q = np.zeros((2, 600), np.int64)
    x_q[:, ::2] = -100
    built = model(lambda v: v.softmax(1), "Softmax", f"{FIXED}{SOFTMAX} }}", Grid(0.1), x_q, BYTES)
    assert result_of(built.codes(Grid(0.1).reals(x_q))).max() == -127  # 256 / 300 rounds to 1
    with pytest.raises(IntegerError, match=r"softmax: a sum of exponentials reaches 512, and there operators\.Softmax"):
        built(Grid(0.1).reals(np.zeros((2, 600), np.int64)))
