# SPDX-License-Identifier: Apache-2.0
"""Tables of functions and clips on their own, entry by entry against float64 and hand-made codes."""

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
from tests.integer_support import S16, U8, Function, Grid, quantized, result_of


def sigmoid(x: Any) -> Any:
    return 1.0 / (1.0 + np.exp(-x))


TABLES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Any], Any], Grid]] = {
    "sigmoid": (torch.sigmoid, sigmoid, Grid(1 / 256, -128)),
    "tanh": (torch.tanh, np.tanh, Grid(1 / 128, 0)),
    "leaky-relu": (lambda x: F.leaky_relu(x, 0.1), lambda x: np.where(x >= 0, x, 0.1 * x), Grid(np.float32(0.05), -90)),
}


@pytest.mark.parametrize("name", TABLES)
def test_a_table_holds_the_function_of_every_code(name: str) -> None:
    function, exact, out = TABLES[name]
    x = Grid(np.float32(0.06), -20)
    x_q = np.arange(-128, 128).reshape(4, 64)
    result = quantized(Function(function), reference.target(), x.reals(x_q), {"input": x, "result": out})
    # float64 decides every entry: none of these lies within float32's error of a tie.
    quotient = exact((x_q + 20) * np.float64(np.float32(0.06))) / np.float64(np.float32(out.scale))
    assert np.abs(quotient - np.floor(quotient) - 0.5).min() > 1e-5
    expected = out.clamped(np.rint(quotient).astype(np.int64) + out.zero_point)
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(x.reals(x_q))), expected)


def test_a_table_of_sixteen_bits_has_an_entry_for_every_code() -> None:
    x, out = Grid(np.float32(2.0**-12), 0, -(2**15), 2**15 - 1), Grid(2.0**-15, 0, -(2**15), 2**15 - 1)
    x_q = np.arange(-(2**15), 2**15, 8).reshape(2, -1)
    spec = reference.target(activation=S16)
    result = quantized(Function(torch.sigmoid), spec, x.reals(x_q), {"input": x, "result": out})
    quotient = sigmoid(x_q * 2.0**-12) * 2.0**15
    found = result_of(IntegerModel(result).codes(x.reals(x_q)))
    sure = np.abs(quotient - np.floor(quotient) - 0.5) > 1e-2  # float32 holds 9 bits below these codes
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(found[sure], out.clamped(np.rint(quotient).astype(np.int64))[sure])


@pytest.mark.parametrize(
    ("approximation", "reason"),
    [
        ("", r"operators\.Sigmoid\.approximation is not stated"),
        (', approximation = "unknown"', r"operators\.Sigmoid\.approximation is 'unknown'"),
        (', approximation = { kind = "unknown" }', r"operators\.Sigmoid\.approximation\.kind is 'unknown', and must"),
        (", approximation = { segments = 4 }", r"operators\.Sigmoid\.approximation\.kind is not stated, and must"),
        (
            ', approximation = { kind = "piecewise_linear" }',
            r'operators\.Sigmoid\.approximation\.kind = "piecewise_linear" cannot be executed exactly; kinds that',
        ),
        (
            ', approximation = { kind = "fixed_point" }',
            r'operators\.Sigmoid\.approximation\.kind = "fixed_point" cannot be executed exactly; kinds that',
        ),
        (
            ', approximation = { kind = "table", quotient = "unknown" }',
            r"operators\.Sigmoid\.approximation\.quotient is 'unknown'",
        ),
        (
            ', approximation = { kind = "table", function = "unknown" }',
            r"operators\.Sigmoid\.approximation\.function is 'unknown'",
        ),
        (
            ', approximation = { kind = "table", function = "erfc" }',
            r'operators\.Sigmoid\.approximation\.function = "erfc" is no form of Sigmoid',
        ),
        (
            ', approximation = { kind = "table" }, rounding = "selectable"',
            r'operators\.Sigmoid\.rounding = "selectable" names no single rounding',
        ),
        (', approximation = { kind = "table", sample_step = 2 }', "with interpolation cannot be executed yet"),
        (', approximation = { kind = "table", entries = 64 }', "64"),
    ],
    ids=[
        "absent",
        "unknown",
        "kind-unknown",
        "kind-absent",
        "linear",
        "fixed-point",
        "quotient-unknown",
        "function-unknown",
        "function-of-another",
        "rounding",
        "interpolated",
        "fewer-entries-than-codes",
    ],
)
def test_a_function_that_is_no_full_table_is_named(approximation: str, reason: str) -> None:
    text = reference.text().replace(
        'operators.Sigmoid = { kernels = ["two"], approximation = { kind = "table" } }',
        f'operators.Sigmoid = {{ kernels = ["two"]{approximation} }}',
    )
    result = quantized(
        Function(torch.sigmoid), parse_target(text), torch.zeros(2, 3), {"input": Grid(0.1), "result": Grid(0.01)}
    )
    with pytest.raises(IntegerError, match=reason):
        IntegerModel(result)


CLIPS: dict[str, tuple[Callable[[Tensor], Tensor], int, int]] = {
    "relu": (torch.relu, 17, 127),
    "relu6": (F.relu6, 17, 37),  # 6 / 0.3 = 20
    "hardtanh": (lambda x: F.hardtanh(x, -1.0, 2.0), 14, 24),  # -3.33, 6.67
    "from-above": (lambda x: x.clamp(max=1.0), -128, 20),
    "outside": (lambda x: x.clamp(min=100.0, max=200.0), 127, 127),
    "far-outside": (lambda x: x.clamp(min=-1e38, max=1e38), -128, 127),
}


@pytest.mark.parametrize("name", CLIPS)
def test_a_clip_on_its_own_clamps_codes(name: str) -> None:
    function, low, high = CLIPS[name]
    x = Grid(np.float32(0.3), 17)
    x_q = np.arange(-128, 128).reshape(4, 64)
    names = ["input", "result"]
    result = quantized(Function(function), reference.target(), x.reals(x_q), dict.fromkeys(names, x))
    np.testing.assert_array_equal(IntegerModel(result)(x.reals(x_q)).numpy(), x.reals(np.clip(x_q, low, high)).numpy())


def test_a_clip_between_grids_of_one_scale_and_other_codes_stays_within_the_output() -> None:
    spec = reference.target(activation=U8)
    x = Grid(0.5, 10, 0, 255)
    x_q = np.arange(256).reshape(4, 64)
    result = quantized(Function(torch.relu), spec, x.reals(x_q), {"input": x, "result": x})
    np.testing.assert_array_equal(IntegerModel(result)(x.reals(x_q)).numpy(), x.reals(np.clip(x_q, 10, 255)).numpy())


@pytest.mark.parametrize("scale", [2.0**-126, 1e-30, 1e30], ids=["smallest", "1e-30", "1e30"])
def test_a_clip_at_an_extreme_scale_neither_overflows_nor_stops(scale: float) -> None:
    x = Grid(np.float32(scale), 3)
    x_q = np.arange(-128, 128).reshape(4, 64)
    result = quantized(Function(F.relu6), reference.target(), torch.zeros(2, 64), {"input": x, "result": x})
    high = 3 if scale > 1 else 127  # 6 / 1e30 is no code, 6 / 1e-30 more than there are
    expected = x.reals(np.clip(x_q, 3, high)).numpy()
    np.testing.assert_array_equal(IntegerModel(result)(x.reals(x_q)).numpy(), expected)
