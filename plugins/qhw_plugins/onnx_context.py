# SPDX-License-Identifier: Apache-2.0
"""What a translation of one operator works with: its arguments as ONNX tensors, shapes and constants."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor, fx

from qhw_plugins.onnx_builder import Builder

__all__ = ["DTYPES", "Context", "NotCovered", "Translation", "Value", "argument", "shape_of"]

Value = str | list[str]
"""An ONNX tensor name, or those of an operator with several results."""

DTYPES = {
    "float32": TensorProto.FLOAT,
    "float64": TensorProto.DOUBLE,
    "float16": TensorProto.FLOAT16,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int16": TensorProto.INT16,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "bool": TensorProto.BOOL,
}
"""torch dtype, as the graph writes it -> ONNX type."""


class NotCovered(Exception):
    """A translation meets arguments that it does not cover; torch's own exporter takes over."""


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """An argument by position or keyword, with the schema's default."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def shape_of(node: Any) -> tuple[int, ...]:
    """Shape of a value with the batch size of the example."""
    return tuple(node.meta["shape"])


class Context:
    """The graph so far: what each fx node has become.

    A value may be `pending`: computed in another shape than the fx node has, with a view still to come. A quantizer
    behind it then goes in front of the view, right behind the operator, where runtimes look for it.

    Args:
        builder: Where nodes go.
        varying: Node -> for each axis, whether its size varies with the batch size.

    Attributes:
        known: Nodes that no input decides, with their values.
        replaced: What stands in for an argument in the operator in translation (a bias as int32 codes).
    """

    def __init__(self, builder: Builder, varying: Mapping[fx.Node, tuple[bool, ...]]) -> None:
        self.builder = builder
        self.varying = varying
        self.known: dict[fx.Node, Any] = {}
        self.replaced: dict[fx.Node, str] = {}
        self._values: dict[fx.Node, Value] = {}
        self._pending: dict[fx.Node, tuple[str, Callable[[str], str]]] = {}
        self._stored: dict[int, str] = {}
        self._prefix = ""

    def enter(self, node: fx.Node) -> None:
        """Names from here on are made of this node's name."""
        self._prefix = str(node.meta.get("name", node.name))

    @property
    def name(self) -> str:
        """Name of the operator in translation."""
        return self._prefix

    def op(self, kind: str, *inputs: str, part: str = "", **attributes: Any) -> str:
        """A node named after the operator in translation; `part` tells apart what it is made of."""
        return self.builder.op(kind, inputs, f"{self._prefix}/{part}" if part else self._prefix, **attributes)

    def set(self, node: fx.Node, value: Value) -> None:
        """Record what a node has become."""
        self._values[node] = value

    def set_pending(self, node: fx.Node, raw: str, finish: Callable[[str], str]) -> None:
        """Record a value that still has to be viewed otherwise."""
        self._pending[node] = (raw, finish)

    def pending(self, node: fx.Node) -> tuple[str, Callable[[str], str]] | None:
        """The value before its view, and the view; None where there is none, or it was applied already."""
        return None if node in self._values else self._pending.get(node)

    def values(self, node: fx.Node) -> Value:
        """What a node has become.

        Raises:
            KeyError: nothing yet.
        """
        if node in self._values:
            return self._values[node]
        if node in self.known:
            self._values[node] = self._known(node)
        elif node in self._pending:
            raw, finish = self._pending[node]
            self._values[node] = finish(raw)
        return self._values[node]

    def tensor(self, argument: Any, dtype: str = "") -> str:
        """An argument as an ONNX tensor.

        Args:
            argument: An fx node, or a number.
            dtype: Cast to this; needed for numbers.
        """
        if not isinstance(argument, fx.Node):
            return self.builder.constant(argument, getattr(np, dtype.replace("bool", "bool_")))
        value = self.replaced.get(argument) or self.values(argument)
        if isinstance(value, list):
            raise TypeError(f"{argument.name} has several results")
        own = argument.meta.get("dtype", dtype)
        if dtype and own != dtype:
            value = self.op("Cast", value, part="cast", to=DTYPES[dtype])
        return value

    def sizes(self, items: Sequence[Any]) -> str | list[int]:
        """A list of sizes: plain integers where all are known, else an int64 tensor."""
        if not any(isinstance(item, fx.Node) for item in items):
            return [int(item) for item in items]
        parts = [
            self.op("Reshape", self.tensor(item), self.builder.ints([1]), part="size")
            if isinstance(item, fx.Node)
            else self.builder.ints([item])
            for item in items
        ]
        return self.op("Concat", *parts, part="shape", axis=0) if len(parts) > 1 else parts[0]

    def shape(self, items: Sequence[Any]) -> str:
        """A shape as an int64 tensor; a single computed size becomes -1, so that the shape is a constant."""
        computed = [index for index, item in enumerate(items) if isinstance(item, fx.Node)]
        if len(computed) == 1 and all(isinstance(i, fx.Node) or i >= 0 for i in items):
            return self.builder.ints([-1 if isinstance(item, fx.Node) else item for item in items])
        sizes = self.sizes(items)
        return sizes if isinstance(sizes, str) else self.builder.ints(sizes)

    def fixed_shape(self, node: Any) -> list[int]:
        """Shape of a value for a Reshape to it: -1 for the size that varies with the batch.

        Raises:
            NotCovered: more than one size varies.
        """
        varies = self.varying.get(node, ())
        if sum(varies) > 1:
            raise NotCovered("several sizes vary with the batch size")
        return [-1 if vary else size for size, vary in zip(shape_of(node), varies or [False] * 99, strict=False)]

    def _known(self, node: fx.Node) -> str:
        """A tensor or number that no input decides, stored once per tensor."""
        value = self.known[node]
        if not isinstance(value, Tensor):
            return self.builder.constant(value, np.int64 if isinstance(value, int) else np.float32)
        if id(value) not in self._stored:
            name = str(node.target) if node.op == "get_attr" else str(node.meta.get("name", node.name))
            array = value.detach().cpu().contiguous()
            if array.dtype == torch.bfloat16:
                array = array.float()
            self._stored[id(value)] = self.builder.initializer(np.array(array.numpy()), name)
        return self._stored[id(value)]


Translation = Callable[[Context, fx.Node], Value | None]
"""Adds an operator's nodes and returns its value; None when it recorded a pending one itself."""
