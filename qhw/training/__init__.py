# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training: a result that trains, and what training made of it as a result again."""

from qhw.training.batch_norm import DoubleForward, KeptNorm, NormLayer, is_distributed
from qhw.training.form import TrainingForm
from qhw.training.freezing import freeze
from qhw.training.loop import Training, train
from qhw.training.parameters import parameter_groups
from qhw.training.start import trainable

__all__ = [
    "DoubleForward",
    "KeptNorm",
    "NormLayer",
    "Training",
    "TrainingForm",
    "freeze",
    "is_distributed",
    "parameter_groups",
    "train",
    "trainable",
]
