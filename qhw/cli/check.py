# SPDX-License-Identifier: Apache-2.0
"""`qhw check`: a quantized model, made with qhw or not, held against a target clause by clause."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qhw.cli.console import heading, paragraph, print_document, print_json
from qhw.cli.options import AsJson, TargetOption
from qhw.wording import counted, listed

if TYPE_CHECKING:
    from qhw.legality import CheckReport, Violation

_SHOWN = 4


def check(
    artefact: Annotated[
        Path,
        typer.Argument(
            metavar="ARTEFACT", help="Quantized ONNX (QDQ, QOperator), TFLite, or AIMET encodings.", show_default=False
        ),
    ],
    target: TargetOption,
    model: Annotated[
        Path | None, typer.Option("--model", "-m", metavar="ONNX", help="The model that encodings belong to.")
    ] = None,
    no_host: Annotated[
        bool, typer.Option("--no-host", help="What the accelerator does not run is a violation, whatever the fallback.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Judge whether a quantized model keeps to what a target states; list each violation with clause and fix.

    What the target leaves unknown is no violation: it is listed as what cannot be judged. So is what it states and no
    check looks at. Exit status 1 where something is broken and where nothing could be judged, as of a float model; 0
    where nothing is broken; 2 where the file cannot be read.

    Example: qhw check model.onnx --target espressif/esp32-p4
    """
    from qhw.checking import check as judged
    from qhw.errors import QhwError

    try:
        report = judged(artefact, target, model=model, host_allowed=not no_host)
    except QhwError as error:
        print(f"error: {error}", file=sys.stderr)
        if as_json:
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        raise typer.Exit(2) from error
    if as_json:
        print_document(report.to_json())
    else:
        _show(report)
    if not (report.is_legal and report.is_judged):
        raise typer.Exit(1)


def _show(report: "CheckReport") -> None:
    verdict = "nothing judged" if not report.is_judged else "legal" if report.is_legal else "not legal"
    heading(f"{report.artefact} ({report.form}) on {report.target}: {verdict}")
    print(report.summary)
    if not report.is_judged:
        print("No operator was held to a kernel of the target, as none of a float model can be. Quantize it first.")
    if report.violations:
        clauses = len({one.clause for one in report.violations})
        print(f"{counted(len(report.violations), 'violation')} of {counted(clauses, 'clause')}")
    for remark in report.remarks:
        print(f"Not read: {remark}" if "was given" not in remark else f"Note: {remark}")
    by_clause: dict[str, list[Violation]] = {}
    for violation in report.violations:
        by_clause.setdefault(violation.clause, []).append(violation)
    for clause, violations in sorted(by_clause.items(), key=lambda item: -len(item[1])):
        _show_clause(clause, violations)
    on_host = [one for one in report.operators if one.status in ("host", "unjudged")]
    if on_host:
        print()
        heading("Not on the accelerator" if report.count("host") else "Cannot be judged")
        for one in on_host[:12]:
            paragraph(f"{one.name} ({one.type})", one.reason, left=32, indent=2)
        if len(on_host) > 12:
            print(f"  and {len(on_host) - 12} more (--json)")
    if report.unjudged:
        print()
        heading("Cannot judge")
        for open_clause in report.unjudged:
            nodes = f": {listed(open_clause.nodes, 3)}" if open_clause.nodes else ""
            paragraph(open_clause.clause, f"{open_clause.why}{nodes}", left=42, indent=2)
    if report.unread:
        print()
        heading("Stated, and not looked at")
        for unread in report.unread:
            paragraph(unread.clause, unread.value, left=42, indent=2)


def _show_clause(clause: str, violations: "list[Violation]") -> None:
    """One clause with what breaks it: what must hold once, then node and tensor with what was got."""
    print()
    nodes = len({violation.node for violation in violations})
    heading(f"{clause}  {counted(nodes, 'operator')}" if violations[0].kind else clause)
    by_rule: dict[tuple[str, str], list[Violation]] = {}
    for violation in violations:
        by_rule.setdefault((violation.must, violation.fix), []).append(violation)
    for (must, fix), found in by_rule.items():
        print(f"  {must}. {fix}")
        for one in found[:_SHOWN]:
            tensor = f", {one.tensor}" if one.tensor not in (None, one.node) else ""
            print(f"    {one.node or 'the network'}{tensor}: {one.got}")
        if len(found) > _SHOWN:
            print(f"    and {len(found) - _SHOWN} more (--json)")
