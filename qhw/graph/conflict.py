# SPDX-License-Identifier: Apache-2.0
"""Why no formats fit: the smallest set of constraints that contradict each other, each of which is needed for it.

Every operand may be requantized before it is read, so that what one operator wants of its operands never binds another.
What is left binds an operator's own result and its weight, and operators that share a weight: each such family is
decided alone, and exactly. Of a family that cannot be met constraints are taken away one by one, and stay away where
the rest still cannot be met (a deletion filter): as many trials as the family has constraints.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from qhw.graph.cell import Cell
from qhw.graph.demands import Demands
from qhw.schema import TargetSpec

__all__ = ["Constraint", "conflict_words", "smallest_conflict"]

What = Literal["kernels", "scale", "precision", "shared", "demand", "edge"]


@dataclass(frozen=True)
class Constraint:
    """Something that formats must meet.

    Attributes:
        what: `kernels` of an operator, its rule on a common `scale` or on its `precision`, a weight that is `shared`, a
            `demand` of the user's, formats at the `edge` of the network.
        name: Of the operator, the parameter or the tensor.
        text: What it asks for, in words, with the field that says so.
        way_out: What to change to be rid of it.
    """

    what: What
    name: str
    text: str
    way_out: str

    @property
    def key(self) -> tuple[What, str]:
        """What tells it from others."""
        return self.what, self.name


def smallest_conflict(target: TargetSpec, cells: Sequence[Cell], demands: Demands) -> tuple[Constraint, ...]:
    """Constraints that cannot be met together, and can where any one of them is gone; empty where all can be met.

    Args:
        target: The accelerator.
        cells: In execution order.
        demands: Formats that the user wants, and those that the target allows at the edge of the network.
    """
    # Rules on scales and width are constraints of their own: kernels that they rule out are back here.
    for family in _families([replace(cell, kernels=cell.rows) for cell in cells]):
        problem = _Problem(target, family, demands)
        kept = list(problem.constraints())
        if problem.is_met({one.key for one in kept}):
            continue
        for one in tuple(kept):
            rest = [other for other in kept if other is not one]
            if not problem.is_met({other.key for other in rest}):
                kept = rest
        return tuple(kept)
    return ()


def conflict_words(conflict: Sequence[Constraint]) -> str:
    """The conflict in one line: what contradicts what, and what to change."""
    ways = dict.fromkeys(one.way_out for one in conflict)
    if len(conflict) == 1:
        return f"{conflict[0].name}: no format fits: {conflict[0].text}. Way out: {conflict[0].way_out}."
    count = f"all {len(conflict)}" if len(conflict) > 2 else "both"
    return (
        f"{conflict[0].name}: no format fits {count}: {'; '.join(one.text for one in conflict)}. "
        f"Drop one: {'; '.join(ways)}."
    )


def _families(cells: Sequence[Cell]) -> Iterator[list[Cell]]:
    """Cells that share a weight; every other cell alone."""
    families: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        key = ("operator", cell.operator.name) if cell.weight is None else ("weight", cell.weight)
        families.setdefault(key, []).append(cell)
    yield from families.values()


class _Problem:
    """One family of cells: what its constraints are, and whether some of them can be met together."""

    def __init__(self, target: TargetSpec, family: Sequence[Cell], demands: Demands) -> None:
        self._target = target
        self._family = family
        self._demands = demands
        self._every = tuple(target.formats)
        self._weight = family[0].weight
        self._one_axis = len({cell.operator.weight_axis for cell in family}) == 1

    def constraints(self) -> Iterator[Constraint]:
        """All constraints, those that are hardest to change first, so that the ones left in the end are easy to."""
        for cell in self._family:
            name, path = cell.operator.name, cell.path
            keep = f"--keep-float {name}"
            if cell.kernels:
                yield Constraint("kernels", name, f"{name} {_rows(cell)} ({path}.kernels)", keep)
            if cell.keeps_precision:
                text = f"{name} reads and gives one width ({path}.may_change_precision)"
                yield Constraint("precision", name, text, keep)
            if len(cell.alike) > 1:
                what = "one format" if cell.same_scale == "aligned" else "one scale"
                yield Constraint("scale", name, f"{name} has {what} for {_tied_words(cell)} ({path}.same_scale)", keep)
        if self._weight is not None and len(self._family) > 1:
            readers = ", ".join(cell.operator.name for cell in self._family)
            text = f"{self._weight} is one weight of {readers}"
            text += "" if self._one_axis else ", whose outputs lie along different axes, and so has one scale"
            yield Constraint("shared", self._weight, text, "untie the weights")
        for cell in self._family:
            allowed = None if cell.gives_float else self._demands.outputs.get(cell.output)
            if allowed is not None:
                text = f"{cell.operator.name} leaves the network in {_listed(allowed)} (boundary.output_formats)"
                yield Constraint("edge", cell.output, text, "another boundary.output_formats")
        if self._weight in self._demands.weights:
            yield _demand(str(self._weight), str(self._weight), self._demands.weights[str(self._weight)])
        for cell in self._family:
            if not cell.gives_float and cell.output in self._demands.tensors:
                yield _demand(cell.output, cell.operator.name, self._demands.tensors[cell.output])

    def is_met(self, active: Collection[tuple[What, str]]) -> bool:
        """Whether formats exist that meet the constraints of these keys."""
        if self._weight is None or ("shared", self._weight) not in active:
            return all(any(self._fits(cell, name, active) for name in self._weights(cell)) for cell in self._family)
        return any(all(self._fits(cell, name, active) for cell in self._family) for name in self._shared_weights())

    def _weights(self, cell: Cell) -> Iterable[str | None]:
        return (None,) if cell.weight is None else self._every

    def _shared_weights(self) -> Iterator[str]:
        """Formats that one weight can have; its scales may lie along one axis alone."""
        for name in self._every:
            if self._one_axis or self._target.formats[name].per == "tensor":
                yield name

    def _fits(self, cell: Cell, held: str | None, active: Collection[tuple[What, str]]) -> bool:
        """Whether a cell has formats for its operands and its result, with its weight in one format."""
        name = cell.operator.name
        if held is not None and ("demand", cell.weight) in active and self._demands.weights[str(cell.weight)] != held:
            return False
        result = None if cell.gives_float else set(self._every)
        if result is not None and ("demand", cell.output) in active:
            result &= {self._demands.tensors[cell.output]}
        if result is not None and ("edge", cell.output) in active:
            result &= set(self._demands.outputs[cell.output])
        if not cell.kernels or ("kernels", name) not in active:
            return self._agree(cell, [set(self._every) for _ in cell.inputs], held, result, active)
        return any(
            (held is None or held in cell.weight_formats(kernel))
            and self._agree(
                cell,
                [set(cell.operand_formats(kernel, index)) for index in range(len(cell.inputs))],
                held,
                None if result is None else result & set(cell.output_formats(kernel)),
                active,
            )
            for kernel in cell.kernels
        )

    def _agree(
        self,
        cell: Cell,
        operands: list[set[str]],
        held: str | None,
        result: set[str] | None,
        active: Collection[tuple[What, str]],
    ) -> bool:
        sets = operands if result is None else [*operands, result]
        if ("scale", cell.operator.name) in active:
            alike = cell.alike
            shared = set.intersection(*(sets[place] for place in alike)) if alike else set()
            sets = [shared if place in alike else names for place, names in enumerate(sets)]
        if ("precision", cell.operator.name) in active:
            widths = [{self._target.formats[name].element_bits for name in names} for names in sets]
            widths += [] if held is None else [{self._target.formats[held].element_bits}]
            return all(sets) and bool(set.intersection(*widths))
        return all(sets)


def _tied_words(cell: Cell) -> str:
    words = {"inputs": "all that it reads", "input_output": "what it reads and gives"}
    return words.get(cell.same_scale, "all that it reads and gives")


def _rows(cell: Cell) -> str:
    """What the kernels of a cell take and give, in words."""
    said: dict[str, None] = {}
    for kernel in cell.kernels:
        parts = [f"reads {_listed(cell.operand_formats(kernel, 0))}"] if cell.inputs else []
        parts += [f"holds weights in {_listed(cell.weight_formats(kernel))}"] if cell.weight is not None else []
        edge = "" if cell.at_edge is None else " (boundary.output_formats)"
        parts += [] if cell.gives_float else [f"gives {_listed(cell.output_formats(kernel))}{edge}"]
        said[", ".join(parts)] = None
    listed = list(said)
    return " or ".join(listed[:4]) + (f" or one of {len(listed) - 4} more" if len(listed) > 4 else "")


def _listed(names: Sequence[str]) -> str:
    return "/".join(names) or "nothing"


def _demand(key: str, point: str, wanted: str) -> Constraint:
    return Constraint("demand", key, f"{point} is demanded in {wanted} (--format)", f"--format {point}={wanted}")
