# SPDX-License-Identifier: Apache-2.0
"""Names that must exist: ids that kernels and operators refer to, source tags, fields that conflicts are about."""

import re
from collections.abc import Collection, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from qhw.schema.base import UNKNOWN, Path, Problem, Table
from qhw.schema.closest import closest
from qhw.schema.kernels import OPERANDS
from qhw.schema.messages import one_line

if TYPE_CHECKING:
    from qhw.schema.spec import TargetSpec

__all__ = ["CONFIDENCE", "reference_problems"]

CONFIDENCE = re.compile(r"memory|(derived|searched): .+", re.DOTALL)
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*(@[a-z0-9._-]+/[a-z0-9._-]+)*")
RESERVED_TAGS = ("memory", "derived", "searched", UNKNOWN)
RESERVED_IDS = (UNKNOWN, "none", "any", "float")
MAX_NAMED = 200  # names looked through for the closest one; a file that mistypes more is another kind of file
MAX_LISTED = 40


def reference_problems(spec: "TargetSpec") -> Iterator[Problem]:
    """The first 200 names that are used and not defined, each with the closest one that is."""
    yield from islice(_problems(spec), MAX_NAMED)


def _problems(spec: "TargetSpec") -> Iterator[Problem]:
    yield from _reserved(spec)
    for name, kernel in spec.kernels.items():
        here: Path = ("kernels", name)
        for operand in OPERANDS:
            yield from _known((*here, operand), getattr(kernel, operand), spec.formats, "Formats")
        bias = None if kernel.bias == "none" else kernel.bias
        yield from _known((*here, "bias"), bias, spec.biases, "Biases")
        yield from _known((*here, "accumulator"), kernel.accumulator, spec.accumulators, "Accumulators")
        yield from _known((*here, "requantize"), kernel.requantize, spec.requantize, "Requantizations")
    for kind, operator in spec.operators.items():
        here = ("operators", kind)
        yield from _known((*here, "kernels"), operator.kernels, spec.kernels, "Kernels")
        for field in ("fixed_output", "preshift_bits"):
            table = getattr(operator, field)
            if isinstance(table, dict):
                yield from _known((*here, field), tuple(table), spec.formats, "Formats")
        yield from _fixed_outputs(spec, kind)
    if spec.boundary is not None:
        for field in ("input_formats", "output_formats"):
            yield from _known(("boundary", field), getattr(spec.boundary, field), spec.formats, "Formats")
    for preset, clock in spec.clocks.items():
        if isinstance(clock.bandwidth_bytes_per_s, dict):
            path = ("clocks", preset, "bandwidth_bytes_per_s")
            yield from _known(path, tuple(clock.bandwidth_bytes_per_s), spec.memories, "Memories")
    yield from _tags(spec, spec.sources, ())
    for index, conflict in enumerate(spec.conflicts):
        if conflict.field:
            yield from _field_exists(spec, conflict.field, ("conflicts", index, "field"))


def _known(path: Path, names: Any, defined: dict[str, Any], plural: str) -> Iterator[Problem]:
    for name in (names,) if isinstance(names, str) else names or ():
        if name in defined or names == UNKNOWN:
            continue
        here = f"{plural} here: {_some(defined)}." if defined else f"No {plural.lower()} are defined here."
        near = closest(name, islice(defined, MAX_NAMED))
        yield Problem(path, f"'{name}' is not defined. {here}" + (f" Closest: {near}." if near else ""))


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(one_line(name, 60) for name in islice(names, MAX_LISTED)) + more


def _reserved(spec: "TargetSpec") -> Iterator[Problem]:
    for section in ("formats", "biases", "accumulators", "requantize", "kernels", "memories", "clocks"):
        for name in getattr(spec, section):
            if name in RESERVED_IDS:
                yield Problem((section, name), f"'{name}' is a word of its own and cannot be an id. Choose another id.")
    for tag in spec.sources:
        if tag in RESERVED_TAGS:
            yield Problem(("sources", tag), f"'{tag}' is a word of its own and cannot be a tag. Choose another tag.")
        elif not TAG.fullmatch(tag):
            yield Problem(
                ("sources", tag), "a tag is letters, digits, _ . + - and starts with a letter or digit. Rename it."
            )


def _fixed_outputs(spec: "TargetSpec", kind: str) -> Iterator[Problem]:
    table = spec.operators[kind].fixed_output
    for name, fixed in table.items() if isinstance(table, dict) else ():
        form = spec.formats.get(name)
        if form is None or not isinstance(fixed.zero_point, int) or form.quant_min is None or form.quant_max is None:
            continue
        path: Path = ("operators", kind, "fixed_output", name, "zero_point")
        if not form.quant_min <= fixed.zero_point <= form.quant_max:
            yield Problem(
                path,
                f"{fixed.zero_point} is not a code of format '{name}' ({form.quant_min} to {form.quant_max}). Use one.",
            )


def _tags(value: Any, sources: dict[str, str], path: Path) -> Iterator[Problem]:
    if isinstance(value, BaseModel):
        if isinstance(value, Table) and value.source is not None:
            yield from _tags_defined(value.source, sources, (*path, "source"))
        for name in type(value).model_fields:
            if name not in ("source", "sources", "lineage", "inherited"):
                yield from _tags(getattr(value, name), sources, (*path, name))
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from _tags(held, sources, (*path, key))
    elif isinstance(value, tuple):
        for index, held in enumerate(value):
            yield from _tags(held, sources, (*path, index))


def _tags_defined(source: Any, sources: dict[str, str], path: Path) -> Iterator[Problem]:
    groups = source.values() if isinstance(source, dict) else (source,)
    tags = dict.fromkeys(tag for group in groups for tag in ((group,) if isinstance(group, str) else group))
    for tag in tags:
        if tag in sources or CONFIDENCE.fullmatch(tag):
            continue
        known = (*sources, "memory", "derived: ...", "searched: ...")
        near = closest(tag, islice(known, MAX_NAMED))
        yield Problem(
            path,
            f"'{one_line(tag, 60)}' is not a tag of sources. Tags here: {_some(known)}."
            + (f" Closest: {near}." if near else ""),
        )


def _field_exists(spec: "TargetSpec", dotted: str, path: Path) -> Iterator[Problem]:
    here: Any = spec
    for part in dotted.split("."):
        if isinstance(here, BaseModel):
            names = tuple(type(here).model_fields)
        elif isinstance(here, dict):
            names = tuple(here)
        else:
            return  # a leaf that holds no table, or a table that is absent: nothing to compare with
        if part not in names:
            near = closest(part, islice(names, MAX_NAMED))
            yield Problem(
                path,
                f"'{one_line(dotted, 60)}' is no field here: no '{one_line(part, 60)}'."
                + (f" Closest: {near}." if near else ""),
            )
            return
        here = getattr(here, part) if isinstance(here, BaseModel) else here[part]
