# SPDX-License-Identifier: Apache-2.0
"""Sums and products of two activations against fractions, an FMA of exact arithmetic, and LiteRT's published steps."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import DOUBLE, FLOAT32, RULES, SINGLE, Grid, Rule, quantized, result_of


class Two(nn.Module):
    """A function of two inputs."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.function(a, b)


class One(nn.Module):
    """A function of one input, which it reads twice."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, a: Tensor) -> Tensor:
        return self.function(a, a)


ADD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b}
# (a, b, result): random scales, short decimals (near ties), powers of two (exact ties), operands far apart.
GRIDS = {
    "random": (Grid(np.float32(0.0173), 5), Grid(np.float32(0.0412), -77), Grid(np.float32(0.0551), 12)),
    "decimal": (Grid(np.float32(0.02), -3), Grid(np.float32(0.1), 100), Grid(np.float32(0.08), -1)),
    # Of the 65,536 pairs, 1,201 change when the constant of the fused form is rounded once more.
    "near-ties": (Grid(np.float32(0.12), -10), Grid(np.float32(0.1), 73), Grid(np.float32(0.28), 50)),
    "powers": (Grid(0.25, 3), Grid(0.125, -7), Grid(0.5, 5)),
    "far": (Grid(np.float32(1e-4), 0), Grid(np.float32(3.0), 9), Grid(np.float32(3.1), 0)),
    "extreme-zeros": (Grid(0.25, -128), Grid(0.25, 127), Grid(0.5, -128)),
}


def all_pairs() -> tuple[Any, Any]:
    """Every pair of int8 codes, [2, 32768] each: one batch is not one shape's accident."""
    a, b = np.meshgrid(np.arange(-128, 128), np.arange(-128, 128))
    return a.reshape(2, -1), b.reshape(2, -1)


def exact_fma(a: Any, b: Any, c: Any) -> Any:
    """float32(a b + c) from fractions. A float64 of the sum could round twice, so the half is looked at exactly."""

    def one(x: float, y: float, z: float) -> float:
        exact = Fraction(x) * Fraction(y) + Fraction(z)
        near = np.float32(float(exact))
        around = (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf)))
        gaps = [abs(Fraction(float(v)) - exact) for v in around]
        best = min(gaps)
        chosen = [v for v, gap in zip(around, gaps, strict=True) if gap == best]
        return float(min(chosen, key=lambda v: int(np.float32(v).view(np.int32)) & 1))

    spread = np.broadcast_arrays(a, b, c)
    found = [one(*row) for row in zip(*(v.ravel().tolist() for v in spread), strict=True)]
    return np.array(found, np.float32).reshape(spread[0].shape)


def run(function: Any, spec: Any, grids: tuple[Grid, Grid, Grid], a_q: Any, b_q: Any) -> Any:
    a, b, out = grids
    example = a.reals(a_q), b.reals(b_q)
    result = quantized(Two(function), spec, example, {"a": a, "b": b, "result": out})
    return result_of(IntegerModel(result).codes(*example))


def each(values: Any, rule: str) -> Any:
    found = [reference.rounded(Fraction(float(v)), rule) for v in values.ravel()]
    return np.array(found).reshape(values.shape)


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ADD)
def test_a_sum_with_the_zero_point_after_rounding_is_two_float32_products(kind: str, name: str, rule: str) -> None:
    a, b, out = GRIDS[name]
    sign = np.float32(-1 if kind == "sub" else 1)
    a_q, b_q = (v[:, ::37] for v in all_pairs())
    first, second = (np.float32(g.scale) / np.float32(out.scale) for g in (a, b))
    total = a.centred(a_q).astype(np.float32) * first + b.centred(b_q).astype(np.float32) * (sign * second)
    expected = out.clamped(each(total, rule) + out.zero_point)
    spec = reference.target(f'kind = "float32", rounding = "{rule}"')
    np.testing.assert_array_equal(run(ADD[kind], spec, GRIDS[name], a_q, b_q), expected)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ADD)
