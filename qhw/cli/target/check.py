# SPDX-License-Identifier: Apache-2.0
"""`qhw target check`: what of one model runs on a target, in which formats, and why the rest does not."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import heading, paragraph, print_json, print_table
from qhw.cli.options import AsJson, TargetArgument
from qhw.wording import counted, listed

if TYPE_CHECKING:
    from qhw.graph import Graph, OperatorPlacement, QuantPoint
    from qhw.schema import TargetSpec

__all__ = ["check_target"]

ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", metavar="MODEL", help="module:callable, or a result folder, as 'qhw plan' takes it."),
]


def check_target(target: TargetArgument, model: ModelOption, as_json: AsJson = False) -> None:
    """Say how much of a model a target covers: who runs each operator and why, and the formats that are legal there.

    Exit status 1 where the model cannot be planned for the target at all; what can be said of it is said first.

    Example: qhw target check tiny.toml --model examples.digits:model
    """
    import qhw
    from qhw.cli.sources import load_model
    from qhw.errors import PlanError

    spec = qhw.load_target(target)
    graph = load_model(model)
    refused: PlanError | None = None
    try:
        operators, points = _planned(graph, spec)
    except PlanError as error:
        refused = error
        operators, points = _placed(graph, spec)
    facts = _facts(spec, operators, points)
    if as_json:
        print_json({**facts, "refused": None if refused is None else str(refused)})
    else:
        _show(spec, model, facts)
        if refused is not None:
            print()
            paragraph("Refused", str(refused))
    raise typer.Exit(0 if refused is None else 1)


def _planned(graph: "Graph", spec: "TargetSpec") -> "tuple[Sequence[OperatorPlacement], Sequence[QuantPoint]]":
    """Where everything is once a plan folds what it can; calibration data is taken to be at hand."""
    from qhw.decisions import Resources
    from qhw.engine import select
    from qhw.extension import default_registry

    made = select(graph, spec, default_registry(), Resources(calibration=True))
    return made.operators, made.points


def _placed(graph: "Graph", spec: "TargetSpec") -> "tuple[Sequence[OperatorPlacement], Sequence[QuantPoint]]":
    """Where everything would be if the host took what the target cannot run; without folding where no plan is made."""
    from qhw.errors import PlanError
    from qhw.graph import place

    lenient = spec.model_copy(update={"fallback": "host"})
    try:
        return _planned(graph, lenient)
    except PlanError:
        placement = place(graph, lenient)
        return placement.operators, placement.points


def _facts(
    spec: "TargetSpec", operators: "Sequence[OperatorPlacement]", points: "Sequence[QuantPoint]"
) -> dict[str, Any]:
    from qhw.schema.words import format_words

    weights = {point.operator: point for point in points if point.role == "weight"}
    results = {point.operator: point for point in points if point.role == "activation"}
    inputs = {point.name: point for point in points if point.role in ("input", "edge")}
    total = sum(one.macs for one in operators)
    there = sum(one.macs for one in operators if one.where == "accelerator")
    used = dict.fromkeys(name for point in points if point.role != "bias" for name in point.legal)
    return {
        "target": spec.name,
        "macs": total,
        "accelerator_macs": there,
        "accelerator_share": there / total if total else None,
        "operators": [
            {
                **{key: getattr(one, key) for key in ("name", "kind", "where", "macs", "kernel", "fused_into")},
                "kernels": list(one.legal),
                "members": list(one.members),
                "weight_formats": _legal(weights.get(one.name)),
                "result_formats": _legal(results.get(one.name)),
                "subject": one.subject,
                "reason": one.reason,
            }
            for one in operators
        ],
        "inputs": [{"name": name, "formats": _legal(point)} for name, point in inputs.items()],
        "formats": {name: format_words(spec.formats[name]) for name in used if name in spec.formats},
    }


def _legal(point: "QuantPoint | None") -> list[str]:
    """Formats that are legal at a point, the chosen one first."""
    if point is None:
        return []
    return [point.format, *(name for name in point.legal if name != point.format)]


def _show(spec: "TargetSpec", model: str, facts: dict[str, Any]) -> None:
    from qhw.cli.words import count_words
    from qhw.graph import VIEW_KINDS

    operators = facts["operators"]
    there = [one for one in operators if one["where"] == "accelerator"]
    heading(f"{spec.name} · {model}")
    print()
    share = facts["accelerator_share"]
    macs = "no MACs" if share is None else f"{100 * share:.1f} % of {count_words(facts['macs'])} MACs"
    folded = sum(one["where"] == "folded" for one in operators)
    rest = f", {folded} folded into others" if folded else ""
    paragraph("On the accelerator", f"{macs}; {len(there)} of {counted(len(operators), 'operator')}{rest}")
    hosted: dict[str, list[dict[str, Any]]] = {}
    for one in operators:
        if one["where"] == "host" and one["kind"] not in VIEW_KINDS:
            hosted.setdefault(f"{one['reason']} ({one['subject']})", []).append(one)
    for text, ones in hosted.items():
        found = ", ".join(dict.fromkeys(one["kind"] for one in ones))
        paragraph("  on the host", f"{found}: {text}: {listed([one['name'] for one in ones], 3)}")
    print()
    kinds = {one["name"]: one["kind"] for one in operators}
    rows = [_row(one, kinds) for one in there if one["fused_into"] is None and (one["kernel"] or one["result_formats"])]
    if rows:
        print_table(("operator", "kind", "kernels", "weights", "results", "MACs"), rows)
        print()
        heading("Formats")
        for name, words in facts["formats"].items():
            paragraph(name, words, indent=2)


def _row(one: dict[str, Any], kinds: dict[str, str]) -> tuple[str, ...]:
    from qhw.cli.words import count_words

    along = "".join(f"+{kinds[name]}" for name in one["members"][1:])
    lists = (one["kernels"] or ["moves data"], one["weight_formats"] or ["-"], one["result_formats"] or ["-"])
    macs = count_words(one["macs"]) if one["macs"] else "-"
    return (one["name"], f"{one['kind']}{along}", *(listed(names, 4) for names in lists), macs)
