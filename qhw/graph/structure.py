# SPDX-License-Identifier: Apache-2.0
"""Facts about sizes that structural limits read: heights, widths, elements, outputs, the axis of a cut."""

import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from qhw.graph.attributes import argument, shape_of, target_name

__all__ = ["structure_of"]

_PLANES = frozenset(
    {"Conv", "DepthwiseConv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "Resize"}
)
_AXIS: dict[str, tuple[int, int]] = {  # ATen operator -> position and default of its axis
    "aten.chunk.default": (2, 0),
    "aten.split.Tensor": (2, 0),
    "aten.split.sizes": (2, 0),
    "aten.split_with_sizes.default": (2, 0),
    "aten.unbind.int": (1, 0),
    "aten.slice.Tensor": (1, 0),
    "aten.narrow.default": (1, 0),
    "aten.select.int": (1, 0),
    "aten.index_select.default": (1, 0),
    "aten.gather.default": (1, 0),
}


def structure_of(
    node: fx.Node, kind: str, shape: Sequence[int], sources: Sequence[fx.Node], batch: int
) -> dict[str, Any]:
    """Sizes of what an operator reads and gives.

    Args:
        node: The operator's node.
        kind: Its kind.
        shape: Of its result.
        sources: The nodes that it reads and that are no parameters.
        batch: Batch size of the example that gave the shapes.

    Returns:
        dict: `elements` of the result for one sample. `spatial`: sizes behind the channels of what a window slides
        over. `height`, `width` of the first operand: its last two axes, where it has a batch, channels and those.
        `outputs` and `axis` of a split, `axis` of a cut.
    """
    found: dict[str, Any] = {"elements": math.prod(shape) // max(batch, 1)}
    source = shape_of(sources[0]) if sources else ()
    if kind in _PLANES and len(source) > 2:
        found["spatial"] = list(source[2:])
    if len(source) > 3 or "spatial" in found:
        found["width"] = source[-1]
    if len(source) > 3:
        found["height"] = source[-2]
    name = target_name(node)
    if name in _AXIS:
        position, default = _AXIS[name]
        axis = argument(node, position, "dim", default)
        if isinstance(axis, int) and source:
            found["axis"] = axis % len(source)
            found["axis_rank"] = len(source)
    if kind == "Split":
        outputs = _outputs(node, name, source, found.get("axis", 0))
        found |= {} if outputs is None else {"outputs": outputs}
    return found


def _outputs(node: fx.Node, name: str, source: Sequence[int], axis: int) -> int | None:
    """Into how many parts a split cuts; None where a size that decides is computed."""
    size = source[axis] if axis < len(source) else 0
    if name == "aten.unbind.int":
        return size
    given = argument(node, 1, "chunks" if name == "aten.chunk.default" else "split_size", 1)
    if isinstance(given, list | tuple):
        return len(given)
    if not isinstance(given, int) or given < 1:
        return None
    # chunk(n) cuts parts of ceil(size / n), which may be fewer than n.
    part = -(-size // given) if name == "aten.chunk.default" else given
    return -(-size // max(part, 1))
