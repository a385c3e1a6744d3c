# SPDX-License-Identifier: Apache-2.0
"""Scores that only a softmax reads: how far below the highest of their row they still count."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from qhw.graph import Graph, Operator, QuantPoint

__all__ = ["REACH", "masked_scores", "masked_term", "readers_of", "score_sums"]

REACH = 24 * math.log(2)
"""exp(-REACH) = 2^-24: what lies further below the highest score adds nothing to it that float32 can hold."""


def masked_scores(scores: Tensor) -> Tensor:
    """Scores with the same softmax over the last axis, none further below the highest of its row than `REACH`.

    A mask puts -10,000, the lowest float or -inf there; a range that held it would have no codes left for the rest.
    A row without a finite score stays as it is.

    Args:
        scores: float [..., columns].
    """
    return torch.fmax(scores, scores.amax(-1, keepdim=True) - REACH)


def masked_term(term: Tensor, other: Tensor) -> Tensor:
    """A term of scores, raised where the sum of both stays beyond `REACH` all the same.

        max(term) - REACH - (max(other) - min(other)) <= term', over the last axis

    Args:
        term: float [..., columns].
        other: float, of a shape that broadcasts with it.
    """
    spread = other.amax(-1, keepdim=True) - other.amin(-1, keepdim=True)
    return torch.fmax(term, term.amax(-1, keepdim=True) - REACH - spread)


def score_sums(graph: Graph, point: QuantPoint) -> list[Operator] | None:
    """The sums of two activations that read a point's tensor and give scores; [] where softmax itself reads it.

    Returns:
        None where anything else reads it, too.
    """
    readers = readers_of(graph, point)
    if readers and all(_is_softmax(graph, reader, point.tensor) for reader in readers):
        return []
    if readers and all(_gives_scores(graph, reader) for reader in readers):
        return readers
    return None


def readers_of(graph: Graph, point: QuantPoint) -> list[Operator]:
    """The operators that read what is quantized at a point, views looked through; none where the model returns it."""
    if point.role == "edge":
        return [graph.operator(point.operator)]
    if point.role == "input":  # host operators read the tensor as it was
        return [graph.operator(name) for name in point.consumers]
    if point.role == "activation" and point.tensor not in graph.output_values:
        return list(_readers(graph, point.tensor))
    return []


def _readers(graph: Graph, value: str) -> Iterator[Operator]:
    """A view that the model returns stands for itself."""
    for reader in graph.consumers(value):
        if reader.is_view and reader.name not in graph.output_values:
            yield from _readers(graph, reader.name)
        else:
            yield reader


def _gives_scores(graph: Graph, operator: Operator) -> bool:
    readers = list(_readers(graph, operator.name))
    is_sum = operator.kind == "Add" and len(operator.inputs) == 2 and operator.name not in graph.output_values
    return is_sum and bool(readers) and all(_is_softmax(graph, reader, operator.name) for reader in readers)


def _is_softmax(graph: Graph, reader: Operator, tensor: str) -> bool:
    """Whether it is a softmax over the last axis of a tensor; rows stay rows in any view that keeps that axis."""
    is_last = reader.attributes.get("axis") == len(reader.shape) - 1
    width = graph.node(tensor).meta["shape"][-1:]
    return reader.kind == "Softmax" and is_last and reader.shape[-1:] == width
