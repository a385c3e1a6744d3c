# SPDX-License-Identifier: Apache-2.0
"""Cells: an operator with all that its kernel computes along, and the tensors between cells.

What a fused chain computes inside is no tensor on the chip. A view (reshape, flatten) and an operator that a planned
step folds away carry their input's tensor.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from qhw.graph.graph import Graph
from qhw.graph.kinds import FALLBACK_KINDS
from qhw.graph.limits import violated_limit
from qhw.graph.operator import Operator
from qhw.graph.points import OperatorPlacement
from qhw.schema import WEIGHTED_KINDS, Kernel, TargetSpec
from qhw.schema import Operator as OperatorSpec

__all__ = ["Cell", "Cells", "find_cells"]

_TWO_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "MatMul"})


@dataclass(frozen=True)
class Cell:
    """An operator that the accelerator runs.

    Attributes:
        operator: The operator whose kernel it is.
        spec: The target's row for it.
        path: Field path of that row.
        members: Names of the operators computed along, this one first; without what is folded away.
        inputs: Tensors it reads that may be quantized.
        output: The tensor it writes, under its name once the plan has run.
        kernels: Kernel ids by their rows; empty for an operator that only moves data.
        activations: Formats that an activation can have here.
        parameters: Formats that the constant operand can have here.
    """

    operator: Operator
    spec: OperatorSpec
    path: str
    members: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    kernels: Mapping[str, Kernel]
    activations: frozenset[str]
    parameters: frozenset[str]

    def operand_formats(self, kernel: str, index: int) -> tuple[str, ...]:
        """Format ids that a kernel allows for one operand that is an activation."""
        row = self.kernels[kernel]
        position = index + 1 if self.operator.attributes.get("weight_operand") == 0 else index
        second = position == 1 and self.operator.kind in _TWO_OPERANDS
        return _listed(row.weight if second and isinstance(row.weight, tuple) else row.input, self.activations)

    def weight_formats(self, kernel: str) -> tuple[str, ...]:
        """Format ids that a kernel allows for the constant operand."""
        row = self.kernels[kernel]
        two = self.operator.kind in _TWO_OPERANDS
        first = two and (not isinstance(row.weight, tuple) or self.operator.attributes.get("weight_operand") == 0)
        return _listed(row.input if first else row.weight, self.parameters)

    def output_formats(self, kernel: str) -> tuple[str, ...]:
        """Format ids that a kernel allows for the result."""
        return _listed(self.kernels[kernel].output, self.activations)

    def activation_formats(self) -> tuple[str, ...]:
        """Format ids that any of its kernels allows for any activation."""
        found: list[str] = []
        for kernel in self.kernels:
            for index in range(len(self.inputs)):
                found.extend(self.operand_formats(kernel, index))
            found.extend(self.output_formats(kernel))
        return tuple(dict.fromkeys(found))


def _listed(formats: object, usable: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in formats if name in usable) if isinstance(formats, tuple) else ()


@dataclass(frozen=True)
class Cells:
    """All cells of a model on a target, in execution order, and who runs the other operators."""

    cells: tuple[Cell, ...]
    placements: Mapping[str, OperatorPlacement]
    tensor_of: Mapping[str, str]


def find_cells(graph: Graph, target: TargetSpec, absorbed: Collection[str], keep_float: Collection[str]) -> Cells:
    """Read a graph as cells.

    Args:
        graph: The captured model.
        target: The accelerator.
        absorbed: Operators that planned steps fold into their producer.
        keep_float: Operators that the user keeps on the host.
    """
    tensor_of = _tensors(graph, absorbed)
    reader = _Reader(graph, target, frozenset(absorbed), frozenset(keep_float), tensor_of)
    cells = _connected(reader.cells())
    kept = {cell.operator.name for cell in cells}
    members = {member: cell for cell in cells for member in cell.members[1:]}
    placed: dict[str, OperatorPlacement] = {}
    for operator in graph.operators:
        name = operator.name
        if name in absorbed:
            folded = _placement(operator, "folded", "graph", "folded into the operator before it")
            placed[name] = folded.model_copy(update={"fused_into": operator.inputs[0]})
        elif name in members:
            placed[name] = _fused(operator, members[name])
        elif name in kept:
            cell = next(cell for cell in cells if cell.operator.name == name)
            placed[name] = _placement(operator, "accelerator", f"{cell.path}.kernels", "", cell.members)
        elif operator.is_view:
            source = placed.get(operator.inputs[0])
            where = "host" if source is not None and source.where == "host" else "accelerator"
            placed[name] = _placement(operator, where, "graph", "the same values, seen otherwise")
        else:
            unanchored = ("graph", "only moves data that no operator on the accelerator computes with")
            placed[name] = _placement(operator, "host", *reader.refused.get(name, unanchored))
    return Cells(cells, placed, tensor_of)


def _connected(cells: list[Cell]) -> tuple[Cell, ...]:
    """The cells without those that only move data between tensors that no kernel reads or writes."""
    anchored = {tensor for cell in cells if cell.kernels for tensor in (*cell.inputs, cell.output)}
    movers = [cell for cell in cells if not cell.kernels]
    grown = True
    while grown:
        touching = [cell for cell in movers if not anchored.isdisjoint((*cell.inputs, cell.output))]
        reached = {tensor for cell in touching for tensor in (*cell.inputs, cell.output)}
        grown = not reached <= anchored
        anchored |= reached
    return tuple(cell for cell in cells if cell.kernels or not anchored.isdisjoint((*cell.inputs, cell.output)))


def _tensors(graph: Graph, absorbed: Collection[str]) -> dict[str, str]:
    """Value name to the name of the tensor it is, once absorbed operators are gone and views are looked through."""
    tensor_of = {name: name for name in graph.inputs}
    for operator in graph.operators:
        seen_through = operator.name in absorbed or operator.is_view
        tensor_of[operator.name] = tensor_of[operator.inputs[0]] if seen_through else operator.name
    return tensor_of


def _placement(
    operator: Operator, where: str, subject: str, reason: str, members: tuple[str, ...] = ()
) -> OperatorPlacement:
    return OperatorPlacement.model_validate(
        {
            "name": operator.name,
            "kind": operator.kind,
            "macs": operator.macs,
            "where": where,
            "members": members,
            "subject": subject,
            "reason": reason,
        }
    )


def _fused(operator: Operator, cell: Cell) -> OperatorPlacement:
    placement = _placement(operator, "accelerator", f"{cell.path}.fused", f"computed along with {cell.operator.name}")
    return placement.model_copy(update={"fused_into": cell.operator.name})


class _Reader:
    """Walks the graph once, and notes for every operator the cell it starts or why the host runs it."""

    def __init__(
        self,
        graph: Graph,
        target: TargetSpec,
        absorbed: frozenset[str],
        keep_float: frozenset[str],
        tensor_of: Mapping[str, str],
    ) -> None:
        self._graph = graph
        self._target = target
        self._absorbed = absorbed
        self._keep_float = keep_float
        self._tensor_of = tensor_of
        self._outputs = frozenset(graph.output_values)
        self.refused: dict[str, tuple[str, str]] = {}

    def cells(self) -> list[Cell]:
        found: list[Cell] = []
        taken: set[str] = set()
        for operator in self._graph.operators:
            if operator.name in taken or operator.name in self._absorbed or operator.is_view:
                continue
            cell = self._cell(operator)
            if isinstance(cell, Cell):
                found.append(cell)
                taken.update(cell.members)
            else:
                self.refused[operator.name] = cell
        return found

    def _cell(self, operator: Operator) -> Cell | tuple[str, str]:
        """The operator's cell, or the field and reason that put it on the host."""
        if self._target.fallback == "single_partition" and self.refused:
            first = next(iter(self.refused))
            return ("fallback", f"single partition: all that follows '{first}', the first on the host, is there")
        if operator.name in self._keep_float:
            return ("--keep-float", "kept in float by request")
        unfit = _unfit(operator)
        if unfit is not None:
            return ("graph", unfit)
        reason = (f"operators.{operator.kind}", "the target does not list it")
        for kind in (operator.kind, *FALLBACK_KINDS.get(operator.kind, ())):
            spec = self._target.operators.get(kind)
            if spec is None:
                continue
            path = f"operators.{kind}"
            broken = violated_limit(operator, spec.limits)
            if broken is not None:
                reason = (f"{path}.limits.{broken[0]}", f"{broken[0]} {broken[1]} is outside the limit")
                continue
            cell = self._cell_of(operator, spec, path)
            if isinstance(cell, Cell):
                return cell
            reason = cell
        return reason

    def _cell_of(self, operator: Operator, spec: OperatorSpec, path: str) -> Cell | tuple[str, str]:
        if operator.weight in self._keep_float:
            return ("--keep-float", "kept in float by request")
        if operator.weight is not None and operator.kind in _TWO_OPERANDS and spec.same_scale in ("inputs", "all"):
            return (f"{path}.same_scale", "its constant operand would need the scale of the other one")
        inputs = tuple(self._tensor_of[name] for name in operator.inputs if self._is_float(name))
        found = self._kernels(operator, spec, path, inputs)
        if isinstance(found, tuple):
            return found
        members, last = self._chain(operator, spec)
        activations = frozenset(name for name in self._target.formats if _reason(self._target, name, None) is None)
        parameters = frozenset(name for name in self._target.formats if _reason(self._target, name, operator) is None)
        cell = Cell(operator, spec, path, members, inputs, self._tensor_of[last], found, activations, parameters)
        tied = {kernel: row for kernel, row in found.items() if _can_share(cell, kernel)}
        if found and not tied:
            return (f"{path}.same_scale", f"no format of its kernels fits all that share a scale ({spec.same_scale})")
        return replace(cell, kernels=tied)

    def _is_float(self, value: str) -> bool:
        dtypes = self._graph.input_dtypes
        return (
            dtypes[value].startswith(("float", "bfloat")) if value in dtypes else self._graph.operator(value).is_float
        )

    def _kernels(
        self, operator: Operator, spec: OperatorSpec, path: str, inputs: tuple[str, ...]
    ) -> dict[str, Kernel] | tuple[str, str]:
        """The rows that can hold this operator at all; or the field and reason why there is none."""
        if spec.kernels is None and operator.weight is None:
            return {} if inputs else (f"{path}.kernels", "the target lists no kernel for it")
        if not isinstance(spec.kernels, tuple) or not spec.kernels:
            return (f"{path}.kernels", "unknown" if spec.kernels == "unknown" else "the target lists no kernel for it")
        readers = self._graph.consumers(operator.name)
        has_bias = operator.bias is not None or any(reader.name in self._absorbed for reader in readers)
        reason = (f"{path}.kernels", "no kernel holds it")
        rows: dict[str, Kernel] = {}
        for name in spec.kernels:
            row = self._target.kernels[name]
            missing = _missing(self._target, operator, row, has_bias, bool(inputs))
            if missing is None:
                rows[name] = row
            else:
                reason = (f"kernels.{name}.{missing[0]}", missing[1])
        return rows or reason

    def _chain(self, operator: Operator, spec: OperatorSpec) -> tuple[tuple[str, ...], str]:
        """Operators computed along, longest fusion first, and the name of the last value, folded operators included."""
        followers: list[Operator] = []
        current = operator.name
        ends = {0: current}
        while current not in self._outputs:
            readers = self._graph.consumers(current)
            if len(readers) != 1 or len(readers[0].inputs) != 1:
                break
            follower = readers[0]
            current = follower.name
            if follower.name in self._absorbed:
                ends[len(followers)] = current
                continue
            if follower.kind == "Dropout":  # nothing happens there at inference
                continue
            if follower.name in self._keep_float or _unfit(follower) or follower.kind in _TWO_OPERANDS:
                break
            followers.append(follower)
            ends[len(followers)] = current
        kinds = tuple(follower.kind for follower in followers)
        entries = spec.fused if isinstance(spec.fused, tuple) else ()
        chains = [(entry,) if isinstance(entry, str) else entry for entry in entries]
        longest = max((len(chain) for chain in chains if kinds[: len(chain)] == chain), default=0)
        return (operator.name, *(follower.name for follower in followers[:longest])), ends[longest]


