# SPDX-License-Identifier: Apache-2.0
"""Bytes of a model's parameters, in float and as codes."""

from qhw.engine.result import QuantizedModel
from qhw.graph import Graph
from qhw.schema import Scale

__all__ = ["float_bytes", "quantized_bytes"]

_SCALE_BYTES = {"float16": 2, "bfloat16": 2, "e8m0": 1, "e4m3": 1}


def float_bytes(graph: Graph) -> int:
    """Bytes of all parameters and of the statistics of batch norms, shared ones once."""
    module = graph.module
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def quantized_bytes(result: QuantizedModel) -> int:
    """Bytes of all parameters as the target stores them: packed codes, biases, scales and zero points.

    A scale counts the bytes of its type, 4 where it has none of its own, once for all points that share it, and nothing
    where the hardware prescribes it or where it belongs to a bias (it is a product of two others). A zero point counts
    one code's width, and nothing where the format fixes it. What stays in float counts as such.
    """
    graph = result.float_graph
    bits = 0
    quantized: set[int] = set()
    encodings = result.encodings()
    scaled: set[str] = set()
    for point in result.plan.points:
        qparams = encodings[point.group]
        if point.role in ("weight", "bias"):
            tensor = graph.tensor(point.tensor)
            quantized.add(id(tensor))
            bits += tensor.numel() * qparams.bits
            bits += 0 if qparams.elements is None else qparams.elements.beside_bits
        if point.role == "bias" or point.is_given or point.group in scaled:
            continue  # a bias scale is the product of two that are stored, others are wired in or computed
        scaled.add(point.group)
        spec = result.target.formats[point.format]
        if spec.scale is None and qparams.elements is not None and qparams.elements.is_absolute:
            continue
        kind = spec.scale.kind if isinstance(spec.scale, Scale) else "float32"
        per_scale = 8 * _SCALE_BYTES.get(kind, 4) + (0 if spec.is_symmetric else qparams.bits)
        bits += qparams.scale.numel() * per_scale
    tensors = (*graph.module.parameters(), *graph.module.buffers())
    rest = sum(tensor.numel() * tensor.element_size() for tensor in tensors if id(tensor) not in quantized)
    return rest + (bits + 7) // 8
