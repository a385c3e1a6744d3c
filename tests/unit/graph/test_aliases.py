# SPDX-License-Identifier: Apache-2.0
"""A second name of a function gives the same operator as the first, and the same values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qhw.graph import capture
from qhw.graph.aliases import OVERLOADS, PACKETS
from qhw.graph.saving import check_savable
from tests.integer_support import Function


@pytest.mark.parametrize(
    ("function", "kind"),
    [
        pytest.param(lambda x: torch.concat([x, x], 1), "Concat", id="concat"),
        pytest.param(lambda x: torch.concatenate([x, x], -1), "Concat", id="concatenate"),
        pytest.param(lambda x: torch.hstack([x, x]), "Concat", id="hstack"),
        pytest.param(lambda x: torch.dstack([x, x]), "Concat", id="dstack"),
        pytest.param(lambda x: torch.multiply(x, x), "Mul", id="multiply"),
        pytest.param(lambda x: x**2, "Mul", id="power-of-2"),
        pytest.param(lambda x: x.square(), "Mul", id="square"),
        pytest.param(lambda x: x**3, "Pow", id="power-of-3"),
        pytest.param(lambda x: torch.divide(x, x), "Div", id="divide"),
        pytest.param(lambda x: torch.true_divide(x, x), "Div", id="true_divide"),
        pytest.param(lambda x: torch.subtract(x, x), "Sub", id="subtract"),
        pytest.param(lambda x: torch.max(x, x), "Max", id="max"),
        pytest.param(lambda x: torch.min(x, x), "Min", id="min"),
        pytest.param(lambda x: torch.negative(x), "Neg", id="negative"),
        pytest.param(lambda x: torch.absolute(x), "Abs", id="absolute"),
        pytest.param(lambda x: x.clip(0, 6), "Clip", id="clip"),
        pytest.param(lambda x: x.clip(min=0), "Relu", id="clip-at-0"),
        pytest.param(lambda x: torch.special.expit(x), "Sigmoid", id="expit"),
        pytest.param(lambda x: torch.special.softmax(x, 1), "Softmax", id="softmax"),
        pytest.param(lambda x: x.swapdims(1, 2), "Transpose", id="swapdims"),
        pytest.param(lambda x: x.mT, "Transpose", id="mT"),
        pytest.param(lambda x: x.moveaxis(1, 2), "Transpose", id="moveaxis"),
        pytest.param(lambda x: x.moveaxis((3, 1), (1, -2)), "Transpose", id="moveaxis-of-two"),
        pytest.param(lambda x: torch.broadcast_to(x, x.shape), "Expand", id="broadcast_to"),
    ],
)
def test_it_is_the_operator_with_a_kind(function: Callable[[Tensor], Tensor], kind: str) -> None:
    x = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(function), x)
    assert [operator.kind for operator in graph.operators] == [kind]
    assert torch.equal(graph(x), function(x))
    check_savable(graph)


def test_a_second_name_of_an_operator_in_place_too() -> None:
    x = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(lambda x: (x * 2).clip_(-1, 1).multiply_(x)), x)
    assert [operator.kind for operator in graph.operators] == ["Mul", "Clip", "Mul"]
    assert torch.equal(graph(x), (x * 2).clamp(-1, 1) * x)


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_constant_pad_is_a_pad(value: float) -> None:
    """Its value stands where a pad has its mode."""
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(lambda x: torch.constant_pad_nd(x, (1, 2), value)), x)
    (pad,) = graph.operators
    assert (pad.kind, pad.attributes["mode"], pad.attributes["value"]) == ("Pad", "constant", value)
    assert torch.equal(graph(x), torch.nn.functional.pad(x, (1, 2), value=value))


def test_a_stack_of_vectors_stays() -> None:
    x = torch.randn(4, generator=torch.Generator().manual_seed(0))
    graph = capture(Function(lambda x: torch.vstack([x, x])), x, dynamic_batch=False)
    assert torch.equal(graph(x), torch.stack([x, x]))


def _arguments(overload: object) -> list[tuple[str, str]]:
    schema = overload._schema  # type: ignore[attr-defined]
    return [(str(one.type), str(one.default_value)) for one in schema.arguments]


def test_both_names_take_the_same_arguments() -> None:
    aten = torch.ops.aten
    for alias, name in PACKETS.items():
        shared = set(getattr(aten, alias).overloads()) & set(getattr(aten, name).overloads())
        assert shared, alias
        for overload in shared - {"names", "names_out"}:
            one, other = getattr(getattr(aten, alias), overload), getattr(getattr(aten, name), overload)
            assert len(_arguments(one)) <= len(_arguments(other)), (alias, overload)
            assert all(a[0] == b[0] for a, b in zip(_arguments(one), _arguments(other), strict=False)), (
                alias,
                overload,
            )
    for alias, target in OVERLOADS.items():
        packet, overload = alias.split(".")
        assert len(_arguments(getattr(getattr(aten, packet), overload))) == len(_arguments(target))