def _can_share(cell: Cell, kernel: str) -> bool:
    """Whether a kernel has a format that all tensors can have that its operator wants on one scale."""
    operands = [set(cell.operand_formats(kernel, index)) for index in range(len(cell.inputs))]
    output = set(cell.output_formats(kernel))
    tied = {"inputs": operands, "all": [*operands, output], "input_output": [*operands[:1], output]}
    sets = tied.get(str(cell.spec.same_scale), [])
    return len(sets) < 2 or bool(set.intersection(*sets))


def _unfit(operator: Operator) -> str | None:
    """What about the operator itself keeps it on the host, whatever the target; None for nothing."""
    facts = operator.attributes
    if operator.kind == "Unknown":
        return "qhw has no kind for this operator, so it stays in float"
    if not operator.is_float:
        return f"the result of {operator.kind} is no float tensor, so it is not quantized"
    if facts.get("scalar"):
        return "its other operand is a plain number"
    if facts.get("computed"):
        return "an operand is computed from parameters alone; make it a parameter or a buffer to quantize it"
    if facts.get("of_tuple"):
        return "it picks one of several results of an operator that the host runs"
    if operator.kind in WEIGHTED_KINDS and (operator.weight is None or len(operator.inputs) != 1):
        return "its weight or bias is no parameter but computed while the model runs"
    return None


