# SPDX-License-Identifier: Apache-2.0
"""How large an integer sum of products can get, and how many bits its accumulator needs."""

import torch
from torch import Tensor

from qhw.errors import RangeError


def accumulator_bounds(
    weight_q: Tensor,
    *,
    input_quant_min: int,
    input_quant_max: int,
    input_zero_point: int = 0,
    weight_zero_point: int | Tensor = 0,
    bias_q: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Lowest and highest value an accumulator can reach, at the end or on the way, per output channel.

    With a = input_quant_min - input_zero_point <= 0 <= b = input_quant_max - input_zero_point and w = weight_q -
    weight_zero_point:

        highest = b * sum(w > 0) + a * sum(w < 0) + max(bias, 0)
        lowest  = a * sum(w > 0) + b * sum(w < 0) + min(bias, 0)

    Every product lies between a bound <= 0 and one >= 0, so no partial sum leaves [lowest, highest], whatever the
    order and wherever the bias is added. Some input reaches each bound when there is no bias.

    Args:
        weight_q: integer [out, ...], codes.
        input_quant_min: Lowest input code.
        input_quant_max: Highest input code.
        input_zero_point: Code of 0.0 of the input; subtracted before the product or folded into the bias.
        weight_zero_point: int, or integer [out].
        bias_q: integer [out], in units of input scale * weight scale.

    Returns:
        tuple: lowest and highest, int64 [out].

    Raises:
        RangeError: weight_q is not integer, or the input's zero point is not one of its codes.
    """
    if weight_q.is_floating_point():
        raise RangeError(f"accumulator: weight_q must be integer codes; got {weight_q.dtype}. Quantize it first.")
    low_x, high_x = input_quant_min - input_zero_point, input_quant_max - input_zero_point
    if low_x > 0 or high_x < 0:
        raise RangeError(
            f"accumulator: input_zero_point must lie in [{input_quant_min}, {input_quant_max}]; "
            f"got {input_zero_point}. Use a code of the input."
        )
    zero_point = torch.as_tensor(weight_zero_point, dtype=torch.int64, device=weight_q.device).reshape(-1, 1)
    w = weight_q.long().unsqueeze(-1).flatten(1) - zero_point
    positive, negative = w.clamp(min=0).sum(1), w.clamp(max=0).sum(1)
    lowest, highest = low_x * positive + high_x * negative, high_x * positive + low_x * negative
    if bias_q is not None:
        lowest, highest = lowest + bias_q.long().clamp(max=0), highest + bias_q.long().clamp(min=0)
    return lowest, highest


def accumulator_bits_needed(lowest: Tensor, highest: Tensor) -> Tensor:
    """Width of the smallest two's-complement integer that holds [lowest, highest], sign bit included.

    Args:
        lowest: int64 [*P] <= 0.
        highest: int64 [*P] >= 0.

    Returns:
        Tensor: int64 [*P], 1 to 64.
    """
    # n bits hold [-2**(n-1), 2**(n-1) - 1]; ~lowest = -lowest - 1 turns the low side into the high one.
    magnitude = torch.maximum(highest, ~lowest)
    powers = torch.ones(63, dtype=torch.int64, device=magnitude.device) << torch.arange(63, device=magnitude.device)
    return torch.searchsorted(powers, magnitude.contiguous(), right=True) + 1
