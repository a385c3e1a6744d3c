# SPDX-License-Identifier: Apache-2.0
"""Showing the tensors at quantization points to statistics while the model runs."""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from torch import Tensor, fx, nn

from qhw.engine.insert import insert_modules
from qhw.engine.softmax_rows import masked_scores, masked_term, score_sums
from qhw.graph import Graph, Operator, QuantPoint
from qhw.graph.operator import value_name

__all__ = ["Statistic", "insert_taps"]


class Statistic(Protocol):
    """What an algorithm collects of a tensor: exact, and independent of order (`qhw.numerics.MinMax`, `Histogram`)."""

    def update(self, x: Tensor) -> None:
        """Add a micro-batch of values."""
        ...


def insert_taps(graph: Graph, groups: Mapping[str, Iterable[QuantPoint]], statistics: Mapping[str, Statistic]) -> None:
    """Let the statistic of each group see the tensors at its points.

    Scores that softmax alone reads, and the terms of such scores, are shown without what no softmax can tell from 0:
    masks have no part in a range.

    Args:
        graph: Changed in place.
        groups: Group -> its points.
        statistics: Group -> what collects.
    """
    plain: list[QuantPoint] = []
    scores: list[QuantPoint] = []
    for group, points in groups.items():
        for point in points:
            sums = score_sums(graph, point)
            if sums:
                _insert_at_terms(graph, point, sums, _TermTap(statistics[group]))
            else:
                (plain if sums is None else scores).append(point)
    insert_modules(graph, plain, lambda point: _Tap(statistics[point.group]))
    insert_modules(graph, scores, lambda point: _Tap(statistics[point.group], masked_scores))


def _insert_at_terms(graph: Graph, point: QuantPoint, sums: Iterable[Operator], tap: nn.Module) -> None:
    """Put a tap at the operands of sums that are a point's tensor, seen through views."""
    path = f"tap_{len(graph.module._modules)}"
    graph.module.add_module(path, tap)
    for operator in sums:
        node = graph.node(operator.name)
        term, other = node.all_input_nodes[0], node.all_input_nodes[-1]
        if not _is_tensor(graph, term, point.tensor):
            term, other = other, term
        with graph.module.graph.inserting_before(node):
            seen = graph.module.graph.call_module(path, (term, other))
        seen.meta.update({key: term.meta[key] for key in ("shape", "dtype")})
        node.replace_input_with(term, seen)
    graph.refresh()


def _is_tensor(graph: Graph, node: fx.Node, tensor: str) -> bool:
    name = value_name(node)
    while name != tensor and name not in graph.inputs and graph.operator(name).is_view:
        name = graph.operator(name).inputs[0]
    return bool(name == tensor)


class _Tap(nn.Module):
    """Lets a tensor through and shows it, or what a function makes of it, to a statistic."""

    def __init__(self, statistic: Statistic, seen: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self._statistic = statistic
        self._seen = seen

    def forward(self, x: Tensor) -> Tensor:
        self._statistic.update(x if self._seen is None else self._seen(x))
        return x


class _TermTap(nn.Module):
    """Lets a term of scores through and shows what counts of it to a statistic."""

    def __init__(self, statistic: Statistic) -> None:
        super().__init__()
        self._statistic = statistic

    def forward(self, term: Tensor, other: Tensor) -> Tensor:
        self._statistic.update(masked_term(term, other))
        return term
