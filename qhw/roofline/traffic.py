# SPDX-License-Identifier: Apache-2.0
"""Bytes that operators read and write, by what they are, and how many must be kept at the same time."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from qhw.decisions import QuantPlan
from qhw.graph import Graph, Operator, OperatorPlacement, QuantPoint
from qhw.roofline.figure import Figure
from qhw.schema import Approximation, TargetSpec

__all__ = ["CONSTANT", "Cell", "Content", "cells_of"]

Content = Literal["weights", "activations", "biases", "tables"]
CONSTANT: tuple[Content, ...] = ("weights", "biases", "tables")
_FLOAT_BITS = 32


@dataclass(frozen=True)
class Cell:
    """One operator on the accelerator with what is fused to it.

    Attributes:
        placement: Where its first operator runs.
        operator: That operator.
        bytes: What it is -> bytes that this cell reads and writes for one sample.
        live: Bytes of activations that must be kept while it runs.
    """

    placement: OperatorPlacement
    operator: Operator
    bytes: Mapping[Content, Figure]
    live: Figure


def cells_of(graph: Graph, plan: QuantPlan, target: TargetSpec) -> tuple[Cell, ...]:
    """Everything that runs on the accelerator, in execution order; what is only seen otherwise is left out."""
    sizes = _Sizes(graph, plan, target)
    known = {operator.name: operator for operator in graph.operators}
    placed = [p for p in plan.operators if p.where == "accelerator" and p.fused_into is None and p.name in known]
    placed = [p for p in placed if not known[p.name].is_view]
    reads = [sizes.inputs(p) for p in placed]
    writes = [sizes.output(p) for p in placed]
    lives = _live(graph, sizes, reads, writes)
    found = []
    for placement, read, write, live in zip(placed, reads, writes, lives, strict=True):
        operator = known[placement.name]
        moved = Figure.sum([sizes.read(placement.name, index, name) for index, name in read] + [sizes.of(write)])
        parts: dict[Content, Figure] = {
            "weights": sizes.weights(operator),
            "activations": moved,
            "biases": sizes.biases(operator),
            "tables": sizes.tables(placement),
        }
        found.append(Cell(placement, operator, parts, live))
    return tuple(found)


class _Sizes:
    """Bytes of tensors as the plan stores them."""

    def __init__(self, graph: Graph, plan: QuantPlan, target: TargetSpec) -> None:
        self._graph, self._target = graph, target
        self._known = {operator.name: operator for operator in graph.operators}
        self._tensors = {self.root(p.tensor): p for p in plan.points if p.role in ("activation", "input")}
        self._edges = {p.name: p for p in plan.points if p.role == "edge"}
        self._weights = {p.tensor: p for p in plan.points if p.role == "weight"}
        self._biases = {name: p for p in plan.points if p.role == "bias" for name in (p.operator, *p.consumers)}

    def root(self, value: str) -> str:
        """The value that a view shows otherwise."""
        while value in self._known and self._known[value].is_view and self._known[value].inputs:
            value = self._known[value].inputs[0]
        return value

    def inputs(self, placement: OperatorPlacement) -> list[tuple[int, str]]:
        """Number and root of each operand that comes from outside the cell; numbers count the first operator's."""
        members = [name for name in placement.members or (placement.name,) if name in self._known]
        inside = set(members)
        found: list[tuple[int, str]] = []
        for name in members:
            for index, value in enumerate(self._known[name].inputs):
                root = self.root(value)
                if root not in inside and all(root != seen for _, seen in found):
                    found.append((index if name == placement.name else -1, root))
        return found

    def output(self, placement: OperatorPlacement) -> str:
        """The value that leaves the cell."""
        members = [name for name in placement.members or (placement.name,) if name in self._known]
        return members[-1]

    def read(self, operator: str, index: int, value: str) -> Figure:
        """Bytes of an operand: in its own format where it has one."""
        edge = self._edges.get(f"{operator}.input.{index}")
        return self.of(value) if edge is None else self._bytes(self._elements(value), self._bits(edge))

    def of(self, value: str) -> Figure:
        """Bytes of one sample of a tensor; four an element where it is not quantized."""
        point = self._tensors.get(value)
        bits: int | str = _FLOAT_BITS if point is None else self._bits(point)
        return self._bytes(self._elements(value), bits)

    def weights(self, operator: Operator) -> Figure:
        """Bytes of an operator's constant operand as stored, without its scales."""
        if operator.weight is None:
            return Figure(0.0)
        tensor, point = self._graph.tensor(operator.weight), self._weights.get(operator.weight)
        stored = self._bytes(tensor.numel(), 8 * tensor.element_size() if point is None else self._bits(point))
        compression = self._target.cost.weight_compression if self._target.cost is not None else None
        if compression == "lossless":
            return Figure(0.0, ("how far cost.weight_compression = lossless shrinks these weights",))
        return Figure(0.0, ("cost.weight_compression",)) if compression == "unknown" else stored

    def biases(self, operator: Operator) -> Figure:
        """Bytes of an operator's bias."""
        point = self._biases.get(operator.name)
        if point is not None:
            bits = self._target.biases[point.format].bits
            elements = self._graph.tensor(operator.bias).numel() if operator.bias else _channels(operator)
            return self._bytes(elements, bits if isinstance(bits, int) else f"biases.{point.format}.bits")
        if operator.bias is None:
            return Figure(0.0)
        tensor = self._graph.tensor(operator.bias)
        return Figure(float(tensor.numel() * tensor.element_size()))

    def tables(self, placement: OperatorPlacement) -> Figure:
        """Bytes of the look-up table that stands for a function, with entries as wide as the result."""
        spec = self._target.operators.get(placement.kind)
        form = spec.approximation if spec is not None else None
        if not isinstance(form, Approximation) or form.kind != "table":
            return Figure(0.0)
        if not isinstance(form.entries, int):
            return Figure(0.0, (f"operators.{placement.kind}.approximation.entries",))
        point = self._tensors.get(self.output(placement))
        return self._bytes(form.entries, _FLOAT_BITS if point is None else self._bits(point))

    def _elements(self, value: str) -> float:
        inputs = self._graph.inputs
        shape = inputs[value] if value in inputs else self._known[value].shape
        return math.prod(shape) / max(self._graph.batch, 1)

    def _bits(self, point: QuantPoint) -> int | str:
        bits = self._target.formats[point.format].element_bits
        return f"formats.{point.format}.bits" if bits is None else bits

    @staticmethod
    def _bytes(elements: float, bits: int | str) -> Figure:
        """Packed: eight bits a byte. Bits that nobody knows are named."""
        return Figure(0.0, (bits,)) if isinstance(bits, str) else Figure(math.ceil(elements * bits / 8))


def _channels(operator: Operator) -> int:
    return int(operator.attributes.get("out_channels", 0))


def _live(graph: Graph, sizes: _Sizes, reads: list[list[tuple[int, str]]], writes: list[str]) -> Iterable[Figure]:
    """Per cell the bytes of all tensors that were written, or are inputs, and are still read by it or later."""
    end = len(writes)
    first = {name: 0 for name in graph.inputs} | {name: index for index, name in enumerate(writes)}
    last: dict[str, int] = {sizes.root(name): end for name in graph.output_values}
    for index, read in enumerate(reads):
        for _, name in read:
            last[name] = max(last.get(name, 0), index)
            first.setdefault(name, index)  # written on the host
    for index, name in enumerate(writes):
        last[name] = max(last.get(name, 0), index)
    kept = [(start, last[name], sizes.of(name)) for name, start in first.items() if name in last]
    return [Figure.sum(size for start, stop, size in kept if start <= index <= stop) for index in range(end)]
