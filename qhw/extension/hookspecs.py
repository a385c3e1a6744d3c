# SPDX-License-Identifier: Apache-2.0
"""Every hook a plugin may implement, with its arguments. docs/hooks.md shows each at work."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:  # only in annotations, and `target list` does not wait for torch
    from torch import nn

    from qhw.decisions import Pipeline, QuantPlan, StepReport
    from qhw.extension.info import PluginInfo
    from qhw.extension.interfaces import Algorithm, ArtefactReader, Executor, Exporter, NumberFormat
    from qhw.schema import TargetSpec

hookspec = pluggy.HookspecMarker("qhw")
hookimpl = pluggy.HookimplMarker("qhw")


@hookspec
def qhw_plugin_info() -> PluginInfo:
    """What the plugin is, and the API it was written for. Required, once per plugin.

    Called first. When `api` is foreign nothing else of the plugin is looked at.

    Returns:
        PluginInfo: `PluginInfo(api=1, summary="one line")`.
    """
    raise NotImplementedError


@hookspec
def qhw_register_targets() -> list[Path]:
    """Where target descriptions lie. Only names are listed at load time; a file is read when its target is asked for.

    Returns:
        list[Path]: existing folders that hold `<vendor>/<chip>.toml`, or single files of that form. The target's
        name is `<vendor>/<chip>`, in lower case. Links out of the folder are refused.
    """
    raise NotImplementedError


@hookspec
def qhw_register_algorithms() -> list[type[Algorithm]]:
    """The algorithms the plugin ships.

    Returns:
        list[type[Algorithm]]: classes, not objects; each with a name that no other plugin uses.
    """
    raise NotImplementedError


@hookspec
def qhw_register_pipelines() -> list[Pipeline]:
    """The pipelines the plugin ships: named, ordered preferences of algorithms, as data.

    Returns:
        list[Pipeline]: each with a name that no other plugin uses; at most one in the whole installation is default.
    """
    raise NotImplementedError


@hookspec
def qhw_register_exporters() -> list[type[Exporter]]:
    """The exporters the plugin ships.

    Returns:
        list[type[Exporter]]: classes, not objects; each with a name that no other plugin uses.
    """
    raise NotImplementedError


@hookspec
def qhw_register_executors() -> list[type[Executor]]:
    """The executors the plugin ships.

    Returns:
        list[type[Executor]]: classes, not objects; each with a name that no other plugin uses.
    """
    raise NotImplementedError


@hookspec
def qhw_register_readers() -> list[type[ArtefactReader]]:
    """The readers of quantized models' files the plugin ships.

    Returns:
        list[type[ArtefactReader]]: classes, not objects; each with a name that no other plugin uses.
    """
    raise NotImplementedError


@hookspec
def qhw_register_number_formats() -> list[type[NumberFormat]]:
    """The number formats beyond integers the plugin ships.

    Returns:
        list[type[NumberFormat]]: classes, not objects; each with a name that no other plugin uses.
    """
    raise NotImplementedError


@hookspec
def qhw_plan_ready(plan: QuantPlan, target: TargetSpec) -> None:
    """A plan was made. Look, record, refuse by raising; the plan is frozen and returns are not taken.

    Args:
        plan: Every decision with its reason.
        target: The resolved target it was made for.
    """


@hookspec
def qhw_quantized(model: nn.Module, plan: QuantPlan, report: tuple[StepReport, ...]) -> None:
    """A model was quantized. Look, record, refuse by raising; the model must not be changed.

    Args:
        model: The quantized model, as the caller gets it.
        plan: The plan that was applied.
        report: What each step did, in the order in which they ran.
    """
