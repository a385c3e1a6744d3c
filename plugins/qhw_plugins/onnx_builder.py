# SPDX-License-Identifier: Apache-2.0
"""Builds an ONNX graph node by node: unique names, shared constants, and the opset that the nodes turn out to need."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Builder", "packed"]

_MOVES = {
    "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather", "Expand", "Tile", "Split", "MaxPool",
    "Identity",
}  # fmt: skip
"""What onnxruntime moves Q and DQ across."""


class Builder:
    """One ONNX graph in the making.

    Attributes:
        opset: The opset the nodes are written for.
        needs: Opset -> what needs it; when one exceeds `opset`, the caller builds again with that.
    """

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.needs: dict[int, str] = {}
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._taken: set[str] = set()
        self._producers: dict[str, onnx.NodeProto] = {}
        self._constants: dict[tuple[str, tuple[int, ...], bytes], str] = {}

    def require(self, opset: int, what: str) -> None:
        """Note that something cannot be said below an opset."""
        if opset > max(self.needs, default=0):
            self.needs[opset] = what

    def unique(self, wanted: str) -> str:
        """A tensor or node name nobody has: the wanted one, or the wanted one with a number."""
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def op(self, kind: str, inputs: Sequence[str], name: str, **attributes: Any) -> str:
        """Add a node with one output.

        Args:
            kind: ONNX operator.
            inputs: Tensor names; "" leaves an optional input out.
            name: Wanted name of the node and its output.
            attributes: Of the node; None leaves one out.

        Returns:
            str: the output's name.
        """
        return self.op_many(kind, inputs, [name], **attributes)[0]

    def op_many(self, kind: str, inputs: Sequence[str], names: Sequence[str], **attributes: Any) -> list[str]:
        """Add a node with several outputs; returns their names."""
        outputs = [self.unique(name) for name in names]
        while inputs and not inputs[-1]:
            inputs = inputs[:-1]
        node = helper.make_node(kind, list(inputs), outputs, name=outputs[0])
        for key, value in sorted(attributes.items()):
            if value is not None:
                node.attribute.append(helper.make_attribute(key, value))
        self.nodes.append(node)
        self._producers.update(dict.fromkeys(outputs, node))
        return outputs

    def producer(self, name: str) -> onnx.NodeProto | None:
        """The node that computes a tensor; None for inputs, initializers, and what torch's exporter wrote."""
        return self._producers.get(name)

    def dequantized_from(self, name: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that a tensor comes from with at most data movement between, or None."""
        node = self.producer(name)
        while node is not None and node.op_type in _MOVES:
            node = self.producer(node.input[0])
        return node if node is not None and node.op_type == "DequantizeLinear" else None

    def constant(self, values: Any, dtype: Any, name: str = "constant") -> str:
        """A small constant tensor; equal ones are stored once."""
        array = np.ascontiguousarray(np.asarray(values, dtype=dtype)).reshape(np.shape(values))
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(array, name)
        return self._constants[key]

    def ints(self, values: Iterable[int]) -> str:
        """A constant int64 vector."""
        return self.constant([int(value) for value in values], np.int64, "shape")

    def initializer(self, array: np.ndarray | TensorProto, name: str) -> str:
        """Store a tensor; returns its name."""
        unique = self.unique(name)
        tensor = array if isinstance(array, TensorProto) else numpy_helper.from_array(array)
        tensor.name = unique
        self.initializers[unique] = tensor
        return unique

    def prune(self, outputs: Sequence[str]) -> None:
        """Drop nodes and initializers that no output depends on."""
        wanted = set(outputs)
        kept = []
        for node in reversed(self.nodes):
            if wanted.intersection(node.output):
                wanted.update(name for name in node.input if name)
                kept.append(node)
        self.nodes = kept[::-1]
        self.initializers = {name: tensor for name, tensor in self.initializers.items() if name in wanted}


def packed(codes: np.ndarray, kind: int) -> TensorProto:
    """Codes as a tensor of 4 bits each: two per byte, the first one in the low half, as ONNX stores them."""
    nibbles = codes.reshape(-1).astype(np.int64) & 0xF
    if nibbles.size % 2:
        nibbles = np.append(nibbles, 0)
    pairs = (nibbles[0::2] | nibbles[1::2] << 4).astype(np.uint8)
    return TensorProto(data_type=kind, dims=list(codes.shape), raw_data=pairs.tobytes())
