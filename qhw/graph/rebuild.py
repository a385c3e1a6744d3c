# SPDX-License-Identifier: Apache-2.0
"""From an exported program to a plain `fx.GraphModule`: readable names, switching batch norm, shared parameters."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhw.errors import CaptureError
from qhw.graph.aliases import use_one_name
from qhw.graph.attention import split_attention
from qhw.graph.broadcasts import leave_broadcasts
from qhw.graph.folding import fold_constants
from qhw.graph.inplace import remove_inplace
from qhw.graph.kinds import ATEN_KINDS
from qhw.graph.maxima import reduce_maxima
from qhw.graph.numbers import store_numbers
from qhw.graph.operator import target_name
from qhw.graph.switches import Switches, layer_path
from qhw.graph.tensors import assign, fetch

__all__ = ["rebuild"]


def rebuild(exported: torch.export.ExportedProgram, model: nn.Module) -> fx.GraphModule:
    """A plain graph of ATen operators over the model's own tensor names.

    Batch norm and dropout come back as submodules that read `self.training`; parameters that the model shares are one
    parameter here, reachable under all their names. Tensors that the outputs do not depend on are left out. What
    parameters alone decide is stored, and so are numbers beside real tensors.

    Raises:
        CaptureError: an in-place operator or control flow that a plain graph cannot hold.
    """
    module = exported.module()
    use_one_name(module.graph)
    reduce_maxima(module.graph)
    split_attention(module)
    leave_broadcasts(module.graph)
    aliases = _aliases(model)
    root, graph = nn.Module(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" or (node.op == "get_attr" and not node.users):  # guards; unused tensors
            continue
        if node.op == "output":
            graph.output(_output(exported, node, copies))
        elif node.op == "get_attr":
            copies[node] = _parameter(graph, root, str(node.target), _value(module, node), aliases)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].meta = {}
            if copies[node].target is torch.ops.aten.view.default:
                # The same function, and it takes channels-last tensors too, which the convolution before may give.
                copies[node].target = torch.ops.aten.reshape.default
    remove_inplace(graph)
    origins = {copy: node for node, copy in copies.items()}
    fold_constants(graph, root, lambda copy: _stored_name(copy, origins))
    switches, names, left = Switches(root, model), _Names(), set(graph.nodes)
    for node, copy in copies.items():
        if copy.op == "get_attr" or copy not in left:
            continue
        switches.switch(node, copy)
        names.take(copy, str(node.target) if copy.op == "placeholder" else _operator_name(node, copy))
    store_numbers(graph, root, lambda copy: _is_real(origins.get(copy)))
    _drop_unused(graph)
    result = fx.GraphModule(root, graph, class_name="QhwGraph")
    _register_aliases(result, aliases)
    return result


class _Names:
    """Unique operator names, and fx names made from them."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def take(self, node: fx.Node, wanted: str) -> None:
        name, number = wanted, 0
        while name in self._used:
            number += 1
            name = f"{wanted}_{number}"
        self._used.add(name)
        node.meta["name"] = name
        node._rename(re.sub(r"\W", "_", name))


def _aliases(model: nn.Module) -> dict[int, tuple[str, ...]]:
    """Names of each tensor by identity; more than one where the model shares it."""
    found: dict[int, list[str]] = {}
    for source in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in source:
            found.setdefault(id(tensor), []).append(name)
    return {key: tuple(names) for key, names in found.items()}


def _value(module: nn.Module, node: fx.Node) -> Tensor:
    value = fetch(module, str(node.target))
    if not isinstance(value, Tensor):
        users = ", ".join(str(user.target) for user in node.users)
        raise CaptureError(
            f"forward holds a region that is no plain operator ({users}): torch.cond, a loop, or a 'with' block such "
            "as torch.no_grad or autocast. Take it out of forward."
        )
    return value


def _parameter(
    graph: fx.Graph, root: nn.Module, path: str, value: Tensor, aliases: Mapping[int, tuple[str, ...]]
) -> fx.Node:
    canonical = aliases.get(id(value), (path,))[0]
    assign(root, canonical, value)
    node = graph.get_attr(canonical)
    node.meta["shape"] = tuple(value.shape)
    return node


def _register_aliases(result: fx.GraphModule, aliases: Mapping[int, tuple[str, ...]]) -> None:
    present = {**dict(result.named_parameters()), **dict(result.named_buffers())}
    for names in aliases.values():
        for alias in names[1:]:
            if names[0] in present:
                assign(result, alias, present[names[0]])


def _operator_name(node: fx.Node, copy: fx.Node) -> str:
    """The path of the torch.nn layer that made it, or the path of the module around it and what it does."""
    if copy.op == "call_module":
        return str(copy.target)
    path, is_layer = layer_path(node)
    if is_layer:
        return path
    rule = ATEN_KINDS.get(target_name(copy))
    word = rule.kind.lower() if rule else node.name
    return f"{path}.{word}" if path else word


def _stored_name(copy: fx.Node, origins: Mapping[fx.Node, fx.Node]) -> str:
    """What a stored result is called: a layer's weight or bias where it is one, else after the operator."""
    for user in copy.users:
        rule = ATEN_KINDS.get(target_name(user)) if user.op == "call_function" else None
        path = layer_path(origins[user])[0]
        for place, word in () if rule is None else ((rule.weight, "weight"), (rule.bias, "bias")):
            if path and place is not None and copy in user.args[place : place + 1]:
                return f"{path}.{word}"
    origin = origins[copy]
    return re.sub(r"\W", "_", f"{layer_path(origin)[0]}.{origin.name}").strip("_")


def _is_real(node: fx.Node | None) -> bool:
    value = None if node is None else node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _output(exported: torch.export.ExportedProgram, node: fx.Node, copies: Mapping[fx.Node, fx.Node]) -> Any:
    leaves = [copies[a] if isinstance(a, fx.Node) else a for a in torch.utils._pytree.tree_leaves(node.args[0])]
    return _plain(torch.utils._pytree.tree_unflatten(leaves, exported.call_spec.out_spec))


def _plain(value: Any) -> Any:
    """fx nodes hold tuples and dicts; other containers (a dataclass of outputs) become one of these."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return tuple(_plain(v) for v in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if value is None or isinstance(value, fx.Node | bool | int | float | str):
        return value
    return tuple(_leaves(value))


def _leaves(value: object) -> Iterator[Any]:
    leaves = torch.utils._pytree.tree_leaves(value)
    return (_plain(leaf) for leaf in leaves if leaf is not value)


def _drop_unused(graph: fx.Graph) -> None:
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
