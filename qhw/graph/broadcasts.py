# SPDX-License-Identifier: Apache-2.0
"""Spreading a tensor that the next operator spreads by itself is left out: `x * gate.expand_as(x)` is `x * gate`."""

import torch
from torch import fx

from qhw.graph.attributes import target_name

__all__ = ["leave_broadcasts"]

_SPREADS = ("aten.expand.default", "aten.expand_as.default")
_BROADCASTING = frozenset(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div")) | {
    "aten.maximum.default",
    "aten.minimum.default",
}


def leave_broadcasts(graph: fx.Graph) -> None:
    """Let operators that broadcast read what was spread for them, where the other operand has the full shape.

    Args:
        graph: As torch.export gives it, with `meta["val"]` of each tensor; changed in place.
    """
    for node in list(graph.nodes):
        if node.op != "call_function" or target_name(node) not in _SPREADS:
            continue
        source, shape = node.args[0], node.meta["val"].shape
        for user in list(node.users):
            others = [operand for operand in user.args[:2] if operand is not node]
            if target_name(user) in _BROADCASTING and len(others) == 1 and _shape(others[0]) == shape:
                user.replace_input_with(node, source)
        if not node.users:
            graph.erase_node(node)


def _shape(operand: object) -> torch.Size | None:
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    return value.shape if isinstance(value, torch.Tensor) else None
