# SPDX-License-Identifier: Apache-2.0
"""The module that stands at a point of a simulated model."""

from qhw.engine.grids import grid_with
from qhw.graph import WEIGHTED_KINDS, Graph, QuantPoint
from qhw.numerics import DynamicQuantizer, FakeQuantizer, QParams
from qhw.schema import TargetSpec

__all__ = ["quantizer_of"]


def quantizer_of(target: TargetSpec, graph: Graph, point: QuantPoint, qparams: QParams) -> FakeQuantizer:
    """What quantizes the tensor of a point: on the scale that was found, or on scales of its own that it computes.

    Args:
        target: The accelerator.
        graph: Tells who reads the tensor, and so along which axis it is summed up.
        point: The first one of its group.
        qparams: Of the group.
    """
    if not point.is_dynamic:
        return FakeQuantizer(qparams, name=point.name)
    spec = target.formats[point.format]
    axis, reduced = _summed(graph, point)
    size = spec.group_size if isinstance(spec.group_size, int) else max(spec.group_size or (1,), default=1)
    return DynamicQuantizer(
        qparams,
        grid_with(target, point.format, qparams.elements),
        axis=None if spec.per == "tensor" else axis,
        block=int(size) if spec.per == "group" else None,
        reduced=reduced,
        name=point.name,
    )


def _summed(graph: Graph, point: QuantPoint) -> tuple[int, int | None]:
    """The axis along which readers sum a tensor up, the first one's; and how many elements, where that is known.

    Channels for convolutions, and for tensors with positions that only others read; the last axis else, and the one
    before it for the right factor of a product.
    """
    for name in point.consumers:
        operator = graph.operator(name)
        if operator.kind in WEIGHTED_KINDS and operator.kind != "Gemm":
            return 1, None
        if operator.kind == "Gemm":
            return -1, int(operator.attributes["in_channels"])
        if operator.kind == "MatMul":
            return -2 if operator.inputs[1:] == (point.tensor,) else -1, None
    return (1 if len(graph.node(point.tensor).meta["shape"]) > 3 else -1), None
