# SPDX-License-Identifier: Apache-2.0
"""`qhw target lint`: contradictions, gaps, rules that nothing can reach, and what is left open."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import heading, paragraph, print_json
from qhw.cli.options import AsJson
from qhw.wording import counted

if TYPE_CHECKING:
    from qhw.cli.target.load import Shelf
    from qhw.schema import Finding, Located, OpenField, TargetSpec

__all__ = ["lint_files"]


def lint_files(
    files: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Paths to .toml files, or targets' names.")],
    as_json: AsJson = False,
) -> None:
    """Check targets: contradictions, rules that nothing can reach, gaps, fields that nothing reads yet.

    Fields left open are no errors: each is named with the commands that cannot answer because of it. Exit status 1 if
    there is an error.

    Example: qhw target lint tiny.toml
    """
    from qhw.cli.target.load import Shelf
    from qhw.errors import TargetError
    from qhw.schema import Finding, lint, open_fields

    shelf = Shelf()
    facts: list[dict[str, Any]] = []
    failed = False
    for name in files:
        try:
            loaded = shelf.load(name)
        except TargetError as error:
            failed = True
            facts.append({"target": name, "severity": "error", "path": "", "message": str(error), "place": None})
            if not as_json:
                print(error)
            continue
        fields = open_fields(loaded.spec)
        said = {".".join(map(str, field.path)) for field in fields}
        findings: tuple[Finding, ...] = tuple(
            finding for finding in lint(loaded.spec, loaded.located) if finding.path not in said
        )
        failed = failed or any(finding.severity == "error" for finding in findings)
        facts += [{"target": name, **vars(finding)} for finding in findings]
        facts += [_open_fact(name, field, loaded.located) for field in fields]
        if not as_json:
            _show_findings(findings, loaded.spec, shelf)
            _show_open(fields)
            left = f"; {counted(len(fields), 'field')} left open" if fields else ""
            print(f"{name}: {_count(findings)}{left}")
    if as_json:
        print_json(facts)
    raise typer.Exit(1 if failed else 0)


def _show_findings(findings: "tuple[Finding, ...]", spec: "TargetSpec", shelf: "Shelf") -> None:
    """Each in a line; infos that its base has all the same are counted, as the base's own lint says them."""
    base = spec.lineage[-1] if spec.lineage else None
    inherited = set() if base is None else _infos_of(base, shelf)
    left_out = [f for f in findings if f.severity == "info" and (f.path, f.message) in inherited]
    for finding in findings:
        if finding not in left_out:
            print(finding)
    if left_out:
        print(f"info: {counted(len(left_out), 'info')} on its base as well: qhw target lint {base}")


def _infos_of(name: str, shelf: "Shelf") -> set[tuple[str, str]]:
    """Path and message of each info on a target of the library; none of a base that lies elsewhere."""
    from qhw.errors import TargetError
    from qhw.schema import lint

    try:
        loaded = shelf.load(name)
    except TargetError:
        return set()
    return {(one.path, one.message) for one in lint(loaded.spec) if one.severity == "info"}


def _open_fact(target: str, field: "OpenField", located: "Located | None") -> dict[str, Any]:
    return {
        "target": target,
        "severity": "open",
        "path": ".".join(map(str, field.path)),
        "message": field.sentence(),
        "place": None if located is None else located.place(field.path),
        "kinds": field.kinds,
        "commands": field.commands,
    }


def _show_open(fields: "tuple[OpenField, ...]") -> None:
    """Fields left open, the same of several operators in one line."""
    if not fields:
        return
    heading("Left open")
    grouped: dict[tuple[object, ...], list[OpenField]] = {}
    for field in fields:
        is_own = field.path[0] == "operators"
        grouped.setdefault(((field.path[2:], field.value, field.where) if is_own else field.path), []).append(field)
    for same in grouped.values():
        kinds = tuple(kind for field in same for kind in field.kinds)
        head = "operators.*" if len(same) > 1 else ".".join(map(str, same[0].path[:2]))
        path = ".".join((head, *map(str, same[0].path[2:])))
        paragraph(path, replace(same[0], kinds=kinds).sentence(), left=36, indent=2)


def _count(findings: Any) -> str:
    words = []
    for severity in ("error", "warning", "info"):
        number = sum(finding.severity == severity for finding in findings)
        if number:
            words.append(counted(number, severity))
    return ", ".join(words) or "clean"
