# SPDX-License-Identifier: Apache-2.0
"""Quantized models of one operator or two, written by hand with onnx.helper: what `qhw check` is tested on."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import ArrayLike, NDArray
from onnx import TensorProto, helper, numpy_helper

__all__ = ["Grid", "OnnxFile", "conv_file", "gemm_file", "grid"]

Array = NDArray[Any]


@dataclass(frozen=True)
class Grid:
    """Scale, zero point and type of codes; several scales lie along `axis`."""

    scale: ArrayLike
    zero_point: ArrayLike = 0
    dtype: str = "int8"
    axis: int = 0
    block_size: int = 0
    scale_dtype: str = "float32"


def grid(scale: ArrayLike, zero_point: ArrayLike = 0, dtype: str = "int8", **more: Any) -> Grid:
    """A grid, shorter to write."""
    return Grid(scale, zero_point, dtype, **more)


@dataclass
class OnnxFile:
    """An ONNX graph in the making; names of values are given."""

    opset: int = 21
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    tensors: list[TensorProto] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    infos: list[Any] = field(default_factory=list)

    def given(self, name: str, shape: Sequence[int | str], dtype: int = TensorProto.FLOAT) -> str:
        """A graph input."""
        self.inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def gives(self, name: str, shape: Sequence[int | str] | None = None, dtype: int = TensorProto.FLOAT) -> str:
        """A graph output."""
        self.outputs.append(helper.make_tensor_value_info(name, dtype, shape))
        return name

    def stored(self, name: str, array: ArrayLike, dtype: str = "float32") -> str:
        """An initializer; of small floats the array has the values, which must be theirs."""
        if dtype in ("int4", "uint4") or dtype.startswith(("float8", "float4", "bfloat")):
            values = np.asarray(array)
            kind = getattr(TensorProto, dtype.upper())
            self.tensors.append(helper.make_tensor(name, kind, values.shape, values.reshape(-1).tolist()))
        else:
            self.tensors.append(numpy_helper.from_array(np.asarray(array, dtype=dtype), name))
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """A node with one output, named after it."""
        domain = attributes.pop("domain", None)
        self.nodes.append(helper.make_node(kind, list(inputs), [output], name=output, domain=domain, **attributes))
        return output

    def pair(self, value: str, at: Grid) -> str:
        """QuantizeLinear and DequantizeLinear of a value."""
        names = self._parameters(f"{value}/q", at)
        codes = self.op("QuantizeLinear", [value, *names], f"{value}/codes")
        return self.op("DequantizeLinear", [codes, *names], f"{value}/dq")

    def weight(self, name: str, codes: ArrayLike, at: Grid) -> str:
        """Stored codes behind a DequantizeLinear."""
        attributes: dict[str, Any] = {"axis": at.axis} if np.size(at.scale) > 1 else {}
        attributes |= {"block_size": at.block_size} if at.block_size else {}
        names = self._parameters(name, at)
        return self.op("DequantizeLinear", [self.stored(name, codes, at.dtype), *names], f"{name}/dq", **attributes)

    def _parameters(self, name: str, at: Grid) -> list[str]:
        scale = self.stored(f"{name}/scale", at.scale, at.scale_dtype)
        zero = np.broadcast_to(np.asarray(at.zero_point), np.shape(at.scale))
        return [scale] if at.dtype == "int32" else [scale, self.stored(f"{name}/zero", zero, at.dtype)]

    def model(self) -> onnx.ModelProto:
        """The model, not checked."""
        graph = helper.make_graph(self.nodes, "g", self.inputs, self.outputs, self.tensors, value_info=self.infos)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)

    def write(self, folder: Path, name: str = "model.onnx") -> Path:
        """The model as a file."""
        path = folder / name
        path.write_bytes(self.model().SerializeToString())
        return path


X, W, Y = grid(2.0**-5), grid([2.0**-7] * 4), grid(2.0**-4)
CODES = (np.arange(4 * 3 * 3 * 3) % 21 - 10).reshape(4, 3, 3, 3)


def conv_file(
    *,
    x: Grid | None = X,
    w: Grid | None = W,
    y: Grid | None = Y,
    codes: Array = CODES,
    bias: ArrayLike | None = (1, -2, 3, 0),
    bias_grid: Grid | None = None,
    is_bias_real: bool = False,
    behind: Sequence[str] = (),
    opset: int = 21,
    **attributes: Any,
) -> OnnxFile:
    """A convolution 'conv' between QDQ pairs, [1, 3, 8, 8] to four channels, and what else stands behind it.

    Args:
        x: Grid of the input; None: real numbers.
        w: Of the weight; None: real numbers.
        y: Of the result.
        codes: Of the weight.
        bias: Codes; None for none.
        bias_grid: Absent: int32 at input scale times weight scale.
        is_bias_real: The bias is stored in real numbers.
        behind: Operators between the convolution and the quantizer.
        opset: Of the file.
        attributes: Of the convolution.
    """
    f = OnnxFile(opset)
    channels = codes.shape[1] * attributes.get("group", 1)
    source = f.given("x", [1, channels, 8, 8])
    source = source if x is None else f.pair(source, x)
    weight = f.stored("w", codes * 0.01) if w is None else f.weight("w", codes, w)
    operands = [source, weight]
    if bias is not None:
        made = bias_grid
        if made is None and x is not None and w is not None and not is_bias_real:
            product = np.float32(x.scale) * np.float32(w.scale)
            made = grid(product, 0, "int32")
        operands.append(f.stored("b", bias) if made is None else f.weight("b", np.asarray(bias), made))
    value = f.op("Conv", operands, "conv", kernel_shape=list(codes.shape[2:]), **attributes)
    for kind in behind:
        value = f.op(kind, [value], kind.lower())
    f.gives(value if y is None else f.pair(value, y))
    return f


def gemm_file(
    *, x: Grid | None = X, w: Grid = W, y: Grid | None = Y, codes: Array | None = None, opset: int = 21
) -> OnnxFile:
    """A product 'gemm' of [1, inputs] and rows [outputs, inputs], without a bias; no grid: real numbers."""
    f = OnnxFile(opset)
    rows = (np.arange(32) % 15 - 7).reshape(4, 8) if codes is None else codes
    source = f.given("x", [1, rows.shape[1]])
    source = source if x is None else f.pair(source, x)
    value = f.op("Gemm", [source, f.weight("w", rows, w)], "gemm", transB=1)
    f.gives(value if y is None else f.pair(value, y), [1, len(rows)])
    return f
