# SPDX-License-Identifier: Apache-2.0
"""Whole numbers in a ball of the L1 norm."""

import torch
from torch import Tensor


def onto_ball(magnitudes: Tensor, limit: Tensor) -> Tensor:
    """Whole numbers next to the Euclidean projection onto {sum <= limit}, per row (Duchi et al., 2008); not above."""
    limit = limit.clamp(min=0)
    ordered = magnitudes.sort(1, descending=True).values
    counts = torch.arange(1, magnitudes.shape[1] + 1, dtype=torch.float64)
    thresholds = (ordered.cumsum(1) - limit[:, None]) / counts
    last = (ordered > thresholds).long().cumsum(1).argmax(1, keepdim=True)
    threshold = thresholds.gather(1, last).clamp(min=0)
    real = (magnitudes - threshold).clamp(min=0)
    whole = real.floor()
    spare = (limit - whole.sum(1)).clamp(min=0)
    order = (real - whole).argsort(1, descending=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(magnitudes.shape[1]).expand_as(order))
    return whole + ((rank < spare[:, None]) & (real > whole)).double()
