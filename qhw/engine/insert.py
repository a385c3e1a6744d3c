# SPDX-License-Identifier: Apache-2.0
"""Putting modules into a graph at its quantization points: quantizers to simulate, taps to observe."""

import re
from collections.abc import Callable, Container, Iterable

from torch import fx, nn

from qhw.graph import Graph, QuantPoint

__all__ = ["insert_modules"]


def insert_modules(
    graph: Graph,
    points: Iterable[QuantPoint],
    make: Callable[[QuantPoint], nn.Module | None],
) -> dict[str, str]:
    """Call a module on the tensor of each point; what it returns takes the tensor's place.

    Points of one group share the module that the first of them makes. The modules lie in a submodule `quantizers`, or
    `quantizers_1` and so on where the model has one of that name.

    Args:
        graph: Changed in place.
        points: Where.
        make: Module for a point; None leaves the point out.

    Returns:
        Group -> path of its module.
    """
    holder = nn.ModuleDict()
    holder_name = _unused(dir(graph.module), "quantizers")
    graph.module.add_module(holder_name, holder)
    points = tuple(points)
    # A view that the host computes is a tensor of its own, with a point of its own.
    views = {op.name for op in graph.operators if op.is_view} - {point.tensor for point in points}
    paths: dict[str, str] = {}
    # Edges first: they read what the tensor's own point will put in place of the tensor.
    for point in sorted(points, key=lambda p: p.role != "edge"):
        if point.group not in paths:
            new = make(point)
            if new is None:
                continue
            key = _unused(holder.keys(), re.sub(r"\W", "_", point.group))  # module names hold no dots
            holder[key] = new
            paths[point.group] = f"{holder_name}.{key}"
        _insert(graph, point, paths[point.group], views)
    graph.refresh()
    return paths


def _unused(taken: Container[str], name: str) -> str:
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _insert(graph: Graph, point: QuantPoint, path: str, views: set[str]) -> None:
    if point.role in ("weight", "bias"):
        for node in _parameter_nodes(graph, point):
            _after(graph, node, path, [user for user in node.users if user.meta.get("name") in point.consumers])
    elif point.role == "edge":
        operator = graph.node(point.operator)
        _before(graph, operator, int(point.name.rpartition(".")[2]), path)
    elif point.role == "activation":
        node = graph.node(point.tensor)
        _after(graph, node, path, list(node.users))
    else:
        _for_readers(graph, graph.node(point.tensor), path, point.consumers, views)


def _parameter_nodes(graph: Graph, point: QuantPoint) -> list[fx.Node]:
    return [node for node in graph.module.graph.nodes if node.op == "get_attr" and node.target == point.tensor]


def _for_readers(graph: Graph, node: fx.Node, path: str, readers: Container[str], views: set[str]) -> None:
    """Quantize a host tensor for its readers on the accelerator alone; views between them are looked through."""
    mine = []
    for user in list(node.users):
        name = user.meta.get("name")
        if user.op != "output" and (name is None or name in readers):  # without a name: the quantizer of an edge
            mine.append(user)
        elif name in views:
            _for_readers(graph, user, path, readers, views)
    _after(graph, node, path, mine)


def _after(graph: Graph, node: fx.Node, path: str, users: list[fx.Node]) -> None:
    if not users:
        return
    with graph.module.graph.inserting_after(node):
        quantized = graph.module.graph.call_module(path, (node,))
    _copy_meta(node, quantized)
    for user in users:
        user.replace_input_with(node, quantized)


def _before(graph: Graph, operator: fx.Node, index: int, path: str) -> None:
    """Replace one operand, counted among the operator's values."""
    count = -1
    with graph.module.graph.inserting_before(operator):
        quantized = graph.module.graph.call_module(path, ())

    def swap(argument: fx.Node) -> fx.Node:
        nonlocal count
        is_float = str(argument.meta.get("dtype", "")).startswith(("float", "bfloat"))
        if argument.op == "get_attr" or "shape" not in argument.meta or not is_float:
            return argument
        count += 1
        if count != index:
            return argument
        quantized.args = (argument,)
        _copy_meta(argument, quantized)
        return quantized

    operator.args = fx.map_arg(operator.args, swap)


def _copy_meta(source: fx.Node, target: fx.Node) -> None:
    target.meta.update({key: source.meta[key] for key in ("shape", "dtype") if key in source.meta})
