# SPDX-License-Identifier: Apache-2.0
"""Inputs that drive one accumulator, or a sum of two products before it, as far as any can."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.integer.accumulate import Bounds
from qhw.integer.bias import bias_reach
from qhw.integer.bounds import met_weights, sample_shape
from qhw.integer.codes import reach
from qhw.integer.exact import FLOAT32_EXACT, exact_dtype, exact_settings
from qhw.integer.pairwise import furthest_pairs, multiplied_weight, stated_pairs
from qhw.integer.site import Site
from qhw.integer.weights import centred_weight, product_of

__all__ = ["Witness", "pair_witness", "sum_witness"]


@dataclass(frozen=True)
class Witness:
    """An input that drives one accumulator as far as any can.

    Attributes:
        channel: Output channel.
        position: Of the accumulator in the output of one sample, the channel left out.
        operand: Input codes, int32, one sample as the operator reads it.
        value: The accumulator that it gives in the end, bias included, were no sum to overflow: computed, not
            estimated.
        peak: The largest magnitude on the way, with its sign: without a bias of the other sign, which may come last.
            Of pairs: the sum of two products.
    """

    channel: int
    position: tuple[int, ...]
    operand: Tensor
    value: int
    peak: int


def sum_witness(site: Site, bounds: Bounds) -> Witness | None:
    """The input that attains the widest channel's bound, run through the operator; None where none does.

    Args:
        site: The operator.
        bounds: Of its accumulators, with the bias where the target has it.
    """
    channel, is_highest, bound = _furthest(bounds)
    x, weight = site.inputs[0], centred_weight(site)
    low, high = x.quant_min - int(x.zero_point), x.quant_max - int(x.zero_point)
    positive, negative = (part[channel] for part in met_weights(site, weight))
    met = high * positive + low * negative if is_highest else -(low * positive + high * negative)
    position = tuple(int(i) for i in torch.unravel_index(met.argmax(), met.shape))
    codes = _driving(site, weight, channel, position, is_highest)
    value = _sum(site, codes, channel, position)
    every, is_exact = bias_reach(site)
    bias = 0 if every is None else int(every[channel])
    spec = site.target.accumulators.get(str(site.kernel.accumulator if site.kernel is not None else None))
    is_first = spec is not None and spec.overflow == "saturate" and spec.bias_added == "first"
    # A bias of the other sign that comes last takes something off in the end: the bound holds the sum before that.
    peak = value + (bias if is_first else max(bias, 0) if is_highest else min(bias, 0))
    is_attained = is_exact and peak == bound
    return Witness(channel, position[1:], codes, value + bias, peak) if is_attained else None


def pair_witness(site: Site, bounds: Bounds) -> Witness | None:
    """The input with which a pair of products attains its bound, and all others of its channel pull the same way.

    Args:
        site: The operator.
        bounds: Of its sums of two products.
    """
    pairs = stated_pairs(site)
    if pairs is None:
        return None
    channel, is_highest, bound = _furthest(bounds)
    weight = multiplied_weight(site, pairs[1])
    positive, negative = (part[channel] for part in met_weights(site, weight))
    position = tuple(int(i) for i in torch.unravel_index((positive - negative).argmax(), positive.shape))
    codes = _driving(site, weight, channel, position, is_highest)
    value = _sum(site, codes, channel, position)
    x = codes.long() - int(site.inputs[0].zero_point)
    peak = int(furthest_pairs(site, x, pairs, is_highest).movedim(_axis(site), 0)[channel][position])
    every, is_exact = bias_reach(site)
    bias = 0 if every is None else int(every[channel])
    return Witness(channel, position[1:], codes, value + bias, peak) if is_exact and peak == bound else None


def _furthest(bounds: Bounds) -> tuple[int, bool, int]:
    """The channel that reaches furthest, whether upwards, and its bound."""
    # Two's complement holds one number more below 0 than above: ~lowest = -lowest - 1 weighs both sides alike.
    channel = int(torch.maximum(bounds.highest, ~bounds.lowest).argmax())
    lowest, highest = int(bounds.lowest[channel]), int(bounds.highest[channel])
    return (channel, True, highest) if highest >= ~lowest else (channel, False, lowest)


def _driving(site: Site, weight: Tensor, channel: int, position: tuple[int, ...], is_highest: bool) -> Tensor:
    """Codes that take one output as far up or down as it gets: int32, one sample.

    The gradient of an output by the input is the weight that each input meets, padding and dilation included: each
    input goes to the end of its range that its weight's sign asks for.
    """
    q = site.inputs[0]
    with exact_settings(), torch.enable_grad():
        x = torch.zeros(sample_shape(site), dtype=torch.float64, requires_grad=True)
        row = product_of(site)(x, weight.double()).movedim(_axis(site), 0)[channel]
        row[position].backward()  # type: ignore[no-untyped-call]
    assert x.grad is not None
    ends = (q.quant_min, q.quant_max) if is_highest else (q.quant_max, q.quant_min)
    return torch.where(x.grad > 0, ends[1], torch.where(x.grad < 0, ends[0], int(q.zero_point))).int()


def _sum(site: Site, codes: Tensor, channel: int, position: tuple[int, ...]) -> int:
    """One output's exact sum of products, without the bias."""
    q, weight = site.inputs[0], centred_weight(site)
    dtype = exact_dtype(max(FLOAT32_EXACT, int(weight.abs().sum()) * reach(q)))
    centred = (codes.long() - int(q.zero_point)).to(dtype)
    with exact_settings():
        return int(product_of(site)(centred, weight.to(dtype)).movedim(_axis(site), 0)[channel][position])


def _axis(site: Site) -> int:
    """Of the output channels in the result."""
    return -1 if site.operator.kind == "Gemm" else 1
