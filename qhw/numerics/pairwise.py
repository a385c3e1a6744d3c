# SPDX-License-Identifier: Apache-2.0
"""Sums of two neighbouring products, which some hardware holds in a register narrower than the accumulator."""

from typing import Literal

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.qparams import QParams

__all__ = ["Operands", "multiplied_offset", "multiplied_range", "pair_sums"]

Operands = Literal["centred", "stored", "unsigned"]


def multiplied_offset(x: QParams, operands: Operands) -> int:
    """What is multiplied, less the input code minus its zero point.

    Args:
        x: Grid of the input, per tensor.
        operands: centred: codes minus zero point; stored: codes; unsigned: signed codes plus 2^(bits - 1).
    """
    if operands == "centred":
        return 0
    lift = 1 << (-x.quant_min - 1).bit_length() if operands == "unsigned" and x.quant_min < 0 else 0
    return int(x.zero_point) + lift


def multiplied_range(x: QParams, operands: Operands) -> tuple[int, int]:
    """Lowest and highest value of an input as it is multiplied; see `multiplied_offset`."""
    shift = multiplied_offset(x, operands) - int(x.zero_point)
    return x.quant_min + shift, x.quant_max + shift


def pair_sums(weight_q: Tensor, low: int, high: int) -> tuple[Tensor, Tensor]:
    """Lowest and highest sum of each two neighbouring products over all inputs in [low, high].

    Args:
        weight_q: integer [*any, inputs], in the order of summation; an odd last product stays alone.
        low: Smallest input as it is multiplied.
        high: Largest.

    Returns:
        tuple: int64 [*any, ceil(inputs / 2)] each.

    Raises:
        RangeError: weight_q is not integer.
    """
    if weight_q.is_floating_point():
        raise RangeError(f"pairs: weight_q must be integer codes; got {weight_q.dtype}. Quantize it first.")
    w = torch.nn.functional.pad(weight_q.long(), (0, weight_q.shape[-1] % 2))
    lowest, highest = torch.minimum(low * w, high * w), torch.maximum(low * w, high * w)
    return lowest[..., ::2] + lowest[..., 1::2], highest[..., ::2] + highest[..., 1::2]
