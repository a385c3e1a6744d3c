# SPDX-License-Identifier: Apache-2.0
"""The exception tree: every mistake a user can make raises one of these, with a one-line message.

A message says where, what must hold, what was got, and what to do.
"""

__all__ = [
    "ArtefactError",
    "CalibrationError",
    "CaptureError",
    "ExportError",
    "IntegerError",
    "PlanError",
    "PluginError",
    "QhwError",
    "RangeError",
    "ResultError",
    "TargetError",
    "TrainingError",
]


class QhwError(Exception):
    """Base of all qhw errors. The command line prints its message without a traceback and exits with 1."""


class TargetError(QhwError):
    """A target description is missing, malformed or contradicts itself."""


class RangeError(QhwError):
    """A tensor or a range cannot be put on a grid: NaN, infinite, or of the wrong shape."""


class CaptureError(QhwError):
    """A model cannot be captured as a graph, or a saved graph cannot be read."""


class PlanError(QhwError):
    """A plan cannot be made, or does not belong to this model or target."""


class PluginError(QhwError):
    """A plugin is missing, broken, or in conflict with another one."""


class CalibrationError(QhwError):
    """Calibration or evaluation data does not fit the model."""


class ExportError(QhwError):
    """A result cannot be written in the asked form, or an artefact cannot be run."""


class IntegerError(QhwError):
    """A model cannot be computed in integers as its target does: a fact is missing, or a sum may overflow."""


class TrainingError(QhwError):
    """A result cannot be trained or frozen, or training came to a value that is no number."""


class ArtefactError(QhwError):
    """A quantized model's file cannot be read, or does not hold together."""


class ResultError(QhwError):
    """A result folder cannot be written or read."""
