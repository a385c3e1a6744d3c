# SPDX-License-Identifier: Apache-2.0
"""Cells: an operator with all that its kernel computes along, and the tensors between cells.

What a fused chain computes inside is no tensor on the chip. A view (reshape, flatten) and an operator that a planned
step folds away carry their input's tensor.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from qhw.graph.cell import TWO_OPERANDS, Cell
from qhw.graph.graph import Graph
from qhw.graph.limits import violated_limit
from qhw.graph.network import violated_network_limit
from qhw.graph.operator import Operator
from qhw.graph.points import OperatorPlacement
from qhw.graph.rows import activations_of, held_formats, missing_field, preferred
from qhw.schema import WEIGHTED_KINDS, Kernel, TargetSpec
from qhw.schema import Operator as OperatorSpec
from qhw.schema.kinds import row_kinds

__all__ = ["Cell", "Cells", "Wishes", "find_cells"]

Reason = tuple[str, str]
"""Field of the target or fact of the graph, and what it decides, in words."""


@dataclass(frozen=True)
class Wishes:
    """What leaves an operator to the host, or a kernel out, besides the target.

    Attributes:
        absorbed: Operators that planned steps fold into their producer.
        keep_float: Operators that the user keeps on the host.
        formats: Point name or pattern -> format id that the user demands there.
        excluded: Operators that the network as a whole has no room for, each with the reason.
    """

    absorbed: Collection[str] = ()
    keep_float: Collection[str] = ()
    formats: Mapping[str, str] = field(default_factory=dict)
    excluded: Mapping[str, Reason] = field(default_factory=dict)


@dataclass(frozen=True)
class Cells:
    """All cells of a model on a target, in execution order, and who runs the other operators."""

    cells: tuple[Cell, ...]
    placements: Mapping[str, OperatorPlacement]
    tensor_of: Mapping[str, str]


def find_cells(graph: Graph, target: TargetSpec, wishes: Wishes) -> Cells:
    """Read a graph as cells.

    Args:
        graph: The captured model.
        target: The accelerator.
        wishes: What else decides.
    """
    hosted = _hosted_views(graph, target, wishes.absorbed)
    tensor_of = _tensors(graph, wishes.absorbed, hosted)
    reader = _Reader(graph, target, wishes, tensor_of, hosted)
    cells = _at_edge(graph, target, _connected(reader.cells()), tensor_of)
    anchors = {cell.operator.name: cell for cell in cells}
    members = {member: cell for cell in cells for member in cell.members[1:]}
    placed: dict[str, OperatorPlacement] = {}
    for operator in graph.operators:
        name = operator.name
        if name in wishes.absorbed:
            folded = _placement(operator, "folded", "graph", "folded into the operator before it")
            placed[name] = folded.model_copy(update={"fused_into": operator.inputs[0]})
        elif name in members:
            placed[name] = _fused(operator, members[name])
        elif name in anchors:
            cell = anchors[name]
            placed[name] = _placement(operator, "accelerator", f"{cell.path}.kernels", "", cell.members)
        elif not operator.inputs:
            placed[name] = _placement(operator, "accelerator", "graph", "the same parameters for each sample")
        elif name in hosted:
            placed[name] = _placement(operator, "host", *hosted[name])
        elif operator.is_view:
            source = placed.get(operator.inputs[0])
            where = "host" if source is not None and source.where == "host" else "accelerator"
            placed[name] = _placement(operator, where, "graph", "the same values, seen otherwise")
        else:
            unanchored = ("graph", "only moves data that no operator on the accelerator computes with")
            placed[name] = _placement(operator, "host", *reader.refused.get(name, unanchored))
    return Cells(cells, placed, tensor_of)


def _hosted_views(graph: Graph, target: TargetSpec, absorbed: Collection[str]) -> dict[str, Reason]:
    """Views that the target does not have, or not in this shape: the host computes them, as any other operator."""
    found: dict[str, Reason] = {}
    for operator in graph.operators:
        if not operator.is_view or operator.name in absorbed or operator.kind == "Dropout":
            continue
        reason = _hosted_view(graph, target, operator)
        source = operator.inputs[0]
        if operator.kind == "Identity":
            is_part = source in found and graph.operator(source).kind == "Split"
            reason = ("graph", f"a part of '{source}', which the host splits") if is_part else None
        if reason is not None:
            found[operator.name] = reason
    return found


def _hosted_view(graph: Graph, target: TargetSpec, operator: Operator) -> Reason | None:
    spec, path = target.operators.get(operator.kind), f"operators.{operator.kind}"
    if spec is not None and spec.kernels == ():
        return (f"{path}.kernels", "the target lists no kernel for it")
    broken = None if spec is None else violated_limit(operator, spec.limits)
    if broken is not None:
        return (f"{path}.limits.{broken[0]}", f"{broken[0]} {broken[1]} is outside the limit")
    return violated_network_limit(graph, target, operator)


def _connected(cells: list[Cell]) -> tuple[Cell, ...]:
    """The cells without those that only move data between tensors that no kernel reads or writes."""
    anchored = {tensor for cell in cells if cell.kernels for tensor in _coded(cell)}
    movers = [cell for cell in cells if not cell.kernels]
    grown = True
    while grown:
        touching = [cell for cell in movers if not anchored.isdisjoint((*cell.inputs, cell.output))]
        reached = {tensor for cell in touching for tensor in (*cell.inputs, cell.output)}
        grown = not reached <= anchored
        anchored |= reached
    return tuple(cell for cell in cells if cell.kernels or not anchored.isdisjoint((*cell.inputs, cell.output)))


def _coded(cell: Cell) -> tuple[str, ...]:
    return cell.inputs if cell.gives_float else (*cell.inputs, cell.output)


def _at_edge(
    graph: Graph, target: TargetSpec, cells: tuple[Cell, ...], tensor_of: Mapping[str, str]
) -> tuple[Cell, ...]:
    """Cells with what the target says of results that leave the network, where no cell reads them."""
    read = {name for cell in cells for name in cell.inputs}
    leaving = {tensor_of[name] for name in graph.output_values} - read
    return tuple(_leaving(target, cell) if cell.output in leaving else cell for cell in cells)


def _leaving(target: TargetSpec, cell: Cell) -> Cell:
    """A cell whose result leaves the network, with what the target says of those."""
    boundary = target.boundary
    if boundary is None or cell.gives_float:
        return cell
    if boundary.outputs == "float":
        return replace(cell, gives_float=True)
    # What only moves data has no kernel whose formats could be replaced; it gives what it reads.
    formats = boundary.output_formats
    return replace(cell, at_edge=formats) if isinstance(formats, tuple) and cell.kernels else cell


def _tensors(graph: Graph, absorbed: Collection[str], hosted: Collection[str]) -> dict[str, str]:
    """Value name to the name of the tensor it is, once absorbed operators are gone and views are looked through."""
    tensor_of = {name: name for name in graph.inputs}
    for operator in graph.operators:
        seen_through = operator.name in absorbed or (operator.is_view and operator.name not in hosted)
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
        wishes: Wishes,
        tensor_of: Mapping[str, str],
        hosted: Mapping[str, Reason],
    ) -> None:
        self._graph = graph
        self._target = target
        self._absorbed = frozenset(wishes.absorbed)
        self._keep_float = frozenset(wishes.keep_float)
        self._wishes = wishes
        self._tensor_of = tensor_of
        self._hosted = hosted
        self._outputs = frozenset(graph.output_values)
        self._activations = activations_of(target)
        read = {self._tensor_of[name] for op in graph.operators if not op.is_view for name in op.inputs}
        self._leaving = {self._tensor_of[name] for name in graph.output_values} - read
        self._layers = 0
        self.refused: dict[str, Reason] = {}

    def cells(self) -> list[Cell]:
        found: list[Cell] = []
        taken: set[str] = set()
        for operator in self._graph.operators:
            if operator.name in self._hosted:
                self.refused[operator.name] = self._hosted[operator.name]
            if operator.name in taken or operator.name in self._absorbed or operator.is_view or not operator.inputs:
                continue
            cell = self._cell(operator)
            if isinstance(cell, Cell):
                found.append(cell)
                taken.update(cell.members)
                self._layers += bool(cell.kernels)
            else:
                self.refused[operator.name] = cell
        return found

    def _cell(self, operator: Operator) -> Cell | Reason:
        """The operator's cell, or the field and reason that put it on the host."""
        if self._target.fallback == "single_partition" and self.refused:
            first = next(iter(self.refused))
            return ("fallback", f"single partition: all that follows '{first}', the first on the host, is there")
        if operator.name in self._keep_float:
            return ("--keep-float", "kept in float by request")
        unfit = _unfit(operator) or self._masks(operator)
        if unfit is not None:
            return ("graph", unfit)
        beyond = violated_network_limit(self._graph, self._target, operator) or self._wishes.excluded.get(operator.name)
        if beyond is not None:
            return beyond
        reason = (f"operators.{operator.kind}", "the target does not list it")
        for kind in row_kinds(operator.kind, self._target.operators):
            spec = self._target.operators[kind]
            path = f"operators.{kind}"
            broken = violated_limit(operator, spec.limits)
            if broken is not None:
                reason = (f"{path}.limits.{broken[0]}", f"{broken[0]} {broken[1]} is outside the limit")
                continue
            cell = self._cell_of(operator, spec, path)
            if isinstance(cell, Cell):
                return self._too_late(cell) or cell
            reason = cell
        return reason

    def _masks(self, operator: Operator) -> str | None:
        """Whether a constant operand holds infinite values."""
        if operator.kind not in TWO_OPERANDS or operator.weight is None:
            return None
        is_mask = bool(self._graph.tensor(operator.weight).isinf().any())
        return "its constant operand holds infinite values, as masks do, which no grid has" if is_mask else None

    def _too_late(self, cell: Cell) -> Reason | None:
        """Whether the network has as many layers already as it may, or reads what crosses the edge in float."""
        most = self._target.network.max_layers if self._target.network is not None else None
        if cell.kernels and isinstance(most, int) and self._layers >= most:
            return ("network.max_layers", f"{most} layers come before it, which is the most")
        boundary = self._target.boundary
        given = [name for name in cell.inputs if name in self._graph.inputs]
        if given and boundary is not None and boundary.inputs == "float":
            return ("boundary.inputs", f"it reads the network's input '{given[0]}', which is not quantized")
        return None

    def _cell_of(self, operator: Operator, spec: OperatorSpec, path: str) -> Cell | Reason:
        if operator.weight in self._keep_float:
            return ("--keep-float", "kept in float by request")
        has_constant = operator.weight is not None and operator.kind in TWO_OPERANDS and spec.parameters != "float"
        if has_constant and spec.same_scale in ("inputs", "all"):
            return (f"{path}.same_scale", "its constant operand would need the scale of the other one")
        inputs = tuple(self._tensor_of[name] for name in operator.inputs if self._is_float(name))
        has_bias = self._has_bias(operator)
        rows = self._kernels(operator, spec, path, bool(inputs), has_bias)
        if isinstance(rows, tuple):
            return rows
        rows, (members, last) = self._with_chain(operator, spec, rows)
        held = {name: held_formats(self._target, operator, spec, row, has_bias) for name, row in rows.items()}
        output = self._tensor_of[last]
        gives_float = spec.output == "float"
        cell = Cell(operator, spec, path, members, inputs, output, rows, self._activations, held, gives_float)
        if output in self._leaving:  # which decides what its rows may give; of others it is known once all are read
            cell = _leaving(self._target, cell)
        tied = {kernel: row for kernel, row in rows.items() if _can_share(cell, kernel)}
        if rows and not tied:
            return (f"{path}.same_scale", f"no format of its kernels fits all that share a scale ({spec.same_scale})")
        narrow = {kernel: row for kernel, row in tied.items() if _can_keep_width(self._target, cell, kernel)}
        if rows and not narrow:
            return (f"{path}.may_change_precision", "no kernel of it has one width for all that it reads and gives")
        return replace(cell, kernels=narrow, rows=rows)

    def _is_float(self, value: str) -> bool:
        dtypes = self._graph.input_dtypes
        return (
            dtypes[value].startswith(("float", "bfloat")) if value in dtypes else self._graph.operator(value).is_float
        )

    def _has_bias(self, operator: Operator) -> bool:
        readers = self._graph.consumers(operator.name)
        return operator.bias is not None or any(reader.name in self._absorbed for reader in readers)

    def _kernels(
        self, operator: Operator, spec: OperatorSpec, path: str, reads: bool, has_bias: bool
    ) -> dict[str, Kernel] | Reason:
        """The rows that can hold this operator at all, preferred first; or the field and reason why there is none."""
        if spec.kernels is None and operator.weight is None:
            return {} if reads else (f"{path}.kernels", "the target lists no kernel for it")
        if not isinstance(spec.kernels, tuple) or not spec.kernels:
            return (f"{path}.kernels", "unknown" if spec.kernels == "unknown" else "the target lists no kernel for it")
        reason = (f"{path}.kernels", "no kernel holds it")
        rows: dict[str, Kernel] = {}
        for name in preferred(self._target.kernels, spec.kernels):
            row = self._target.kernels[name]
            missing = missing_field(self._target, operator, spec, row, has_bias, reads)
            if missing is None:
                rows[name] = row
            else:
                reason = (f"kernels.{name}.{missing[0]}", missing[1])
        return rows or reason

    def _with_chain(
        self, operator: Operator, spec: OperatorSpec, rows: dict[str, Kernel]
    ) -> tuple[dict[str, Kernel], tuple[tuple[str, ...], str]]:
        """What is computed along, and the rows that compute just that along.

        Kernels may take in different operators (`kernels.*.fused`). The first that can have the formats demanded here
        decides, and those that would end elsewhere are out.
        """
        chains = {
            name: self._chain(operator, spec.fused if row.fused is None else row.fused) for name, row in rows.items()
        }
        if not rows:
            return rows, self._chain(operator, spec.fused)
        lead = next((name for name, row in rows.items() if self._meets(operator, row)), next(iter(rows)))
        return {name: row for name, row in rows.items() if chains[name] == chains[lead]}, chains[lead]

    def _meets(self, operator: Operator, row: Kernel) -> bool:
        """Whether a kernel has the formats that the user demands of an operator's weight, result and inputs."""
        for pattern, wanted in self._wishes.formats.items():
            given = [name for name in operator.inputs if name in self._graph.inputs]
            asked = [
                (row.weight, operator.weight is not None and fnmatchcase(operator.weight, pattern)),
                (row.output, fnmatchcase(operator.name, pattern)),
                (row.input, any(fnmatchcase(name, pattern) for name in given)),
            ]
            if any(is_asked and isinstance(names, tuple) and wanted not in names for names, is_asked in asked):
                return False
        return True

    def _chain(self, operator: Operator, fused: object) -> tuple[tuple[str, ...], str]:
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
            if follower.name in self._keep_float or _unfit(follower) or follower.kind in TWO_OPERANDS:
                break
            followers.append(follower)
            ends[len(followers)] = current
        kinds = tuple(follower.kind for follower in followers)
        entries = fused if isinstance(fused, tuple) else ()
        chains = [(entry,) if isinstance(entry, str) else entry for entry in entries]
        longest = max((len(chain) for chain in chains if kinds[: len(chain)] == chain), default=0)
        return (operator.name, *(follower.name for follower in followers[:longest])), ends[longest]


def _can_share(cell: Cell, kernel: str) -> bool:
    """Whether a kernel has a format that all tensors can have that its operator wants on one scale, or aligned."""
    sets = [set(cell.operand_formats(kernel, index)) for index in range(len(cell.inputs))]
    sets += [] if cell.gives_float else [set(cell.output_formats(kernel))]
    alike = [sets[place] for place in cell.alike]
    return len(alike) < 2 or bool(set.intersection(*alike))


def _can_keep_width(target: TargetSpec, cell: Cell, kernel: str) -> bool:
    """Whether a kernel has formats of one width for all that an operator reads and gives, where it keeps its width."""
    if not cell.keeps_precision:
        return True
    sets = [cell.operand_formats(kernel, index) for index in range(len(cell.inputs))]
    sets += [] if cell.weight is None else [cell.weight_formats(kernel)]
    sets += [] if cell.gives_float else [cell.output_formats(kernel)]
    widths = [{target.formats[name].element_bits for name in names} for names in sets]
    return bool(set.intersection(*widths))


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
