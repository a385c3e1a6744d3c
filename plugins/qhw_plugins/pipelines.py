# SPDX-License-Identifier: Apache-2.0
"""The shipped pipelines, as data."""

from qhw.decisions import Pipeline, StagePreference
from qhw.extension import PluginInfo, hookimpl

RANGES_PTQ = Pipeline(
    name="ranges-ptq",
    summary="Fold batch norms, set ranges by MSE, round to nearest.",
    reference="Nagel et al., 2021, arXiv:2106.08295, sections 2.6 and 3.1",
    is_default=True,
    stages=(
        StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
        StagePreference(stage="weight_range", algorithms=("mse_weights", "min_max_weights")),
        StagePreference(stage="round", algorithms=("nearest",)),
        StagePreference(stage="activation_range", algorithms=("mse", "min_max")),
    ),
)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="The shipped pipelines.")


@hookimpl
def qhw_register_pipelines() -> list[Pipeline]:
    return [RANGES_PTQ]
