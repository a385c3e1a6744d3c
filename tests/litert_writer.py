# SPDX-License-Identifier: Apache-2.0
"""A TFLite graph in the making: tensors, constants, operators, and each value in the layout that is asked for.

A value with three or four axes has two layouts: as torch has it, and as an image, [batch, height, width, channels].
It is moved from one to the other (TRANSPOSE, RESHAPE) only where an operator wants the one it is not in.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import ArrayLike, NDArray

Array = NDArray[Any]

# The first version of each operator that has int8 tensors, per channel where there are weights.
_VERSIONS = {
    "CONV_2D": 3, "DEPTHWISE_CONV_2D": 3, "FULLY_CONNECTED": 4, "TRANSPOSE_CONV": 3, "RESHAPE": 1, "DEPTH_TO_SPACE": 1,
    "RELU_N1_TO_1": 1, "HARD_SWISH": 1,
}  # fmt: skip
_INT8_VERSION = 2
_KINDS = {np.dtype(np.int8): "INT8", np.dtype(np.int32): "INT32"}


@dataclass(frozen=True)
class Encoding:
    """Where codes lie: real = scale * (code - zero_point).

    Attributes:
        scale: One number, or one per index of `axis`; float32.
        zero_point: Code of 0.0; 0 where there are several scales.
        axis: The axis that has a scale per index.
    """

    scale: ArrayLike
    zero_point: int = 0
    axis: int = 0


@dataclass
class Value:
    """One quantized value.

    Attributes:
        encoding: Where its codes lie.
        shape: As torch has it.
        plain: Its tensor in that layout, once it is there.
        image: Its tensor as an image.
    """

    encoding: Encoding
    shape: tuple[int, ...]
    plain: int | None = None
    image: int | None = None


class Writer:
    """Collects a graph; see the module."""

    def __init__(self) -> None:
        self.values: dict[str, Value] = {}
        self._graph, self._buffers = schema.SubGraphT(), [schema.BufferT()]  # buffer 0: tensors that are computed
        self._graph.tensors, self._graph.operators = [], []
        self._codes: list[tuple[str, int]] = []

    def given(self, shape: Sequence[int], encoding: Encoding) -> int:
        """A tensor that the graph is given."""
        return self._new(shape, encoding)

    def constant(self, array: Array, encoding: Encoding | None = None) -> int:
        """A tensor stored in the file."""
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self._buffers.append(buffer)
        self._graph.tensors.append(_tensor(array.shape, _KINDS[array.dtype], encoding, len(self._buffers) - 1))
        return len(self._graph.tensors) - 1

    def numbers(self, *values: int) -> int:
        """A constant list of int32."""
        return self.constant(np.asarray(values, np.int32))

    def add(self, name: str, options: Any, operands: Sequence[int], encoding: Encoding) -> int:
        """An operator of one result on a grid; the runtime finds its shape."""
        return self.add_many(name, options, operands, [encoding])[0]

    def add_many(self, name: str, options: Any, operands: Sequence[int], encodings: Sequence[Encoding]) -> list[int]:
        """An operator of several results."""
        code = name, _VERSIONS.get(name, _INT8_VERSION)
        if code not in self._codes:
            self._codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._codes.index(code)
        places = [self._new((), encoding) for encoding in encodings]
        operator.inputs, operator.outputs = list(operands), places
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__[:-1])
        self._graph.operators.append(operator)
        return places

    def plain(self, name: str) -> int:
        """A value's tensor as torch has it."""
        value = self.values[name]
        if value.plain is None:
            place, rank = _there(value.image), len(value.shape)
            if rank == 3:
                place = self.reshape(place, (-1, value.shape[2], value.shape[1]), value.encoding)
            value.plain = self.transpose(place, (0, rank - 1, *range(1, rank - 1)), value.encoding)
        return value.plain

    def image(self, name: str) -> int:
        """A value's tensor with channels last, of height one where it has no height."""
        value = self.values[name]
        if value.image is None:
            rank = len(value.shape)
            place = self.transpose(_there(value.plain), (0, *range(2, rank), 1), value.encoding)
            if rank == 3:
                place = self.reshape(place, (-1, 1, value.shape[2], value.shape[1]), value.encoding)
            value.image = place
        return value.image

    def transpose(self, place: int, axes: Sequence[int], encoding: Encoding) -> int:
        """A tensor with its axes in another order."""
        return self.add("TRANSPOSE", schema.TransposeOptionsT(), [place, self.numbers(*axes)], encoding)

    def reshape(self, place: int, shape: Sequence[int], encoding: Encoding) -> int:
        """A tensor in another shape; at most one entry is -1."""
        return self.add("RESHAPE", schema.ReshapeOptionsT(), [place, self.numbers(*shape)], encoding)

    def pad(self, place: int, rows: Sequence[tuple[int, int]], encoding: Encoding, code: int | None = None) -> int:
        """A tensor with codes around it: of 0.0, or the one given; the tensor itself where there are none."""
        if not any(edge for row in rows for edge in row):
            return place
        table = self.constant(np.asarray(rows, np.int32))
        if code is None:
            return self.add("PAD", schema.PadOptionsT(), [place, table], encoding)
        value = self.constant(np.asarray([code], np.int8), encoding)
        return self.add("PADV2", schema.PadV2OptionsT(), [place, table, value], encoding)

    def finish(self, inputs: Sequence[int], outputs: Sequence[int]) -> bytes:
        """The file."""
        self._graph.inputs, self._graph.outputs = list(inputs), list(outputs)
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [self._graph], self._buffers, []
        for name, version in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = version
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _new(self, shape: Sequence[int], encoding: Encoding) -> int:
        self._graph.tensors.append(_tensor(shape, "INT8", encoding, 0))
        return len(self._graph.tensors) - 1


def _there(place: int | None) -> int:
    assert place is not None, "a value without a tensor"
    return place


def _tensor(shape: Sequence[int], kind: str, encoding: Encoding | None, buffer: int) -> Any:
    tensor = schema.TensorT()
    tensor.shape, tensor.type, tensor.buffer = list(shape), getattr(schema.TensorType, kind), buffer
    if encoding is not None:
        scale = np.atleast_1d(np.asarray(encoding.scale, np.float32))
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = scale
        tensor.quantization.zeroPoint = np.full(scale.shape, encoding.zero_point, np.int64)
        tensor.quantization.quantizedDimension = encoding.axis if len(scale) > 1 else 0
    return tensor
