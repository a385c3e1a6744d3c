# SPDX-License-Identifier: Apache-2.0
"""Finds, imports and checks plugins, and builds the registry. Strict: the first fault stops, with its plugin named."""

import os
import sys
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

from qhw.errors import PluginError
from qhw.extension.plugin import Plugin, PluginRecord, adopt
from qhw.extension.registry import Entry, Registry
from qhw.extension.target_files import list_targets
from qhw.extension.target_plugins import may_register

if TYPE_CHECKING:
    from qhw.decisions import Pipeline

GROUP = "qhw"
BLOCK_VARIABLE = "QHW_BLOCK"

T = TypeVar("T")


@dataclass(frozen=True)
class _Candidate:
    """A plugin that is known by name and not imported yet."""

    record: PluginRecord
    origin: str
    load: Callable[[], object]


def load_plugins(
    *,
    block: str | Iterable[str] | None = None,
    extra: Iterable[tuple[str, object]] = (),
    entry_points: Iterable[metadata.EntryPoint] | None = None,
) -> Registry:
    """Import all plugins and collect what they bring.

    The result depends on the set of plugins alone, never on the order in which they were installed or found.

    Args:
        block: Names of plugins to leave out, also as one comma-separated text. Absent: the variable `QHW_BLOCK`,
            read now. A name that no plugin has is no error; it is listed in `Registry.unmatched_blocks`.
        extra: Plugins that are not installed, as (name, module or object).
        entry_points: Absent: those of the installed distributions in the group `qhw`.

    Raises:
        PluginError: a plugin cannot be imported, breaks a rule, raises, or is in conflict with another one. The
            message names plugin, distribution and version, and says how to go on without it.
    """
    from qhw.extension.interfaces import Algorithm, ArtefactReader, Executor, Exporter, NumberFormat

    blocked = _names(os.environ.get(BLOCK_VARIABLE, "") if block is None else block)
    candidates = _candidates(metadata.entry_points(group=GROUP) if entry_points is None else entry_points, extra)
    wanted = [candidate for candidate in candidates if candidate.record.name not in blocked]
    _refuse_same_name(wanted)
    plugins = _adopt_all(wanted)
    left_out = [replace(c.record, state="blocked") for c in candidates if c.record.name in blocked]
    records = sorted([*(plugin.record for plugin in plugins), *left_out], key=lambda record: record.name)
    return Registry(
        plugins=tuple(records),
        targets=_targets(plugins),
        algorithms=_classes(plugins, "algorithm", Algorithm),
        pipelines=_pipelines(plugins),
        exporters=_classes(plugins, "exporter", Exporter),
        executors=_classes(plugins, "executor", Executor),
        readers=_classes(plugins, "reader", ArtefactReader),
        number_formats=_classes(plugins, "number_format", NumberFormat),
        unmatched_blocks=tuple(sorted(blocked - {candidate.record.name for candidate in candidates})),
        loaded=tuple(plugins),
    )


def load_target_plugins(
    *, block: str | Iterable[str] | None = None, entry_points: Iterable[metadata.EntryPoint] | None = None
) -> Registry:
    """Import only the plugins that may bring targets, and collect these: no algorithm is imported, and no torch.

    A plugin whose source cannot define the hook is left alone, faults and all; whatever is doubtful is imported.

    Args:
        block: As for `load_plugins`.
        entry_points: As for `load_plugins`.

    Raises:
        PluginError: as for `load_plugins`, of the plugins that are imported.
    """
    blocked = _names(os.environ.get(BLOCK_VARIABLE, "") if block is None else block)
    points = metadata.entry_points(group=GROUP) if entry_points is None else entry_points
    able = [point for point in points if point.name not in blocked and may_register(point, "qhw_register_targets")]
    candidates = _candidates(able, ())
    _refuse_same_name(candidates)
    plugins = _adopt_all(candidates)
    return Registry(
        plugins=tuple(plugin.record for plugin in plugins), targets=_targets(plugins), loaded=tuple(plugins)
    )


def default_registry() -> Registry:
    """The registry of the installed plugins, loaded at the first call and kept for the process.

    Importing all plugins costs seconds and their set is fixed while the process runs, so it is kept; `QHW_BLOCK` is
    still read at each call. `reset_default_registry` forgets it.
    """
    return _default(os.environ.get(BLOCK_VARIABLE, ""))


def reset_default_registry() -> None:
    """Forget the kept registry, so that the next call loads anew: after installing a plugin in a live process."""
    _default.cache_clear()


@cache
def _default(blocked: str) -> Registry:
    return load_plugins(block=blocked)


def _names(block: str | Iterable[str]) -> frozenset[str]:
    names = block.split(",") if isinstance(block, str) else block
    return frozenset(name.strip() for name in names if name.strip())


