# SPDX-License-Identifier: Apache-2.0
"""A plan as a colleague would explain it."""

from collections import Counter
from collections.abc import Iterable, Iterator

from qhw.cli.console import heading, paragraph
from qhw.cli.figures import cycles_words, seconds_words
from qhw.cli.words import accumulator_words, format_words, share_words
from qhw.decisions import QuantPlan, Reason
from qhw.graph import QuantPoint
from qhw.roofline import CostReport
from qhw.schema import TargetSpec
from qhw.wording import counted, listed

__all__ = ["show_plan"]

_ALGORITHM = 24  # the longest name that does not get a line of its own
_WHY = 18 + _ALGORITHM + 2


def show_plan(
    plan: QuantPlan, target: TargetSpec, model: str, samples: int | None = None, cost: CostReport | None = None
) -> None:
    """Print a plan: what runs where, in which formats, which algorithms and why, what was refused, what is unknown.

    Args:
        plan: The plan.
        target: Its target.
        model: What the command line calls the model.
        samples: Number of calibration samples, where known.
        cost: What it is estimated to cost; shown where the target has figures for it.
    """
    data = "calibration data" if plan.resources.calibration else "no data"
    data += "" if samples is None else f" ({counted(samples, 'sample')})"
    labels = ", with labels" if plan.resources.labels else ""
    heading(f"{plan.target} · {model} · pipeline {plan.pipeline} · {data}{labels}")
    print()
    _show_placement(plan, target)
    if cost is not None and (cost.cycles.at_least or cost.seconds.at_least):
        paragraph("Estimated", f"{cycles_words(cost.cycles)} cycles, {seconds_words(cost.seconds)} a sample   qhw cost")
    print()
    heading(f"{'Stage':<18}{'Algorithm':<{_ALGORITHM + 2}}Why")
    for step in plan.steps:
        why = f"{_grouped(step.verdict.reasons)}; {counted(len(step.sites), 'site')}"
        if len(step.algorithm) > _ALGORITHM:
            print(f"{step.stage:<18}{step.algorithm}")
        paragraph("" if len(step.algorithm) > _ALGORITHM else f"{step.stage:<18}{step.algorithm}", why, left=_WHY)
        if step.left_out:
            reasons = [reason for site in step.left_out for reason in site.verdict.reasons]
            paragraph("", f"left out, {len(step.left_out)}: {_grouped(reasons)}", left=_WHY)
    if plan.refused:
        print()
        heading("Refused")
        for refusal in plan.refused:
            paragraph(refusal.algorithm, _grouped(refusal.verdict.reasons), left=29, indent=2)
    _show_hints(plan, target)
    if plan.notes:
        print()
        heading("Not known of this target")
        for note in plan.notes:
            paragraph(note.subject, note.rule.replace("{value}", str(note.value)), left=34, indent=2)


def _grouped(reasons: Iterable[Reason]) -> str:
    """Reasons in words; those that say the same of several things are said once."""
    subjects: dict[str, list[str]] = {}
    for reason in reasons:
        subjects.setdefault(reason.statement(), []).append(reason.subject)
    return "; ".join(f"{words} ({listed(list(dict.fromkeys(found)), 1)})" for words, found in subjects.items())


def _show_placement(plan: QuantPlan, target: TargetSpec) -> None:
    paragraph("On the accelerator", share_words(plan))
    hosted = [op for op in plan.operators if op.where == "host"]
    for text in dict.fromkeys(f"{op.kind}: {op.reason} ({op.subject})" for op in hosted):
        names = [op.name for op in hosted if f"{op.kind}: {op.reason} ({op.subject})" == text]
        paragraph("  on the host", f"{text}: {listed(names, 3)}")
    weights = [point for point in plan.points if point.role == "weight"]
    activations = [point for point in plan.points if point.role in ("activation", "input", "edge")]
    biases = [point for point in plan.points if point.role == "bias"]
    for label, points in (("Weights", weights), ("Activations", activations)):
        for name, number in _counted(points):
            paragraph(label, f"{format_words(target.formats[name])}   formats.{name}, {counted(number, 'point')}")
            label = ""
    for name, number in _counted(biases):
        rule = target.biases[name]
        width = "float" if rule.bits == "float" else f"{rule.bits} bits"
        paragraph("Biases", f"{width}, scale {rule.scale or 'not stated'}   biases.{name}, {counted(number, 'point')}")
    edges = [point for point in plan.points if point.role == "edge"]
    if edges:
        takes = "operand takes" if len(edges) == 1 else "operands take"
        paragraph("Requantized", f"{len(edges)} {takes} another format than their tensor has")
    kernels = dict.fromkeys(op.kernel for op in plan.operators if op.kernel is not None and op.macs)
    for accumulator in dict.fromkeys(target.kernels[str(kernel)].accumulator for kernel in kernels):
        where = "" if accumulator in (None, "unknown") else f"   accumulators.{accumulator}"
        paragraph("Accumulator", f"{accumulator_words(target, accumulator)}{where}")


def _counted(points: Iterable[QuantPoint]) -> list[tuple[str, int]]:
    return list(Counter(point.format for point in points).items())


def _show_hints(plan: QuantPlan, target: TargetSpec) -> None:
    """What would change the plan."""
    hints = [] if plan.resources.calibration else [("--calibration DATA", "algorithms that need data")]
    hints += [*_other_formats(plan, target, "weight"), *_other_formats(plan, target, "activation")]
    if hints:
        print()
        heading("Would change the plan")
        left = 4 + max(len(option) for option, _ in hints)
        for option, meaning in hints:
            paragraph(option, meaning, left=left, indent=2)


def _other_formats(plan: QuantPlan, target: TargetSpec, role: str) -> Iterator[tuple[str, str]]:
    """Each other format that weights or activations may have: the option that asks for it, and what it brings.

    Activations are offered at the operator with the most multiply-accumulates: what they cost, they cost there.
    """
    macs = {operator.name: operator.macs for operator in plan.operators}
    points = [point for point in plan.points if point.role == role]
    if role == "activation":
        points.sort(key=lambda point: -macs[point.operator])
    for name in dict.fromkeys(name for point in points for name in point.legal):
        allowing = [point for point in points if name in point.legal]
        changed = next((point for point in allowing if point.format != name), None)
        if changed is None:
            continue
        is_everywhere = role == "weight" and len(allowing) == len(points)
        where = "*.weight" if is_everywhere and all(p.name.endswith(".weight") for p in points) else changed.name
        yield (
            f"--format '{where}={name}'",
            format_words(target.formats[name]) + _other_kernel(plan, target, changed, name),
        )


def _other_kernel(plan: QuantPlan, target: TargetSpec, point: QuantPoint, wanted: str) -> str:
    """The kernel that a format needs, where it is another one, and how it compares."""
    placement = next(operator for operator in plan.operators if operator.name == point.operator)
    field = "weight" if point.role == "weight" else "output"
    fitting = [kernel for kernel in placement.legal if wanted in (getattr(target.kernels[kernel], field) or ())]
    if placement.kernel is None or not fitting or placement.kernel in fitting:
        return ""
    now, then = target.kernels[placement.kernel].macs_per_cycle, target.kernels[fitting[0]].macs_per_cycle
    if not (isinstance(now, float) and isinstance(then, float)):
        return f"; kernels.{fitting[0]} instead of {placement.kernel}"
    return f"; kernels.{fitting[0]}, {now / then:.3g} x the cycles of {placement.kernel}"
