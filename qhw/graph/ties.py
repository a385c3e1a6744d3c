# SPDX-License-Identifier: Apache-2.0
"""Tensors on one scale: what an operator's same-scale rule ties, and the groups that follow."""

from collections.abc import Iterator, Mapping, Sequence

from qhw.graph.cell import Cell
from qhw.graph.points import FixedEncoding
from qhw.graph.slots import Slot, edge, tensor

__all__ = ["alike_slots", "clashing_operand", "fixed_encoding", "group_encodings", "scale_groups", "tied_slots"]


def tied_slots(cell: Cell, operands: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
    """Slots that a cell puts on one scale.

    An operator without kernels only moves data, so that all it touches has one scale.
    """
    return _at(cell, operands, cell.tied)


def alike_slots(cell: Cell, operands: Sequence[Slot]) -> Iterator[tuple[Slot, ...]]:
    """Slots that a cell wants in one format: those on one scale, or aligned ones, which keep scales of their own."""
    return _at(cell, operands, cell.alike)


def _at(cell: Cell, operands: Sequence[Slot], places: Sequence[int]) -> Iterator[tuple[Slot, ...]]:
    slots = (*operands, tensor(cell.output))
    tied = tuple(dict.fromkeys(slots[place] for place in places))
    if len(tied) > 1:
        yield tied


def fixed_encoding(cell: Cell, format_name: str) -> FixedEncoding | None:
    """The qparams that a target prescribes for a cell's result in one format."""
    table = cell.spec.fixed_output
    fixed = table.get(format_name) if isinstance(table, dict) else None
    if fixed is None or not isinstance(fixed.scale, float) or not isinstance(fixed.zero_point, int):
        return None
    return FixedEncoding(scale=fixed.scale, zero_point=fixed.zero_point)


class _Groups:
    """Sets of slots that share a scale, and the encoding that is prescribed for a set."""

    def __init__(self) -> None:
        self._parents: dict[Slot, Slot] = {}
        self.fixed: dict[Slot, FixedEncoding] = {}

    def root(self, slot: Slot) -> Slot:
        while slot in self._parents:
            slot = self._parents[slot]
        return slot

    def join(self, a: Slot, b: Slot) -> None:
        first, second = self.root(a), self.root(b)
        if first != second:
            self._parents[second] = first
            held = self.fixed.pop(second, None)
            if held is not None:
                self.fixed.setdefault(first, held)

    def members(self) -> dict[Slot, Slot]:
        return {slot: self.root(slot) for slot in (*self._parents, *self._parents.values())}


def _operands(cell: Cell, edges: frozenset[Slot]) -> list[Slot]:
    places = [edge(cell.operator.name, index) for index in range(len(cell.inputs))]
    return [p if p in edges else tensor(name) for p, name in zip(places, cell.inputs, strict=True)]


def _walk(
    cells: Sequence[Cell], formats: Mapping[Slot, Sequence[str]], edges: frozenset[Slot]
) -> tuple[_Groups, Slot | None]:
    """Join groups in execution order, up to the first operand whose prescribed scale does not suit the others."""
    groups = _Groups()
    for cell in cells:
        output = tensor(cell.output)
        if output in formats and not cell.gives_float:
            fixed = fixed_encoding(cell, formats[output][0])
            if fixed is not None:
                groups.fixed[output] = fixed
        operands = _operands(cell, edges)
        for tied in tied_slots(cell, operands):
            clash = _clash(groups, tied, operands, cell)
            if clash is not None:
                return groups, clash
            for slot in tied[1:]:
                groups.join(tied[0], slot)
    return groups, None


def _clash(groups: _Groups, tied: Sequence[Slot], operands: Sequence[Slot], cell: Cell) -> Slot | None:
    """An operand on a prescribed scale that a tie would force upon a tensor with other values.

    What only passes on one operand (a transpose, a max pooling) may keep that operand's scale; where several meet, or
    the result has a prescribed scale of its own, all must have the same one.
    """
    output = tensor(cell.output)
    wanted = [groups.fixed.get(groups.root(slot)) for slot in tied]
    is_passing = len([slot for slot in tied if slot != output]) == 1 and output not in groups.fixed
    if is_passing or len(set(wanted) - {None}) == 0:
        return None
    alike = {fixed for slot, fixed in zip(tied, wanted, strict=True) if slot != output or fixed is not None}
    if len(alike) == 1:
        return None
    own = groups.fixed.get(output)
    for index, slot in enumerate(operands):
        fixed = groups.fixed.get(groups.root(slot))
        if slot in tied and slot.what == "tensor" and fixed != own:
            return edge(cell.operator.name, index)
    return None


def clashing_operand(
    cells: Sequence[Cell], formats: Mapping[Slot, Sequence[str]], edges: frozenset[Slot]
) -> Slot | None:
    """An operand that must be requantized because its scale is prescribed and the tie needs another; None without."""
    return _walk(cells, formats, edges)[1]


def scale_groups(
    cells: Sequence[Cell], formats: Mapping[Slot, Sequence[str]], edges: frozenset[Slot]
) -> dict[Slot, Slot]:
    """Slots that share a scale, each with the slot that names its group: the first of them in execution order."""
    return _walk(cells, formats, edges)[0].members()


def group_encodings(
    cells: Sequence[Cell], formats: Mapping[Slot, Sequence[str]], edges: frozenset[Slot]
) -> dict[Slot, FixedEncoding]:
    """The prescribed encoding of each group that has one, by the slot that names the group."""
    return dict(_walk(cells, formats, edges)[0].fixed)