def test_a_sum_with_the_zero_point_before_rounding_is_two_fused_multiply_adds(kind: str, name: str) -> None:
    a, b, out = GRIDS[name]
    sign = np.float32(-1 if kind == "sub" else 1)
    a_q, b_q = (v[:, ::41] for v in all_pairs())
    first, second = np.float32(a.scale) / np.float32(out.scale), sign * np.float32(b.scale) / np.float32(out.scale)
    constant = np.float32(out.zero_point) - exact_fma(
        first, np.float32(a.zero_point), second * np.float32(b.zero_point)
    )
    inner = exact_fma(b_q.astype(np.float32), second, constant)
    total = exact_fma(a_q.astype(np.float32), first, inner)
    expected = out.clamped(each(total, "half_even"))
    spec = reference.target(FLOAT32, order="zero_point_before")
    np.testing.assert_array_equal(run(ADD[kind], spec, GRIDS[name], a_q, b_q), expected)


def litert_sum(a: Grid, b: Grid, out: Grid, a_q: Any, b_q: Any, sign: int) -> Any:
    """ADD of LiteRT's reference kernel: operands times 2^20, scaled to twice the larger scale, added, scaled."""
    twice = 2 * max(float(np.float32(a.scale)), float(np.float32(b.scale)))
    ratios = float(np.float32(a.scale)) / twice, float(np.float32(b.scale)) / twice
    last = twice / ((1 << 20) * float(np.float32(out.scale)))

    def scaled(value: int, ratio: float) -> int:
        multiplier, right = reference.multiplier_of(ratio, 31)
        return reference.divide_by_power(reference.high_multiply(value << max(-right, 0), multiplier), max(right, 0))

    def one(x: int, y: int) -> int:
        left, right = scaled((x - a.zero_point) << 20, ratios[0]), scaled((y - b.zero_point) << 20, ratios[1])
        return scaled(left + sign * right, last) + out.zero_point

    found = [one(x, y) for x, y in zip(a_q.ravel().tolist(), b_q.ravel().tolist(), strict=True)]
    return np.clip(np.array(found).reshape(a_q.shape), out.low, out.high)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ADD)
def test_a_fixed_point_sum_is_the_one_of_litert(kind: str, name: str) -> None:
    a_q, b_q = (v[:, ::17] for v in all_pairs())
    expected = litert_sum(*GRIDS[name], a_q, b_q, -1 if kind == "sub" else 1)
    np.testing.assert_array_equal(run(ADD[kind], reference.target(DOUBLE), GRIDS[name], a_q, b_q), expected)


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("kind", ADD)
def test_a_fixed_point_sum_on_one_scale_needs_no_pre_shift_and_rounds_once(kind: str, rule: str) -> None:
    text = reference.text(reference.fixed_point(rule, bits=15))
    spec = parse_target(text.replace("preshift_bits = { a = 20 }", 'same_scale = "inputs"'))
    operand, out, (a_q, b_q) = Grid(0.375, -9), Grid(1.0, 4), all_pairs()
    found = run(ADD[kind], spec, (operand, operand, out), a_q, b_q)
    total = (a_q + 9) + (-1 if kind == "sub" else 1) * (b_q + 9)
    eighths = {int(t): int(reference.rounded(Fraction(3 * int(t), 8), rule)) + 4 for t in np.unique(total)}
    np.testing.assert_array_equal(found, out.clamped(np.vectorize(eighths.get)(total)))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}-{r.order}")
def test_a_product_of_two_activations_element_by_element_is_one_multiplier(rule: Rule) -> None:
    grids = GRIDS["powers"] if rule.kind == "shift" else GRIDS["decimal"]
    a, b, out = grids
    a_q, b_q = (v[:, ::53] for v in all_pairs())
    acc = a.centred(a_q) * b.centred(b_q)
    expected = out.clamped(rule.codes(acc, [a.scale, b.scale], out)).astype(np.int64)
    spec = reference.target(rule.text, order=rule.order)
    np.testing.assert_array_equal(run(lambda a, b: a * b, spec, grids, a_q, b_q), expected)


def test_every_pair_of_codes_of_a_sum_and_a_product_is_met() -> None:
    a_q, b_q = all_pairs()
    a, b, out = GRIDS["powers"]
    for kind, acc in (("mul", a.centred(a_q) * b.centred(b_q)), ("add", 2 * a.centred(a_q) + b.centred(b_q))):
        # In units of 1/32 and of 1/8, halves are exact: numpy's rint of a float64 is the truth.
        quotient = acc / 16.0 if kind == "mul" else acc / 4.0
        expected = np.clip(np.rint(quotient) + out.zero_point, -128, 127)
        function = (lambda a, b: a * b) if kind == "mul" else ADD["add"]
        np.testing.assert_array_equal(run(function, reference.target(), GRIDS["powers"], a_q, b_q), expected)


