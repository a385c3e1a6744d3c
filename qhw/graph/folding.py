# SPDX-License-Identifier: Apache-2.0
"""What parameters alone decide is computed once, at capture, and stored: a kernel takes what is stored in a file."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhw.graph.attributes import target_name
from qhw.graph.tensors import assign, fetch, holds, remove, unused_path

__all__ = ["fold_constants"]

_LARGEST = 2**20  # elements; what is made of less than that (a mask from positions) stays computed


def fold_constants(graph: fx.Graph, root: nn.Module, name_of: Callable[[fx.Node], str]) -> None:
    """Store the results of operators that read parameters alone: a weight norm, positions 0 .. n-1, a causal mask.

    What is made of a parameter is a parameter, anything else a buffer. Tensors that nothing reads any more are
    removed. Sizes that vary, random numbers and operators that write into a tensor are left as they are.

    Args:
        graph: Changed in place.
        root: The module that holds its tensors; changed in place.
        name_of: Name of the tensor that holds the result of a node, if it is free.
    """
    values: dict[fx.Node, Any] = {}
    held: dict[fx.Node, int] = {}  # elements of the largest tensor that a result is made of
    learned: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            values[node] = fetch(root, str(node.target))
            held[node] = values[node].numel()
            learned.update({node} if isinstance(values[node], nn.Parameter) else ())
        elif _is_foldable(node) and all(source in values for source in node.all_input_nodes):
            args: Any = fx.map_arg(node.args, values.__getitem__)
            kwargs: Any = fx.map_arg(node.kwargs, values.__getitem__)
            with torch.no_grad():
                values[node] = node.target(*args, **kwargs)
            held[node] = max((held[source] for source in node.all_input_nodes), default=0)
            learned.update({node} if any(source in learned for source in node.all_input_nodes) else ())
    read = _read(graph)
    for node, value in values.items():
        is_read = any(user not in values for user in node.users)
        is_result = node.op != "get_attr" and isinstance(value, Tensor)
        if is_result and is_read and value.numel() <= max(_LARGEST, held[node]):
            _store(graph, root, node, value, node in learned, name_of(node))
    _drop(graph, values)
    for target in read - _read(graph):
        remove(root, target)


def _read(graph: fx.Graph) -> set[str]:
    return {str(node.target) for node in graph.nodes if node.op == "get_attr"}


def _is_foldable(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    is_pure = not node.target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in node.target.tags
    return is_pure and not target_name(node).startswith("aten._assert")


def _store(graph: fx.Graph, root: nn.Module, node: fx.Node, value: Tensor, is_learned: bool, name: str) -> None:
    path = _same(root, value) or unused_path(root, name)
    if not holds(root, path):
        held = value.detach().clone(memory_format=torch.contiguous_format)
        assign(root, path, nn.Parameter(held) if is_learned and held.is_floating_point() else held)
    with graph.inserting_before(node):
        stored = graph.get_attr(path)
    stored.meta["shape"] = tuple(value.shape)
    node.replace_all_uses_with(stored)


def _same(root: nn.Module, value: Tensor) -> str | None:
    """The tensor that a result is, seen as it is (detached, contiguous as it was): it stays shared."""
    for name, tensor in root.state_dict(keep_vars=True).items():
        is_alike = (tensor.dtype, tensor.shape, tensor.stride()) == (value.dtype, value.shape, value.stride())
        if is_alike and tensor.numel() and tensor.data_ptr() == value.data_ptr():
            return str(name)
    return None


def _drop(graph: fx.Graph, folded: dict[fx.Node, Any]) -> None:
    for node in reversed(list(graph.nodes)):
        if node in folded and not node.users:
            graph.erase_node(node)
