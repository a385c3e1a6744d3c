# SPDX-License-Identifier: Apache-2.0
"""What the loaded plugins bring, by name. Frozen: built once by the loader."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from qhw.errors import PluginError, TargetError
from qhw.extension.names import unknown_name
from qhw.extension.plugin import Plugin, PluginRecord

if TYPE_CHECKING:
    from torch import nn

    from qhw.decisions import Pipeline, QuantPlan, StepReport
    from qhw.extension.interfaces import Algorithm, ArtefactReader, Executor, Exporter, NumberFormat
    from qhw.schema import TargetSpec

T_co = TypeVar("T_co", covariant=True)


@dataclass(frozen=True)
class Entry(Generic[T_co]):
    """Something registered, and the plugin it comes from."""

    name: str
    value: T_co
    record: PluginRecord

    @property
    def plugin(self) -> str:
        """The plugin's entry-point name."""
        return self.record.name

    @property
    def distribution(self) -> str:
        """The installed distribution it comes from."""
        return self.record.distribution

    @property
    def version(self) -> str:
        """That distribution's version."""
        return self.record.version


def _none() -> Mapping[str, Entry[Any]]:
    return MappingProxyType({})


@dataclass(frozen=True)
class Registry:
    """All registered things, each kind in order of name.

    `plugins` holds loaded and blocked ones; `unmatched_blocks` the names asked to be blocked that no plugin has.
    """

    plugins: tuple[PluginRecord, ...] = ()
    targets: Mapping[str, Entry[Path]] = field(default_factory=_none)
    algorithms: Mapping[str, Entry[type[Algorithm]]] = field(default_factory=_none)
    pipelines: Mapping[str, Entry[Pipeline]] = field(default_factory=_none)
    exporters: Mapping[str, Entry[type[Exporter]]] = field(default_factory=_none)
    executors: Mapping[str, Entry[type[Executor]]] = field(default_factory=_none)
    readers: Mapping[str, Entry[type[ArtefactReader]]] = field(default_factory=_none)
    number_formats: Mapping[str, Entry[type[NumberFormat]]] = field(default_factory=_none)
    unmatched_blocks: tuple[str, ...] = ()
    loaded: tuple[Plugin, ...] = field(default=(), repr=False)

    def __deepcopy__(self, memo: object) -> Registry:
        """Itself: it is frozen, and what keeps it, a model in training for one, may be copied."""
        return self

    @property
    def blocked(self) -> tuple[str, ...]:
        """Plugins that are installed and were not loaded, as the user wishes."""
        return tuple(record.name for record in self.plugins if record.state == "blocked")

    def target_names(self) -> tuple[str, ...]:
        """All registered targets, as `<vendor>/<chip>`."""
        return tuple(self.targets)

    def target_path(self, name: str) -> Path:
        """The file that describes a target.

        Raises:
            TargetError: no plugin registered that name; says which come closest.
        """
        if name not in self.targets:
            raise TargetError(unknown_name("target", name, self.targets, listing="qhw target list"))
        return self.targets[name].value

    def algorithm(self, name: str) -> type[Algorithm]:
        """The algorithm of that name.

        Raises:
            PluginError: there is none; says which come closest. The same holds for the other kinds.
        """
        return _named("algorithm", name, self.algorithms)

    def pipeline(self, name: str) -> Pipeline:
        """The pipeline of that name."""
        return _named("pipeline", name, self.pipelines)

    def default_pipeline(self) -> Pipeline:
        """The pipeline that is used when nobody names one.

        Raises:
            PluginError: no loaded pipeline says that it is the default.
        """
        for entry in self.pipelines.values():
            if entry.value.is_default:
                return entry.value
        known = ", ".join(self.pipelines) or "none; see 'qhw plugin list' for what QHW_BLOCK leaves out"
        raise PluginError(f"no pipeline is the default. Name one with --pipeline. Known: {known}.")

    def exporter(self, name: str) -> type[Exporter]:
        """The exporter of that name."""
        return _named("exporter", name, self.exporters)

    def executor(self, name: str) -> type[Executor]:
        """The executor of that name."""
        return _named("executor", name, self.executors)

    def reader(self, name: str) -> type[ArtefactReader]:
        """The reader of that name."""
        return _named("reader", name, self.readers)

    def number_format(self, name: str) -> type[NumberFormat]:
        """The number format of that name."""
        return _named("number format", name, self.number_formats)

    def provided_by(self, plugin: str) -> dict[str, tuple[str, ...]]:
        """Kind to names of what a plugin brings; kinds it brings nothing of are left out."""
        kinds: dict[str, Mapping[str, Entry[object]]] = {
            "targets": self.targets,
            "algorithms": self.algorithms,
            "pipelines": self.pipelines,
            "exporters": self.exporters,
            "executors": self.executors,
            "readers": self.readers,
            "number_formats": self.number_formats,
        }
        brought = {kind: tuple(n for n, e in entries.items() if e.plugin == plugin) for kind, entries in kinds.items()}
        return {kind: names for kind, names in brought.items() if names}

    def plan_ready(self, plan: QuantPlan, target: TargetSpec) -> None:
        """Tell every plugin that a plan was made, in order of plugin name.

        Raises:
            PluginError: a plugin raised, or returned something where nothing is taken.
        """
        self._notify("qhw_plan_ready", plan=plan, target=target)

    def quantized(self, model: nn.Module, plan: QuantPlan, report: tuple[StepReport, ...]) -> None:
        """Tell every plugin that a model was quantized, in order of plugin name.

        Raises:
            PluginError: a plugin raised, or returned something where nothing is taken.
        """
        self._notify("qhw_quantized", model=model, plan=plan, report=report)

    def _notify(self, hook: str, **arguments: object) -> None:
        for plugin in self.loaded:
            answer = plugin.call(hook, **arguments)
            if answer is not None:
                raise plugin.record.author_error(
                    f"{hook} must return nothing; got {type(answer).__name__}. What it returns would be lost."
                )


def _named(kind: str, name: str, known: Mapping[str, Entry[T_co]]) -> T_co:
    if name not in known:
        raise PluginError(unknown_name(kind, name, known))
    return known[name].value
