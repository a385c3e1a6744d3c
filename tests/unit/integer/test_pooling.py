# SPDX-License-Identifier: Apache-2.0
"""Averages, sums and maxima against Python integers and fractions."""

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from torch import Tensor
from torch.nn import functional as F

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import DOUBLE, RULES, SINGLE, Function, Grid, Rule, fixed_point, quantized, result_of

# On one grid no multiplier is met, only the rounding: of the centred sum, or of the codes' sum.
NAMED = [
    *(Rule(fixed_point(r), "fixed_point", r, before=before) for r in SINGLE for before in (False, True)),
    RULES[0],
]
SHOWN = [RULES[i] for i in (0, 2, 5, 6, 9, 12, 15)]


def run(function: Callable[[Tensor], Tensor], rule: Rule, x: Grid, out: Grid, x_q: Any, batch: int = 2) -> Any:
    spec = reference.target(rule.text, order=rule.order)
    result = quantized(Function(function), spec, x.reals(x_q)[:batch], {"input": x, "result": out})
    return result_of(IntegerModel(result).codes(x.reals(x_q)))


def sums(values: Any, size: int, stride: int, padding: int) -> Any:
    """int64 sums of the last two axes' windows."""
    values = np.pad(values, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    steps = [range(0, n - size + 1, stride) for n in values.shape[2:]]
    return np.stack(
        [np.stack([values[..., i : i + size, j : j + size].sum((2, 3)) for j in steps[1]], -1) for i in steps[0]], -2
    )


AVERAGES = {
    "windows": (lambda x: F.avg_pool2d(x, 2), lambda v: sums(v, 2, 2, 0), 4),
    "padded": (lambda x: F.avg_pool2d(x, 3, 2, 1), lambda v: sums(v, 3, 2, 1), 9),
    "to-a-size": (lambda x: F.adaptive_avg_pool2d(x, 2), lambda v: sums(v, 3, 3, 0), 9),
    "global": (lambda x: F.adaptive_avg_pool2d(x, 1), lambda v: v.sum((2, 3), keepdims=True), 36),
    "mean-of-image": (lambda x: x.mean((2, 3)), lambda v: v.sum((2, 3)), 36),
    "mean-of-image-kept": (lambda x: x.mean((-1, -2), keepdim=True), lambda v: v.sum((2, 3), keepdims=True), 36),
    "mean-of-channels": (lambda x: x.mean(1), lambda v: v.sum(1), 3),
    "mean-of-rows": (lambda x: x.mean(-2, keepdim=True), lambda v: v.sum(2, keepdims=True), 6),
    "sum-of-channels": (lambda x: x.sum(1, keepdim=True), lambda v: v.sum(1, keepdims=True), 1),
    "sum-of-image": (lambda x: x.sum((2, 3)), lambda v: v.sum((2, 3)), 1),
}


@pytest.mark.parametrize("rule", SHOWN, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}-{r.order}")
@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_between_two_grids_is_a_sum_and_one_multiplier(name: str, rule: Rule) -> None:
    function, total, count = AVERAGES[name]
    is_power = not count & (count - 1)
    # A rule that shifts needs a ratio that is a power of two: the count goes into the scale.
    count_scale = 0.3 if rule.kind != "shift" else 0.25 if is_power else 0.25 * count
    rng = np.random.default_rng(3)
    x, out = Grid(np.float32(count_scale), 17), Grid(np.float32(0.5 if count > 1 else 8.0), -9)
    x_q = x.codes(rng, 5, 3, 6, 6)
    acc = total(x.centred(x_q))
    if rule.kind == "float32":
        factor = np.float32(x.scale) / (np.float32(out.scale) * np.float32(count))
        expected = reference.by_float32(acc, factor, out.zero_point, rule.rounding, rule.before)
    else:
        ratio = np.float64(x.scale) / (np.float64(out.scale) * count)
        one = reference.by_shift if rule.kind == "shift" else reference.by_fixed_point
        bits = {"bits": rule.bits} if rule.kind == "fixed_point" else {}
        expected = one(acc, ratio, out.zero_point, rule.rounding, **bits)
    np.testing.assert_array_equal(run(function, rule, x, out, x_q), out.clamped(expected).astype(np.int64))


@pytest.mark.parametrize("rule", NAMED, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}-{r.order}")
@pytest.mark.parametrize("name", [name for name in AVERAGES if not name.startswith("sum")])
def test_an_average_on_one_grid_divides_the_sum(name: str, rule: Rule) -> None:
    function, total, count = AVERAGES[name]
    x = Grid(np.float32(0.3), 17)
    x_q = x.codes(np.random.default_rng(4), 5, 3, 6, 6)
    # Odd halves as well: sums of codes, centred or not, meet ties of both signs.
    if rule.before:
        acc, more = total(x.centred(x_q)) + count * 17, 0
    else:
        acc, more = total(x.centred(x_q)), 17
    each = [reference.rounded(Fraction(int(v), count), rule.rounding) + more for v in acc.ravel()]
    expected = x.clamped(np.array(each).reshape(acc.shape))
    np.testing.assert_array_equal(run(function, rule, x, x, x_q), expected)


@pytest.mark.parametrize("same", [True, False], ids=["one-grid", "two-grids"])
@pytest.mark.parametrize("name", ["mean-of-image", "mean-of-channels", "mean-of-rows"])
def test_a_count_that_divides_the_multiplier_is_folded_into_it(name: str, same: bool) -> None:
    function, total, count = AVERAGES[name]
    text = reference.text(DOUBLE).replace('"zero_point_after" }', '"zero_point_after", mean_count = "multiplier" }')
    x, out = Grid(np.float32(0.3), 17), Grid(np.float32(0.3 if same else 0.07), 17 if same else -5)
    x_q = x.codes(np.random.default_rng(7), 4, 3, 6, 6)
    # floor(m 2^k / n) with 2^k the largest power of two up to n, and a shift k longer.
    multiplier, right = reference.multiplier_of(float(np.float32(x.scale)) / float(np.float32(out.scale)), 31)
    k = count.bit_length() - 1
    multiplier, right = (multiplier << k) // count, right + k

    def one(acc: int) -> int:
        high = reference.high_multiply(acc << max(-right, 0), multiplier)
        return reference.divide_by_power(high, max(right, 0)) + out.zero_point

    acc = total(x.centred(x_q))
    expected = out.clamped(np.array([one(int(v)) for v in acc.ravel()]).reshape(acc.shape))
    result = quantized(Function(function), parse_target(text), x.reals(x_q)[:2], {"input": x, "result": out})
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(x.reals(x_q))), expected)


