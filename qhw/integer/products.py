# SPDX-License-Identifier: Apache-2.0
"""Sums of products: convolutions of every form, linear operators, products of two activations."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhw.engine import MatrixForm
from qhw.errors import IntegerError
from qhw.integer.accumulate import Bounds, overflow_of
from qhw.integer.arithmetic import Requantization, code_bounds, rescaler
from qhw.integer.codes import carrier, reach
from qhw.integer.exact import exact_dtype
from qhw.integer.site import Site, unknown
from qhw.numerics import PerGroup, PerTensor, QParams, accumulator_bounds, expand

__all__ = [
    "PRODUCT_KINDS",
    "Fact",
    "Lowered",
    "Run",
    "centred_weight",
    "lower_matmul",
    "lower_product",
    "product_bounds",
    "product_of",
]

_PIECE = 2**18  # elements of the operand or the result, whichever has more
PRODUCT_KINDS = ("Conv", "DepthwiseConv", "ConvTranspose", "Gemm")

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


def _weight_rows(site: Site) -> Tensor:
    """Weight codes minus zero point, int64 [out_channels, inputs of an output]."""
    weight = centred_weight(site)
    return MatrixForm(site.operator, tuple(weight.shape)).weight_rows(weight).flatten(0, 1)


def product_bounds(site: Site) -> Bounds:
    """What the accumulators of an operator with weights can reach, per output channel, exact for what is stored.

    A transposed convolution spreads its taps over neighbouring outputs: there the bound is safe, not tight.
    """
    x = site.inputs[0]
    lowest, highest = accumulator_bounds(
        _weight_rows(site),
        input_quant_min=x.quant_min,
        input_quant_max=x.quant_max,
        input_zero_point=int(x.zero_point),
        bias_q=None if site.bias is None else site.bias.codes,
    )
    return Bounds(lowest, highest)


def lower_product(site: Site) -> Lowered:
    """A Conv, DepthwiseConv, ConvTranspose or Gemm.

    Raises:
        IntegerError: the target leaves open what decides, or the sum may overflow.
    """
    x = site.inputs[0]
    bounds = product_bounds(site)
    overflow = overflow_of(site, bounds)
    _check_bias(site)
    dtype = exact_dtype(bounds.largest)
    weight = centred_weight(site).to(dtype)
    shape = _output_shape(site)
    bias = _with_zero_point(site, dtype)
    is_folded = bias is not None
    if bias is None and site.bias is not None:
        bias = site.bias.codes.to(dtype)
    product = _biased_product(site, bias, shape)
    zero_point = x.zero_point.to(dtype)

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        codes = values[0].to(dtype)
        return overflow(product(codes if is_folded else codes - zero_point, weight))

    found = _finished(site, accumulate, _unit(site, shape))
    return found if site.output is None else replace(found, run=_sample_by_sample(site, found.run))


def _finished(site: Site, accumulate: Run, unit: Callable[[torch.dtype], Tensor]) -> Lowered:
    """Sums of products as codes of the result, or as reals where it leaves the accelerator in float."""
    if site.output is None:
        return _in_reals(site, accumulate, unit(torch.float32))
    out = site.output

    def ratio(product: torch.dtype, quotient: torch.dtype) -> Tensor:
        return unit(product).to(quotient) / out.scale.to(quotient)

    rescale = rescaler(site, ratio, int(out.zero_point))
    limits, kept = code_bounds(site), carrier(out)
    facts: dict[str, Fact] = {"rule": "sum_of_products", "requantize": rescale, "clamp": limits}
    return Lowered(lambda values: rescale.codes(accumulate(values), limits, kept), accumulate, facts)


def _sample_by_sample(site: Site, run: Run) -> Run:
    """The same, a few samples at a time, so that what is made on the way stays in the cache."""
    given, made = site.input_shape[1:], tuple(site.node.meta["shape"])[1:]
    is_batched = len(given) == len(site.operator.attributes.get("kernel", ())) + 1
    samples = max(1, _PIECE // max(math.prod(given), math.prod(made), 1))

    def pieces(values: Sequence[Tensor]) -> Tensor:
        x = values[0]
        if not is_batched or len(x) <= samples:
            return run(values)
        return torch.cat([run([part]) for part in torch.split(x, samples)])

    return pieces


def lower_matmul(site: Site) -> Lowered:
    """A product of two activations.

    Raises:
        IntegerError: the target leaves open what decides, or the sum may overflow.
    """
    a, b = _two(site)
    count = int(site.operator.attributes["reduced_elements"])
    largest = reach(a) * reach(b) * count
    overflow = overflow_of(site, Bounds(torch.tensor([-largest]), torch.tensor([largest])))
    dtype = exact_dtype(largest)
    zeros = a.zero_point.to(dtype), b.zero_point.to(dtype)

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        return overflow(torch.matmul(values[0].to(dtype) - zeros[0], values[1].to(dtype) - zeros[1]))

    def unit(kind: torch.dtype) -> Tensor:
        return a.scale.to(kind) * b.scale.to(kind)

    return _finished(site, accumulate, unit)


def _two(site: Site) -> tuple[QParams, QParams]:
    if len(site.inputs) == 2:
        return site.inputs[0], site.inputs[1]
    raise IntegerError("a product with a constant tensor cannot be executed exactly yet")


def centred_weight(site: Site) -> Tensor:
    """int64, like the weight."""
    codes, qparams = site.constant.codes.long(), site.constant.qparams
    if isinstance(qparams.granularity, PerGroup):
        raise IntegerError("weights with a scale per group of inputs cannot be executed exactly yet")
    return codes - expand(qparams.zero_point.long(), qparams.granularity, tuple(codes.shape))


def _output_shape(site: Site) -> list[int]:
    """A shape in which [out_channels] broadcasts over the output."""
    operator = site.operator
    if operator.kind == "Gemm":
        return [-1]
    return [-1, *[1] * len(operator.attributes["kernel"])]


def _unit(site: Site, shape: list[int]) -> Callable[[torch.dtype], Tensor]:
    """What one unit of the accumulator stands for: input scale times weight scale."""
    x, w = site.inputs[0], site.constant.qparams
    scale = w.scale
    if not isinstance(w.granularity, PerTensor):
        # A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
        scale = scale.repeat(int(site.operator.attributes["out_channels"]) // len(scale)).reshape(shape)
    return lambda kind: x.scale.to(kind) * scale.to(kind)


def _check_bias(site: Site) -> None:
    """The bias is in units of the accumulator, and none is left out."""
    if site.bias is None:
        if site.operator.bias is not None:
            raise _bias_left_out(site)
        return
    rule = site.kernel.bias if site.kernel is not None else None
    applied = site.target.biases[str(rule)].applied
    if applied == "unknown":
        raise unknown(f"biases.{rule}.applied", applied)
    if applied == "after_multiplier":
        raise IntegerError(f'biases.{rule}.applied = "{applied}" cannot be executed exactly yet')
    unit = _unit(site, [-1])(torch.float32)
    scale = site.bias.qparams.scale
    if bool((site.bias.qparams.zero_point != 0).any()) or not torch.equal(scale.expand(unit.shape), unit):
        raise IntegerError("a bias on another scale than input*weight cannot be executed exactly yet")


def _bias_left_out(site: Site) -> IntegerError:
    """Why an operator's bias is not quantized."""
    rule = site.kernel.bias if site.kernel is not None else None
    if rule is None or rule == "unknown":
        return unknown(f"kernels.{site.kernel_name}.bias", rule)
    if rule == "none":
        return IntegerError(f'kernels.{site.kernel_name}.bias = "none", and the operator has a bias')
    bits = site.target.biases[rule].bits
    if bits == "float":
        return IntegerError(f'biases.{rule}.bits = "float" cannot be executed exactly')
    return unknown(f"biases.{rule}.bits", bits)


