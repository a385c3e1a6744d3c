# SPDX-License-Identifier: Apache-2.0
"""Numbers beside a real tensor are stored as constants; the function stays the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qhw.graph import capture
from tests.integer_support import Function

X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))

STORED = {
    # function, kind, number, its place
    "x + 2": (lambda x: x + 2, "Add", 2.0, 1),
    "x - 2": (lambda x: x - 2, "Add", -2.0, 1),
    "2 - x": (lambda x: 2 - x, "Sub", 2.0, 0),
    "x * 0.1": (lambda x: x * 0.1, "Mul", 0.1, 1),
    "0.1 * x": (lambda x: 0.1 * x, "Mul", 0.1, 1),
    "x / 8": (lambda x: x / 8, "Mul", 0.125, 1),
    "written in place": (lambda x: torch.relu(x).mul_(3), "Mul", 3.0, 1),
    "another name": (lambda x: torch.multiply(x, 3), "Mul", 3.0, 1),
}


@pytest.mark.parametrize("case", STORED)
def test_a_number_is_a_constant_of_one_element(case: str) -> None:
    function, kind, number, place = STORED[case]
    graph = capture(Function(function), X)
    operator = graph.operators[-1]
    assert (operator.kind, operator.attributes["weight_operand"], len(operator.inputs)) == (kind, place, 1)
    assert operator.weight == f"{operator.node}_number"
    assert torch.equal(graph.tensor(operator.weight), torch.tensor(number))
    assert torch.equal(graph(X), function(X))


def test_a_quotient_differs_in_its_last_bit() -> None:
    graph = capture(Function(lambda x: x / 3), X)
    torch.testing.assert_close(graph(X), X / 3, rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x / 0,
        lambda x: x * -1e9,
        lambda x: x + float("inf"),
        lambda x: torch.add(x, 1, alpha=2),
        lambda x: x.argmax(1) + 2,
    ],
    ids=["divided by zero", "a mask", "infinite", "scaled before it is added", "of integers"],
)
def test_other_numbers_stay(function: Callable[[Tensor], Tensor]) -> None:
    graph = capture(Function(function), X)
    assert not graph.module.state_dict()
    torch.testing.assert_close(graph(X), function(X), equal_nan=True, rtol=0, atol=0)


def test_each_number_has_a_name_of_its_own() -> None:
    graph = capture(Function(lambda x: (x * 2 + 1) * 2), X)
    assert set(graph.module.state_dict()) == {"mul_number", "add_number", "mul_1_number"}
