# SPDX-License-Identifier: Apache-2.0
"""A plugin for tests that load a few algorithms only: the shipped `ranges-ptq` up to its ranges, as the default."""

from qhw.decisions import Pipeline
from qhw.extension import PluginInfo, hookimpl
from qhw_plugins.pipelines import RANGES_PTQ


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="ranges-ptq as the default.")


@hookimpl
def qhw_register_pipelines() -> list[Pipeline]:
    stages = tuple(stage for stage in RANGES_PTQ.stages if stage.stage != "fit")
    return [RANGES_PTQ.model_copy(update={"is_default": True, "stages": stages})]
