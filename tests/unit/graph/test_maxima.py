# SPDX-License-Identifier: Apache-2.0
"""Maxima become reductions with the same values; those whose places are read stay as they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qhw.graph import capture
from tests.integer_support import Function


@pytest.mark.parametrize(
    ("function", "shape", "kind", "axes"),
    [
        (nn.AdaptiveMaxPool2d(1), (2, 3, 4, 5), "GlobalMaxPool", [2, 3]),
        (nn.AdaptiveMaxPool1d(1), (2, 3, 4), "GlobalMaxPool", [2]),
        (nn.AdaptiveMaxPool3d((1, 1, 1)), (2, 3, 4, 5, 2), "GlobalMaxPool", [2, 3, 4]),
        (lambda x: x.max(1)[0], (2, 3, 4), "ReduceMax", [1]),
        (lambda x: x.max(-1).values, (2, 3, 4), "GlobalMaxPool", [2]),
        (lambda x: torch.min(x, 1, keepdim=True)[0], (2, 3, 4), "ReduceMin", [1]),
    ],
    ids=["pool 2d", "pool 1d", "pool 3d", "max of channels", "max of the last axis", "min, axis kept"],
)
def test_it_is_a_reduction_with_the_same_values(
    function: Callable[[Tensor], Tensor], shape: tuple[int, ...], kind: str, axes: list[int]
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(function), x)
    (operator,) = graph.operators
    assert (operator.kind, operator.attributes["axes"]) == (kind, axes)
    assert torch.equal(graph(x), function(x))


def test_a_maximum_whose_place_is_read_stays() -> None:
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(lambda x: x.max(1)), x)
    assert [operator.kind for operator in graph.operators] == ["Unknown", "Identity", "Identity"]
    values, places = graph(x)
    assert torch.equal(values, x.amax(1)) and torch.equal(places, x.argmax(1))


def test_pooling_to_more_than_one_value_stays() -> None:
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(nn.AdaptiveMaxPool2d(2)), x)
    assert graph.operators[0].kind == "Unknown"
    assert torch.equal(graph(x), nn.functional.max_pool2d(x, 2))
