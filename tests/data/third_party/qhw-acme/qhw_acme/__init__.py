# SPDX-License-Identifier: Apache-2.0
"""ACME's accelerators for qhw: what the distribution brings, one hook each."""

from pathlib import Path

from qhw.decisions import Pipeline, StagePreference
from qhw.extension import Algorithm, Exporter, PluginInfo, hookimpl
from qhw_acme.json_export import AcmeJson
from qhw_acme.percentile import AcmePercentile

FAST = Pipeline(
    name="acme-fast",
    summary="What ACME's compiler does by itself: no search.",
    stages=(
        StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
        StagePreference(stage="weight_range", algorithms=("min_max_weights",)),
        StagePreference(stage="round", algorithms=("nearest",)),
        StagePreference(stage="activation_range", algorithms=("acme_percentile", "min_max")),
    ),
)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="ACME's accelerators")


@hookimpl
def qhw_register_targets() -> list[Path]:
    return [Path(__file__).parent / "targets"]


@hookimpl
def qhw_register_algorithms() -> list[type[Algorithm]]:
    return [AcmePercentile]


@hookimpl
def qhw_register_pipelines() -> list[Pipeline]:
    return [FAST]


@hookimpl
def qhw_register_exporters() -> list[type[Exporter]]:
    return [AcmeJson]
