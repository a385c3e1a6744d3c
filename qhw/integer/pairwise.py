# SPDX-License-Identifier: Apache-2.0
"""Sums of two neighbouring products in a register of their own: what is multiplied, and how far they reach."""

from functools import reduce
from itertools import product

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.accumulate import Bounds, Order, Pairs, operands_of
from qhw.integer.reduction import by_rows, in_order
from qhw.integer.site import Site
from qhw.integer.weights import centred_weight, matrix_form
from qhw.numerics import Operands, multiplied_offset, multiplied_range, pair_sums
from qhw.schema import Pairwise

__all__ = [
    "check_raw_sums",
    "furthest_pairs",
    "matmul_pair_bounds",
    "multiplied_weight",
    "pair_bounds",
    "pair_reach",
    "stated_pair_bounds",
    "stated_pairs",
]


def multiplied_weight(site: Site, operands: Operands) -> Tensor:
    """The weight as it is multiplied: int64, like the weight."""
    return centred_weight(site) if operands == "centred" else site.constant.codes.long()


def pair_reach(site: Site, order: Order | None, operands: Operands) -> tuple[Tensor, Tensor]:
    """Lowest and highest sum of each pair of products: int64 [groups, outputs of a group, pairs].

    Args:
        site: An operator with weights.
        order: Pairs are neighbours in it, from the first product on; an odd one stays alone. None: the two products
            that reach furthest, one pair.
        operands: What is multiplied.
    """
    rows = matrix_form(site).weight_rows(multiplied_weight(site, operands))
    low, high = multiplied_range(site.inputs[0], operands)
    if order is None:
        count = min(2, rows.shape[-1])
        lowest = torch.minimum(low * rows, high * rows).topk(count, largest=False).values.clamp(max=0)
        highest = torch.maximum(low * rows, high * rows).topk(count).values.clamp(min=0)
        return lowest.sum(-1, keepdim=True), highest.sum(-1, keepdim=True)
    return pair_sums(in_order(rows, site, order), low, high)


def pair_bounds(site: Site, order: Order | None, operands: Operands) -> Bounds:
    """What sums of two products of an operator with weights reach, per output channel; see `pair_reach`."""
    lowest, highest = pair_reach(site, order, operands)
    return Bounds(lowest.amin(-1).flatten(), highest.amax(-1).flatten())


def stated_pair_bounds(site: Site) -> Bounds:
    """What sums of two products reach for all that the target leaves open: of any two, of whatever is multiplied.

    The target has such sums.
    """
    spec = site.accumulator[1]
    assert isinstance(spec.pairwise, Pairwise)
    # The taps of a transposed convolution that one output meets depend on its position, and so do its neighbours.
    order = spec.order if spec.order != "unknown" and site.operator.kind != "ConvTranspose" else None
    found = [pair_bounds(site, order, form) for form in operands_of(spec.pairwise)]
    lowest, highest = (torch.stack(ends) for ends in ([b.lowest for b in found], [b.highest for b in found]))
    return Bounds(lowest.amin(0), highest.amax(0))


def stated_pairs(site: Site) -> tuple[Order, Operands] | None:
    """The order and the operands of sums of two products, where the target says both."""
    spec = site.accumulator[1]
    assert isinstance(spec.pairwise, Pairwise)
    if spec.order is None or spec.order == "unknown" or site.operator.kind == "ConvTranspose":
        return None
    forms = operands_of(spec.pairwise)
    return (spec.order, forms[0]) if len(forms) == 1 else None


def furthest_pairs(site: Site, x: Tensor, pairs: tuple[Order, Operands], is_highest: bool) -> Tensor:
    """The highest or lowest of the sums of two products that each output meets: int64, like the output.

    Args:
        site: A Conv, DepthwiseConv or Gemm.
        x: Codes minus zero point, int64.
        pairs: What `stated_pairs` found.
        is_highest: Which of both.
    """
    order, operands = pairs
    rows = in_order(matrix_form(site).weight_rows(multiplied_weight(site, operands)), site, order)
    columns, offset = rows.transpose(1, 2), multiplied_offset(site.inputs[0], operands)
    further = torch.maximum if is_highest else torch.minimum

    def furthest(patches: Tensor) -> Tensor:
        sums = (
            torch.matmul(patches[..., i : i + 2] + offset, columns[..., i : i + 2, :])
            for i in range(0, patches.shape[-1], 2)
        )
        return reduce(further, sums)

    return by_rows(site, x, order, furthest)


def matmul_pair_bounds(site: Site, order: Order | None, operands: Operands) -> Bounds:
    """What sums of two products of two activations reach; the order makes no difference."""
    del order
    a, b = site.inputs
    second: Operands = "centred" if operands == "centred" else "stored"
    ends = [x * y for x, y in product(multiplied_range(a, operands), multiplied_range(b, second))]
    count = min(2, int(site.operator.attributes["reduced_elements"]))
    return Bounds(torch.tensor([count * min(*ends, 0)]), torch.tensor([count * max(*ends, 0)]))


def check_raw_sums(site: Site, pairs: Pairs, largest: int) -> None:
    """Sums of codes that are not centred reach further than centred ones: those of an accumulator that wraps may.

    Args:
        site: The operator.
        pairs: What is multiplied.
        largest: Magnitude that sums of it can reach.

    Raises:
        IntegerError: they may leave an accumulator that does not wrap.
    """
    path, spec = site.accumulator
    bits = spec.bits if isinstance(spec.bits, int) else None
    if pairs.operands != "centred" and bits is not None and spec.overflow != "wrap" and largest >= 1 << (bits - 1):
        raise IntegerError(
            f'{path}.pairwise.operands = "{pairs.operands}": sums of such codes may need {largest.bit_length() + 1} '
            f"bits, {path}.bits = {bits}, and only an accumulator that wraps can be executed exactly then"
        )
