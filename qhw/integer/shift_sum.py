# SPDX-License-Identifier: Apache-2.0
"""Sums of two operands on power-of-two scales, by shifts alone."""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.accumulate import wrapped
from qhw.integer.arithmetic import Requantization, check_shift, code_bounds, rescaler
from qhw.integer.products import Fact, Run
from qhw.integer.site import Site, unknown
from qhw.numerics import ROUNDING_RULES, QParams
from qhw.schema import Align

__all__ = ["register_of", "shift_add"]

_WIDEST = 62  # bits that an int64 keeps free of overflow
_EXACT = Requantization("shift", "floor", shift=torch.zeros((), dtype=torch.int64))


def shift_add(site: Site, a: QParams, b: QParams, out: QParams, sign: int) -> tuple[Run, dict[str, Fact]]:
    """Add or Sub of kind shift, or of fixed point on one scale; u is one of both scales, as the target aligns them.

        round(register((A - za) sa/u + sign (B - zb) sb/u) u/sy) + zy

    An operand on a coarser scale than u is shifted left, one on a finer scale right and rounded.

    Args:
        site: The operator.
        a: Grid of the first operand.
        b: Grid of the second.
        out: Grid of the result.
        sign: -1 for Sub.

    Returns:
        tuple: codes of both operands -> codes before the clamp, int64; and what it computes with.

    Raises:
        IntegerError: the scales are no powers of two apart, a shift is none that the target has, or the target leaves
            open what decides.
    """
    shifts, finest_is_unit = _alignment(site, a, b)
    unit = torch.minimum(a.scale, b.scale) if finest_is_unit else torch.maximum(a.scale, b.scale)
    moves = [_moved(site, right) for right in shifts]
    (low_a, high_a), (low_b, high_b) = (_ends(q, right, m) for q, right, m in zip((a, b), shifts, moves, strict=True))
    if sign < 0:
        low_b, high_b = -high_b, -low_b
    register, width = register_of(site, low_a + low_b, high_a + high_b)
    last = rescaler(site, lambda _, kind: unit.to(kind) / out.scale.to(kind), int(out.zero_point))
    za, zb = int(a.zero_point), int(b.zero_point)

    def add(values: Sequence[Tensor]) -> Tensor:
        left, right = moves[0](values[0].long() - za), moves[1](values[1].long() - zb)
        return last(register(left + sign * right))

    facts: dict[str, Fact] = {"rule": "add_fixed_point", "left_shift": 0, "sign": sign, "clamp": code_bounds(site)}
    return add, {**facts, **width, "requantize.0": moves[0], "requantize.1": moves[1], "requantize": last}


def _alignment(site: Site, a: QParams, b: QParams) -> tuple[tuple[int, int], bool]:
    """Right shifts of both operands, and whether they get onto the finer of their scales."""
    mantissa, exponent = torch.frexp(a.scale.double() / b.scale.double())
    path, rule = site.requantize
    if float(mantissa) != 0.5:
        apart = float(a.scale.double() / b.scale.double())
        raise IntegerError(
            f'{path}.kind = "shift" needs operands whose scales are a power of two apart; got {apart:.6g}'
        )
    apart_bits = int(exponent) - 1  # sa = sb 2^apart_bits
    if apart_bits == 0:
        return (0, 0), True
    align, where = rule.align, f"{path}.align"
    if not isinstance(align, Align):
        raise unknown(where, align, ('{ to = "finer", ... }', '{ to = "coarser", ... }'))
    if align.to is None or align.to == "unknown":
        raise unknown(f"{where}.to", align.to, ("finer", "coarser"))
    is_finer = align.to == "finer"
    distance = -abs(apart_bits) if is_finer else abs(apart_bits)
    check_shift(f"{where}.shift", align.shift, torch.tensor([distance]))
    moves_first = (apart_bits > 0) == is_finer  # the coarser operand goes to the finer scale, or the other way round
    return ((distance, 0) if moves_first else (0, distance)), is_finer


def _moved(site: Site, right: int) -> Requantization:
    if right == 0:
        return _EXACT
    shift = torch.tensor(right)
    if right < 0:
        return Requantization("shift", "floor", shift=shift)
    path, rule = site.requantize
    rounding = rule.align.rounding if isinstance(rule.align, Align) else None
    if rounding is None or rounding == "unknown":
        raise unknown(f"{path}.align.rounding", rounding, ROUNDING_RULES)
    if rounding not in ROUNDING_RULES:
        raise IntegerError(f'{path}.align.rounding = "{rounding}" names no single rounding')
    return Requantization("shift", rounding, shift=shift)  # type: ignore[arg-type]


def _ends(q: QParams, right: int, move: Requantization) -> tuple[int, int]:
    """Lowest and highest value of an operand behind its shift."""
    low, high = q.quant_min - int(q.zero_point), q.quant_max - int(q.zero_point)
    if right <= 0:
        return low << -right, high << -right
    return int(move(torch.tensor(low))), int(move(torch.tensor(high)))


def register_of(site: Site, low: int, high: int) -> tuple[Callable[[Tensor], Tensor], dict[str, Fact]]:
    """What the kernel's accumulator makes of a single sum or product, and the facts that say it where it decides.

    Args:
        site: The operator.
        low: Lowest value that occurs.
        high: Highest.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    path, accumulator = site.accumulator
    if accumulator.kind == "float":
        raise IntegerError(f'{path}.kind = "float" cannot be executed exactly')
    bits = accumulator.bits
    if bits is None or bits == "unknown":
        raise unknown(f"{path}.bits", bits)
    needed = 1 + max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0)
    if needed > _WIDEST:
        raise IntegerError(f"its sum needs {needed} bits, more than the {_WIDEST} that can be executed. Change a scale")
    if isinstance(bits, str) or needed <= bits:
        return _unchanged, {}
    facts: dict[str, Fact] = {"accumulator_bits": bits}
    if accumulator.overflow == "wrap":
        return partial(wrapped, bits=bits), {**facts, "accumulator_overflow": "wrap"}
    if accumulator.overflow == "saturate":
        return partial(_saturated, bits=bits), {**facts, "accumulator_overflow": "saturate"}
    if accumulator.overflow == "exact":
        raise IntegerError(
            f'it may need {needed} bits, and {path}.bits = {bits} with overflow = "exact". Change a scale'
        )
    raise unknown(f"{path}.overflow", accumulator.overflow, ("wrap", "saturate"))


def _saturated(total: Tensor, bits: int) -> Tensor:
    return total.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _unchanged(total: Tensor) -> Tensor:
    return total
