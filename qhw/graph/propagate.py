# SPDX-License-Identifier: Apache-2.0
"""One kernel per operator and one format per tensor, so that every kernel gets and gives what it can.

Arc consistency over the cells: a tensor keeps the formats that its writer can write and its readers can read; a cell
keeps the kernels that its tensors allow. Where nothing would be left, one operand of that cell is requantized: it gets
a slot of its own, and all starts again with that operand apart. There are finitely many operands, so it ends. Then
formats are fixed in execution order, the most preferred first.
"""

from collections.abc import Collection, Iterable, Sequence

from qhw.errors import PlanError
from qhw.graph.cell import Cell
from qhw.graph.conflict import conflict_words, smallest_conflict
from qhw.graph.demands import Demands
from qhw.graph.rows import preferred
from qhw.graph.slots import Choice, Slot, edge, tensor, weight
from qhw.graph.ties import alike_slots, clashing_operand, scale_groups
from qhw.schema import TargetSpec

__all__ = ["choose_formats"]


class _Stuck(Exception):
    """No kernel is left for a cell, or no format for a slot that it touches."""

    def __init__(self, cell: Cell) -> None:
        super().__init__(cell.operator.name)
        self.cell = cell


def choose_formats(target: TargetSpec, cells: Sequence[Cell], demands: Demands) -> Choice:
    """Choose one kernel per cell and one format per quantized tensor.

    Args:
        target: The accelerator.
        cells: In execution order.
        demands: Formats that the user wants, and those that the target allows at the edge of the network.

    Raises:
        PlanError: a demand cannot be met, or constraints contradict each other; names the smallest set that does.
    """
    edges: list[Slot] = []
    while True:
        search = _Search(target, cells, demands, frozenset(edges))
        conflict = smallest_conflict(target, cells, demands) if not edges else ()
        if conflict:
            raise PlanError(conflict_words(conflict))
        found = search.solve()
        if isinstance(found, Choice):
            break
        edges.append(found if isinstance(found, Slot) else search.operand_to_part(found.cell))
    inputs = {edge(cell.operator.name, i): tensor(name) for cell in cells for i, name in enumerate(cell.inputs)}
    for operand in tuple(edges):  # an operand that was parted before the one that mattered can come back
        if found.formats[operand][0] != found.formats.get(inputs[operand], ("",))[0]:
            continue
        fewer = [slot for slot in edges if slot != operand]
        without = _Search(target, cells, demands, frozenset(fewer)).solve()
        if isinstance(without, Choice):
            edges, found = fewer, without
    return found


def _first(chosen: str, legal: Iterable[str]) -> tuple[str, ...]:
    return (chosen, *(name for name in legal if name != chosen))


