# SPDX-License-Identifier: Apache-2.0
"""scikit-learn's bundled digits, split once and for all into 1,297 training and 500 held-out test images.

The images are scans of digits written by hand, reduced to 8x8 cells with values 0 to 16 (UCI "Optical Recognition of
Handwritten Digits"). The file does not say who wrote what, so writers occur in both splits: accuracy here is that of a
random split, not of unseen writers.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from qhw.errors import CalibrationError

__all__ = ["NUM_TEST", "NUM_TRAIN", "Split", "load_split", "split_indices"]

NUM_TRAIN = 1297
NUM_TEST = 500
_SPLIT_SEED = 0


@dataclass(frozen=True)
class Split:
    """Images and labels of one split.

    Attributes:
        images: float32 [num, 1, 8, 8] in [-1, 1]: value / 8 - 1, exact in float32; background is -1.
        labels: int64 [num], the digits 0 to 9.
    """

    images: Tensor
    labels: Tensor


def split_indices(name: Literal["train", "test"]) -> np.ndarray:
    """Positions of a split in `load_digits`, int64: the head or the tail of one fixed permutation (not stratified)."""
    order = np.random.default_rng(_SPLIT_SEED).permutation(NUM_TRAIN + NUM_TEST)
    return order[:NUM_TRAIN] if name == "train" else order[NUM_TRAIN:]


def load_split(name: Literal["train", "test"]) -> Split:
    """One of the two splits, always in the same order.

    Raises:
        CalibrationError: scikit-learn is not installed, or bundles other data.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CalibrationError(
            "examples.digits: the images come with scikit-learn, which is not installed. "
            'Run: pip install "scikit-learn>=1.5,<2"'
        ) from error
    digits = load_digits()
    if digits.images.shape != (NUM_TRAIN + NUM_TEST, 8, 8):
        raise CalibrationError(
            f"examples.digits: load_digits must give images [1797, 8, 8]; got {list(digits.images.shape)}. "
            'Run: pip install "scikit-learn>=1.5,<2"'
        )
    chosen = split_indices(name)
    images = torch.from_numpy(digits.images[chosen]).float().unsqueeze(1) / 8 - 1
    return Split(images, torch.from_numpy(digits.target[chosen]).long())