@pytest.mark.parametrize("rule", [RULES[i] for i in (0, 6, 9)], ids=lambda r: f"{r.kind}-{r.rounding}")
@pytest.mark.parametrize("scale", [0.5, 0.3], ids=["one-grid", "two-grids"])
def test_an_average_with_a_divisor_of_its_own_divides_by_that(scale: float, rule: Rule) -> None:
    x = Grid(np.float32(0.5), 17)
    out = x if scale == 0.5 else Grid(np.float32(scale), 3)
    x_q = x.codes(np.random.default_rng(4), 4, 3, 6, 6)
    acc = sums(x.centred(x_q), 2, 2, 0)
    if scale == 0.5 and rule.kind != "float32":
        each = [reference.rounded(Fraction(int(v), 3), "half_even") for v in acc.ravel()]
        expected = np.array(each).reshape(acc.shape) + out.zero_point
        rule = Rule(fixed_point("half_even"), "fixed_point", "half_even")
    else:
        three = np.float32(x.scale) / (np.float32(out.scale) * np.float32(3))
        real = np.float64(x.scale) / (np.float64(out.scale) * 3)
        expected = (
            reference.by_float32(acc, three, out.zero_point)
            if rule.kind == "float32"
            else reference.by_fixed_point(acc, np.asarray(real), out.zero_point, rule.rounding)
        )
    found = run(lambda v: F.avg_pool2d(v, 2, divisor_override=3), rule, x, out, x_q)
    np.testing.assert_array_equal(found, out.clamped(expected).astype(np.int64))


UNEVEN: dict[str, tuple[Any, int, int, int, bool]] = {
    # kernel, stride, padding, whether padding counts
    "padding-not-counted": (lambda v: F.avg_pool2d(v, 3, 2, 1, count_include_pad=False), 3, 2, 1, False),
    "past-the-end": (lambda v: F.avg_pool2d(v, 4, 3, ceil_mode=True), 4, 3, 0, True),
    "past-the-end-and-padded": (lambda v: F.avg_pool2d(v, 4, 3, 1, ceil_mode=True), 4, 3, 1, True),
    "neither-counted": (lambda v: F.avg_pool2d(v, 4, 3, 1, True, count_include_pad=False), 4, 3, 1, False),
}


