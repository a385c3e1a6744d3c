# SPDX-License-Identifier: Apache-2.0
"""How strangers come in: the hooks, the interfaces of what they bring, the loader and the registry."""

from typing import TYPE_CHECKING, Any

from qhw.extension.hookspecs import hookimpl, hookspec
from qhw.extension.info import API_VERSION, PluginInfo
from qhw.extension.loader import default_registry, load_plugins, load_target_plugins, reset_default_registry
from qhw.extension.plugin import PluginRecord
from qhw.extension.registry import Entry, Registry

if TYPE_CHECKING:
    from qhw.extension.interfaces import (
        Algorithm,
        AlgorithmOptions,
        ArtefactReader,
        Executor,
        Exporter,
        NumberFormat,
        TrainingAlgorithm,
    )

__all__ = [
    "API_VERSION",
    "Algorithm",
    "AlgorithmOptions",
    "ArtefactReader",
    "Entry",
    "Executor",
    "Exporter",
    "NumberFormat",
    "PluginInfo",
    "PluginRecord",
    "Registry",
    "TrainingAlgorithm",
    "default_registry",
    "hookimpl",
    "hookspec",
    "load_plugins",
    "load_target_plugins",
    "reset_default_registry",
]

_HEAVY = (
    "Algorithm",
    "AlgorithmOptions",
    "ArtefactReader",
    "Executor",
    "Exporter",
    "NumberFormat",
    "TrainingAlgorithm",
)


def __getattr__(name: str) -> Any:
    """Interfaces on first use: they need torch, and a plugin of targets alone does not."""
    if name not in _HEAVY:
        raise AttributeError(f"module 'qhw.extension' has no attribute '{name}'")
    from qhw.extension import interfaces

    return getattr(interfaces, name)
