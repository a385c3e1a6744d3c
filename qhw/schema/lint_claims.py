# SPDX-License-Identifier: Apache-2.0
"""What a target claims and on what grounds: claims without a source, sources without a claim, sources that disagree."""

from collections.abc import Iterator

from qhw.schema.base import Path
from qhw.schema.messages import shown
from qhw.schema.provenance import claim_tables, claims, leaf_paths
from qhw.schema.remarks import Remark
from qhw.schema.spec import TargetSpec
from qhw.schema.write import plain_data

__all__ = ["disagreements", "unfounded"]

NO_CLAIMS = ("artefact.exporter", "artefact.executor")


def unfounded(spec: TargetSpec) -> Iterator[Remark]:
    """Claims without a source, and sources that no claim names."""
    yield from _unsourced(spec)
    yield from _uncited(spec)


def _unsourced(spec: TargetSpec) -> Iterator[Remark]:
    if not spec.sources:
        return
    for where, table in claim_tables(plain_data(spec)):
        bare = [
            ".".join(leaf)
            for leaf in leaf_paths(claims(where, table))
            if not spec.source_of(".".join((*where, *leaf))) and ".".join((*where, *leaf)) not in NO_CLAIMS
        ]
        if bare:
            path: Path = where or (bare[0],)
            yield "warning", path, f"no source beside {', '.join(bare)}. Name one, or write memory."


def _uncited(spec: TargetSpec) -> Iterator[Remark]:
    """Sources of its own file that no claim names."""
    cited = {tag for source in _sources(plain_data(spec)) for tag in source}
    for tag in spec.sources:
        if tag not in cited and f"sources.{tag}" not in spec.inherited:
            yield "warning", ("sources", tag), "no claim names it. Name it beside what it says, or remove it."


def _sources(value: object, below: bool = False) -> Iterator[tuple[str, ...]]:
    """Tags of everything that stands under a `source`."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield from _sources(held, below or key == "source")
    elif isinstance(value, list):
        for held in value:
            yield from _sources(held, below)
    elif below and isinstance(value, str):
        yield (value,)


def disagreements(spec: TargetSpec) -> Iterator[Remark]:
    """Every conflict between sources, with the reading chosen."""
    for index, conflict in enumerate(spec.conflicts):
        sides = "; ".join(f"{_plain(item.value)} ({_plain(item.source)})" for item in conflict.readings)
        why = f", because: {conflict.why}" if conflict.why else ""
        chosen = "nothing is chosen" if conflict.chosen is None else f"chosen: {_plain(conflict.chosen)}{why}"
        yield "info", ("conflicts", index), f"sources disagree on {conflict.field}: {sides}; {chosen}."


def _plain(value: object) -> str:
    return shown(list(value)) if isinstance(value, tuple) else value if isinstance(value, str) else shown(value)
