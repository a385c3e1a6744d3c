# SPDX-License-Identifier: Apache-2.0
"""A plugin for tests of equalization: pipelines that differ in that stage alone, and a registry of few algorithms."""

from types import ModuleType
from typing import Any

from qhw.decisions import Pipeline, StagePreference
from qhw.extension import PluginInfo, Registry, hookimpl, load_plugins


class Equalizing:
    """Pipelines that fold batch norms, equalize, and go on with min-max ranges and nearest rounding.

    Args:
        pipelines: Name -> algorithms of the stage; the first pipeline is the default.
    """

    def __init__(self, **pipelines: tuple[str, ...]) -> None:
        self._pipelines = pipelines

    @hookimpl
    def qhw_plugin_info(self) -> PluginInfo:
        return PluginInfo(api=1, summary="pipelines for tests")

    @hookimpl
    def qhw_register_pipelines(self) -> list[Pipeline]:
        default = next(iter(self._pipelines))
        return [
            Pipeline(name=name, summary="For tests.", is_default=name == default, stages=_stages(algorithms))
            for name, algorithms in self._pipelines.items()
        ]


def _stages(equalize: tuple[str, ...]) -> tuple[StagePreference, ...]:
    return (
        StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
        StagePreference(stage="equalize", algorithms=equalize, mode="all"),
        StagePreference(stage="weight_range", algorithms=("min_max_weights",)),
        StagePreference(stage="round", algorithms=("nearest",)),
        StagePreference(stage="activation_range", algorithms=("min_max",)),
    )


def registry_of(*modules: ModuleType, **pipelines: tuple[str, ...]) -> Registry:
    """A registry of these plugins and of `Equalizing`'s pipelines, without an installation."""
    extra: list[tuple[str, Any]] = [(module.__name__.rpartition(".")[2], module) for module in modules]
    return load_plugins(block=(), entry_points=(), extra=[*extra, ("equalizing", Equalizing(**pipelines))])
