# SPDX-License-Identifier: Apache-2.0
"""What quantizers do on the way, or not twice: a ReLU in front costs no pass, a batch norm and a slice no memory."""

import math
from typing import Any

import torch
from torch import fx, nn

from qhw.graph import MOVEMENT_KINDS, VIEW_KINDS, Graph, Operator
from qhw.numerics import LearnedQuantizer, PerTensor
from qhw.numerics.learned import Clip
from qhw.training.batch_norm import KeptNorm

__all__ = ["drop_repeats", "drop_results", "fuse_clips", "fuse_norms"]

# With the bounds they have by default. Their gradient is 0 at the bounds, too; that of clamp is not.
_CLIPS: dict[Any, Clip] = {
    torch.ops.aten.relu.default: (0.0, math.inf),
    torch.ops.aten.relu6.default: (0.0, 6.0),
    torch.ops.aten.hardtanh.default: (-1.0, 1.0),
}
# Operators whose gradient does not need what they read.
_KEEP_NO_INPUT = {
    torch.ops.aten.add.Tensor,
    torch.ops.aten.sub.Tensor,
    torch.ops.aten.mean.dim,
    torch.ops.aten.cat.default,
}


def drop_repeats(graph: Graph) -> None:
    """Take out the calls of learning quantizers on values that they quantized already, and that were only moved since.

    Values stay to the bit, gradients to float rounding: on a value that is on the grid, a quantizer is the identity.

    Args:
        graph: With its quantizers; changed in place.
    """
    moving = {op.name for op in graph.operators if op.kind in VIEW_KINDS | MOVEMENT_KINDS and _adds_nothing(op)}
    on_grid: dict[fx.Node, str] = {}
    for node in list(graph.module.graph.nodes):
        grids = {on_grid.get(source, "") for source in node.all_input_nodes}
        if node.op == "call_module" and _is_one_grid(graph.module.get_submodule(str(node.target))):
            if grids == {str(node.target)}:
                node.replace_all_uses_with(node.all_input_nodes[0])
                graph.module.graph.erase_node(node)
            else:
                on_grid[node] = str(node.target)
        elif node.meta.get("name") in moving and len(grids) == 1 and "" not in grids:
            on_grid[node] = grids.pop()
    graph.refresh()


def _is_one_grid(module: nn.Module) -> bool:
    """Whether it is a learning quantizer of integers with one scale, so that a place in the tensor does not matter."""
    return _is_learned(module) and isinstance(module.granularity, PerTensor) and module.elements is None


def _adds_nothing(operator: Operator) -> bool:
    """Whether what moves values gives those of its input alone, or zeros, which every such grid has."""
    facts = operator.attributes
    return operator.kind != "Pad" or (facts["mode"] == "constant" and not facts["value"])


def fuse_clips(graph: Graph) -> None:
    """Let learning quantizers limit their tensor where nobody else reads what the ReLU before them gives.

    Values and gradients stay: to the bit, but for the order in which the scale's gradient is summed up.

    Args:
        graph: With its quantizers; changed in place.
    """
    calls: dict[str, list[fx.Node]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_module":
            calls.setdefault(str(node.target), []).append(node)
    for path, nodes in calls.items():
        module = graph.module.get_submodule(path)
        clips = {_clip_of(node) for node in nodes}
        clip = clips.pop() if _is_learned(module) and len(clips) == 1 else None
        if clip is None:
            continue
        module.clip = clip  # type: ignore[assignment]
        for node in nodes:
            source: Any = node.args[0]
            node.args = (source.args[0],)
            graph.module.graph.erase_node(source)
    graph.refresh()


def fuse_norms(graph: Graph) -> None:
    """Let learning quantizers make the output of a kept batch norm again for their gradient, where they alone read it.

    What the batch norm reads is kept for its own gradient anyway. Call it behind `fuse_clips`.

    Args:
        graph: With its layers and quantizers; its modules are changed.
    """
    for node in graph.module.graph.nodes:
        users = list(node.users)
        if node.op != "call_module" or len(users) != 1 or users[0].op != "call_module":
            continue
        norm, reader = (graph.module.get_submodule(str(call.target)) for call in (node, users[0]))
        if isinstance(norm, KeptNorm) and _is_learned(reader):
            norm.batch_norm.is_made_again = True


def drop_results(graph: Graph) -> None:
    """Let learning quantizers compute their result again where no reader keeps it, as sums and means do not.

    Args:
        graph: With its quantizers; its modules are changed.
    """
    readers: dict[str, set[Any]] = {}
    for node in graph.module.graph.nodes:
        if node.op == "call_module":
            readers.setdefault(str(node.target), set()).update(user.target for user in node.users)
    for path, targets in readers.items():
        module = graph.module.get_submodule(path)
        if isinstance(module, LearnedQuantizer):
            module.keeps_result = not targets <= _KEEP_NO_INPUT


def _is_learned(module: nn.Module) -> bool:
    """Whether it is a learning quantizer that does not look at its input first, in a forward of its own."""
    return isinstance(module, LearnedQuantizer) and type(module).forward is LearnedQuantizer.forward


def _clip_of(call: fx.Node) -> Clip | None:
    """The bounds of the ReLU whose result this call alone reads; None where there is none."""
    source = call.args[0] if call.args else None
    if not isinstance(source, fx.Node) or source.target not in _CLIPS or len(source.users) > 1:
        return None
    given: list[Any] = list(source.args[1:])
    bounds = [*given, *list(_CLIPS[source.target])[len(given) :]]
    return float(bounds[0]), float(bounds[1])
