# SPDX-License-Identifier: Apache-2.0
"""`qhw target ...`: list, show and lint accelerator descriptions; print their JSON Schema."""

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import heading, paragraph, print_json, print_table
from qhw.cli.options import AsJson, TargetArgument
from qhw.wording import counted

if TYPE_CHECKING:
    from qhw.extension import Registry
    from qhw.schema import LoadedTarget, Located, OpenField, TargetSpec

app = typer.Typer(help="Accelerator descriptions: list, show, lint, schema.", no_args_is_help=True)


@app.command("list")
def list_targets(as_json: AsJson = False) -> None:
    """List all targets: formats, accumulators, and what can run their artefact."""
    from qhw.api import load_target
    from qhw.cli.words import accumulator_words, format_words
    from qhw.extension import default_registry

    registry = default_registry()
    facts: list[dict[str, Any]] = []
    for name in registry.target_names():
        spec = load_target(name, registry=registry)
        used = _used_formats(spec)
        facts.append(
            {
                "name": name,
                "summary": spec.summary or "",
                "activations": [format_words(spec.formats[f]) for f in used["activations"]],
                "weights": [format_words(spec.formats[f]) for f in used["weights"]],
                "accumulators": [accumulator_words(spec, a) for a in spec.accumulators],
                "executor": spec.artefact.executor if spec.artefact is not None else None,
            }
        )
    if as_json:
        print_json(facts)
        return
    print_table(
        ("target", "weights", "activations", "accumulators", "runs in"),
        [
            (
                f["name"],
                _first(f["weights"]),
                _first(f["activations"]),
                _first(f["accumulators"]),
                f["executor"] or "-",
            )
            for f in facts
        ],
    )


def _first(words: Any) -> str:
    return f"{words[0]}{f' (+{len(words) - 1})' if len(words) > 1 else ''}" if words else "-"


def _used_formats(spec: "TargetSpec") -> dict[str, list[str]]:
    weights: dict[str, None] = {}
    activations: dict[str, None] = {}
    for kernel in spec.kernels.values():
        for field, into in (("weight", weights), ("input", activations), ("output", activations)):
            listed = getattr(kernel, field)
            into.update(dict.fromkeys(listed if isinstance(listed, tuple) else ()))
    return {"weights": list(weights), "activations": [name for name in activations]}


@app.command("show")
def show(
    name: TargetArgument,
    as_json: AsJson = False,
) -> None:
    """Show a target as resolved through `extends`, each value with its source."""
    from qhw.schema import to_json

    spec = _loaded(name).spec
    if as_json:
        print(to_json(spec), end="")
        return
    heading(f"{spec.name}  {spec.summary or ''}".rstrip())
    if spec.lineage:
        print(f"extends {' <- '.join(spec.lineage)}")
    data = json.loads(to_json(spec))
    skipped = ("schema_version", "name", "summary", "sources", "lineage", "inherited", "conflicts")
    for section, content in data.items():
        if section in skipped or content in (None, {}, []):
            continue
        print()
        heading(section)
        _show_leaves(spec, section, content)
    if spec.sources:
        print()
        heading("sources")
        for tag, text in spec.sources.items():
            paragraph(tag, text, indent=2)
    for conflict in spec.conflicts:
        print(f"conflict at {conflict.field}: chosen {conflict.chosen!r}, {conflict.why or 'no reason given'}")


def _show_leaves(spec: "TargetSpec", path: str, content: Any) -> None:
    """One line per table of the section: its fields as written, then where they come from."""
    rows = content.items() if isinstance(content, dict) and _is_tables(content) else [("", content)]
    for key, value in rows:
        if isinstance(value, dict):
            text = ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if k != "source" and v not in (None, {}))
            where = f"{path}.{key}" if key else path
            tags = dict.fromkeys(tag for k in value for tag in spec.source_of(f"{where}.{k}"))
        else:
            text, tags = _toml(value), dict.fromkeys(spec.source_of(f"{path}.{key}" if key else path))
        paragraph(key or path, f"{text}{'   [' + ', '.join(tags) + ']' if tags else ''}", indent=2)


def _is_tables(content: dict[str, Any]) -> bool:
    return all(isinstance(value, dict) for value in content.values())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k} = {_toml(v)}" for k, v in value.items() if v is not None and k != "source") + "}"
    return json.dumps(value)


@app.command("lint")
def lint_files(
    files: Annotated[list[str], typer.Argument(metavar="TARGET...", help="Paths to .toml files, or targets' names.")],
    as_json: AsJson = False,
) -> None:
    """Check targets: contradictions, gaps, fields that nothing reads yet, and what is left open.

    Fields left open are no errors: each is named with the commands that cannot answer because of it. Exit status 1 if
    there is an error.

    Example: qhw target lint tiny.toml
    """
    from qhw.errors import TargetError
    from qhw.graph.kinds import KNOWN_KINDS
    from qhw.schema import Finding, lint, open_fields

    facts: list[dict[str, Any]] = []
    failed = False
    for name in files:
        try:
            loaded = _loaded(name)
        except TargetError as error:
            failed = True
            facts.append({"target": name, "severity": "error", "path": "", "message": str(error), "place": None})
            if not as_json:
                print(error)
            continue
        fields = open_fields(loaded.spec)
        said = {".".join(map(str, field.path)) for field in fields}
        findings: tuple[Finding, ...] = tuple(
            finding
            for finding in lint(loaded.spec, loaded.located, known_kinds=KNOWN_KINDS)
            if finding.path not in said
        )
        failed = failed or any(finding.severity == "error" for finding in findings)
        facts += [{"target": name, **vars(finding)} for finding in findings]
        facts += [_open_fact(name, field, loaded.located) for field in fields]
        if not as_json:
            for finding in findings:
                print(finding)
            show_open(fields)
            left = f"; {counted(len(fields), 'field')} left open" if fields else ""
            print(f"{name}: {_count(findings)}{left}")
    if as_json:
        print_json(facts)
    raise typer.Exit(1 if failed else 0)


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


def show_open(fields: "tuple[OpenField, ...]") -> None:
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
            words.append(f"{number} {severity}{'s' if number > 1 else ''}")
    return ", ".join(words) or "clean"


@app.command("schema")
def schema(as_json: AsJson = False) -> None:  # taken as everywhere: a JSON Schema is JSON anyway
    """Print the JSON Schema of a target file, for editors and other tools."""
    from qhw.schema import target_json_schema

    print_json(target_json_schema())


def _loaded(name: str) -> "LoadedTarget":
    from qhw.schema import read_target_file

    registry = _registry()
    path = Path(name) if name.endswith((".toml", ".json")) else registry.target_path(name)
    return read_target_file(path, find_base=registry.target_path)


def _registry() -> "Registry":
    from qhw.extension import default_registry

    return default_registry()
