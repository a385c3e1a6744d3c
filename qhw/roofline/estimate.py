# SPDX-License-Identifier: Apache-2.0
"""The estimate: per operator the slowest of arithmetic and memories, then totals at a clock."""

from collections.abc import Mapping, Sequence

from qhw.decisions import QuantPlan
from qhw.errors import TargetError
from qhw.graph import VIEW_KINDS, Graph
from qhw.roofline.compute import compute_cycles
from qhw.roofline.figure import Figure
from qhw.roofline.memories import Share, bandwidth, is_default, shares
from qhw.roofline.report import CostReport, OperatorCost
from qhw.roofline.traffic import Cell, cells_of
from qhw.schema import TargetSpec, closest

__all__ = ["estimate"]


def estimate(graph: Graph, plan: QuantPlan, target: TargetSpec, clock: str | None = None) -> CostReport:
    """What one sample costs on a target.

    Per operator cycles are the largest of (1) to (3), as if all overlapped; operators follow one another.

        multiply-accumulates, channels rounded up to cost.channel_multiple, / kernels.*.macs_per_cycle      (1)
        elementwise results / cost.elementwise_per_cycle                                                    (2)
        bytes through a memory / its bandwidth * clock_hz, for each memory                                  (3)

    Start-up, control, reuse inside an operator and the host are not in it: it ranks layers and targets, and predicts no
    benchmark. What the target leaves open is named, never taken for nothing.

    Args:
        graph: The captured model, or the float graph of its result.
        plan: Where each operator runs, in which formats.
        target: The accelerator.
        clock: A preset of `clocks`; absent: the default one.

    Raises:
        TargetError: the target has no such clock preset.

    Reference:
        Williams, Waterman, Patterson, 2009, "Roofline", CACM 52(4). Differs: several memories, and cycles, not rates.
    """
    preset, clock_missing = _preset(target, clock)
    hertz = target.clocks[preset].clock_hz if preset is not None else None
    clock_hz = hertz if isinstance(hertz, float) else None
    if preset is not None and clock_hz is None:
        clock_missing = f"clocks.{preset}.clock_hz"
    cells = cells_of(graph, plan, target)
    carried, unplaced, refused = shares(target, cells)
    operators = tuple(
        _operator(graph, target, cell, mine, unplaced, preset, clock_hz, clock_missing)
        for cell, mine in zip(cells, carried, strict=True)
    )
    cycles = Figure.sum(operator.cycles for operator in operators)
    seconds = _seconds(target, cycles, operators, clock_hz, clock_missing)
    return CostReport(
        target=target.name,
        clock=preset,
        operators=operators,
        host=tuple(p.name for p in plan.operators if p.where == "host" and p.kind not in VIEW_KINDS),
        refused=refused,
        cycles=cycles,
        seconds=seconds,
        joules=_joules(target, seconds),
    )


def _preset(target: TargetSpec, clock: str | None) -> tuple[str | None, str | None]:
    """The preset to use, or the field that would name one."""
    if clock is not None:
        if clock not in target.clocks:
            near = closest(clock, target.clocks)
            known = ", ".join(target.clocks) or "none"
            raise TargetError(
                f"--clock: '{target.name}' has no clock preset '{clock}'. Known: {known}."
                + (f" Closest: {near}." if near else "")
            )
        return clock, None
    if not target.clocks:
        return None, "clocks"
    preset = next((name for name in target.clocks if is_default(target, name)), None)
    return preset, None if preset is not None else "clocks.*.is_default"


def _operator(
    graph: Graph,
    target: TargetSpec,
    cell: Cell,
    carried: Mapping[str, Share],
    unplaced: Sequence[str],
    preset: str | None,
    clock_hz: float | None,
    clock_missing: str | None,
) -> OperatorCost:
    compute = compute_cycles(graph, target, cell.placement, cell.operator, clock_hz)
    traffic: dict[str, Figure] = {}
    memory: dict[str, Figure] = {}
    for name, share in carried.items():
        moved = Figure.sum(cell.bytes[content].times(part) for content, part in share.parts.items())
        if not (moved.at_least or moved.missing or share.missing):
            continue
        traffic[name] = Figure(moved.at_least, tuple(dict.fromkeys((*moved.missing, *share.missing))))
        speed = bandwidth(target, name, preset)
        if isinstance(speed, str) or clock_hz is None:
            fields = (speed, clock_missing)
            lacking = tuple(field for field in fields if isinstance(field, str))
            memory[name] = Figure(0.0, (*traffic[name].missing, *lacking))
        else:
            memory[name] = traffic[name].times(clock_hz / speed)
    total = Figure.largest([compute, *memory.values()])
    return OperatorCost(
        name=cell.placement.name,
        kind=cell.placement.kind,
        kernel=cell.placement.kernel,
        macs=cell.placement.macs,
        compute=compute,
        traffic=traffic,
        memory=memory,
        cycles=Figure(total.at_least, tuple(dict.fromkeys((*total.missing, *unplaced)))),
    )


def _seconds(
    target: TargetSpec,
    cycles: Figure,
    operators: Sequence[OperatorCost],
    clock_hz: float | None,
    clock_missing: str | None,
) -> Figure:
    if clock_hz is not None:
        return cycles.times(1 / clock_hz)
    missing = (*cycles.missing, clock_missing or "clocks")
    peak = target.cost.peak_ops_per_s if target.cost is not None else None
    low = 2 * sum(operator.macs for operator in operators) / peak if isinstance(peak, float) else 0.0
    return Figure(low, tuple(dict.fromkeys(missing)))


def _joules(target: TargetSpec, seconds: Figure) -> Figure:
    power = target.cost.power_w if target.cost is not None else None
    if not isinstance(power, float):
        return Figure(0.0, (*seconds.missing, "cost.power_w"))
    return Figure(0.0, seconds.missing) if seconds.missing else seconds.times(power)