def _in_reals(site: Site, accumulate: Run, unit: Tensor) -> Lowered:
    """A result that leaves the accelerator in float32, with the clips that are computed along."""
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
    return Lowered(run, accumulate, facts)


def _with_zero_point(site: Site, dtype: torch.dtype) -> Tensor | None:
    """The bias that makes a product of codes one of centred codes, bias - zero point * sum(weight): [out_channels].

    None where it does not: zeros at the border are codes of 0.0 as they are, and a sum may leave what `dtype` holds.
    """
    x, kind = site.inputs[0], site.operator.kind
    padding = site.operator.attributes.get("padding", 0)
    if kind == "ConvTranspose" or isinstance(padding, str) or np.any(padding) or not dtype.is_floating_point:
        return None
    rows = _weight_rows(site)
    bias = -int(x.zero_point) * rows.sum(1)
    if site.bias is not None:
        bias = bias + site.bias.codes.long()
    largest = rows.abs().sum(1) * max(-x.quant_min, x.quant_max) + bias.abs()
    return bias.to(dtype) if exact_dtype(int(largest.max())) in (dtype, torch.float32) else None


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


def product_of(site: Site) -> Callable[[Tensor, Tensor], Tensor]:
    """The operator's own function, of input and weight, without a bias."""
    node, operator = site.node, site.operator
    target: Any = node.target
    if operator.kind == "Gemm":
        if operator.weight_axis == 0:
            return lambda x, w: torch.nn.functional.linear(x, w)
        return torch.matmul
    rest = list(node.args[3:])
    kwargs = dict(node.kwargs)
    return lambda x, w: target(x, w, None, *rest, **kwargs)
