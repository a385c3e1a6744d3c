# SPDX-License-Identifier: Apache-2.0
"""Quantization points, built from the cells and the formats chosen for them."""

from collections.abc import Iterator, Mapping

from qhw.graph.cell import Cell
from qhw.graph.cells import Cells
from qhw.graph.graph import Graph
from qhw.graph.points import FixedEncoding, QuantPoint
from qhw.graph.rows import group_size
from qhw.graph.slots import Choice, Slot, edge, tensor, weight
from qhw.graph.ties import group_encodings
from qhw.schema import WEIGHTED_KINDS, TargetSpec

__all__ = ["PointBuilder"]

_BOUNDS: Mapping[str, tuple[float | None, float | None]] = {
    "Relu": (0.0, None),
    "Sigmoid": (0.0, 1.0),
    "HardSigmoid": (0.0, 1.0),
    "Softmax": (0.0, 1.0),
    "Tanh": (-1.0, 1.0),
}


class PointBuilder:
    """Builds the points of one placement.

    Args:
        graph: The captured model.
        target: The accelerator.
        found: The model as cells.
        choice: Kernels and formats chosen for them.
    """

    def __init__(self, graph: Graph, target: TargetSpec, found: Cells, choice: Choice) -> None:
        self._graph = graph
        self._target = target
        self._found = found
        self._choice = choice
        self._writers = {cell.output: cell for cell in found.cells if not cell.gives_float}
        self._encodings = group_encodings(found.cells, choice.formats, choice.edges)

    def points(self) -> Iterator[QuantPoint]:
        """All points in execution order: what an operator reads, its parameters, what it writes."""
        seen: set[str] = set()
        for cell in self._found.cells:
            for index, name in enumerate(cell.inputs):
                if name not in self._writers and name not in seen and self._readers(name):
                    seen.add(name)
                    yield self._tensor_point(name, None)
                if edge(cell.operator.name, index) in self._choice.edges:
                    yield self._edge_point(cell, index)
            yield from self._parameter_points(cell, seen)
            if not cell.gives_float:
                yield self._tensor_point(cell.output, cell)

    def _readers(self, name: str) -> tuple[str, ...]:
        """Cells that read a tensor as it is, not through an edge.

        An input of the network that has a format of its own there (`boundary.input_formats`) is quantized for all its
        readers, also where each of them requantizes it.
        """
        reads = [
            (cell.operator.name, edge(cell.operator.name, index) in self._choice.edges)
            for cell in self._found.cells
            for index, read in enumerate(cell.inputs)
            if read == name
        ]
        direct = tuple(dict.fromkeys(reader for reader, is_parted in reads if not is_parted))
        boundary = self._target.boundary
        has_format = name in self._graph.inputs and boundary is not None and isinstance(boundary.input_formats, tuple)
        return direct or (tuple(dict.fromkeys(reader for reader, _ in reads)) if has_format else ())

    def _tensor_point(self, name: str, writer: Cell | None) -> QuantPoint:
        slot = tensor(name)
        legal = self._choice.formats[slot]
        low, high = self._operator_bounds(name) if writer is None else self._cell_bounds(writer)
        return QuantPoint(
            name=name if writer is None else writer.operator.name,
            role="input" if writer is None else "activation",
            operator=name if writer is None else writer.operator.name,
            tensor=name,
            consumers=self._readers(name),
            legal=legal,
            format=legal[0],
            group=self._group(slot),
            fixed=self._fixed(slot),
            is_dynamic=self._target.formats[legal[0]].is_dynamic,
            minimum=low,
            maximum=high,
        )

    def _edge_point(self, cell: Cell, index: int) -> QuantPoint:
        slot = edge(cell.operator.name, index)
        legal = self._choice.formats[slot]
        writer = self._writers.get(cell.inputs[index])
        low, high = self._operator_bounds(cell.inputs[index]) if writer is None else self._cell_bounds(writer)
        return QuantPoint(
            name=f"{cell.operator.name}.input.{index}",
            role="edge",
            operator=cell.operator.name,
            tensor=cell.inputs[index],
            consumers=(cell.operator.name,),
            legal=legal,
            format=legal[0],
            group=self._group(slot),
            fixed=self._fixed(slot),
            is_dynamic=self._target.formats[legal[0]].is_dynamic,
            minimum=low,
            maximum=high,
        )

    def _parameter_points(self, cell: Cell, seen: set[str]) -> Iterator[QuantPoint]:
        operator, name = cell.operator, cell.weight
        if name is None:
            return
        if name not in seen:
            seen.add(name)
            legal = self._choice.formats[weight(name)]
            form = self._target.formats[legal[0]]
            yield QuantPoint(
                name=name,
                role="weight",
                operator=operator.name,
                tensor=name,
                consumers=tuple(c.operator.name for c in self._found.cells if c.weight == name),
                legal=legal,
                format=legal[0],
                group=name,
                axis=operator.weight_axis,
                group_size=group_size(form, operator) if form.per == "group" else None,
            )
        rule = self._bias_rule(cell)
        if rule is None:
            return
        tensor_name = self._graph.bias_name(operator)
        # A bias in units of input scale times weight scale: a layer that is called twice has one point per call.
        name = tensor_name if tensor_name not in seen else f"{operator.name}.bias"
        seen.add(name)
        yield QuantPoint(
            name=name,
            role="bias",
            operator=operator.name,
            tensor=tensor_name,
            consumers=(operator.name,),
            legal=(rule,),
            format=rule,
            group=name,
            axis=0,
        )

    def _bias_rule(self, cell: Cell) -> str | None:
        """Id of the bias rule, where the operator has a bias or gets one, and the rule quantizes it."""
        operator = cell.operator
        readers = self._graph.consumers(operator.name)
        has_bias = operator.bias is not None or any(self._found.placements[r.name].where == "folded" for r in readers)
        rule = self._target.kernels[self._choice.kernels[operator.name][0]].bias
        if rule in (None, "none", "unknown") or self._target.biases[str(rule)].bits in (None, "float", "unknown"):
            return None
        gets_one = has_bias or (self._target.biases[str(rule)].required is True and operator.kind in WEIGHTED_KINDS)
        return str(rule) if gets_one else None

    def _group(self, slot: Slot) -> str:
        slot = self._choice.groups.get(slot, slot)
        if slot.what == "edge":
            return f"{slot.name}.input.{slot.operand}"
        writer = self._writers.get(slot.name)
        return slot.name if writer is None else writer.operator.name

    def _fixed(self, slot: Slot) -> FixedEncoding | None:
        return self._encodings.get(self._choice.groups.get(slot, slot))

    def _cell_bounds(self, cell: Cell) -> tuple[float | None, float | None]:
        """Real bounds of a result: the last function that has some, within what the target states."""
        low, high = self._operator_bounds(cell.members[-1])
        stated = cell.spec.range
        if stated is not None and stated != "unknown":
            if isinstance(stated.min, int | float):
                low = stated.min if low is None else max(low, stated.min)
            if isinstance(stated.max, int | float):
                high = stated.max if high is None else min(high, stated.max)
        return low, high

    def _operator_bounds(self, name: str) -> tuple[float | None, float | None]:
        if name in self._graph.inputs:
            return None, None
        operator = self._graph.operator(name)
        if operator.kind == "Clip":
            return operator.attributes["minimum"], operator.attributes["maximum"]
        return _BOUNDS.get(operator.kind, (None, None))
