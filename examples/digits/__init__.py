# SPDX-License-Identifier: Apache-2.0
"""Handwritten digits: a trained depthwise-separable CNN, its calibration and training images, a held-out test split.

    qhw quantize examples.digits:model --target whitepaper/generic-int8 \
        --calibration examples.digits:calibration --evaluate examples.digits:evaluation --out out/digits
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from examples.digits.data import load_split
from examples.digits.network import DigitsNet

__all__ = ["calibration", "evaluation", "model", "training"]

WEIGHTS = Path(__file__).with_name("digits.safetensors")
_BATCH = 64
_CALIBRATION_IMAGES = 512


def model() -> tuple[nn.Module, Tensor]:
    """The trained network in eval mode, and example inputs float32 [1, 1, 8, 8]. Needs no scikit-learn."""
    network = DigitsNet()
    network.load_state_dict(load_file(WEIGHTS))
    # A ramp over the whole input range: unlike zeros it lets the check of the captured graph see every weight.
    return network.eval(), torch.linspace(-1, 1, 64).reshape(1, 1, 8, 8)


def calibration() -> Iterator[Tensor]:
    """The first 512 training images without labels, in batches of float32 [64, 1, 8, 8]."""
    yield from load_split("train").images[:_CALIBRATION_IMAGES].split(_BATCH)


def training() -> Iterator[tuple[Tensor, Tensor]]:
    """The 1,297 training images with labels, in batches of 64, in an order that torch's random numbers give."""
    split = load_split("train")
    for part in torch.randperm(len(split.labels)).split(_BATCH):
        yield split.images[part], split.labels[part]


def evaluation() -> Iterator[tuple[Tensor, Tensor]]:
    """The held-out 500: batches of images float32 [batch, 1, 8, 8] and labels int64 [batch]; the last is shorter."""
    split = load_split("test")
    yield from zip(split.images.split(_BATCH), split.labels.split(_BATCH), strict=True)
