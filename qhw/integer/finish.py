# SPDX-License-Identifier: Apache-2.0
"""From accumulators of a known bound to codes, in as few passes over them as the arithmetic allows."""

from collections.abc import Callable

import torch
from torch import Tensor

from qhw.integer.arithmetic import Requantization
from qhw.numerics import ROUNDING_RULES, round_real
from qhw.numerics.requantize import FixedPointCodes
from qhw.numerics.requantize_int64 import DOUBLE

__all__ = ["Finish", "filling", "finish_of"]

Finish = Callable[[Tensor, Tensor], None]


def finish_of(rescale: Requantization, limits: tuple[int, int], largest: int | None) -> Finish:
    """`rescale.codes` for accumulators in [-largest, largest].

    Args:
        rescale: The requantization.
        limits: Lowest and highest code.
        largest: Largest magnitude of an accumulator; None: not known.

    Returns:
        Callable: accumulators [*shape], which it may overwrite, and a tensor of their shape that it fills with codes;
            this may be the accumulators themselves.
    """
    bounded = None if largest is None else _fixed_point(rescale, limits, largest)
    return bounded or _float32(rescale, limits) or filling(rescale.codes, limits)


def filling(codes: Callable[[Tensor, tuple[int, int], torch.dtype], Tensor], limits: tuple[int, int]) -> Finish:
    """What makes new codes, as what fills a tensor with them."""

    def finish(acc: Tensor, out: Tensor) -> None:
        out.copy_(codes(acc, limits, out.dtype))

    return finish


def _fixed_point(rescale: Requantization, limits: tuple[int, int], largest: int) -> Finish | None:
    multiplier, shift, bits, rule = rescale.multiplier, rescale.shift, rescale.bits, rescale.rounding
    if multiplier is None or shift is None or bits is None or rescale.before or rule not in (*ROUNDING_RULES, *DOUBLE):
        return None
    prepared = FixedPointCodes.of(multiplier, shift, bits, rule)  # type: ignore[arg-type]
    return prepared.bounded(rescale.zero_point, *limits, largest)


def _float32(rescale: Requantization, limits: tuple[int, int]) -> Finish | None:
    """The same operations in the same order, in place: a product in float32, rounded, and the zero point."""
    factor, rule, zero_point = _factor(rescale), rescale.rounding, rescale.zero_point
    if factor is None or rescale.before or rule not in ROUNDING_RULES:
        return None
    plain = filling(rescale.codes, limits)

    def finish(acc: Tensor, out: Tensor) -> None:
        if acc.dtype != torch.float32 or out.dtype != torch.float32:
            plain(acc, out)
            return
        acc.mul_(factor)
        whole = acc.round_() if rule == "half_even" else round_real(acc, rule)  # type: ignore[arg-type]
        if zero_point:
            whole.add_(float(zero_point))
        torch.clamp(whole, *limits, out=out)

    return finish


def _factor(rescale: Requantization) -> Tensor | None:
    """What float32 accumulators are multiplied by in float32; None where that is not what the target computes.

    A shift is a product with a power of two: exact for whole numbers below 2^24, and so is its fraction.
    """
    if rescale.kind == "shift" and rescale.shift is not None:
        return torch.ldexp(torch.ones_like(rescale.shift, dtype=torch.float32), -rescale.shift)
    return rescale.factor if rescale.kind == "float32" and rescale.rounding == "half_even" else None
