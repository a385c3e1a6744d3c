# SPDX-License-Identifier: Apache-2.0
"""What is spread for an operator that broadcasts is read as it was; other readers keep it."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from qhw.graph import capture
from tests.integer_support import Function

X = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))


def gate(x: Tensor) -> Tensor:
    return x.mean((2, 3), keepdim=True)


LEFT_OUT = {
    "a gate": lambda x: x * gate(x).expand_as(x),
    "first": lambda x: gate(x).expand_as(x) - x,
    "to sizes": lambda x: x + gate(x).expand(-1, -1, 4, 5),
    "to the batch": lambda x: torch.maximum(x, gate(x).expand(x.shape[0], 3, 4, 5)),
    "normalize": lambda x: F.normalize(x, dim=1),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_the_operator_broadcasts(case: str) -> None:
    graph = capture(Function(LEFT_OUT[case]), X)
    assert "Expand" not in [one.kind for one in graph.operators]
    assert torch.equal(graph(X), LEFT_OUT[case](X))


KEPT: dict[str, Callable[[Tensor], Tensor]] = {
    "joined": lambda x: torch.cat([x, gate(x).expand_as(x)], 1),
    "both spread": lambda x: gate(x).expand_as(x) + gate(x * x).expand_as(x),
    "with itself": lambda x: (lambda y: y * y)(gate(x).expand_as(x)),
}


@pytest.mark.parametrize("case", KEPT)
def test_the_full_shape_stays(case: str) -> None:
    graph = capture(Function(KEPT[case]), X)
    assert "Expand" in [one.kind for one in graph.operators]
    assert torch.equal(graph(X), KEPT[case](X))