def window(at: int, size: int, kernel: int, stride: int, padding: int, counts: bool) -> tuple[range, int]:
    """Indices that one window meets along an axis, and how many it counts."""
    start = at * stride - padding
    inside = range(max(start, 0), min(start + kernel, size))
    return inside, min(start + kernel, size + padding) - start if counts else len(inside)


@pytest.mark.parametrize("name", UNEVEN)
@pytest.mark.parametrize("out", [Grid(0.5, 17), Grid(np.float32(0.3), -4)], ids=["one-grid", "two-grids"])
def test_windows_at_the_border_divide_by_what_they_count(name: str, out: Grid) -> None:
    function, *facts = UNEVEN[name]
    x, size = Grid(0.5, 17), 9
    x_q = x.codes(np.random.default_rng(4), 3, 2, size, size)
    found = run(function, RULES[0], x, out, x_q)
    expected = np.empty(found.shape, np.int64)
    for n, c, i, j in np.ndindex(*found.shape):
        (rows, high), (columns, wide) = (window(at, size, *facts) for at in (i, j))
        acc = sum(int(x_q[n, c, row, column]) - 17 for row in rows for column in columns)
        if out.scale == x.scale:
            code = reference.rounded(Fraction(acc, high * wide), "half_even") + 17
        else:
            factor = np.float32(x.scale) / (np.float32(out.scale) * np.float32(high * wide))
            code = int(reference.by_float32(np.array([acc]), factor, out.zero_point)[0])
        expected[n, c, i, j] = min(max(code, -128), 127)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "function", [lambda v: v.mean(0), lambda v: v.mean(), lambda v: v.sum((0, 2))], ids=["axis-0", "all", "sum"]
)
def test_a_mean_over_the_batch_needs_the_batch_that_was_captured(function: Any) -> None:
    x, out = Grid(0.5, 17), Grid(np.float32(0.3), 3)
    x_q = x.codes(np.random.default_rng(4), 5, 3, 4)
    result = quantized(Function(function), reference.target(), x.reals(x_q)[:2], {"input": x, "result": out})
    with pytest.raises(IntegerError, match=r"sums \d+ values of a batch; captured with \d+\. Run batches of that size"):
        IntegerModel(result).codes(x.reals(x_q))
    found = result_of(IntegerModel(result).codes(x.reals(x_q[:2])))
    expected = out.quantized(function(x.reals(x_q[:2])).numpy())
    assert np.abs(found.astype(np.int64) - expected).max() <= 1  # the expectation rounds the mean in float32


MAXIMA = {
    "max-pool": lambda x: F.max_pool2d(x, 2),
    "padded": lambda x: F.max_pool2d(x, 3, 2, 1),
    "dilated-ceil": lambda x: F.max_pool2d(x, 2, 2, dilation=2, ceil_mode=True),
    "global": lambda x: x.amax((2, 3)),
    "over-an-axis": lambda x: x.amax(1, keepdim=True),
    "minimum": lambda x: x.amin(-1),
}


@pytest.mark.parametrize("name", MAXIMA)
def test_a_maximum_picks_codes_in_the_order_of_their_reals(name: str) -> None:
    x = Grid(0.25, -100)  # exact scale: the maximum of reals stands for that of codes
    x_q = x.codes(np.random.default_rng(8), 3, 3, 6, 6)
    expected = x.quantized(MAXIMA[name](x.reals(x_q)).numpy())
    np.testing.assert_array_equal(run(MAXIMA[name], RULES[0], x, x, x_q), expected)


def test_one_dimensional_and_three_dimensional_windows_sum_too() -> None:
    rule, rng = RULES[0], np.random.default_rng(1)
    x, out = Grid(np.float32(0.3), 5), Grid(np.float32(0.21), -7)
    for dims, pool in ((1, F.avg_pool1d), (3, F.avg_pool3d)):
        x_q = x.codes(rng, 2, 3, *[4] * dims)
        centred = x.centred(x_q)
        acc = centred.reshape(2, 3, *[n for _ in range(dims) for n in (2, 2)]).sum(tuple(range(3, 3 + 2 * dims, 2)))
        factor = np.float32(x.scale) / (np.float32(out.scale) * np.float32(2**dims))
        expected = out.clamped(reference.by_float32(acc, factor, out.zero_point))
        np.testing.assert_array_equal(run(lambda v, p=pool: p(v, 2), rule, x, out, x_q), expected.astype(np.int64))
