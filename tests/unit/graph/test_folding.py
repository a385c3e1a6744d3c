# SPDX-License-Identifier: Apache-2.0
"""What parameters alone decide is stored at capture; what a batch spreads is a value without inputs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qhw.graph import Graph, capture, place
from tests.integer_support import Function, target

IDS = torch.tensor([[1, 2, 3], [4, 0, 2]])


class Holding(nn.Module):
    """A function of the input and a table."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def captured(function: Callable[[nn.Module, Tensor], Tensor], table: Tensor, x: Tensor) -> Graph:
    model = Holding(function, table).eval()
    graph = capture(model, x)
    torch.testing.assert_close(graph(x[:1]), model(x[:1]), rtol=0, atol=0)
    return graph


def table(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_positions_are_read_from_their_table_once() -> None:
    def positions(m: nn.Module, x: Tensor) -> Tensor:
        return x + F.embedding(torch.arange(x.shape[1]), m.table)

    graph = captured(positions, table(9, 4), table(2, 7, 4))
    (add,) = graph.operators
    assert (add.kind, add.inputs, add.attributes.get("computed")) == ("Add", ("x",), None)
    assert torch.equal(graph.tensor(str(add.weight)), table(9, 4)[:7])
    assert list(graph.module.state_dict()) == [add.weight]  # the table itself is read by nobody
    assert isinstance(graph.tensor(str(add.weight)), nn.Parameter)


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_normed_weight_is_the_weight_of_its_layer(norm: Callable[[nn.Module], nn.Module]) -> None:
    torch.manual_seed(0)
    layer = norm(nn.Conv1d(4, 5, 3)).eval()
    graph = capture(layer, table(2, 4, 9))
    (conv,) = graph.operators
    assert (conv.kind, conv.weight_axis, conv.attributes.get("computed")) == ("Conv", 0, None)
    torch.testing.assert_close(graph.tensor(str(conv.weight)), layer.weight, rtol=0, atol=0)
    torch.testing.assert_close(graph(table(2, 4, 9)), layer(table(2, 4, 9)))


def test_a_weight_of_a_layer_is_called_that() -> None:
    graph = capture(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))).eval(), table(2, 4))
    assert set(graph.module.state_dict()) == {"0.weight", "0.bias"}


def test_a_tensor_that_is_only_seen_as_it_is_stays_shared() -> None:
    def tied(m: nn.Module, x: Tensor) -> Tensor:
        return F.linear(F.embedding(x, m.table), m.table.detach())

    graph = captured(tied, table(5, 4), IDS)
    assert list(graph.module.state_dict()) == ["table"]


def test_random_numbers_are_drawn_anew() -> None:
    graph = capture(Function(lambda x: x + 1e-9 * torch.rand(4)), table(2, 4))
    assert "aten.rand.default" in [str(node.target) for node in graph.module.graph.nodes]


def test_what_takes_much_room_stays_computed() -> None:
    def mask(m: nn.Module, x: Tensor) -> Tensor:
        rows = torch.arange(1100)
        return x + m.table * (rows[:, None] < rows[None, :])

    graph = captured(mask, table(1), table(2, 1, 1))
    assert all(tensor.numel() <= 2**20 for tensor in graph.module.state_dict().values())
    assert graph.operators[-1].attributes["computed"]


TOKENS = {
    "class token": (lambda m, x: torch.cat([m.table.expand(x.shape[0], -1, -1), x], 1), table(1, 1, 4), "Expand"),
    "token types at zero": (lambda m, x: x + F.embedding(torch.zeros_like(x[..., 0].long()), m.table), table(2, 4),
                            "Embedding"),
}  # fmt: skip


@pytest.mark.parametrize("case", TOKENS)
def test_what_a_batch_spreads_is_a_value_that_the_accelerator_reads(case: str) -> None:
    function, held, kind = TOKENS[case]
    graph = captured(function, held, table(2, 3, 4))
    spread = next(operator for operator in graph.operators if operator.kind == kind)
    join = graph.operators[-1]
    assert (spread.inputs, spread.is_view) == ((), False)
    assert spread.name in join.inputs
    assert "computed" not in join.attributes
    placement = place(graph, target())
    assert {one.kind: one.where for one in placement.operators}[join.kind] == "accelerator"
    (point,) = [point for point in placement.points if point.tensor == spread.name]
    assert (point.role, point.consumers) == ("input", (join.name,))


def test_a_weight_that_a_hook_computes_at_each_call() -> None:
    """The older weight norm leaves its last result in the layer, which copy.deepcopy refuses."""
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Conv1d(4, 5, 3))
    x = table(2, 4, 9)
    before = layer(x)
    graph = capture(nn.Sequential(layer).eval(), x)
    assert [(one.kind, one.weight) for one in graph.operators] == [("Conv", "0.weight")]
    torch.testing.assert_close(graph(x), before)