@pytest.mark.parametrize("order", ["zero_point_after", "zero_point_before"])
def test_operands_of_other_shapes_broadcast(order: str) -> None:
    rng = np.random.default_rng(2)
    a, b, out = GRIDS["powers"]
    a_q, b_q = a.codes(rng, 2, 3, 4, 4), b.codes(rng, 2, 3, 1, 1)
    total = (2 * a.centred(a_q) + b.centred(b_q)) / 4.0
    shifted = np.rint(total + out.zero_point) if order == "zero_point_before" else np.rint(total) + out.zero_point
    found = run(ADD["add"], reference.target(order=order), GRIDS["powers"], a_q, b_q)
    np.testing.assert_array_equal(found, np.clip(shifted, -128, 127))


@pytest.mark.parametrize("kind", ["add", "sub", "mul"])
@pytest.mark.parametrize("text", [FLOAT32, DOUBLE], ids=["float32", "fixed_point"])
def test_one_tensor_read_twice_is_both_operands(kind: str, text: str) -> None:
    functions = {**ADD, "mul": lambda a, b: a * b}
    a, out = Grid(0.25, 3), Grid(1.0, 5)
    a_q = np.arange(-128, 128).reshape(2, 128)
    centred = a.centred(a_q)
    real = {"add": centred * 0.5, "sub": centred * 0.0, "mul": centred * centred / 16.0}[kind]
    rule = "half_even" if text == FLOAT32 else "half_away_from_zero"
    expected = out.clamped(each(real, rule) + out.zero_point)
    result = quantized(One(functions[kind]), reference.target(text), a.reals(a_q), {"a": a, "result": out})
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(a.reals(a_q))), expected)


def test_a_fused_relu_behind_a_sum_clamps_at_the_zero_point() -> None:
    a, b, out = GRIDS["decimal"]
    a_q, b_q = (v[:, ::67] for v in all_pairs())
    total = a.centred(a_q).astype(np.float32) * (np.float32(a.scale) / np.float32(out.scale))
    total = total + b.centred(b_q).astype(np.float32) * (np.float32(b.scale) / np.float32(out.scale))
    expected = np.clip(np.rint(total).astype(np.int64) + out.zero_point, out.zero_point, 127)
    found = run(lambda a, b: torch.relu(a + b), reference.target(), GRIDS["decimal"], a_q, b_q)
    np.testing.assert_array_equal(found, expected)


def test_sixteen_bit_operands_are_summed_and_multiplied_too() -> None:
    rng = np.random.default_rng(6)
    wide = [Grid(2.0**-14, 100, -(2**15), 2**15 - 1), Grid(2.0**-15, -77, -(2**15), 2**15 - 1)]
    out = Grid(2.0**-13, 5, -(2**15), 2**15 - 1)
    a_q, b_q = (g.codes(rng, 2, 2000) for g in wide)
    a, b = (g.centred(q) for g, q in zip(wide, (a_q, b_q), strict=True))
    spec = reference.target(activation=reference.S16)
    grids = (wide[0], wide[1], out)
    # a / 2 + b / 4 needs 18 bits and 2 of fraction: float32 holds it.
    expected = np.clip(np.rint(a / 2 + b / 4) + 5, -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(run(ADD["add"], spec, grids, a_q, b_q), expected)
    product = reference.by_float32(a * b, np.float32(2.0**-16), 5)
    expected = np.clip(product.astype(np.int64), -(2**15), 2**15 - 1)
    np.testing.assert_array_equal(run(lambda a, b: a * b, spec, grids, a_q, b_q), expected)


def test_a_sum_or_product_that_leaves_in_float_or_has_a_number_is_named() -> None:
    a, b, _ = GRIDS["powers"]
    example = torch.zeros(2, 3), torch.zeros(2, 3)
    result = quantized(Two(ADD["add"]), reference.target(outputs="float"), example, {"a": a, "b": b})
    with pytest.raises(IntegerError, match="Add with a float result cannot be executed exactly yet"):
        IntegerModel(result)
