# SPDX-License-Identifier: Apache-2.0
"""Clips that quantizers do on the way: a ReLU in front of a learning quantizer costs no passes of its own."""

import math
from typing import Any

import torch
from torch import fx

from qhw.graph import Graph
from qhw.numerics import LearnedQuantizer
from qhw.numerics.learned import Clip

__all__ = ["fuse_clips"]

# With the bounds they have by default. Their gradient is 0 at the bounds, too; that of clamp is not.
_CLIPS: dict[Any, Clip] = {
    torch.ops.aten.relu.default: (0.0, math.inf),
    torch.ops.aten.relu6.default: (0.0, 6.0),
    torch.ops.aten.hardtanh.default: (-1.0, 1.0),
}


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
        # A forward of its own may look at its input first.
        is_learned = isinstance(module, LearnedQuantizer) and type(module).forward is LearnedQuantizer.forward
        clip = clips.pop() if is_learned and len(clips) == 1 else None
        if clip is None:
            continue
        module.clip = clip  # type: ignore[assignment]
        for node in nodes:
            source: Any = node.args[0]
            node.args = (source.args[0],)
            graph.module.graph.erase_node(source)
    graph.refresh()


def _clip_of(call: fx.Node) -> Clip | None:
    """The bounds of the ReLU whose result this call alone reads; None where there is none."""
    source = call.args[0] if call.args else None
    if not isinstance(source, fx.Node) or source.target not in _CLIPS or len(source.users) > 1:
        return None
    given: list[Any] = list(source.args[1:])
    bounds = [*given, *list(_CLIPS[source.target])[len(given) :]]
    return float(bounds[0]), float(bounds[1])
