# SPDX-License-Identifier: Apache-2.0
"""Rounding rules by exact name, on floats and on integer right shifts."""

from typing import Literal, get_args

import torch
from torch import Tensor

from qhw.errors import RangeError

Rounding = Literal["half_even", "half_away_from_zero", "half_to_plus_infinity", "floor", "toward_zero"]

ROUNDING_RULES: tuple[str, ...] = get_args(Rounding)


def round_real(x: Tensor, rule: Rounding = "half_even") -> Tensor:
    """Integers next to real numbers, by a named rule.

    half_even: nearest, a tie to the even one (ONNX, IEEE 754). half_away_from_zero: nearest, a tie away from 0 (C
    `round`). half_to_plus_infinity: nearest, a tie upwards, floor(x + 1/2) without its float error. floor: downwards.
    toward_zero: drops the fraction.

    Args:
        x: float [*shape]. Infinite values and NaN stay as they are.
        rule: One of ROUNDING_RULES.

    Returns:
        Tensor: x's dtype [*shape], new, holding integers.

    Raises:
        RangeError: the rule is unknown.
    """
    if rule == "half_even":
        return x.round()
    if rule == "floor":
        return x.floor()
    if rule == "toward_zero":
        return x.trunc()
    # Adding 0.5 first would round 0.49999997 up: float32 has no neighbour between it and 0.5. The fraction is exact.
    if rule == "half_away_from_zero":
        whole = x.trunc()
        return torch.where((x - whole).abs() >= 0.5, whole + x.sign(), whole)
    if rule == "half_to_plus_infinity":
        whole = x.floor()
        return torch.where(x - whole >= 0.5, whole + 1, whole)
    raise RangeError(_unknown(rule))


def shift_right(q: Tensor, shift: int | Tensor, rule: Rounding = "half_even") -> Tensor:
    """Quotient of integers by a power of two, rounded by a named rule: round(q / 2**shift), exact.

    Args:
        q: int64 [*shape].
        shift: int or int64 tensor that broadcasts against q; 0 to 62.
        rule: One of ROUNDING_RULES.

    Returns:
        Tensor: int64 [*shape].

    Raises:
        RangeError: the rule is unknown, q is not int64, or a shift is outside 0 to 62.
    """
    if q.dtype != torch.int64:
        raise RangeError(f"shift_right: q must be int64; got {q.dtype}. Convert it.")
    shift = torch.as_tensor(shift, dtype=torch.int64, device=q.device)
    if bool(((shift < 0) | (shift > 62)).any()):
        bad = shift[(shift < 0) | (shift > 62)].flatten()[0].item()
        raise RangeError(f"shift_right: shift must lie in 0 to 62; got {bad}. Multiply to shift left.")
    floor = q >> shift
    # 0 <= rest < 2**shift <= 2**62, so twice the rest fits int64 and compares with the divisor without a fraction.
    divisor = torch.ones_like(shift) << shift
    rest = q - (floor << shift)
    twice = rest * 2
    if rule == "floor":
        return floor
    if rule == "toward_zero":
        return floor + ((q < 0) & (rest > 0)).long()
    if rule == "half_to_plus_infinity":
        return floor + (twice >= divisor).long()
    if rule == "half_away_from_zero":
        return floor + ((twice > divisor) | ((twice == divisor) & (q >= 0))).long()
    if rule == "half_even":
        return floor + ((twice > divisor) | ((twice == divisor) & (floor % 2 == 1))).long()
    raise RangeError(_unknown(rule))


def _unknown(rule: str) -> str:
    return f"rounding: rule must be one of {', '.join(ROUNDING_RULES)}; got {rule!r}. Choose one of them."
