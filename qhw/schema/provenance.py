# SPDX-License-Identifier: Apache-2.0
"""Sources per leaf: every spelling of `source` brought to one form, so that claims keep theirs through `extends`.

After `normalise`, each claim table (one id of a keyed section, or one single section) holds at most one `source`,
a table from the dotted path of a leaf within it to its tags. Works on the plain data of a file, before validation.
"""

from collections.abc import Iterator
from typing import Any

from qhw.schema.base import Problem
from qhw.schema.closest import closest

__all__ = ["KEYED", "SINGLE", "TOP", "claim_tables", "leaf_paths", "normalise"]

KEYED = ("formats", "biases", "accumulators", "requantize", "kernels", "operators", "memories", "clocks")
SINGLE = ("boundary", "artefact", "network", "cost")
TOP = ("fallback",)

Data = dict[str, Any]


def claim_tables(data: Data) -> Iterator[tuple[tuple[str, ...], Data]]:
    """Path and table of every place that carries claims, `()` for the fields at the top."""
    yield (), data
    for section in KEYED:
        tables = data.get(section)
        if isinstance(tables, dict):
            yield from (((section, key), table) for key, table in tables.items() if isinstance(table, dict))
    for section in SINGLE:
        if isinstance(data.get(section), dict):
            yield (section,), data[section]


def claims(where: tuple[str, ...], table: Data) -> Data:
    """The fields of a claim table that are claims: at the top only some are."""
    return table if where else {key: table[key] for key in TOP if key in table}


def leaf_paths(table: Data, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Path of every leaf below a table; a list is one leaf, and `source` none."""
    for key, value in table.items():
        if key == "source":
            continue
        if isinstance(value, dict):
            yield from leaf_paths(value, (*prefix, key))
        else:
            yield (*prefix, key)


def normalise(data: Data) -> tuple[Data, tuple[Problem, ...]]:
    """A copy with one per-leaf `source` in each claim table, and the source keys that name no leaf."""
    problems: list[Problem] = []
    result = dict(data)
    for section in KEYED:
        if isinstance(data.get(section), dict):
            result[section] = dict(data[section])
    for where, table in claim_tables(data):
        done = _one_source(where, table, problems)
        if not where:
            result = {key: result.get(key, value) if key != "source" else value for key, value in done.items()}
        elif len(where) == 2:
            result[where[0]][where[1]] = done
        else:
            result[where[0]] = done
    return result, tuple(problems)


def _one_source(where: tuple[str, ...], table: Data, problems: list[Problem]) -> Data:
    scope = claims(where, table)
    if not _well_formed(table) or not all(_well_formed(value) for value in _tables_below(scope)):
        return table  # validation names the malformed source
    tags: Data = {}
    rules = [((), _as_rules(table.get("source")))]
    _collect(scope, (), rules, tags)
    _check_keys(where, table.get("source"), scope, (), problems)
    bare = {key: _without_source(value) for key, value in table.items() if key != "source"}
    if where:
        for nested, held in _nested_sources(scope):
            _check_keys(where, held["source"], held, nested, problems)
    return {**bare, "source": tags} if tags else bare


def _collect(table: Data, path: tuple[str, ...], rules: list[Any], tags: Data) -> None:
    for key, value in table.items():
        if key == "source":
            continue
        here = (*path, key)
        if isinstance(value, dict):
            below = [*rules, (here, _as_rules(value["source"]))] if "source" in value else rules
            _collect(value, here, below, tags)
            continue
        for start, named in reversed(rules):
            rest = here[len(start) :]
            keys = (".".join(rest[:count]) for count in range(len(rest), 0, -1))
            found = next((named[name] for name in (*keys, "*") if name in named), None)
            if found is not None:
                tags[".".join(here)] = found
                break


def _check_keys(
    where: tuple[str, ...], source: Any, table: Data, nested: tuple[str, ...], problems: list[Problem]
) -> None:
    if not isinstance(source, dict):
        return
    whole = {".".join(path[:count]) for path in leaf_paths(table) for count in range(1, len(path) + 1)}
    names = sorted(whole)[:200]
    for key in source:
        if key != "*" and key not in whole:
            near = closest(key, names)
            text = f"'{key[:60]}' is not a field this table sets, so it has nothing to source."
            fix = f" Closest: {near}." if near else " State the field beside its source."
            problems.append(Problem((*where, *nested, "source", key), text + fix))


def _as_rules(source: Any) -> Data:
    return source if isinstance(source, dict) else {} if source is None else {"*": source}


def _tags_well_formed(tags: Any) -> bool:
    return isinstance(tags, str) or (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags))


def _well_formed(table: Data) -> bool:
    source = table.get("source")
    if isinstance(source, dict):
        return all(_tags_well_formed(tags) for tags in source.values())
    return "source" not in table or source is None or _tags_well_formed(source)


def _tables_below(table: Data) -> Iterator[Data]:
    for key, value in table.items():
        if key != "source" and isinstance(value, dict):
            yield value
            yield from _tables_below(value)


def _nested_sources(table: Data, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Data]]:
    for key, value in table.items():
        if key != "source" and isinstance(value, dict):
            if "source" in value:
                yield (*path, key), value
            yield from _nested_sources(value, (*path, key))


def _without_source(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_source(held) for key, held in value.items() if key != "source"}
