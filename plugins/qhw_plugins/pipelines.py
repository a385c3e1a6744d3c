# SPDX-License-Identifier: Apache-2.0
"""The shipped pipelines, as data."""

from qhw.decisions import Pipeline, StagePreference
from qhw.extension import PluginInfo, hookimpl

# The branches of the paper's figure 8 are the algorithms' own: each refuses where data, a batch norm or few bits are
# missing, and the next in line takes its sites.
WHITEPAPER_PTQ = Pipeline(
    name="whitepaper-ptq",
    summary="Equalize, set ranges, learn the rounding of few bits; without data, correct biases by batch norms.",
    reference="Nagel et al., 2021, arXiv:2106.08295, figure 8",
    is_default=True,
    training="whitepaper-qat",
    stages=(
        StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
        StagePreference(
            stage="equalize",
            algorithms=("relu6_replacement", "cross_layer_equalization", "bias_absorption"),
            mode="all",
        ),
        StagePreference(stage="weight_range", algorithms=("mse_weights", "min_max_weights")),
        StagePreference(stage="round", algorithms=("adaround", "nearest")),
        StagePreference(
            stage="correct",
            algorithms=("empirical_bias_correction", "analytic_bias_correction"),
            skip_sites_of=("adaround",),
        ),
        StagePreference(stage="activation_range", algorithms=("cross_entropy", "mse", "min_max", "batch_norm_ranges")),
        StagePreference(
            stage="fit", algorithms=("reduce_range", "accumulator_projection", "requantization_fit"), mode="all"
        ),
    ),
)

RANGES_PTQ = Pipeline(
    name="ranges-ptq",
    summary="Fold batch norms, set ranges by MSE, round to nearest: fast, and nothing else changes.",
    reference="Nagel et al., 2021, arXiv:2106.08295, sections 2.6 and 3.1",
    training="whitepaper-qat",
    stages=(
        StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
        StagePreference(stage="weight_range", algorithms=("mse_weights", "min_max_weights")),
        StagePreference(stage="round", algorithms=("nearest",)),
        StagePreference(stage="activation_range", algorithms=("mse", "min_max")),
        StagePreference(
            stage="fit", algorithms=("reduce_range", "accumulator_projection", "requantization_fit"), mode="all"
        ),
    ),
)

# Training starts from ranges by MSE and from weights whose channels are equalized; rounding and biases learn by
# themselves. The order at `train` settles batch norm before the quantizers that start from what it leaves.
WHITEPAPER_QAT = Pipeline(
    name="whitepaper-qat",
    summary="Equalize and set ranges; then train weights, scales and zero points in the user's own loop.",
    reference="Nagel et al., 2021, arXiv:2106.08295, figure 12",
    stages=(
        StagePreference(stage="prepare", algorithms=("batch_norm_folding",), mode="all"),
        StagePreference(stage="equalize", algorithms=("relu6_replacement", "cross_layer_equalization"), mode="all"),
        StagePreference(stage="weight_range", algorithms=("mse_weights", "min_max_weights")),
        StagePreference(stage="round", algorithms=("nearest",)),
        StagePreference(stage="activation_range", algorithms=("mse", "min_max", "batch_norm_ranges")),
        StagePreference(stage="train", algorithms=("kept_batch_norm", "accumulator_aware", "learned_ranges")),
        StagePreference(
            stage="fit", algorithms=("reduce_range", "accumulator_projection", "requantization_fit"), mode="all"
        ),
    ),
)


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="The shipped pipelines.")


@hookimpl
def qhw_register_pipelines() -> list[Pipeline]:
    return [WHITEPAPER_PTQ, RANGES_PTQ, WHITEPAPER_QAT]
