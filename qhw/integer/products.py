# SPDX-License-Identifier: Apache-2.0
"""Sums of products: convolutions of every form, linear operators, products of two activations."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.accumulate import Bounds, summation_of
from qhw.integer.arithmetic import Requantization, code_bounds, rescaler
from qhw.integer.bias import accumulated_bias, behind_multiplier, is_behind_multiplier
from qhw.integer.bounds import matmul_bounds, product_bounds, saturating_bounds
from qhw.integer.byte_products import byte_convolution
from qhw.integer.codes import carrier
from qhw.integer.exact import exact_dtype
from qhw.integer.finish import filling, finish_of
from qhw.integer.pairwise import matmul_pair_bounds, pair_bounds
from qhw.integer.pieces import in_pieces
from qhw.integer.saturating import matmul_on_the_way, sum_on_the_way
from qhw.integer.site import Site
from qhw.integer.weights import centred_weight, output_shape, product_of, unit_of, weight_rows
from qhw.integer.windows import is_ordinary
from qhw.numerics import PerGroup, QParams

__all__ = ["Fact", "Lowered", "Run", "lower_matmul", "lower_product", "product_bounds"]

Run = Callable[[Sequence[Tensor]], Tensor]
Fact = str | int | tuple[int, ...] | Tensor | Requantization


@dataclass(frozen=True)
class Lowered:
    """An operator in integers.

    Attributes:
        run: Codes of the operands, as carried -> codes of the result, as carried; reals where `output` is None.
        accumulate: Codes of the operands -> accumulators before requantization; None where there is none.
        moves: Per operand, codes of its tensor -> codes on the grid that `run` reads.
        facts: What `run` computes with, by name; `rule` names the formula. Golden vectors show it.
    """

    run: Run
    accumulate: Run | None = None
    facts: Mapping[str, Fact] = field(default_factory=dict)
    moves: tuple[Callable[[Tensor], Tensor], ...] = ()


def lower_product(site: Site) -> Lowered:
    """A Conv, DepthwiseConv, ConvTranspose or Gemm.

    Raises:
        IntegerError: the target leaves open what decides, or the sum may overflow.
    """
    _refuse_groups(site)
    x = site.inputs[0]
    bounds = product_bounds(site)
    summation = summation_of(site, saturating_bounds(site, bounds), partial(pair_bounds, site))
    bias, shape = accumulated_bias(site), output_shape(site)
    if summation.is_exact:
        accumulate = _exact_sum(site, bounds, summation.finish, bias)
    else:
        on_the_way = sum_on_the_way(site, summation, bounds, bias)
        zero_point = int(x.zero_point)

        def accumulate(values: Sequence[Tensor]) -> Tensor:
            return on_the_way(values[0].long() - zero_point)

    return _finished(site, accumulate, unit_of(site, shape), bounds.largest, summation.is_exact)


def _exact_sum(site: Site, bounds: Bounds, finish: Callable[[Tensor], Tensor], bias: Tensor | None) -> Run:
    """Sums that are the same in any order."""
    dtype, shape = exact_dtype(bounds.largest), output_shape(site)
    of_bytes = byte_convolution(site, bias) if dtype == torch.float32 else None
    if of_bytes is not None:
        return lambda values: finish(of_bytes(values[0]))
    layout = _layout(site, dtype)
    weight, zero_point = centred_weight(site).to(dtype).contiguous(memory_format=layout), site.inputs[0].zero_point
    folded = _with_zero_point(site, bias, dtype)
    product = _biased_product(site, folded if folded is not None or bias is None else bias.to(dtype), shape)
    offset = zero_point.to(dtype) if folded is None and int(zero_point) else None

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        codes = values[0].to(dtype).contiguous(memory_format=layout)
        return finish(product(codes if offset is None else codes - offset, weight))

    return accumulate


def _layout(site: Site, dtype: torch.dtype) -> torch.memory_format:
    """Channels last in memory where float32 convolutions then need no copy in an order of their own."""
    is_image = site.operator.kind in ("Conv", "DepthwiseConv") and is_ordinary(site)
    return torch.channels_last if is_image and dtype == torch.float32 else torch.contiguous_format


def _refuse_groups(site: Site) -> None:
    if isinstance(site.constant.qparams.granularity, PerGroup):
        raise IntegerError(
            "weights with a scale per group of inputs cannot be executed exactly: no field of a target says how the "
            "sums of groups become one (it would belong to accumulators.*)"
        )


def _finished(
    site: Site, accumulate: Run, unit: Callable[[torch.dtype], Tensor], largest: int, is_exact: bool
) -> Lowered:
    """Sums of products as codes of the result, or as reals where it leaves the accelerator in float.

    Args:
        site: The operator.
        accumulate: Its sums.
        unit: What one unit of them stands for, in a dtype.
        largest: Largest magnitude of its exact sums.
        is_exact: Whether those are what it sums.
    """
    if site.output is None:
        return _in_reals(site, accumulate, unit(torch.float32))
    out = site.output

    def ratio(product: torch.dtype, quotient: torch.dtype) -> Tensor:
        return unit(product).to(quotient) / out.scale.to(quotient)

    rescale = rescaler(site, ratio, int(out.zero_point))
    limits = code_bounds(site)
    facts: dict[str, Fact] = {"rule": "sum_of_products", "requantize": rescale, "clamp": limits}
    if is_behind_multiplier(site):
        finish = filling(behind_multiplier(site, rescale, largest, output_shape(site)), limits)
    else:
        finish = finish_of(rescale, limits, largest if is_exact else None)
    return Lowered(in_pieces(site, accumulate, finish, carrier(out)), accumulate, facts)


def lower_matmul(site: Site) -> Lowered:
    """A product of two activations.

    Raises:
        IntegerError: the target leaves open what decides, or the sum may overflow.
    """
    a, b = _two(site)
    count = int(site.operator.attributes["reduced_elements"])
    bounds = matmul_bounds(site)
    summation = summation_of(site, bounds, partial(matmul_pair_bounds, site))
    dtype = exact_dtype(bounds.largest) if summation.is_exact else torch.int64
    zeros = a.zero_point.to(dtype), b.zero_point.to(dtype)
    product = torch.matmul if summation.is_exact else matmul_on_the_way(site, summation, bounds)

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        if values[0].shape[-1] != count:  # the axis that is summed over is the batch
            raise IntegerError(
                f"{site.name}: sums {values[0].shape[-1]} products of a batch; captured with {count}. Run batches of "
                "that size."
            )
        total = product(values[0].to(dtype) - zeros[0], values[1].to(dtype) - zeros[1])
        return summation.finish(total) if summation.is_exact else total

    def unit(kind: torch.dtype) -> Tensor:
        return a.scale.to(kind) * b.scale.to(kind)

    return _finished(site, accumulate, unit, bounds.largest, summation.is_exact)


def _two(site: Site) -> tuple[QParams, QParams]:
    if len(site.inputs) == 2:
        return site.inputs[0], site.inputs[1]
    raise IntegerError("a product with a constant tensor cannot be executed exactly yet")


def _in_reals(site: Site, accumulate: Run, unit: Tensor) -> Lowered:
    """A result that leaves the accelerator in float32, with the clips that are computed along."""
    if is_behind_multiplier(site):
        raise IntegerError("a bias behind the multiplier, and no multiplier: the result leaves in float")
    limits: list[tuple[float | None, float | None]] = []
    for member in site.members[1:]:
        if member.kind in ("Relu", "Clip"):
            limits.append((member.attributes.get("minimum"), member.attributes.get("maximum")))
        elif member.kind != "Dropout":
            raise IntegerError(f"{member.kind} behind {site.operator.kind} cannot be executed exactly yet")

    def run(values: Sequence[Tensor]) -> Tensor:
        found = accumulate(values).float() * unit
        for low, high in limits:
            found = found.clamp(low, high)
        return found

    facts: dict[str, Fact] = {"rule": "sum_of_products", "unit": unit}
    if limits:  # one row per clip, in order; infinite where it has no bound
        ends = [[-math.inf if low is None else low, math.inf if high is None else high] for low, high in limits]
        facts["clips"] = torch.tensor(ends, dtype=torch.float32)
    return Lowered(run, accumulate, facts)


def _with_zero_point(site: Site, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias that makes a product of codes one of centred codes, bias - zero point * sum(weight): [out_channels].

    None where it does not: zeros at the border are codes of 0.0 as they are, and a sum may leave what `dtype` holds.
    """
    x, kind = site.inputs[0], site.operator.kind
    padding = site.operator.attributes.get("padding", 0)
    if kind == "ConvTranspose" or isinstance(padding, str) or np.any(padding) or not dtype.is_floating_point:
        return None
    rows = weight_rows(site)
    folded = -int(x.zero_point) * rows.sum(1)
    if bias is not None:
        folded = folded + bias
    largest = rows.abs().sum(1) * max(-x.quant_min, x.quant_max) + folded.abs()
    return folded.to(dtype) if exact_dtype(int(largest.max())) in (dtype, torch.float32) else None


def _biased_product(site: Site, bias: Tensor | None, shape: list[int]) -> Callable[[Tensor, Tensor], Tensor]:
    """The operator's function with a bias; in one call where the call has one, for sums are exact in any order."""
    product = product_of(site)
    if bias is None:
        return product
    if site.operator.kind == "Gemm" or not bias.dtype.is_floating_point:
        spread = bias.reshape(shape)
        return lambda x, w: product(x, w).add_(spread)
    node = site.node
    target: Any = node.target
    rest, kwargs = list(node.args[3:]), dict(node.kwargs)
    return lambda x, w: target(x, w, bias, *rest, **kwargs)