def _candidates(entry_points: Iterable[metadata.EntryPoint], extra: Iterable[tuple[str, object]]) -> list[_Candidate]:
    found = [
        _Candidate(
            PluginRecord(point.name, _field(point, "Name"), _field(point, "Version")), repr(point.value), point.load
        )
        for point in entry_points
    ]
    for name, plugin in extra:
        record = PluginRecord(name, "given by the caller", "")
        found.append(_Candidate(record, repr(plugin), partial(_itself, plugin)))
    return sorted(found, key=lambda c: (c.record.name, c.record.distribution, c.record.version, c.origin))


def _itself(plugin: object) -> object:
    return plugin


def _field(point: metadata.EntryPoint, key: str) -> str:
    if point.dist is None or key not in point.dist.metadata:
        return f"unknown {key.lower()}"
    return point.dist.metadata[key]


def _refuse_same_name(candidates: list[_Candidate]) -> None:
    for one, other in pairwise(candidates):
        if one.record.name == other.record.name:
            raise PluginError(
                f"two plugins are called '{one.record.name}': {one.record.label} and {other.record.label}. "
                f"Uninstall one, or go on without both: QHW_BLOCK={one.record.name}"
            )


def _adopt_all(candidates: list[_Candidate]) -> list[Plugin]:
    plugins: list[Plugin] = []
    seen: dict[int, PluginRecord] = {}
    for candidate in candidates:
        record = candidate.record
        try:
            with redirect_stdout(sys.stderr):  # a greeting is no part of what a command answers
                plugin = candidate.load()
        except (Exception, SystemExit) as error:
            raise record.failure(f"import of {candidate.origin} failed", error) from error
        if id(plugin) in seen:
            raise record.author_error(f"it is the same object as {seen[id(plugin)].label}. Keep one entry point.")
        seen[id(plugin)] = record
        plugins.append(adopt(record, plugin))
    return plugins


def _answers(plugins: list[Plugin], hook: str) -> list[tuple[PluginRecord, object]]:
    """Each item of each plugin's list, with its plugin."""
    items: list[tuple[PluginRecord, object]] = []
    for plugin in plugins:
        if hook not in plugin.record.hooks:
            continue
        answer = plugin.call(hook)
        if not isinstance(answer, list):
            raise plugin.record.author_error(f"{hook} must return a list; got {type(answer).__name__}.")
        items += ((plugin.record, item) for item in answer)
    return items


def _unique(kind: str, entries: Iterable[Entry[T]]) -> Mapping[str, Entry[T]]:
    """The entries by name, in order of name.

    Raises:
        PluginError: two entries have one name; names both plugins.
    """
    ordered: dict[str, Entry[T]] = {}
    for entry in sorted(entries, key=lambda entry: (entry.name, entry.plugin)):
        first = ordered.setdefault(entry.name, entry)
        if first is entry:
            continue
        if first.plugin == entry.plugin:
            raise entry.record.author_error(f"{kind} '{entry.name}' is registered twice. Rename or remove one.")
        raise PluginError(
            f"{kind} '{entry.name}' comes from {first.record.label} and from {entry.record.label}. "
            f"Go on without one: QHW_BLOCK={first.plugin} or QHW_BLOCK={entry.plugin}"
        )
    return MappingProxyType(ordered)


def _targets(plugins: list[Plugin]) -> Mapping[str, Entry[Path]]:
    return _unique(
        "target",
        (
            Entry(name, file, record)
            for record, path in _answers(plugins, "qhw_register_targets")
            for name, file in list_targets(record, path)
        ),
    )


def _classes(plugins: list[Plugin], kind: str, interface: ABCMeta) -> Mapping[str, Entry[Any]]:
    from qhw.extension.check import class_problem

    entries: list[Entry[Any]] = []
    for record, candidate in _answers(plugins, f"qhw_register_{kind}s"):
        problem = class_problem(candidate, interface)
        if problem is not None:
            raise record.author_error(problem)
        entries.append(Entry(candidate.name, candidate, record))  # type: ignore[attr-defined]  # class_problem saw it
    return _unique(kind, entries)


def _pipelines(plugins: list[Plugin]) -> "Mapping[str, Entry[Pipeline]]":
    from qhw.decisions import Pipeline

    entries = []
    for record, pipeline in _answers(plugins, "qhw_register_pipelines"):
        if not isinstance(pipeline, Pipeline):
            raise record.author_error(f"qhw_register_pipelines must return Pipeline objects; got {pipeline!r}.")
        entries.append(Entry(pipeline.name, pipeline, record))
    by_name = _unique("pipeline", entries)
    defaults = [entry for entry in by_name.values() if entry.value.is_default]
    if len(defaults) > 1:
        one, other = defaults[:2]
        raise PluginError(
            f"pipelines '{one.name}' from {one.record.label} and '{other.name}' from {other.record.label} both say "
            f"is_default=True. Go on without one: QHW_BLOCK={one.plugin} or QHW_BLOCK={other.plugin}"
        )
    return by_name
