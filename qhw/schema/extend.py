# SPDX-License-Identifier: Apache-2.0
"""`extends`: a child's file laid over its base.

Tables merge by field, lists replace, sources follow leaves, conflicts follow the field that they are about.
"""

from typing import Any

from qhw.schema.provenance import KEYED, SINGLE, claim_tables, claims, leaf_paths

__all__ = ["merge", "merge_target"]

Data = dict[str, Any]
NOT_INHERITED = ("name", "extends", "lineage", "inherited", "schema_version")


def merge(base: Data, child: Data) -> Data:
    """Tables merged field by field; whatever else the child writes replaces what the base wrote. Neither is changed.

    Example:
        >>> merge({"a": {"x": 1, "y": [1, 2]}}, {"a": {"y": [3]}})
        {'a': {'x': 1, 'y': [3]}}
    """
    result = dict(base)
    for key, value in child.items():
        held = result.get(key)
        result[key] = merge(held, value) if isinstance(held, dict) and isinstance(value, dict) else value
    return result


def merge_target(base: Data, child: Data) -> Data:
    """A normalised child file over its resolved, normalised base.

    A leaf the child writes takes the child's source, or none; every other keeps the base's. A tag that means another
    text in the child is renamed in the base to `TAG@vendor/chip`, after the target that wrote it. A conflict of the
    base stays where the child writes neither its field nor a conflict about it. `inherited` names for every leaf,
    conflict and document that the base wrote the target that wrote it.
    """
    base = _rename_tags(base, _clashes(base, child))
    writers = base.get("inherited")
    writers = dict(writers) if isinstance(writers, dict) else {}
    base_name = base.get("name")
    result = merge(
        {key: value for key, value in base.items() if key not in NOT_INHERITED},
        {key: value for key, value in child.items() if key not in ("extends", "lineage", "inherited")},
    )
    # Tables of claims are exchanged below, in copies: base and child stay as they are.
    result = {key: dict(value) if key in KEYED and isinstance(value, dict) else value for key, value in result.items()}
    inherited: Data = {}
    kept = _kept_conflicts(base, child)
    if kept is not None:
        result["conflicts"] = [*kept, *child.get("conflicts", ())]
    for where, table in list(claim_tables(result)):
        own = set(leaf_paths(claims(where, _at(child, where))))
        sources: Data = {}
        for leaf in leaf_paths(claims(where, table)):
            wrote = child if leaf in own else base
            tags = _at(wrote, where).get("source")
            name = ".".join(leaf)
            if isinstance(tags, dict) and name in tags:
                sources[name] = tags[name]
            if leaf not in own:
                path = ".".join((*where, *leaf))
                inherited[path] = writers.get(path, base_name)
        result = _with_source(result, where, table, sources, _at(child, where).get("source"))
    written = [f"conflicts.{entry['field']}" for entry in kept or ()]
    written += [] if base.get("summary") is None or "summary" in child else ["summary"]
    written += sorted(f"sources.{tag}" for tag in _tags(base) if tag not in _tags(child))
    inherited.update({path: writers.get(path, base_name) for path in written})
    lineage = base.get("lineage")
    return {
        **result,
        "lineage": [*(lineage if isinstance(lineage, list) else []), base_name],
        "inherited": inherited,
    }


def _with_source(result: Data, where: tuple[str, ...], table: Data, sources: Data, child_source: Any) -> Data:
    kept = child_source if child_source is not None and not isinstance(child_source, dict) else sources
    bare = {key: value for key, value in table.items() if key != "source"}
    done = {**bare, "source": kept} if kept else bare
    if not where:
        return {**{key: result[key] for key in bare}, **({"source": kept} if kept else {})}
    if len(where) == 1:
        result[where[0]] = done
    else:
        result[where[0]][where[1]] = done
    return result


def _at(data: Data, where: tuple[str, ...]) -> Data:
    here: Any = data
    for key in where:
        here = here.get(key) if isinstance(here, dict) else None
    return here if isinstance(here, dict) else {}


def _kept_conflicts(base: Data, child: Data) -> list[Data] | None:
    """Conflicts of the base about fields that the child leaves alone; None where there is nothing to merge."""
    held, own = base.get("conflicts"), child.get("conflicts", [])
    if not isinstance(held, list) or not isinstance(own, list):
        return None
    settled = {entry["field"] for entry in own if _is_conflict(entry)}
    for where, table in claim_tables(child):
        settled |= {".".join((*where, *leaf)) for leaf in leaf_paths(claims(where, table))}
    return [entry for entry in held if _is_conflict(entry) and not _touches(entry["field"], settled)]


def _is_conflict(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("field"), str)


def _touches(field: str, written: set[str]) -> bool:
    """Whether a field, what it lies in or something in it is written."""
    return any(f"{field}.".startswith(f"{path}.") or path.startswith(f"{field}.") for path in written)


def _tags(data: Data) -> Data:
    tags = data.get("sources")
    return tags if isinstance(tags, dict) else {}


def _clashes(base: Data, child: Data) -> dict[str, str]:
    texts, own = _tags(base), _tags(child)
    writers = base.get("inherited")
    writers = writers if isinstance(writers, dict) else {}
    return {
        tag: f"{tag}@{writers.get(f'sources.{tag}', base.get('name'))}"
        for tag, text in texts.items()
        if tag in own and own[tag] != text
    }


def _rename_tags(base: Data, new: dict[str, str]) -> Data:
    if not new:
        return base
    result = dict(base)
    result["sources"] = {new.get(tag, tag): text for tag, text in base["sources"].items()}
    for section in (*KEYED, *SINGLE, "conflicts", "source"):
        if section in base:
            result[section] = _renamed(base[section], new, is_source=section == "source")
    writers = base.get("inherited")
    if isinstance(writers, dict):
        names = {f"sources.{tag}": f"sources.{other}" for tag, other in new.items()}
        result["inherited"] = {names.get(path, path): name for path, name in writers.items()}
    return result


def _renamed(value: Any, new: dict[str, str], *, is_source: bool) -> Any:
    if isinstance(value, dict):
        return {key: _renamed(held, new, is_source=is_source or key == "source") for key, held in value.items()}
    if isinstance(value, list):
        return [_renamed(held, new, is_source=is_source) for held in value]
    return new.get(value, value) if is_source and isinstance(value, str) else value
