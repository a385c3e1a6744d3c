# SPDX-License-Identifier: Apache-2.0
"""How strangers come in: the hooks, the interfaces of what they bring, the loader and the registry."""

from qhw.extension.hookspecs import hookimpl, hookspec
from qhw.extension.interfaces import (
    API_VERSION,
    Algorithm,
    AlgorithmOptions,
    Executor,
    Exporter,
    PluginInfo,
    TrainingAlgorithm,
)
from qhw.extension.loader import default_registry, load_plugins, reset_default_registry
from qhw.extension.plugin import PluginRecord
from qhw.extension.registry import Entry, Registry

__all__ = [
    "API_VERSION",
    "Algorithm",
    "AlgorithmOptions",
    "Entry",
    "Executor",
    "Exporter",
    "PluginInfo",
    "PluginRecord",
    "Registry",
    "TrainingAlgorithm",
    "default_registry",
    "hookimpl",
    "hookspec",
    "load_plugins",
    "reset_default_registry",
]