class _Search:
    """One round, with a given set of operands apart."""

    def __init__(
        self,
        target: TargetSpec,
        cells: Sequence[Cell],
        demands: Demands,
        edges: frozenset[Slot],
    ) -> None:
        self._target = target
        self._cells = cells
        self._demands = demands
        self._edges = edges
        self._writers = {cell.output: cell for cell in cells if not cell.gives_float}
        self.kernels: dict[str, list[str]] = {cell.operator.name: list(cell.kernels) for cell in cells if cell.kernels}
        self._touching: dict[Slot, list[Cell]] = {}
        for cell in cells:
            for slot in self._slots(cell):
                self._touching.setdefault(slot, []).append(cell)
        for name in demands.inputs:  # has a format of its own, even where every reader requantizes it
            self._touching.setdefault(tensor(name), [])
        self.formats: dict[Slot, list[str]] = {slot: self._start(slot) for slot in self._touching}

    def solve(self) -> "Choice | Slot | _Stuck":
        """The choice; else the operand that must be requantized, or the cell where nothing is left."""
        try:
            self._propagate(list(self._cells))
            kernels, formats = dict(self.kernels), dict(self.formats)
            self._fix()
        except _Stuck as stuck:
            return stuck
        operand = clashing_operand(self._cells, self.formats, self._edges)
        return operand or Choice(
            {name: _first(self.kernels[name][0], kernels[name]) for name in kernels},
            {slot: _first(self.formats[slot][0], formats[slot]) for slot in formats},
            self._edges,
            scale_groups(self._cells, self.formats, self._edges),
        )

    def _fix(self) -> None:
        """Decide every slot, then every kernel, in execution order: the first format that leaves the rest possible.

        Raises:
            _Stuck: none does.
        """
        for slot in self.formats:
            legal = self.formats[slot]
            for name in legal if len(legal) > 1 else ():
                kernels, formats = dict(self.kernels), dict(self.formats)
                self.formats[slot] = [name]
                try:
                    self._propagate(self._touching[slot])
                    break
                except _Stuck:
                    if name == legal[-1]:
                        raise
                    self.kernels, self.formats = kernels, formats
        for cell in self._cells:
            if cell.kernels:
                self.kernels[cell.operator.name] = self.kernels[cell.operator.name][:1]

    def operand_to_part(self, cell: Cell) -> Slot:
        """The operand that is to be requantized where a cell is stuck: the first of its own that frees it, else its
        first at all; else one that reads its result, or the result of a cell that shares its weight; else any.

        With all operands apart every cell finds formats: `smallest_conflict` found nothing that stands against it.
        """
        own = self._joined([cell])
        freeing = [slot for slot in own if self._frees(cell, slot.operand)]
        family = [c for c in self._cells if c is cell or (c.weight is not None and c.weight == cell.weight)]
        results = {c.output for c in family}
        reading = self._joined(self._cells, results)
        return (freeing or own or reading or self._joined(family) or self._joined(self._cells))[0]

    def _joined(self, cells: Iterable[Cell], among: Collection[str] | None = None) -> list[Slot]:
        """Operands of cells that are not apart yet; those of some tensors alone."""
        places = [(edge(c.operator.name, i), name) for c in cells for i, name in enumerate(c.inputs)]
        return [p for p, name in places if p not in self._edges and (among is None or name in among)]

    def _frees(self, cell: Cell, index: int) -> bool:
        """Whether some kernel fits all that a cell touches but one operand."""
        return any(
            all(
                not set(names).isdisjoint(self.formats[slot])
                for place, slot, names in self._wanted(cell, kernel)
                if place != index
            )
            for kernel in cell.kernels
        )

    def _operands(self, cell: Cell) -> list[Slot]:
        places = [edge(cell.operator.name, index) for index in range(len(cell.inputs))]
        return [p if p in self._edges else tensor(name) for p, name in zip(places, cell.inputs, strict=True)]

    def _slots(self, cell: Cell) -> list[Slot]:
        slots = self._operands(cell)
        if cell.weight is not None:
            slots.append(weight(cell.weight))
        if not cell.gives_float:
            slots.append(tensor(cell.output))
        return list(dict.fromkeys(slots))

    def _start(self, slot: Slot) -> list[str]:
        """All formats that a slot may have before its neighbours are asked, preferred first."""
        touching = self._touching[slot]
        if slot.what == "weight":
            return self._start_weight(slot.name, touching)
        writer = self._writers.get(slot.name) if slot.what == "tensor" else None
        if writer is not None and writer.kernels:
            options = _union(writer.output_formats(kernel) for kernel in writer.kernels)
        else:
            reads = [(c, i) for c in touching for i, operand in enumerate(self._operands(c)) if operand == slot]
            options = _union(c.operand_formats(kernel, i) for c, i in reads for kernel in c.kernels)
            if not all(c.kernels for c, _ in reads) or writer is not None:
                options = _union([options, _union(c.activation_formats() for c in self._cells)])
        if slot.what == "tensor":
            options = self._at_boundary(slot.name, options)
        options = preferred(self._target.formats, options)
        wanted = self._demands.tensors.get(slot.name) if slot.what == "tensor" else None
        if wanted is None:
            return options
        if wanted not in options:
            raise PlanError(f"{slot.name}: cannot be in '{wanted}' on this target. Legal here: {', '.join(options)}.")
        return [wanted]

    def _at_boundary(self, name: str, options: list[str]) -> list[str]:
        """Formats that the target allows at the edge of the network; an input may have some that no kernel reads."""
        allowed = self._demands.inputs.get(name)
        if allowed is not None:
            usable = next(iter(self._cells)).activations
            options = [n for n in _union([options, allowed]) if n in allowed and n in usable]
        allowed = self._demands.outputs.get(name)
        return options if allowed is None else [n for n in options if n in allowed]

    def _start_weight(self, name: str, touching: Sequence[Cell]) -> list[str]:
        options = _union(cell.weight_formats(kernel) for cell in touching for kernel in cell.kernels)
        if len({cell.operator.weight_axis for cell in touching}) > 1:  # their scales would lie along different axes
            options = [name for name in options if self._target.formats[name].per == "tensor"]
        options = preferred(self._target.formats, options)
        wanted = self._demands.weights.get(name)
        if wanted is None:
            return options
        if wanted not in options:
            kind = touching[0].operator.kind
            if wanted in _union(cell.weight_formats(kernel) for cell in touching for kernel in cell.rows):
                raise PlanError(conflict_words(smallest_conflict(self._target, self._cells, self._demands)))
            raise PlanError(f"{name}: no kernel of {kind} holds weights in '{wanted}'. It holds: {', '.join(options)}.")
        return [wanted]

    def _propagate(self, queue: Iterable[Cell]) -> None:
        waiting = {cell.operator.name: cell for cell in queue}
        while waiting:
            cell = waiting.pop(next(iter(waiting)))
            for slot in self._revise(cell):
                waiting.update({other.operator.name: other for other in self._touching[slot]})

    def _revise(self, cell: Cell) -> list[Slot]:
        """Drop kernels and formats of one cell that no longer agree; the slots that changed.

        Raises:
            _Stuck: nothing is left.
        """
        slots = self._slots(cell)
        before = {slot: self.formats[slot] for slot in slots}
        if cell.kernels:
            left = {kernel: self._left(cell, self._wanted(cell, kernel)) for kernel in self.kernels[cell.operator.name]}
            kept = [kernel for kernel, formats in left.items() if formats is not None]
            self.kernels[cell.operator.name] = kept
            allowed = {slot: {name for kernel in kept for name in (left[kernel] or {})[slot]} for slot in slots}
        else:
            allowed = self._left(cell, []) or {slot: set() for slot in slots}
        for slot in slots:
            self.formats[slot] = [name for name in before[slot] if name in allowed[slot]]
        if not all(self.formats[slot] for slot in slots):
            raise _Stuck(cell)
        return [slot for slot in slots if len(before[slot]) != len(self.formats[slot])]

    def _left(
        self, cell: Cell, wanted: Sequence[tuple[int | None, Slot, Sequence[str]]]
    ) -> dict[Slot, set[str]] | None:
        """Formats that are left for a cell's slots under what one kernel wants; None where a slot has none.

        Slots on one scale, or aligned ones, have one format; slots of a cell that keeps its precision one width.
        """
        found = {slot: set(self.formats[slot]) for slot in self._slots(cell)}
        for _, slot, names in wanted:
            found[slot] &= set(names)
        for tied in alike_slots(cell, self._operands(cell)):
            shared = set.intersection(*(found[slot] for slot in tied))
            found |= dict.fromkeys(tied, shared)
        if cell.keeps_precision:
            widths = set.intersection(*({self._width(name) for name in names} for names in found.values()))
            found = {slot: {name for name in names if self._width(name) in widths} for slot, names in found.items()}
        return found if all(found.values()) else None

    def _width(self, name: str) -> int | None:
        return self._target.formats[name].element_bits

    def _wanted(self, cell: Cell, kernel: str) -> list[tuple[int | None, Slot, Sequence[str]]]:
        """What a kernel wants of each slot: position of the operand, or None; slot; formats."""
        found: list[tuple[int | None, Slot, Sequence[str]]] = [
            (index, slot, cell.operand_formats(kernel, index)) for index, slot in enumerate(self._operands(cell))
        ]
        if cell.weight is not None:
            found.append((None, weight(cell.weight), cell.weight_formats(kernel)))
        if not cell.gives_float:
            found.append((None, tensor(cell.output), cell.output_formats(kernel)))
        return found


def _union(lists: Iterable[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(name for names in lists for name in names))
