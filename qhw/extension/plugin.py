# SPDX-License-Identifier: Apache-2.0
"""One plugin: who it is, and its hooks behind a manager of its own.

Each plugin has its own pluggy manager. So `check_pending` and every failure have exactly one plugin to name, and no
plugin can wrap, reorder or silence another one's hooks: no answer can depend on the order of installation.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import pluggy

from qhw.errors import PluginError
from qhw.extension import hookspecs
from qhw.extension.info import API_VERSION, PluginInfo
from qhw.extension.names import nearest

HOOKS: dict[str, tuple[str, ...]] = {
    name: tuple(inspect.signature(function).parameters)
    for name, function in sorted(vars(hookspecs).items())
    if name.startswith("qhw_")
}


@dataclass(frozen=True)
class PluginRecord:
    """Who a plugin is, for messages and for `qhw plugin list`."""

    name: str
    distribution: str
    version: str
    state: Literal["loaded", "blocked"] = "loaded"
    summary: str = ""
    hooks: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """Name, distribution and version, as every message about the plugin starts."""
        return f"plugin '{self.name}' ({self.distribution} {self.version})".replace(" )", ")")

    def author_error(self, problem: str) -> PluginError:
        """The error for a mistake that only the plugin's author can repair."""
        return PluginError(f"{self.label}: plugin author: {problem} To go on without it: QHW_BLOCK={self.name}")

    def failure(self, doing: str, error: BaseException) -> PluginError:
        """The error for something that the plugin raised."""
        text = " ".join(str(error).split()).rstrip(".")
        return PluginError(
            f"{self.label}: {doing}: {type(error).__name__}: {text}. "
            f"Reinstall or repair it, or go on without it: QHW_BLOCK={self.name}"
        )


@dataclass(frozen=True)
class Plugin:
    """A plugin whose hooks were checked."""

    record: PluginRecord
    manager: pluggy.PluginManager

    def call(self, hook: str, **arguments: object) -> Any:
        """What the plugin's hook returns; None when it has no such hook.

        Raises:
            PluginError: the hook raised, whatever it was; names the plugin, chained to the cause.
        """
        return _call(self.record, self.manager, hook, **arguments)


def adopt(record: PluginRecord, plugin: object) -> Plugin:
    """Check an imported plugin's hooks.

    Args:
        record: Who it is.
        plugin: The module or object whose functions are marked with `hookimpl`.

    Raises:
        PluginError: no hooks, a class, a hook or argument that does not exist, no or foreign API version.
    """
    if isinstance(plugin, type):
        raise record.author_error(f"the entry point names the class {plugin.__name__}. Name a module or an object.")
    manager = pluggy.PluginManager("qhw")
    manager.register(plugin, record.name)
    hooks = dict(sorted((caller.name, caller.get_hookimpls()) for caller in manager.get_hookcallers(plugin) or ()))
    _check_marked(record, plugin, hooks)
    # The API version comes before the signatures: a plugin for another API would fail those for the wrong reason.
    info = _info(record, manager) if "qhw_plugin_info" in hooks else None
    _check_signatures(record, hooks)
    manager.add_hookspecs(hookspecs)
    _check_pending(record, manager, hooks)
    if info is None:
        raise record.author_error("qhw_plugin_info is missing. Return PluginInfo(api=1, summary=...) from it.")
    known = tuple(name for name in hooks if name in HOOKS)
    return Plugin(
        PluginRecord(record.name, record.distribution, record.version, summary=info.summary, hooks=known), manager
    )


def _call(record: PluginRecord, manager: pluggy.PluginManager, hook: str, **arguments: object) -> Any:
    try:
        answers = getattr(manager.hook, hook)(**arguments)
    except (Exception, SystemExit) as error:
        raise record.failure(f"{hook} raised", error) from error
    return answers[0] if answers else None


def _check_marked(record: PluginRecord, plugin: object, hooks: dict[str, list[pluggy.HookImpl]]) -> None:
    bare = [name for name in HOOKS if name not in hooks and inspect.isroutine(getattr(plugin, name, None))]
    if bare:
        raise record.author_error(f"{bare[0]} is not marked. Put @hookimpl from qhw.extension above it.")
    if not hooks:
        raise record.author_error(
            "it has no hooks. Mark its functions with @hookimpl from qhw.extension, or let the entry point name the "
            "module that holds them."
        )


def _info(record: PluginRecord, manager: pluggy.PluginManager) -> PluginInfo:
    info = _call(record, manager, "qhw_plugin_info")
    if not isinstance(info, PluginInfo):
        raise record.author_error(
            f"qhw_plugin_info must return PluginInfo(api=1, summary=...); got {type(info).__name__}."
        )
    if info.api != API_VERSION:
        raise record.author_error(
            f"it was written for plugin API {info.api}; this qhw speaks {API_VERSION}. Install a version that fits."
        )
    return info


def _check_signatures(record: PluginRecord, hooks: dict[str, list[pluggy.HookImpl]]) -> None:
    for name, impl in _known(hooks):
        signature = f"{name}({', '.join(HOOKS[name])})"
        if len(hooks[name]) > 1:
            raise record.author_error(f"{name} is implemented {len(hooks[name])} times. Keep one.")
        if impl.wrapper or impl.hookwrapper:
            raise record.author_error(f"{name} is a hook wrapper; qhw has none. Write {signature}.")
        foreign = [argument for argument in impl.argnames if argument not in HOOKS[name]]
        if foreign:
            raise record.author_error(f"{name} has no argument '{foreign[0]}'. Its signature is {signature}.")
        if impl.kwargnames:
            # pluggy never passes an argument that has a default: the plugin would see the default for ever.
            raise record.author_error(
                f"{name}: argument '{impl.kwargnames[0]}' has a default and would never be passed. Write {signature}."
            )


def _known(hooks: dict[str, list[pluggy.HookImpl]]) -> Iterator[tuple[str, pluggy.HookImpl]]:
    return ((name, impl) for name, impls in hooks.items() if name in HOOKS for impl in impls)


def _check_pending(
    record: PluginRecord, manager: pluggy.PluginManager, hooks: dict[str, list[pluggy.HookImpl]]
) -> None:
    try:
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        required = (name for name, impls in hooks.items() if not all(impl.optionalhook for impl in impls))
        wrong = next(name for name in required if name not in HOOKS)
        near = nearest(wrong, HOOKS)
        hint = f"Closest: {near}." if near else f"Hooks: {', '.join(HOOKS)}."
        raise record.author_error(f"no hook is called '{wrong}'. {hint}") from error
