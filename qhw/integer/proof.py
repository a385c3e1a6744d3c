# SPDX-License-Identifier: Apache-2.0
"""Accumulators: what each can reach, proven from the stored codes, and an input that reaches it."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.integer.accumulate import Bounds
from qhw.integer.exact import exact_settings
from qhw.integer.products import PRODUCT_KINDS, centred_weight, product_bounds, product_of
from qhw.integer.site import Site, sites

__all__ = ["Proof", "Witness", "prove_accumulators"]


@dataclass(frozen=True)
class Witness:
    """An input that drives one accumulator as far as any can.

    Attributes:
        channel: Output channel.
        position: Of the accumulator in the output of one sample, the channel left out.
        operand: Input codes, int32, one sample as the operator reads it.
        value: The accumulator that it gives in the end, bias included: computed, not estimated.
        peak: The largest magnitude on the way, with its sign: without a bias of the other sign, which may come last.
    """

    channel: int
    position: tuple[int, ...]
    operand: Tensor
    value: int
    peak: int


@dataclass(frozen=True)
class Proof:
    """One operator's accumulators.

    Attributes:
        operator: Its name.
        path: The target's entry, as `accumulators.sum`; None where the kernel names none.
        bounds: Lowest and highest value per output channel, at any moment, in any order of summation.
        bits_needed: Width that holds all of them, the sign included.
        bits: Width that the target has; None where it does not say.
        overflow: What it says happens past that.
        witness: An input that attains the largest magnitude; None where the bound is safe but not attained,
            and where none was asked for.
    """

    operator: str
    path: str | None
    bounds: Bounds
    bits_needed: int
    bits: int | None
    overflow: str | None
    witness: Witness | None

    @property
    def headroom(self) -> int | None:
        """Bits left; negative where some input overflows; None where the width is not known."""
        return None if self.bits is None else self.bits - self.bits_needed

    @property
    def overflowing_channels(self) -> int:
        """Output channels whose accumulator can leave the width."""
        return 0 if self.bits is None else int((self.bounds.bits > self.bits).sum())


def prove_accumulators(result: QuantizedModel, *, witnesses: bool = True) -> Iterator[Proof]:
    """The accumulators of every operator with weights, in execution order.

    Does not need the target to say how it requantizes.

    Args:
        result: The quantized model.
        witnesses: Whether inputs are looked for that attain the bounds: one gradient of one output per operator.
    """
    for site in sites(result):
        if site.operator.kind in PRODUCT_KINDS and site.weight is not None and site.inputs:
            yield _proof(site, witnesses)


def _proof(site: Site, wants_witness: bool) -> Proof:
    bounds = product_bounds(site)
    try:
        path, spec = site.accumulator
    except IntegerError:
        path, spec = None, None
    return Proof(
        operator=site.name,
        path=path,
        bounds=bounds,
        bits_needed=int(bounds.bits.max()),
        bits=spec.bits if spec is not None and isinstance(spec.bits, int) else None,
        overflow=spec.overflow if spec is not None else None,
        witness=_witness(site, bounds) if wants_witness else None,
    )


def _witness(site: Site, bounds: Bounds) -> Witness | None:
    """The input that attains the widest channel's bound, run through the operator; None where none does.

    The position is one whose taps meet the most weight, padding left out. The gradient of its accumulator by the input
    is the weight that each input meets, padding and dilation included: each input goes to the end of its range that its
    weight's sign asks for.
    """
    # Two's complement holds one number more below 0 than above: ~lowest = -lowest - 1 weighs both sides alike.
    channel = int(torch.maximum(bounds.highest, ~bounds.lowest).argmax())
    wants_highest = int(bounds.highest[channel]) >= ~int(bounds.lowest[channel])
    bound = int(bounds.highest[channel] if wants_highest else bounds.lowest[channel])
    shape = (1, *site.input_shape[1:])
    axis = -1 if site.operator.kind == "Gemm" else 1
    weight, product = centred_weight(site).double(), product_of(site)
    with exact_settings(), torch.enable_grad():
        x = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        row = product(x, weight).select(axis, channel)
        met = product(torch.ones_like(x), weight.abs()).select(axis, channel)[0]
        position = tuple(int(i) for i in torch.unravel_index(met.argmax(), met.shape))
        row[(0, *position)].backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    q = site.inputs[0]
    zero = int(q.zero_point)
    ends = (q.quant_min, q.quant_max) if wants_highest else (q.quant_max, q.quant_min)
    codes = torch.where(x.grad > 0, ends[1], torch.where(x.grad < 0, ends[0], zero))
    with exact_settings():
        value = int(product((codes - zero).double(), weight).select(axis, channel)[(0, *position)])
    bias = 0 if site.bias is None else int(site.bias.codes[channel])
    # A bias of the other sign takes something off in the end: the bound holds the sum before that.
    peak = value + (max(bias, 0) if wants_highest else min(bias, 0))
    return Witness(channel, position, codes.int(), value + bias, peak) if peak == bound else None
