# SPDX-License-Identifier: Apache-2.0
"""One name for each function: torch exports `concat`, `clip` or `multiply` as operators of their own."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from qhw.graph.attributes import argument, target_name

__all__ = ["use_one_name"]

_aten = torch.ops.aten

PACKETS: Mapping[str, str] = MappingProxyType(
    {
        "concat": "cat",
        "concatenate": "cat",
        "multiply": "mul",
        "divide": "div",
        "true_divide": "div",
        "subtract": "sub",
        "negative": "neg",
        "absolute": "abs",
        "clip": "clamp",
        "greater": "gt",
        "greater_equal": "ge",
        "less": "lt",
        "less_equal": "le",
        "not_equal": "ne",
        "arccos": "acos",
        "arccosh": "acosh",
        "arcsin": "asin",
        "arcsinh": "asinh",
        "arctan": "atan",
        "arctan2": "atan2",
        "arctanh": "atanh",
        "fix": "trunc",
        "moveaxis": "movedim",
        "broadcast_to": "expand",
        "unsafe_chunk": "chunk",
        "special_expit": "sigmoid",
        "special_erf": "erf",
        "special_logsumexp": "logsumexp",
        "__and__": "bitwise_and",
        "__or__": "bitwise_or",
        "__xor__": "bitwise_xor",
    }
)
"""Another name -> the name, with the same overloads and arguments."""

OVERLOADS: Mapping[str, Any] = MappingProxyType(
    {
        "swapdims.default": _aten.transpose.int,
        "swapaxes.default": _aten.transpose.int,
        "max.other": _aten.maximum.default,
        "min.other": _aten.minimum.default,
        "special_softmax.default": _aten.softmax.int,
        "special_log_softmax.default": _aten.log_softmax.int,
    }
)
"""Another overload -> the one, with the same arguments."""


def use_one_name(graph: fx.Graph) -> None:
    """Rewrite operators that have a second name, or are another one with certain arguments.

    Args:
        graph: As torch.export gives it, with `meta["val"]` of each tensor; changed in place.
    """
    for node in graph.nodes:
        if node.op != "call_function" or not target_name(node).startswith("aten."):
            continue
        _, packet, overload = target_name(node).split(".")
        # In-place forms keep their underscore: they become pure ones later.
        name = packet if packet.startswith("__") else packet.removesuffix("_")
        if name in PACKETS:
            plain = getattr(_aten, PACKETS[name] + packet[len(name) :], None)
            node.target = getattr(plain, overload, node.target)
        elif f"{packet}.{overload}" in OVERLOADS:
            node.target = OVERLOADS[f"{packet}.{overload}"]
        if (rule := _FORMS.get(target_name(node))) is not None:
            rule(node)


def _as_permutation(node: fx.Node) -> None:
    source, moved, places = node.args
    rank = node.meta["val"].dim()
    put = {place % rank: axis % rank for axis, place in zip(moved, places, strict=True)}  # type: ignore[arg-type]
    rest = iter([axis for axis in range(rank) if axis not in put.values()])
    node.target = _aten.permute.default
    node.args = (source, [put[place] if place in put else next(rest) for place in range(rank)])


def _as_swap(node: fx.Node) -> None:
    node.target, node.args = _aten.transpose.int, (node.args[0], -2, -1)


def _as_pad(node: fx.Node) -> None:
    value = argument(node, 2, "value", 0)
    node.target, node.args, node.kwargs = _aten.pad.default, (*node.args[:2], "constant", float(value)), {}


def _as_product(node: fx.Node) -> None:
    """A square, which accelerators multiply; torch computes it so, too."""
    if argument(node, 1, "exponent", 2) == 2 and node.meta["val"].is_floating_point():
        node.target, node.args, node.kwargs = _aten.mul.Tensor, (node.args[0], node.args[0]), {}


def _as_concatenation(axis: int) -> Callable[[fx.Node], None]:
    """Tensors of too few axes get new ones before they are stacked: those stay as they are."""

    def rewrite(node: fx.Node) -> None:
        parts: Any = node.args[0]
        if all(part.meta["val"].dim() > max(axis, 1) for part in parts):
            node.target, node.args = _aten.cat.default, (parts, axis)

    return rewrite


_FORMS: Mapping[str, Callable[[fx.Node], None]] = MappingProxyType(
    {
        "aten.movedim.intlist": _as_permutation,
        "aten.mT.default": _as_swap,
        "aten.constant_pad_nd.default": _as_pad,
        "aten.square.default": _as_product,
        "aten.pow.Tensor_Scalar": _as_product,
        "aten.hstack.default": _as_concatenation(1),
        "aten.vstack.default": _as_concatenation(0),
        "aten.row_stack.default": _as_concatenation(0),
        "aten.dstack.default": _as_concatenation(2),
    }
)
