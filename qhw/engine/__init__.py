# SPDX-License-Identifier: Apache-2.0
"""Deciding and doing: selection (pure), the runner, and the quantized model it makes."""

from qhw.engine.blame import blaming, must_be
from qhw.engine.calibration import MICRO_BATCH, Calibration, CalibrationData, has_labels
from qhw.engine.evaluate import Agreement, Metric, Runner, Score, agreement, evaluate, top1
from qhw.engine.folder import is_result_folder, load_result, save_result, written_files, written_whole
from qhw.engine.improve import Improve, improve_layers
from qhw.engine.layerwise import Layer, layers
from qhw.engine.matrix_form import MatrixForm
from qhw.engine.progress import Progress, RichProgress, SilentProgress, default_progress
from qhw.engine.result import QuantizedModel
from qhw.engine.runner import run
from qhw.engine.select import select, target_fingerprint
from qhw.engine.size import float_bytes, quantized_bytes
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
    "blaming",
    "default_progress",
    "evaluate",
    "float_bytes",
    "has_labels",
    "improve_layers",
    "is_result_folder",
    "layers",
    "load_result",
    "must_be",
    "quantized_bytes",
    "run",
    "save_result",
    "select",
    "target_fingerprint",
    "top1",
    "written_files",
    "written_whole",
]
