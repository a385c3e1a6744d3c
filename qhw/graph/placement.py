# SPDX-License-Identifier: Apache-2.0
"""Placing quantization points: the paper's rules (sections 2.6 to 2.8) under the target's kernels.

A weight point before the operator, an activation point after the fused chain, none where the host runs. A model input
or host tensor gets a point where the accelerator reads it. Tensors that the target wants on one scale share a group.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from qhw.errors import PlanError
from qhw.graph.build_points import PointBuilder
from qhw.graph.cells import Cells, Wishes, find_cells
from qhw.graph.demands import Demands
from qhw.graph.graph import Graph
from qhw.graph.kinds import VIEW_KINDS
from qhw.graph.network import past_weight_memory
from qhw.graph.points import OperatorPlacement, QuantPoint
from qhw.graph.propagate import choose_formats
from qhw.graph.room import with_room
from qhw.graph.slots import Choice
from qhw.schema import TargetSpec

__all__ = ["Placement", "place"]


@dataclass(frozen=True)
class Placement:
    """All points of a model on a target, and who runs each operator."""

    operators: tuple[OperatorPlacement, ...]
    points: tuple[QuantPoint, ...]

    def operator(self, name: str) -> OperatorPlacement:
        """The placement of one operator."""
        return next(operator for operator in self.operators if operator.name == name)


def place(
    graph: Graph,
    target: TargetSpec,
    *,
    absorbed: Collection[str] = (),
    keep_float: Collection[str] = (),
    formats: Mapping[str, str] | None = None,
) -> Placement:
    """Place every quantization point of a model on a target.

    Args:
        graph: The captured model.
        target: The accelerator.
        absorbed: Operators that planned steps fold into the one before them (batch norms).
        keep_float: Operator names or patterns that stay on the host.
        formats: Point name or pattern -> format id demanded there.

    Raises:
        PlanError: a name matches nothing, a demand cannot be met, or the target refuses host operators and the model
            has some.
    """
    names = [operator.name for operator in graph.operators]
    kept = {name for pattern in keep_float for name in _matching(pattern, names, "--keep-float", "operator")}
    excluded: dict[str, tuple[str, str]] = {}
    while True:
        found = find_cells(graph, target, Wishes(absorbed, kept, formats or {}, excluded))
        _check_fallback(target, found)
        demands = _demands(graph, found, target, formats or {})
        choice = choose_formats(target, found.cells, demands)
        late = past_weight_memory(graph, target, found.cells, choice)
        if not late:
            break
        excluded |= late
    choice, reasons = with_room(target, found.cells, choice)
    points = tuple(PointBuilder(graph, target, found, choice).points())
    _check_met(points, demands)
    operators = tuple(_with_kernel(found.placements[name], choice, reasons.get(name, "")) for name in names)
    return Placement(operators, points)


def _matching(pattern: str, names: list[str], where: str, what: str) -> list[str]:
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        closest = get_close_matches(pattern, names, n=3, cutoff=0.4)
        hint = f"Closest: {', '.join(closest)}." if closest else f"The first of {len(names)}: {', '.join(names[:5])}."
        raise PlanError(f"{where}: no {what} matches '{pattern}'. {hint} qhw plan --json lists all.")
    return found


def _check_fallback(target: TargetSpec, found: Cells) -> None:
    if target.fallback != "refuse":
        return
    on_host = [p for p in found.placements.values() if p.where == "host"]
    hosted = [p for p in on_host if p.kind not in VIEW_KINDS or p.subject != "graph"]
    if hosted:
        listed = "; ".join(f"{p.name} ({p.kind}: {p.reason}, {p.subject})" for p in hosted[:5])
        more = f" and {len(hosted) - 5} more" if len(hosted) > 5 else ""
        raise PlanError(
            f"'{target.name}' runs whole models only (fallback = \"refuse\"), and cannot run {listed}{more}. "
            "Replace these operators, or choose another target."
        )


def _demands(graph: Graph, found: Cells, target: TargetSpec, formats: Mapping[str, str]) -> Demands:
    weights: dict[str, str] = {}
    tensors: dict[str, str] = {}
    weight_names = [cell.operator.weight for cell in found.cells if cell.operator.weight]
    tensor_by_point = {cell.operator.name: cell.output for cell in found.cells}
    written = {cell.output for cell in found.cells if not cell.gives_float}
    tensor_by_point |= {name: name for cell in found.cells for name in cell.inputs if name not in written}
    for pattern, wanted in formats.items():
        if wanted not in target.formats:
            closest = get_close_matches(wanted, list(target.formats), n=1, cutoff=0.0)
            raise PlanError(
                f"--format {pattern}={wanted}: '{target.name}' has no format '{wanted}'. "
                f"Formats: {', '.join(target.formats)}.{f' Closest: {closest[0]}.' if closest else ''}"
            )
        for name in _matching(pattern, [*weight_names, *tensor_by_point], "--format", "point"):
            if name in tensor_by_point:
                tensors[tensor_by_point[name]] = wanted
            else:
                weights[name] = wanted
    return Demands(weights, tensors, *_at_boundary(graph, found, target))


def _at_boundary(graph: Graph, found: Cells, target: TargetSpec) -> tuple[Mapping[str, tuple[str, ...]], ...]:
    """Formats that the target leaves to the network's inputs and to results that it returns and that cells read."""
    boundary = target.boundary
    if boundary is None:
        return {}, {}
    read = {name for cell in found.cells for name in cell.inputs}
    ends = [found.tensor_of[name] for name in graph.output_values]
    inputs, outputs = boundary.input_formats, boundary.output_formats
    return (
        {name: inputs for name in graph.inputs if name in read} if isinstance(inputs, tuple) else {},
        {name: outputs for name in ends if name in read} if isinstance(outputs, tuple) else {},
    )


def _check_met(points: tuple[QuantPoint, ...], demands: Demands) -> None:
    chosen = {point.tensor: point for point in points if point.role != "edge"}
    for name, wanted in {**demands.weights, **demands.tensors}.items():
        point = chosen.get(name)
        if point is None or point.format != wanted:
            got = "is not quantized" if point is None else f"can only be {', '.join(point.legal)}"
            raise PlanError(f"--format: {name} cannot be '{wanted}' beside the other choices: it {got}.")


def _with_kernel(placement: OperatorPlacement, choice: Choice, reason: str) -> OperatorPlacement:
    kernels = choice.kernels.get(placement.name, ())
    if not kernels:
        return placement
    return placement.model_copy(update={"kernel": kernels[0], "legal": kernels, "reason": reason})
