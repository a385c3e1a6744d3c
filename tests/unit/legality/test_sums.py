# SPDX-License-Identifier: Apache-2.0
"""Clauses on how the operands of Add and Sub meet, kept and broken by one; shifts and ratios counted by hand.

By shifts: an operand on 2^-3 beside one on 2^-8 goes 5 to the right, or the first one 5 to the left; then one shift
brings the sum from there to the result's scale.
"""

from typing import Any

import pytest

from tests.quantized_files import Grid, OnnxFile, grid

ADD = {"kernels.move.requantize": "r", "kernels.move.accumulator": "sum"}
COARSER = ADD | {"requantize.r.align": {"to": "coarser", "rounding": "floor", "shift": {"min": 0, "max": 5}}}
FINER = ADD | {"requantize.r.align": {"to": "finer", "shift": {"min": -5, "max": 0}}}
FIXED = {
    **{"requantize.r": {"kind": "fixed_point", "rounding": "half_even", "multiplier_bits": 15}},
    **{"requantize.r.shift": {"min": 0, "max": 15}, "formats.a8.scale": {"kind": "float32"}},
}


def added(a: Grid, b: Grid, y: Grid, kind: str = "Add") -> OnnxFile:
    f = OnnxFile()
    left, right = (f.pair(f.given(name, [1, 4]), q) for name, q in (("a", a), ("b", b)))
    f.gives(f.pair(f.op(kind, [left, right], "add"), y))
    return f


def powers(a: int, b: int, y: int, kind: str = "Add") -> OnnxFile:
    return added(grid(2.0**a), grid(2.0**b), grid(2.0**y), kind)


CASES: dict[str, tuple[OnnxFile, dict[str, Any], set[tuple[str, str]]]] = {
    "one scale, one shift": (powers(-8, -8, -4), ADD | {"requantize.r.shift.max": 4}, set()),
    "one scale, a shift too long": (
        powers(-8, -8, -4),
        ADD | {"requantize.r.shift.max": 3},
        {("add", "requantize.r.shift.max")},
    ),
    "to the coarser scale, as far as it may": (powers(-8, -3, -3), COARSER | {"requantize.r.shift.max": 0}, set()),
    "to the coarser scale, further": (powers(-9, -3, -3), COARSER, {("add", "requantize.r.align.shift.max")}),
    "to the coarser scale, the second one": (powers(-3, -9, -3), COARSER, {("add", "requantize.r.align.shift.max")}),
    "to the coarser scale, then to the left": (powers(-8, -3, -4), COARSER, {("add", "requantize.r.shift.min")}),
    "to the finer scale, as far as it may": (powers(-8, -3, -4), FINER | {"requantize.r.shift.max": 4}, set()),
    "to the finer scale, further": (powers(-9, -3, -4), FINER, {("add", "requantize.r.align.shift.min")}),
    "to the finer scale, then too far": (
        powers(-8, -3, -3),
        FINER | {"requantize.r.shift.max": 4},
        {("add", "requantize.r.shift.max")},
    ),
    "a difference is a sum": (
        powers(-9, -3, -4, "Sub"),
        FINER | {"operators.Sub.kernels": ["move"]},
        {("add", "requantize.r.align.shift.min")},
    ),
    "scales that no shift brings together": (
        added(grid(0.03), grid(2.0**-5), grid(2.0**-5)),
        COARSER | {"formats.a8.scale": {"kind": "float32"}},
        {("add", "requantize.r.kind")},
    ),
    "in fixed point on the one scale demanded": (
        # 2^-8 / 2^-4 = 2^-4 = 0.5 * 2^-3: a right shift of 3.
        powers(-8, -8, -4),
        ADD | FIXED | {"operators.Add.same_scale": "inputs", "requantize.r.shift": {"min": 0, "max": 3}},
        set(),
    ),
    "in fixed point on one scale, a shift too long": (
        powers(-8, -8, -4),
        ADD | FIXED | {"operators.Add.same_scale": "inputs", "requantize.r.shift": {"min": 0, "max": 2}},
        {("add", "requantize.r.shift.max")},
    ),
    "in fixed point with a pre-shift": (
        # 2^-8 / (2 * 2^-3) = 2^-6: a right shift of 5; 2 * 2^-3 / (2^4 * 2^-4) = 2^-2: one of 1.
        powers(-8, -3, -4),
        ADD | FIXED | {"operators.Add.preshift_bits": {"a8": 4}, "requantize.r.shift": {"min": 0, "max": 4}},
        {("add", "requantize.r.shift.max")},
    ),
}


@pytest.mark.parametrize(("file", "changes", "expected"), CASES.values(), ids=CASES.keys())
def test_the_sum_breaks_its_clause_and_no_other(
    file: OnnxFile, changes: dict[str, Any], expected: set[tuple[str, str]], broken_by: Any
) -> None:
    assert broken_by(file, changes) == expected


OPEN: dict[str, tuple[dict[str, Any], str, str]] = {
    "no pre-shift": (ADD | FIXED, "operators.Add.preshift_bits", "the target does not say how far operands are"),
    "unknown pre-shift": (
        ADD | FIXED | {"operators.Add.preshift_bits": "unknown"},
        "operators.Add.preshift_bits",
        "the target leaves it unknown",
    ),
    "no alignment": (ADD, "requantize.r.align", "the target does not say how operands meet"),
    "unknown alignment": (ADD | {"requantize.r.align": "unknown"}, "requantize.r.align", "the target leaves it unkn"),
    "unknown side": (ADD | {"requantize.r.align": {"to": "unknown"}}, "requantize.r.align.to", "leaves it unknown"),
    "unknown end": (
        ADD | {"requantize.r.align": {"to": "finer", "shift": {"min": "unknown", "max": 0}}},
        "requantize.r.align.shift.min",
        "leaves it unknown",
    ),
}


@pytest.mark.parametrize(("changes", "clause", "why"), OPEN.values(), ids=OPEN.keys())
def test_a_sum_that_the_target_leaves_open_cannot_be_judged(
    changes: dict[str, Any], clause: str, why: str, judged: Any
) -> None:
    report = judged(powers(-8, -3, -3), changes)
    assert [(one.clause, one.nodes) for one in report.unjudged if why in one.why] == [(clause, ("add",))]
    assert report.is_legal


@pytest.mark.parametrize(("exponent", "expected"), [(-4, []), (-5, ["a ratio of 0.0555555556"])])
def test_a_mean_that_no_shift_divides_by_needs_one_scale(exponent: int, expected: list[str], judged: Any) -> None:
    """36 elements: 2^-4 / 2^-5 / 36 = 1 / 18. On one scale the sum is divided by 36, without a ratio."""
    f = OnnxFile()
    x = f.pair(f.given("x", [1, 4, 6, 6]), grid(2.0**-4))
    f.gives(f.pair(f.op("GlobalAveragePool", [x], "mean"), grid(2.0**exponent)))
    report = judged(f, ADD | {"operators.GlobalAveragePool.kernels": ["move"]})
    assert [one.got for one in report.violations] == expected
    advice = "A mean of 36 needs one scale for operand and result here, or the host."
    assert [one.fix for one in report.violations] == [advice] * len(expected)
