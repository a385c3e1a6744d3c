# SPDX-License-Identifier: Apache-2.0
"""An operator with weights as products of matrices whose inner index runs in the target's order, a piece at a time."""

from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from qhw.integer.accumulate import Order
from qhw.integer.site import Site
from qhw.integer.weights import matrix_form

__all__ = ["by_rows", "in_order"]

_PIECE = 2**22  # elements of the patches or the sums of one piece, whichever has more


def in_order(rows: Tensor, site: Site, order: Order | None) -> Tensor:
    """The inputs of an output in the order in which the target sums them.

    Args:
        rows: [*any, inputs of an output], as `MatrixForm.weight_rows` has them.
        site: The operator.
        order: None: as they are.
    """
    return rows if order is None else rows[..., matrix_form(site).reduction_order(order)]


def by_rows(site: Site, x: Tensor, order: Order | None, function: Callable[[Tensor], Tensor]) -> Tensor:
    """The operator's output, made of its patches in order, a bounded number of them at a time.

    Args:
        site: A Conv, DepthwiseConv or Gemm.
        x: Its input; what lies beyond the border is 0.
        order: Of the inputs of an output.
        function: [groups, rows, inputs of an output] -> [groups, rows, outputs of a group].
    """
    form = matrix_form(site)
    if site.operator.kind == "Gemm":
        flat = x.reshape(-1, x.shape[-1])
        count = _rows_of_a_piece(x.shape[-1], form.out_channels)
        found = [function(part[None])[0] for part in torch.split(flat, count)]
        return torch.cat(found).reshape(*x.shape[:-1], -1)
    rank = len(site.operator.attributes["kernel"])
    windows = form.windows(x)  # [samples, *positions, channels, *kernel], a view
    places = windows.shape[: 1 + rank]
    count = _rows_of_a_piece(prod(windows.shape[1 + rank :]), form.out_channels)
    found = []
    for index in torch.split(torch.arange(prod(places)), count):
        patches = windows[tuple(torch.unravel_index(index, places))].reshape(len(index), form.groups, -1)
        found.append(function(in_order(patches, site, order).transpose(0, 1)).transpose(0, 1).flatten(1))
    made = torch.cat(found).reshape(*places, -1).movedim(-1, 1).contiguous()
    return made if x.dim() == rank + 2 else made[0]


def _rows_of_a_piece(inputs: int, outputs: int) -> int:
    return max(1, _PIECE // max(inputs, outputs, 1))
