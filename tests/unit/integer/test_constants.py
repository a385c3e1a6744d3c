# SPDX-License-Identifier: Apache-2.0
"""Sums and products with a constant: the arithmetic of two activations, and numpy's."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import DOUBLE, FLOAT32, RULES, SINGLE, FunctionOf, Grid, Rule, by_float32, quantized
from tests.integer_support import result_of as last

Function = Callable[[Tensor, Tensor], Tensor]
FUNCTIONS: dict[str, Function] = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b, "mul": lambda a, b: a * b}
SHAPES = {"scalar": (), "one": (1,), "channels": (3, 1, 1), "all": (3, 4, 4), "row": (4,)}
SHIFT = (
    'kind = "shift", rounding = "half_even", shift = { min = -20, max = 20 }, '
    'align = { to = "coarser", rounding = "half_even", shift = { min = 0, max = 9 } }'
)


def with_constant(function: Function, is_first: bool) -> Function:
    return (lambda x, c: function(c, x)) if is_first else function


def codes_of(function: Function, spec: Any, x: Grid, c: Grid, out: Grid, x_q: Any, c_q: Any) -> Any:
    """Codes of a function of an input and a constant."""
    model = FunctionOf(function, torch.as_tensor(c.centred(c_q) * np.float32(c.scale)).float())
    grids = {"inputs": x, "inputs_0": x, "constants.0": c, "result": out}
    result = quantized(model, spec, x.reals(x_q)[:2], grids)
    return last(IntegerModel(result).codes(x.reals(x_q)))


def two_activations(function: Function, spec: Any, x: Grid, c: Grid, out: Grid, x_q: Any, c_q: Any) -> Any:
    """The same where both are inputs."""
    example = x.reals(x_q), c.reals(c_q)
    result = quantized(FunctionOf(function), spec, example, {"inputs_0": x, "inputs_1": c, "result": out})
    return last(IntegerModel(result).codes(*example))


@pytest.mark.parametrize("is_first", [False, True], ids=["second", "first"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("text", "order"),
    [(FLOAT32, "zero_point_after"), (FLOAT32, "zero_point_before"), (DOUBLE, "zero_point_after"), (SHIFT, "unknown")],
    ids=["float32", "fused", "fixed_point", "shift"],
)
def test_a_constant_is_an_operand_like_an_activation(
    text: str, order: str, name: str, shape: str, is_first: bool
) -> None:
    x, c, out = Grid(0.25, 17), Grid(0.125, -60), Grid(0.5, 8)
    rng = np.random.default_rng(1)
    x_q, c_q = x.codes(rng, 4, 3, 4, 4), c.codes(rng, *SHAPES[shape])
    function, spec = with_constant(FUNCTIONS[name], is_first), reference.target(text, order=order)
    found = codes_of(function, spec, x, c, out, x_q, c_q)
    broadcast = np.broadcast_to(c_q, np.broadcast_shapes(c_q.shape, x_q.shape)).copy()
    x_q = np.broadcast_to(x_q, broadcast.shape).copy()
    np.testing.assert_array_equal(found, two_activations(function, spec, x, c, out, x_q, broadcast))


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}-{r.order}")
def test_a_product_with_a_constant_is_that_of_integers(rule: Rule) -> None:
    x, c, out = Grid(np.float32(0.25), 17), Grid(np.float32(0.125), -60), Grid(np.float32(0.5), 9)
    rng = np.random.default_rng(3)
    x_q, c_q = x.codes(rng, 4, 3, 4, 4), c.codes(rng, 3, 1, 1)
    expected = out.clamped(rule.codes(x.centred(x_q) * c.centred(c_q), [x.scale, c.scale], out)).astype(np.int64)
    spec = reference.target(rule.text, order=rule.order)
    np.testing.assert_array_equal(codes_of(FUNCTIONS["mul"], spec, x, c, out, x_q, c_q), expected)


@pytest.mark.parametrize("is_first", [False, True], ids=["x-c", "c-x"])
@pytest.mark.parametrize("rule", SINGLE)
def test_a_difference_knows_which_side_the_constant_stands_on(rule: str, is_first: bool) -> None:
    x, c, out = Grid(0.25, 17), Grid(0.125, -60), Grid(0.5, 9)
    rng = np.random.default_rng(4)
    x_q, c_q = x.codes(rng, 4, 3, 4, 4), c.codes(rng, 4)
    eighths = (2 * x.centred(x_q) - c.centred(c_q)) * (-1 if is_first else 1)
    expected = out.clamped(by_float32(eighths, np.asarray(0.25), 9, rule)).astype(np.int64)
    spec = reference.target(f'kind = "float32", rounding = "{rule}"')
    function = with_constant(FUNCTIONS["sub"], is_first)
    np.testing.assert_array_equal(codes_of(function, spec, x, c, out, x_q, c_q), expected)


def test_a_buffer_is_a_constant_too() -> None:
    class Shifted(torch.nn.Module):
        offset: Tensor

        def __init__(self, offset: Tensor) -> None:
            super().__init__()
            self.register_buffer("offset", offset)

        def forward(self, input: Tensor) -> Tensor:
            return input + self.offset

    x, c, out = Grid(0.25, 17), Grid(0.25, -60), Grid(0.25, 9)
    x_q, c_q = np.arange(-128, 128).reshape(4, 64), np.full((64,), 3)
    result = quantized(
        Shifted(c.reals(c_q)), reference.target(), x.reals(x_q), {"input": x, "offset": c, "result": out}
    )
    expected = out.clamped(x_q - 17 + 63 + 9)
    np.testing.assert_array_equal(last(IntegerModel(result).codes(x.reals(x_q))), expected)


def test_an_operand_that_is_not_quantized_is_named() -> None:
    x, c, out = Grid(0.25, 17), Grid(0.125, -60), Grid(0.5, 9)
    result = quantized(
        FunctionOf(FUNCTIONS["add"], c.reals(np.ones(4))), parse_target(reference.text()), torch.zeros(2, 4),
        {"inputs": x, "inputs_0": x, "constants.0": c, "result": out},
    )  # fmt: skip
    points = [point for point in result.plan.points if point.role != "weight"]
    bare = type(result)(
        result.float_graph, result.plan.model_copy(update={"points": tuple(points)}), result.target, result.encodings()
    )
    with pytest.raises(IntegerError, match=r"Add with an operand that is not quantized cannot be executed exactly \("):
        IntegerModel(bare)
