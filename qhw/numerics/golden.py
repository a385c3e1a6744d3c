# SPDX-License-Identifier: Apache-2.0
"""Golden-section search: the minimum of unimodal functions of one variable, many of them at once."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

_RATIO = (math.sqrt(5.0) - 1.0) / 2.0


def golden_section(loss: Callable[[Tensor], Tensor], low: Tensor, high: Tensor, tolerance: float) -> Tensor:
    """Where each function has its minimum, to within a tolerance.

    Every evaluation but the first two shrinks the interval by 0.618, so that an interval of 1 takes 2 + 15 evaluations
    to a tolerance of 0.001. On a tie the upper part is kept. A function that is not unimodal gets one of its local
    minima.

    Args:
        loss: x float64 [*functions] -> values [*functions].
        low: float64 [*functions], lower end of each interval.
        high: float64 [*functions], upper end.
        tolerance: Width at which the widest interval counts as a point; positive.

    Returns:
        Tensor: float64 [*functions], middle of the last interval.

    Reference:
        Kiefer, 1953, Proc. AMS 4(3), 502-506; named in Nagel et al., 2021, arXiv:2106.08295, section 3.1.
    """
    low, high = low.double(), high.double()
    inner = [high - _RATIO * (high - low), low + _RATIO * (high - low)]
    values = [loss(inner[0]), loss(inner[1])]
    widest = float((high - low).max()) * _RATIO if low.numel() else 0.0
    while widest > tolerance:
        is_left = values[0] < values[1]
        high, low = torch.where(is_left, inner[1], high), torch.where(is_left, low, inner[0])
        new = torch.where(is_left, high - _RATIO * (high - low), low + _RATIO * (high - low))
        value = loss(new)
        inner = [torch.where(is_left, new, inner[1]), torch.where(is_left, inner[0], new)]
        values = [torch.where(is_left, value, values[1]), torch.where(is_left, values[0], value)]
        widest *= _RATIO
    is_left = values[0] < values[1]
    return (torch.where(is_left, low, inner[0]) + torch.where(is_left, inner[1], high)) / 2
