# SPDX-License-Identifier: Apache-2.0
"""Plain numbers beside a tensor become constants of one element, which are quantized as any constant operand is."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx, nn

from qhw.graph.attributes import argument, target_name
from qhw.graph.tensors import assign, unused_path

__all__ = ["store_numbers"]

_aten = torch.ops.aten
_LARGEST = 65504.0  # of float16. Larger numbers mask, as -1e9 does; no grid holds them beside others

Operands = tuple[Any, float, bool]
"""Function to call, the number to store, and whether that comes first."""


def store_numbers(graph: fx.Graph, root: nn.Module, is_float: Callable[[fx.Node], bool]) -> None:
    """Let sums and products of a real tensor and a number read that number from a buffer.

    `x - 2` becomes `x + (-2)` and `x / 4` becomes `x * 0.25`, as accelerators add and multiply; for a divisor that is
    no power of two the quotient differs in its last bit.

    Args:
        graph: Nodes with `meta["name"]`; changed in place.
        root: The module that holds its tensors; changed in place.
        is_float: Whether a node's value is a real tensor.
    """
    for node in graph.nodes:
        form = _FORMS.get(target_name(node)) if node.op == "call_function" else None
        if form is None or argument(node, 2, "alpha", 1) != 1:
            continue
        numbers = [index for index in (0, 1) if _is_number(node.args[index])]
        if len(numbers) != 1 or not isinstance(node.args[1 - numbers[0]], fx.Node) or not is_float(node):
            continue
        changed = form(node.args[numbers[0]], numbers[0] == 0)
        tensor = node.args[1 - numbers[0]]
        if changed is None or not is_float(tensor):
            continue
        function, number, is_first = changed
        path = unused_path(root, f"{node.name}_number")
        assign(root, path, torch.tensor(number))
        with graph.inserting_before(node):
            stored = graph.get_attr(path)
        stored.meta["shape"] = ()
        node.target, node.kwargs = function, {}
        node.args = (stored, tensor) if is_first else (tensor, stored)


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and abs(value) <= _LARGEST


def _added(number: float, is_first: bool) -> Operands:
    return _aten.add.Tensor, float(number), is_first


def _subtracted(number: float, is_first: bool) -> Operands:
    if is_first:
        return _aten.sub.Tensor, float(number), True
    return _aten.add.Tensor, -float(number), False


def _subtracted_from(number: float, is_first: bool) -> Operands:
    return _subtracted(number, not is_first)


def _multiplied(number: float, is_first: bool) -> Operands:
    return _aten.mul.Tensor, float(number), is_first


def _divided(number: float, is_first: bool) -> Operands | None:
    if is_first or not abs(number) >= 1 / _LARGEST:
        return None
    return _aten.mul.Tensor, 1 / number, False


_FORMS: Mapping[str, Callable[[float, bool], Operands | None]] = MappingProxyType(
    {
        "aten.add.Tensor": _added,
        "aten.add.Scalar": _added,
        "aten.sub.Tensor": _subtracted,
        "aten.sub.Scalar": _subtracted,
        "aten.rsub.Scalar": _subtracted_from,
        "aten.mul.Tensor": _multiplied,
        "aten.mul.Scalar": _multiplied,
        "aten.div.Tensor": _divided,
        "aten.div.Scalar": _divided,
    }
)
