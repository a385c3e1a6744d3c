# SPDX-License-Identifier: Apache-2.0
"""Whether a sum fits its accumulator: proven from the stored codes; else what the target says happens on the way."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.site import Site, unknown
from qhw.numerics import Operands, accumulator_bits_needed
from qhw.schema import Accumulator, Pairwise

__all__ = ["Bounds", "Order", "Pairs", "Saturation", "Summation", "operands_of", "summation_of", "wrapped"]

Overflow = Callable[[Tensor], Tensor]
Order = Literal["channel_fastest", "kernel_fastest"]
_EVERY_FORM: tuple[Operands, ...] = ("centred", "stored", "unsigned")


@dataclass(frozen=True)
class Bounds:
    """Lowest and highest value of an accumulator at any moment, in any order: int64 [out_channels]."""

    lowest: Tensor
    highest: Tensor

    @property
    def largest(self) -> int:
        """Largest magnitude."""
        return max(int(self.highest.max()), -int(self.lowest.min()))

    @property
    def bits(self) -> Tensor:
        """Bits that each channel needs, the sign included: int64 [out_channels]."""
        return accumulator_bits_needed(self.lowest, self.highest)


PairBounds = Callable[[Order | None, Operands], Bounds]


@dataclass(frozen=True)
class Pairs:
    """Two neighbouring products are added in a register of their own first.

    Attributes:
        order: Which index runs fastest: makes products neighbours.
        operands: What is multiplied: codes minus zero points; codes as stored; input codes counted from the lowest.
        bits: Of the register.
        overflow: What happens past it.
    """

    order: Order
    operands: Operands
    bits: int
    overflow: Literal["wrap", "saturate"]

    def narrowed(self, sums: Tensor) -> Tensor:
        """What the register holds of sums of two products."""
        return _saturated(sums, self.bits) if self.overflow == "saturate" else wrapped(sums, self.bits).to(sums.dtype)


@dataclass(frozen=True)
class Saturation:
    """An accumulator that stops at its ends on the way.

    Attributes:
        bits: Its width.
        count: Products summed exactly between two saturations; None: all.
        order: Which index runs fastest; None where `count` is None.
        bias_first: Whether the bias is there before the first product, or comes behind the last one.
    """

    bits: int
    count: int | None
    order: Order | None
    bias_first: bool

    def stopped(self, total: Tensor) -> Tensor:
        """What the accumulator holds of a sum."""
        return _saturated(total, self.bits)


@dataclass(frozen=True)
class Summation:
    """How products become the accumulator.

    Attributes:
        finish: What happens to the exact sum behind its last product.
        pairs: Where sums of two products can leave a register of their own.
        saturation: Where the sum can saturate on the way; `finish` changes nothing then.
    """

    finish: Overflow
    pairs: Pairs | None = None
    saturation: Saturation | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the sum of all products decides, in whatever order they come."""
        return self.pairs is None and self.saturation is None


def summation_of(site: Site, bounds: Bounds, pair_bounds: PairBounds) -> Summation:
    """What the target says of a sum that its width, or that of pairs of products, may not hold.

    A sum that cannot overflow, or wraps, is the same in any order. One that saturates depends on the order.

    Args:
        site: The operator.
        bounds: Of its sums.
        pair_bounds: Of its sums of two products, which depend on their order (None: of any two) and on what is
            multiplied.

    Raises:
        IntegerError: the width is not known, or some input makes the sum overflow and its value is not defined.
    """
    path, accumulator = site.accumulator
    if accumulator.kind == "float":
        raise IntegerError(f'{path}.kind = "float" cannot be executed exactly')
    pairs = _pairs(path, accumulator, pair_bounds)
    if accumulator.bits == "per_layer":
        return Summation(_unchanged, pairs)
    if not isinstance(accumulator.bits, int):
        raise unknown(f"{path}.bits", accumulator.bits)
    needed = int(bounds.bits.max())
    if needed <= accumulator.bits:
        return Summation(_unchanged, pairs)
    if accumulator.overflow == "wrap":
        return Summation(partial(wrapped, bits=accumulator.bits), pairs)
    what = (
        f"its accumulator may need {needed} bits, {path}.bits = {accumulator.bits}, and with overflow = "
        f'"{accumulator.overflow or "not stated"}" the sum is not defined'
    )
    if accumulator.overflow == "saturate":
        saturation = _saturation(site, path, accumulator, what)
        return Summation(_unchanged, pairs, saturation)
    raise IntegerError(f'{what} ("qhw accumulators" shows the channels)')


def _pairs(path: str, accumulator: Accumulator, pair_bounds: PairBounds) -> Pairs | None:
    """The register of two products, where some input can make it overflow."""
    spec, order = accumulator.pairwise, accumulator.order
    if spec is None:
        return None
    if isinstance(spec, str):
        raise unknown(f"{path}.pairwise", spec)
    if not isinstance(spec.bits, int):
        raise unknown(f"{path}.pairwise.bits", spec.bits)
    needed = max(int(pair_bounds(_stated(order), form).bits.max()) for form in operands_of(spec))
    if needed <= spec.bits:
        return None
    if spec.overflow != "wrap" and spec.overflow != "saturate":
        raise IntegerError(
            f"sums of two products may need {needed} bits, {path}.pairwise.bits = {spec.bits}, and with overflow = "
            f'"{spec.overflow or "not stated"}" they are not defined'
        )
    if spec.operands is None or spec.operands == "unknown":
        raise unknown(f"{path}.pairwise.operands", spec.operands)
    if order is None or order == "unknown":
        raise unknown(f"{path}.order", order)
    return Pairs(order, spec.operands, spec.bits, spec.overflow)


def operands_of(spec: Pairwise) -> tuple[Operands, ...]:
    """What may be multiplied: what the target says, else anything."""
    return _EVERY_FORM if spec.operands is None or spec.operands == "unknown" else (spec.operands,)


def _saturation(site: Site, path: str, accumulator: Accumulator, what: str) -> Saturation:
    assert isinstance(accumulator.bits, int)
    count, order = accumulator.products_per_step, _stated(accumulator.order)
    place = accumulator.bias_added
    for field, value, decides in (
        ("products_per_step", count, True),
        ("order", accumulator.order, count != "all"),
        ("bias_added", place, site.bias is not None),
    ):
        if decides and (value is None or value == "unknown"):
            raise IntegerError(f"{what}: {unknown(f'{path}.{field}', value)}")
    steps = count if isinstance(count, int) else None
    return Saturation(accumulator.bits, steps, None if steps is None else order, place == "first")


def _stated(order: Order | Literal["unknown"] | None) -> Order | None:
    return None if order == "unknown" else order


def wrapped(total: Tensor, bits: int) -> Tensor:
    """Two's complement of a width: int64 in [-2^(bits - 1), 2^(bits - 1)).

    Args:
        total: Whole numbers, in any dtype that holds them; [*shape].
        bits: 1 to 63.
    """
    half = 1 << (bits - 1)
    return torch.remainder(total.long() + half, 2 * half) - half


def _saturated(total: Tensor, bits: int) -> Tensor:
    return total.clamp(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def _unchanged(total: Tensor) -> Tensor:
    return total
