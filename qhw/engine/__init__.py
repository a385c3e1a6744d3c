# SPDX-License-Identifier: Apache-2.0
"""Deciding and doing: selection (pure), the runner, and the quantized model it makes."""

from qhw.engine.bias import is_bounded_bias, weight_scale_floor
from qhw.engine.blame import blaming, must_be
from qhw.engine.calibration import MICRO_BATCH, Calibration, CalibrationData, has_labels
from qhw.engine.evaluate import Agreement, Metric, Runner, Score, agreement, evaluate, labelled_batches, top1
from qhw.engine.folder import is_result_folder, load_result, save_result, written_files, written_whole
from qhw.engine.improve import Improve, improve_layers
from qhw.engine.insert import insert_modules
from qhw.engine.layerwise import Layer, layers
from qhw.engine.matrix_form import MatrixForm
from qhw.engine.progress import Progress, RichProgress, SilentProgress, default_progress
from qhw.engine.result import QuantizedModel
from qhw.engine.runner import apply_step, finished, run
from qhw.engine.select import select, select_stage, target_fingerprint
from qhw.engine.size import float_bytes, quantized_bytes
from qhw.engine.weight_sums import weight_sum_limit
from qhw.engine.work import Context, Statistic, Work
from qhw.engine.work_folder import WorkFolder

__all__ = [
    "MICRO_BATCH",
    "Agreement",
    "Calibration",
    "CalibrationData",
    "Context",
    "Improve",
    "Layer",
    "MatrixForm",
    "Metric",
    "Progress",
    "QuantizedModel",
    "RichProgress",
    "Runner",
    "Score",
    "SilentProgress",
    "Statistic",
    "Work",
    "WorkFolder",
    "agreement",
    "apply_step",
    "blaming",
    "default_progress",
    "evaluate",
    "finished",
    "float_bytes",
    "has_labels",
    "improve_layers",
    "insert_modules",
    "is_bounded_bias",
    "is_result_folder",
    "labelled_batches",
    "layers",
    "load_result",
    "must_be",
    "quantized_bytes",
    "run",
    "save_result",
    "select",
    "select_stage",
    "target_fingerprint",
    "top1",
    "weight_scale_floor",
    "weight_sum_limit",
    "written_files",
    "written_whole",
]
