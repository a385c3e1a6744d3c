# SPDX-License-Identifier: Apache-2.0
"""The stages of quantization, in the order in which they run."""

from typing import Literal, get_args

Stage = Literal["prepare", "equalize", "weight_range", "round", "correct", "activation_range", "train", "fit"]

STAGES: tuple[Stage, ...] = get_args(Stage)
