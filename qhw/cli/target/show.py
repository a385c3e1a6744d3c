# SPDX-License-Identifier: Apache-2.0
"""`qhw target show`: one target as resolved, each value with its source and the file that wrote it."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import heading, paragraph, print_document
from qhw.cli.options import AsJson, TargetArgument

if TYPE_CHECKING:
    from qhw.schema import TargetSpec

__all__ = ["show"]

PartArgument = Annotated[
    str | None, typer.Argument(metavar="[PART]", help="Only this part, as formats or operators.Conv.")
]
HEAD = ("schema_version", "name", "summary", "sources", "lineage", "inherited", "conflicts", "source")


def show(name: TargetArgument, part: PartArgument = None, as_json: AsJson = False) -> None:
    """Show a target as resolved through `extends`: each value, its source, and the base that wrote it.

    Example: qhw target show espressif/esp32-p4 operators.Conv
    """
    from qhw.cli.target.load import Shelf
    from qhw.schema import to_json

    spec = Shelf().load(name).spec
    data = json.loads(to_json(spec))
    sections = {key: held for key, held in data.items() if key not in HEAD and held not in ({}, [])}
    if part is not None:
        sections = _part(spec.name, sections, part)
    if as_json:
        print_document(to_json(spec) if part is None else json.dumps(sections, indent=2, ensure_ascii=False) + "\n")
        return
    if part is None:
        _show_head(spec)
    for section, held in sections.items():
        if part is None:
            print()
        heading(section)
        for label, lines in _entries(spec, section, held):
            for line in lines:
                paragraph(label, line, indent=2)
                label = ""
    if part is None:
        _show_foot(spec)


def _part(target: str, sections: dict[str, Any], part: str) -> dict[str, Any]:
    """The section or entry that a dotted path names."""
    from qhw.errors import TargetError
    from qhw.schema import closest

    section, _, entry = part.partition(".")
    held = sections.get(section)
    if isinstance(held, dict) and entry in held:
        return {section: {entry: held[entry]}}
    if held is not None and not entry:
        return {section: held}
    names = list(sections) if held is None else [f"{section}.{key}" for key in held] if isinstance(held, dict) else []
    near = closest(part, names)
    raise TargetError(
        f"'{target}' has no '{part}'.{f' Closest: {near}.' if near else ''} There are: {', '.join(names) or section}."
    )


def _show_head(spec: "TargetSpec") -> None:
    heading(f"{spec.name}  {spec.summary or ''}".rstrip())
    if spec.lineage:
        print(f"extends {' <- '.join(reversed(spec.lineage))}; what a base wrote is marked with its name")


def _show_foot(spec: "TargetSpec") -> None:
    if spec.sources:
        print()
        heading("sources")
        for tag, text in spec.sources.items():
            paragraph(tag, text, indent=2)
    if spec.conflicts:
        print()
        heading("conflicts")
    for conflict in spec.conflicts:
        sides = "; ".join(f"{_plain(one.value)} ({_tags(one.source)})" for one in conflict.readings)
        chosen = "nothing is chosen" if conflict.chosen is None else f"chosen {_plain(conflict.chosen)}"
        why = f", because {conflict.why}" if conflict.why else ""
        writer = _origin(spec, f"conflicts.{conflict.field}")
        paragraph(str(conflict.field), f"{sides}; {chosen}{why}{writer}", indent=2)


def _entries(spec: "TargetSpec", section: str, held: Any) -> Iterator[tuple[str, list[str]]]:
    """Label and lines of each entry: values of one origin in one line."""
    from qhw.schema.provenance import KEYED

    if section in KEYED:
        for name, table in held.items():
            yield name, _lines(spec, f"{section}.{name}", table)
    elif isinstance(held, dict) and section != "valid_for":
        yield "", _lines(spec, section, held)
    elif isinstance(held, dict):
        for name, values in held.items():
            yield name, [", ".join(values)]
    else:
        yield "", [_plain(held) + _origin(spec, section)]


def _lines(spec: "TargetSpec", path: str, table: dict[str, Any]) -> list[str]:
    """The leaves of a table, those of one source and one writer together, in the order in which they are met."""
    from qhw.schema.provenance import leaf_paths

    found: dict[str, list[str]] = {}
    for leaf in leaf_paths(table):
        here: Any = table
        for key in leaf:
            here = here[key]
        name = ".".join(leaf)
        found.setdefault(_origin(spec, f"{path}.{name}"), []).append(f"{name} = {json.dumps(here, ensure_ascii=False)}")
    return [f"{', '.join(values)}{origin}" for origin, values in found.items()] or ["nothing said"]


def _origin(spec: "TargetSpec", path: str) -> str:
    tags = spec.source_of(path)
    told = f"   [{', '.join(tags)}]" if tags else ""
    writer = spec.written_by(path)
    return told if writer == spec.name else f"{told}   <- {writer}"


def _tags(source: Any) -> str:
    return source if isinstance(source, str) else ", ".join(source or ("no source",))


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