def _reason(target: TargetSpec, name: str, operator: Operator | None) -> str | None:
    """Why a format cannot be had: as the constant operand of an operator, or as an activation (None)."""
    spec = target.formats[name]
    if spec.unplannable_reason is not None:
        return spec.unplannable_reason
    if spec.per == "tensor":
        return None
    if operator is None:
        return f'per: "{spec.per}"; an activation has one scale, which is per = "tensor"'
    if operator.weight_axis is None:
        return f'per: "{spec.per}"; the constant of {operator.kind} has no output channels'
    return None


def _missing(
    target: TargetSpec, operator: Operator, row: Kernel, has_bias: bool, reads: bool
) -> tuple[str, str] | None:
    """The field of a kernel that keeps this operator from it, and why; None where nothing does."""
    two = operator.kind in _TWO_OPERANDS
    needed: list[tuple[str, Operator | None]] = [("input", None)] if reads else []
    needed.append(("output", None))
    if operator.weight is not None and not two:
        needed.append(("weight", operator))
    elif two and isinstance(row.weight, tuple):
        needed.append(("weight", operator if operator.weight is not None else None))
    for field, owner in needed:
        listed = getattr(row, field)
        if not isinstance(listed, tuple):
            return field, "unknown" if listed == "unknown" else "the target does not say which formats it takes"
        reasons = {name: _reason(target, name, owner) for name in listed}
        if None not in reasons.values():
            return field, f"formats.{listed[0]}.{reasons[listed[0]]}"
    if has_bias and row.bias == "none":
        return "bias", "it adds no bias, and the operator has one"
    return None
