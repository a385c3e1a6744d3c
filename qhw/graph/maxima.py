# SPDX-License-Identifier: Apache-2.0
"""Maxima and minima whose places nobody reads, rewritten to plain reductions, which are operators with a kind."""

import operator
from typing import Any

import torch
from torch import fx

from qhw.graph.attributes import argument, target_name

__all__ = ["reduce_maxima"]

_aten = torch.ops.aten
_ALONG = {"aten.max.dim": _aten.amax.default, "aten.min.dim": _aten.amin.default}
_POOLS = {f"aten.adaptive_max_pool{rank}d.default": rank for rank in (1, 2, 3)}


def reduce_maxima(graph: fx.Graph) -> None:
    """`x.max(dim)[0]` and adaptive max pooling to one value become `amax`, where the places are not read.

    The values are the same to the bit. Of equal maxima, `amax` hands the gradient to all, not to the first.
    """
    for node in list(graph.nodes):
        form = _reduction(node)
        if form is None or not all(_is_value(user) for user in node.users):
            continue
        node.target, node.args, node.kwargs = form[0], form[1], {}
        for user in list(node.users):
            user.replace_all_uses_with(node)
            graph.erase_node(user)


def _reduction(node: fx.Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The reduction that gives a node's values, and its arguments."""
    name = target_name(node) if node.op == "call_function" else ""
    if name in _ALONG:
        return _ALONG[name], (node.args[0], [argument(node, 1, "dim", 0)], argument(node, 2, "keepdim", False))
    if name in _POOLS and set(argument(node, 1, "output_size", ())) == {1}:
        return _aten.amax.default, (node.args[0], list(range(-_POOLS[name], 0)), True)
    return None


def _is_value(user: fx.Node) -> bool:
    """Whether it picks the values, or the places for nobody."""
    return user.target is operator.getitem and (user.args[1:] == (0,) or not user.users)
