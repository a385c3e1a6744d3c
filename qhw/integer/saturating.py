# SPDX-License-Identifier: Apache-2.0
"""Sums that are no longer exact on the way: pairs of products that leave their register, accumulators that saturate."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.accumulate import Bounds, Pairs, Saturation, Summation, summation_of
from qhw.integer.bias import accumulated_bias
from qhw.integer.bounds import matmul_bounds, product_bounds, saturating_bounds
from qhw.integer.codes import reach
from qhw.integer.exact import exact_dtype
from qhw.integer.pairwise import check_raw_sums, matmul_pair_bounds, multiplied_weight, pair_bounds, pair_reach
from qhw.integer.reduction import by_rows, in_order
from qhw.integer.site import Site
from qhw.integer.weights import centred_weight, matrix_form, output_shape, product_of
from qhw.numerics import Operands, multiplied_offset, multiplied_range

__all__ = ["is_plain_sum", "matmul_on_the_way", "sum_on_the_way"]

Accumulate = Callable[[Tensor], Tensor]


def is_plain_sum(site: Site) -> bool:
    """Whether an operator's accumulators are its sums of products and the codes of its bias, wrapped at most.

    Args:
        site: A Conv, DepthwiseConv, ConvTranspose, Gemm or MatMul that can be executed.
    """
    if site.weight is None:
        return summation_of(site, matmul_bounds(site), partial(matmul_pair_bounds, site)).is_exact
    bounds = saturating_bounds(site, product_bounds(site))
    bias = accumulated_bias(site)
    added = site.bias is None or (bias is not None and torch.equal(bias, site.bias.codes.long()))
    return added and summation_of(site, bounds, partial(pair_bounds, site)).is_exact


def sum_on_the_way(site: Site, summation: Summation, bounds: Bounds, bias: Tensor | None) -> Accumulate:
    """The accumulators of an operator with weights, summed in the target's order.

    Args:
        site: The operator.
        summation: What happens on the way.
        bounds: Of its exact sums, in any order.
        bias: int64 [out_channels], in units of the accumulator.

    Returns:
        Callable: Codes minus zero point, int64 -> accumulators, whole numbers.

    Raises:
        IntegerError: the operator is a transposed convolution, or the target asks for what qhw does not have.
    """
    pairs, saturation = summation.pairs, summation.saturation
    is_ordered = pairs is not None or (saturation is not None and saturation.count is not None)
    if site.operator.kind == "ConvTranspose" and is_ordered:
        raise IntegerError("a ConvTranspose whose sums depend on their order cannot be executed exactly yet")
    if saturation is not None and saturation.count is not None:
        return _in_steps(site, saturation, pairs, bias)
    product, dtype = product_of(site), exact_dtype(bounds.largest)
    weight = centred_weight(site).to(dtype)
    added = None if bias is None else bias.reshape(output_shape(site)).to(dtype)
    excess = None if pairs is None else _pair_excess(site, pairs)

    def accumulate(x: Tensor) -> Tensor:
        total = product(x.to(dtype), weight)
        if excess is not None:
            total = total + excess(x)
        return _finished(total, added, summation)

    return accumulate


def _finished(total: Tensor, bias: Tensor | None, summation: Summation) -> Tensor:
    """The sum of all products with its bias."""
    saturation = summation.saturation
    if saturation is None:
        return summation.finish(total if bias is None else total + bias)
    if bias is None:
        return saturation.stopped(total)
    if saturation.bias_first:
        return saturation.stopped(total + saturation.stopped(bias))
    return saturation.stopped(saturation.stopped(total) + bias)


def _pair_excess(site: Site, pairs: Pairs) -> Accumulate:
    """What registers of two products lose or gain against exact sums: of pairs that can leave them."""
    lowest, highest = pair_reach(site, pairs.order, pairs.operands)
    half = 1 << (pairs.bits - 1)
    leaving = ((lowest < -half) | (highest >= half)).flatten(0, 1).any(0).nonzero().flatten().tolist()
    # A register that wraps changes a sum by no more than twice what it holds beyond its end.
    dtype = exact_dtype(4 * int(torch.maximum(highest.abs(), lowest.abs()).sum(-1).max()))
    rows = matrix_form(site).weight_rows(multiplied_weight(site, pairs.operands))
    x_ends = multiplied_range(site.inputs[0], pairs.operands)
    check_raw_sums(site, pairs, 2 * int(rows.abs().sum(-1).max()) * max(map(abs, x_ends)))
    columns = in_order(rows, site, pairs.order).transpose(1, 2).contiguous().to(dtype)
    offset = multiplied_offset(site.inputs[0], pairs.operands)

    def excess(patches: Tensor) -> Tensor:
        return _excess(patches.to(dtype) + offset, columns, pairs, (2 * pair for pair in leaving))

    return lambda x: by_rows(site, x, pairs.order, excess)


def _in_steps(site: Site, saturation: Saturation, pairs: Pairs | None, bias: Tensor | None) -> Accumulate:
    """A sum that saturates every few products."""
    assert saturation.count is not None
    form = matrix_form(site)
    largest = int(form.weight_rows(centred_weight(site)).abs().sum(-1).max()) * reach(site.inputs[0])
    if pairs is not None:
        _check_steps_of_pairs(site, saturation, pairs)
    more = 0 if bias is None else int(bias.abs().max())
    dtype = exact_dtype((1 << (saturation.bits - 1)) + 2 * largest + more)
    rows = in_order(form.weight_rows(centred_weight(site)), site, saturation.order).to(dtype)
    columns = rows.transpose(1, 2).contiguous()
    added = None if bias is None else bias.reshape(form.groups, 1, -1).to(dtype)

    def total(patches: Tensor) -> Tensor:
        return _saturated_sum(patches.to(dtype), columns, saturation, pairs, added)

    return lambda x: by_rows(site, x, saturation.order, total)


def matmul_on_the_way(site: Site, summation: Summation, bounds: Bounds) -> Callable[[Tensor, Tensor], Tensor]:
    """The accumulators of a product of two activations, summed in the target's order.

    Args:
        site: The operator.
        summation: What happens on the way.
        bounds: Of its exact sums, in any order.

    Returns:
        Callable: Codes minus zero points, int64 [*batch, rows, inner] and [*batch, inner, columns] -> accumulators.

    Raises:
        IntegerError: an operand is a vector, or the target asks for what qhw does not have.
    """
    pairs, saturation = summation.pairs, summation.saturation
    if any(len(node.meta["shape"]) < 2 for node in site.node.all_input_nodes):
        raise IntegerError("a product with a vector whose sums depend on their order cannot be executed exactly yet")
    if saturation is not None and saturation.count is not None:
        if pairs is not None:
            _check_steps_of_pairs(site, saturation, pairs)
        kept = exact_dtype((1 << (saturation.bits - 1)) + 2 * bounds.largest)
        return lambda x, y: _saturated_sum(x.to(kept), y.to(kept), saturation, pairs, None)
    excess, reached = (None, 0) if pairs is None else _matmul_pair_excess(site, pairs)
    dtype = exact_dtype(bounds.largest + reached)

    def accumulate(x: Tensor, y: Tensor) -> Tensor:
        x, y = x.to(dtype), y.to(dtype)
        total = torch.matmul(x, y)
        return _finished(total if excess is None else total + excess(x, y), None, summation)

    return accumulate


def _matmul_pair_excess(site: Site, pairs: Pairs) -> tuple[Callable[[Tensor, Tensor], Tensor], int]:
    """Of a product of two activations, and a bound of its magnitude."""
    a, b = site.inputs
    second: Operands = "centred" if pairs.operands == "centred" else "stored"
    offset_a, offset_b = multiplied_offset(a, pairs.operands), multiplied_offset(b, second)
    ends = [max(map(abs, multiplied_range(q, form))) for q, form in ((a, pairs.operands), (b, second))]
    largest = ends[0] * ends[1] * int(site.operator.attributes["reduced_elements"])
    check_raw_sums(site, pairs, 2 * largest)

    def excess(x: Tensor, y: Tensor) -> Tensor:
        return _excess(x + offset_a, y + offset_b, pairs, range(0, x.shape[-1], 2))

    # A register that wraps changes a sum by no more than twice what it holds beyond its end.
    return excess, 4 * largest


def _check_steps_of_pairs(site: Site, saturation: Saturation, pairs: Pairs) -> None:
    path = site.accumulator[0]
    second = site.weight.qparams if site.weight is not None else site.inputs[1]
    is_centred = multiplied_offset(site.inputs[0], pairs.operands) == 0 and not bool((second.zero_point != 0).any())
    if pairs.operands != "centred" and not is_centred:
        raise IntegerError(
            f'{path}.pairwise.operands = "{pairs.operands}" with a zero point cannot be executed exactly where the '
            "accumulator saturates on the way"
        )
    if saturation.count is not None and saturation.count % 2:
        raise IntegerError(f"{path}.products_per_step must be even with pairwise sums; got {saturation.count}")


def _excess(x: Tensor, columns: Tensor, pairs: Pairs, starts: Iterable[int]) -> Tensor:
    """Sum over pairs of what their register holds, minus what it should: [*batch, rows, outputs]."""
    found = x.new_zeros(())
    for start in starts:
        sums = torch.matmul(x[..., start : start + 2], columns[..., start : start + 2, :])
        found = found + (pairs.narrowed(sums) - sums)
    return found.expand(*x.shape[:-1], columns.shape[-1]) if found.dim() == 0 else found


def _saturated_sum(
    x: Tensor, columns: Tensor, saturation: Saturation, pairs: Pairs | None, bias: Tensor | None
) -> Tensor:
    """[*batch, rows, inner] @ [*batch, inner, outputs], the sum stopped at its ends every `count` products."""
    assert saturation.count is not None
    width = 2 if pairs is not None else saturation.count
    total = x.new_zeros(())
    if bias is not None and saturation.bias_first:
        total = saturation.stopped(bias)
    for start in range(0, x.shape[-1], saturation.count):
        step = x.new_zeros(())
        for at in range(start, min(start + saturation.count, x.shape[-1]), width):
            end = min(at + width, start + saturation.count)
            sums = torch.matmul(x[..., at:end], columns[..., at:end, :])
            step = step + (sums if pairs is None else pairs.narrowed(sums))
        total = saturation.stopped(total + step)
    if bias is not None and not saturation.bias_first:
        total = saturation.stopped(total + bias)
    return total
