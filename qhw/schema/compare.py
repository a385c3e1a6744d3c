# SPDX-License-Identifier: Apache-2.0
"""What two targets say otherwise, by what it means: ids, sources and the order of writing are no difference."""

from collections.abc import Iterator, Mapping
from typing import Any

from qhw.schema.base import UNKNOWN
from qhw.schema.compare_kernels import kernel_differences
from qhw.schema.content import changed_leaves, content, format_parts, frozen, limit_content
from qhw.schema.difference import Difference, Section, merged
from qhw.schema.kinds import STAND_INS
from qhw.schema.operators import Operator
from qhw.schema.spec import TargetSpec
from qhw.schema.words import format_words, number_words

__all__ = ["diff"]

ABOUT_THE_FILE = (
    "schema_version",
    "name",
    "summary",
    "extends",
    "sources",
    "lineage",
    "inherited",
    "conflicts",
    "source",
)
"""What says nothing about the hardware, or says it of a field that is compared itself."""
BY_OPERATOR = ("formats", "biases", "accumulators", "requantize", "kernels", "operators")
"""What is compared where an operator uses it."""
NAMED = ("memories", "clocks")


def diff(one: TargetSpec, other: TargetSpec) -> tuple[Difference, ...]:
    """Everything that the second target says otherwise than the first, by operator kind and content.

    Formats, kernels and their arithmetic count where an operator uses them, and by what they hold: two targets that
    differ in ids alone do not differ. What is absent and means something by its description is taken as said.

    Args:
        one: The first target, resolved.
        other: The second one.

    Returns:
        tuple: by section, the same of several operators once; empty where both mean the same.
    """
    found = merged(_of_operators(one, other))
    ordered = ("operators", "formats", "arithmetic", "rules")
    by_section = [difference for section in ordered for difference in found if difference.section == section]
    return (*by_section, *_of_target(one, other))


def _of_operators(one: TargetSpec, other: TargetSpec) -> Iterator[Difference]:
    for kind in dict.fromkeys((*one.operators, *other.operators)):
        first, second = _row(one, kind), _row(other, kind)
        states = [_state(row) for row in (first, second)]
        has = [state in ("runs", "moves data") for state in states]
        if states[0] != states[1]:
            is_both = all(has) or UNKNOWN in states
            change: Any = "changed" if is_both else "added" if has[1] else "removed"
            before, after = states if is_both else ("there" if here else "not there" for here in has)
            yield Difference("operators", "operator", (kind,), change, before, after)
        if first is None or second is None or not all(has):
            continue
        if states == ["runs", "runs"]:
            yield from kernel_differences(one, first, other, second, kind)
        yield from _of_rules(_rules(one, first), _rules(other, second), kind)


def _row(spec: TargetSpec, kind: str) -> Operator | None:
    """A target's row of a kind: its own, or that of the kind it runs as."""
    names = (kind, *STAND_INS.get(kind, ()))
    return next((spec.operators[name] for name in names if name in spec.operators), None)


def _state(row: Operator | None) -> str:
    """An operator that is not listed and one without a kernel go the same way: where `fallback` says."""
    if row is None or row.kernels == ():
        return "not there"
    if row.kernels is None:
        return "moves data"
    return UNKNOWN if row.kernels == UNKNOWN else "runs"


def _rules(spec: TargetSpec, row: Operator) -> dict[str, Any]:
    """What a row says beside its kernels, formats named by their numbers."""
    held = {name: item for name, item in content(row).items() if name != "kernels"}
    limits = {name: limit_content(limit) for name, limit in row.limits.items()}
    held["limits"] = {name: limit for name, limit in limits.items() if limit is not None}
    for field in ("fixed_output", "preshift_bits"):
        if isinstance(held.get(field), dict):
            held[field] = _renamed(held[field], {name: _format_name(spec, name, held[field]) for name in held[field]})
    return held


def _format_name(spec: TargetSpec, name: str, among: Mapping[str, Any]) -> str:
    """The numbers of a format, or all of it where others of the table have the same numbers."""
    form = spec.formats[name]
    words = number_words(form)
    same = [item for item in among if number_words(spec.formats[item]) == words]
    return words if len(same) == 1 else f"{format_words(form)}, {format_parts(form)['rest'][1]}"


def _of_rules(before: Mapping[str, Any], after: Mapping[str, Any], kind: str) -> Iterator[Difference]:
    for field in dict.fromkeys((*before, *after)):
        left, right = before.get(field), after.get(field)
        if field == "fused" and isinstance(left, list) and isinstance(right, list):
            yield from _of_fused(left, right, kind)
        else:
            yield from _of_values("rules", field, left, right, (kind,))


def _of_fused(before: list[Any], after: list[Any], kind: str) -> Iterator[Difference]:
    chains = [{_chain(item): None for item in items} for items in (before, after)]
    for chain in chains[0]:
        if chain not in chains[1]:
            yield Difference("rules", "fused", (kind,), "removed", chain, None)
    for chain in chains[1]:
        if chain not in chains[0]:
            yield Difference("rules", "fused", (kind,), "added", None, chain)


def _chain(item: Any) -> str:
    return " then ".join(item) if isinstance(item, list) else str(item)


def _of_values(section: Section, path: str, left: Any, right: Any, kinds: tuple[str, ...] = ()) -> Iterator[Difference]:
    for where, before, after in changed_leaves(path, left, right):
        yield Difference(section, where, kinds, "changed", before, after)


def _of_target(one: TargetSpec, other: TargetSpec) -> Iterator[Difference]:
    skipped = (*ABOUT_THE_FILE, *BY_OPERATOR, *NAMED, "boundary")
    left, right = content(one), content(other)
    for field in type(one).model_fields:
        if field not in skipped:
            yield from _of_values("target", field, left.get(field), right.get(field))
    yield from _of_values("target", "boundary", _boundary(one), _boundary(other))
    memories = _pairs(left["memories"], right["memories"])
    yield from _of_named("memories", left["memories"], _renamed(right["memories"], memories))
    for clock in right["clocks"].values():
        if isinstance(clock.get("bandwidth_bytes_per_s"), dict):
            clock["bandwidth_bytes_per_s"] = _renamed(clock["bandwidth_bytes_per_s"], memories)
    clocks = _pairs(left["clocks"], right["clocks"])
    yield from _of_named("clocks", left["clocks"], _renamed(right["clocks"], clocks))


def _renamed(table: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): item for name, item in table.items()}


def _boundary(spec: TargetSpec) -> dict[str, Any] | None:
    """The edge of the network, formats in words."""
    if spec.boundary is None:
        return None
    held = dict(content(spec.boundary))
    for field in ("input_formats", "output_formats"):
        if isinstance(held.get(field), list):
            held[field] = sorted(format_words(spec.formats[name]) for name in held[field])
    return held


def _pairs(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, str]:
    """Name in the second target -> name in the first, of entries that hold the same and have no namesake."""
    free = [name for name in before if name not in after]
    found: dict[str, str] = {}
    for name, item in after.items():
        match = next((old for old in free if name not in before and frozen(before[old]) == frozen(item)), None)
        if match is not None:
            free.remove(match)
            found[name] = match
    return found


def _of_named(section: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[Difference]:
    for name in dict.fromkeys((*before, *after)):
        yield from _of_values("target", f"{section}.{name}", before.get(name), after.get(name))
