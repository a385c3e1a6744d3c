# SPDX-License-Identifier: Apache-2.0
"""What keeps codes, between two grids: each code by the requantization of its kernel, or dequantized and quantized."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import RULES, FunctionOf, Grid, Rule, quantized, result_of

MOVES: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Any], Any]]] = {
    "MaxPool": ("MaxPool", lambda x: F.max_pool2d(x, 2), lambda q: q.reshape(-1, 3, 3, 2, 3, 2).max((3, 5))),
    "MaxPool with a border": (
        "MaxPool", lambda x: F.max_pool2d(x, 3, 3, 1),
        lambda q: np.pad(q, [(0, 0), (0, 0), (1, 2), (1, 2)], constant_values=-(10**6))
        .reshape(-1, 3, 3, 3, 3, 3)[:, :, :2, :, :2].max((3, 5)),
    ),
    "ReduceMax": ("ReduceMax", lambda x: x.amax((1, 2)), lambda q: q.max((1, 2))),
    "ReduceMin": ("ReduceMin", lambda x: x.amin(1, keepdim=True), lambda q: q.min(1, keepdims=True)),
    "Transpose": ("Transpose", lambda x: x.transpose(1, 3), lambda q: q.swapaxes(1, 3)),
    "Slice": ("Slice", lambda x: x.narrow(2, 1, 3), lambda q: q[:, :, 1:4]),
}  # fmt: skip
SHOWN = [RULES[i] for i in (0, 2, 6, 9, 12, 15)]


def target(kind: str, requantize: str, more: str = "") -> Any:
    """A target whose operator has a kernel and no common scale."""
    lines = [line for line in reference.text(requantize).splitlines() if not line.startswith(f"operators.{kind} ")]
    row = f'operators.{kind} = {{ kernels = ["two"], rounding_order = "zero_point_after"{more} }}'
    return parse_target("\n".join([*lines, row]))


def found(function: Any, spec: Any, x: Grid, out: Grid, x_q: Any) -> Any:
    result = quantized(FunctionOf(function), spec, x.reals(x_q)[:2], {"inputs": x, "inputs_0": x, "result": out})
    return result_of(IntegerModel(result).codes(x.reals(x_q)))


@pytest.mark.parametrize("rule", SHOWN, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}")
@pytest.mark.parametrize("name", MOVES)
def test_codes_are_requantized_and_then_moved(name: str, rule: Rule) -> None:
    kind, function, moved = MOVES[name]
    x, out = Grid(np.float32(0.25), 17), Grid(np.float32(1.0 if rule.kind == "shift" else 0.3), -9)
    x_q = x.codes(np.random.default_rng(1), 4, 3, 6, 6)
    expected = moved(out.clamped(rule.codes(x.centred(x_q), [x.scale], out)).astype(np.int64))
    np.testing.assert_array_equal(found(function, target(kind, rule.text), x, out, x_q), expected)


@pytest.mark.parametrize("name", MOVES)
def test_codes_are_dequantized_and_quantized_where_the_target_says_so(name: str) -> None:
    kind, function, moved = MOVES[name]
    x, out = Grid(np.float32(0.35), 17), Grid(np.float32(0.7), -9)
    x_q = x.codes(np.random.default_rng(2), 4, 3, 6, 6)
    spec = target(kind, 'kind = "float32", rounding = "floor", regrid = "dequantize"')
    expected = moved(out.quantized(x.reals(x_q).numpy()))
    np.testing.assert_array_equal(found(function, spec, x, out, x_q), expected)
    if kind == "Transpose":  # 0.35 is half of 0.7: every second code is a tie, which the kernel's own rule sends down
        by_ratio = found(function, target(kind, 'kind = "float32", rounding = "floor"'), x, out, x_q)
        assert (by_ratio != expected).any()


@pytest.mark.parametrize(
    ("function", "join"), [(torch.maximum, np.maximum), (torch.minimum, np.minimum)], ids=["Max", "Min"]
)
def test_the_larger_of_two_is_found_on_the_grid_of_the_result(function: Any, join: Any) -> None:
    a, b, out = Grid(np.float32(0.25), 17), Grid(np.float32(0.0625), -30), Grid(np.float32(0.3), 4)
    a_q, b_q = (g.codes(np.random.default_rng(seed), 4, 100) for g, seed in ((a, 1), (b, 2)))
    rule, kind = RULES[0], function.__name__[:3].capitalize()
    moved = [out.clamped(rule.codes(g.centred(q), [g.scale], out)).astype(np.int64) for g, q in ((a, a_q), (b, b_q))]
    example = a.reals(a_q), b.reals(b_q)
    spec = parse_target(
        reference.text(rule.text) + f'operators.{kind} = {{ kernels = ["two"], rounding_order = "zero_point_after" }}'
    )
    result = quantized(FunctionOf(function), spec, example, {"inputs_0": a, "inputs_1": b, "result": out})
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(*example)), join(*moved))


@pytest.mark.parametrize("regrid", ["ratio", "dequantize"])
def test_a_clip_on_its_own_changes_the_grid_and_then_clamps(regrid: str) -> None:
    x, out = Grid(np.float32(0.35), 17), Grid(np.float32(0.7), -9)
    x_q = np.arange(-128, 128).reshape(2, 128)
    spec = target("Clip", f'kind = "float32", rounding = "floor", regrid = "{regrid}"')
    halves = x.centred(x_q) * 0.5
    whole = np.rint(halves) if regrid == "dequantize" else np.floor(halves)
    # 4.2 / 0.7 = 6, to code -3; -2.1 / 0.7 = -3, to code -12.
    expected = np.clip(whole.astype(np.int64) - 9, -12, -3)
    np.testing.assert_array_equal(found(lambda v: v.clamp(-2.1, 4.2), spec, x, out, x_q), expected)


def test_padding_is_the_code_that_both_grids_give_it() -> None:
    x, out = Grid(0.25, 17), Grid(0.5, -9)
    x_q = x.codes(np.random.default_rng(1), 3, 2, 4)
    spec = target("Pad", 'kind = "float32", rounding = "half_even"')
    moved = out.clamped(np.rint(x.centred(x_q) / 2).astype(np.int64) - 9)
    for value, code in ((0.0, -9), (1.5, -6), (-100.0, -128)):
        if value == -100.0:  # -145 halved is -72.5: below it, the lowest code of the first grid is no lowest code
            with pytest.raises(IntegerError, match=r"Pad with -100 between two grids: its code is -128 or another"):
                found(lambda v: F.pad(v, (2, 1), value=value), spec, x, out, x_q)  # noqa: B023
            continue
        expected = np.pad(moved, [(0, 0), (0, 0), (2, 1)], constant_values=code)
        np.testing.assert_array_equal(found(lambda v: F.pad(v, (2, 1), value=value), spec, x, out, x_q), expected)  # noqa: B023
