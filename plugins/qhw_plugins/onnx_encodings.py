# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors in ONNX: the integer type that holds a grid, and QuantizeLinear / DequantizeLinear nodes."""

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from qhw.numerics import PerAxis, PerGroup, PerTensor, QParams, quantize
from qhw_plugins.onnx_builder import Builder, packed_int4

__all__ = ["Storage", "dequantized", "implies", "quantized", "storage_of"]


@dataclass(frozen=True)
class Storage:
    """An ONNX integer type: its bounds, its numpy type, and the opset from which Q and DQ take it."""

    name: str
    kind: int
    numpy: type
    low: int
    high: int
    opset: int


_STORAGES = tuple(
    Storage(name, kind, numpy, low, high, opset)
    for name, kind, numpy, low, high, opset in (
        ("uint4", TensorProto.UINT4, np.uint8, 0, 15, 21),
        ("int4", TensorProto.INT4, np.int8, -8, 7, 21),
        ("uint8", TensorProto.UINT8, np.uint8, 0, 255, 13),
        ("int8", TensorProto.INT8, np.int8, -128, 127, 13),
        ("uint16", TensorProto.UINT16, np.uint16, 0, 65535, 21),
        ("int16", TensorProto.INT16, np.int16, -32768, 32767, 21),
    )
)
_INT32 = Storage("int32", TensorProto.INT32, np.int32, -(2**31), 2**31 - 1, 13)


def storage_of(qparams: QParams, *, activation: bool, int4: bool = True) -> Storage | None:
    """The smallest ONNX type that holds a grid, or None where there is none.

    Parameters only: the 4-bit types, because onnxruntime 1.32 fuses a QLinearConv over uint4 activations and then
    refuses its own graph; int32 with zero point 0, because ONNX dequantizes it but quantizes nothing to it.

    Args:
        qparams: The grid.
        activation: Whether the tensor is quantized at run time.
        int4: False stores 4-bit codes of parameters in 8-bit types, too.
    """
    for storage in _STORAGES:
        fits = storage.low <= qparams.quant_min and qparams.quant_max <= storage.high
        if fits and ("int4" not in storage.name or (int4 and not activation)):
            return storage
    fits = _INT32.low <= qparams.quant_min and qparams.quant_max <= _INT32.high
    return _INT32 if fits and not activation and qparams.is_symmetric else None


def implies(qparams: QParams, low: float | None, high: float | None) -> bool:
    """Whether saturation alone does what a clip to [low, high] before the quantizer does.

    Quantizing is monotone, so it is enough that each bound lands on the end of the grid: all beyond it does, too.
    """
    ends = []
    for bound, end in ((low, qparams.quant_min), (high, qparams.quant_max)):
        if bound is not None and np.isfinite(bound):
            ends.append(int(quantize(torch.tensor(bound, dtype=torch.float32), qparams)) == end)
    return all(ends)


def quantized(
    b: Builder, x: str, qparams: QParams, storage: Storage, group: str, name: str, *, saturated: bool = False
) -> str:
    """QuantizeLinear -> DequantizeLinear on an activation.

    Where the type holds more codes than the grid, a Clip keeps the values on the grid: its bounds are reals of
    codes, and fl(fl(scale * n) / scale) rounds back to n, so the end codes are met exactly. A Clip also stands between
    two pairs of different scales, where it changes nothing: onnxruntime 1.32 (DoubleQDQPairsRemover) would make one
    pair of them, which rounds once where the target rounds twice.

    Args:
        b: The graph.
        x: float32 tensor, any shape.
        qparams: Per tensor.
        storage: From `storage_of`.
        group: Names the shared scale and zero point.
        name: Wanted name of the result.
        saturated: Whether x lies within the grid's bounds already.

    Returns:
        str: float32 tensor on the grid.
    """
    parameters = _parameters(b, qparams, storage, group)
    low, high = _bounds(qparams)
    again = _follows_another_pair(b, x, parameters)
    cut_low = again or (qparams.quant_min > storage.low and not saturated)
    cut_high = again or (qparams.quant_max < storage.high and not saturated)
    if cut_low or cut_high:
        bounds = [b.constant(low, np.float32) if cut_low else "", b.constant(high, np.float32) if cut_high else ""]
        x = b.op("Clip", [x, *bounds], f"{name}/clip")
    b.require(storage.opset, storage.name)
    codes = b.op("QuantizeLinear", [x, *parameters], f"{name}/quantize")
    return b.op("DequantizeLinear", [codes, *parameters], name)


def tensor_of(codes: str) -> str | None:
    """The quantized tensor, as the plan names it, of a QuantizeLinear's result; None for one that only repeats it."""
    name = codes.removesuffix("/dequantized/quantize")
    return None if name == codes else name


def _follows_another_pair(b: Builder, x: str, parameters: list[str]) -> bool:
    """Whether x comes from a DequantizeLinear of other parameters with at most data movement between."""
    node = b.dequantized_from(x)
    if node is None:
        return False
    own, other = (
        [numpy_helper.to_array(b.initializers[name]) for name in names] for names in (parameters, node.input[1:])
    )
    return len(own) != len(other) or any(
        mine.dtype != theirs.dtype or not np.array_equal(mine, theirs) for mine, theirs in zip(own, other, strict=True)
    )


def dequantized(b: Builder, codes: Tensor, qparams: QParams, storage: Storage, group: str, name: str) -> str:
    """An integer initializer and its DequantizeLinear; the same codes and scale are stored once per group.

    Args:
        b: The graph.
        codes: integer [*shape], on the grid.
        qparams: Per tensor, axis or group of neighbours.
        storage: From `storage_of`.
        group: Names the shared codes, scale and zero point.
        name: Wanted name of the result.
    """
    b.require(storage.opset, storage.name)
    attributes: dict[str, int] = {}
    if isinstance(qparams.granularity, PerAxis):
        attributes["axis"] = qparams.granularity.axis
    elif isinstance(qparams.granularity, PerGroup):
        b.require(21, "one scale per group")
        attributes = {"axis": qparams.granularity.axis, "block_size": qparams.granularity.group_size}
    stored = f"{group}/codes"
    if stored not in b.initializers:
        array = np.ascontiguousarray(codes.cpu().numpy())
        packed = "int4" in storage.name
        b.initializer(packed_int4(array, storage.low < 0) if packed else array.astype(storage.numpy), stored)
    parameters = _parameters(b, qparams, storage, group)
    return b.op("DequantizeLinear", [stored, *parameters], name, **attributes)


def _bounds(qparams: QParams) -> tuple[float, float]:
    scale, zero_point = qparams.scale.numpy(), int(qparams.zero_point)
    return (
        float(np.float32(qparams.quant_min - zero_point) * scale),
        float(np.float32(qparams.quant_max - zero_point) * scale),
    )


def _parameters(b: Builder, qparams: QParams, storage: Storage, group: str) -> list[str]:
    """Scale and zero point, stored once per group of points. int32 has no zero point in ONNX (it is 0)."""
    scale, zero_point = f"{group}/scale", f"{group}/zero_point"
    if scale not in b.initializers:
        b.initializer(np.ascontiguousarray(qparams.scale.cpu().numpy()).reshape(qparams.scale.shape), scale)
    if storage is _INT32:
        return [scale]
    if zero_point not in b.initializers:
        array = qparams.zero_point.cpu().numpy()
        packed = "int4" in storage.name
        narrow = packed_int4(array, storage.low < 0) if packed else None
        tensor: np.ndarray | TensorProto = np.asarray(array.astype(storage.numpy)) if narrow is None else narrow
        b.initializer(tensor, zero_point)
    return [scale, zero_point]


def size_in_bytes(tensors: list[onnx.TensorProto]) -> int:
    """Bytes of all stored tensors."""
    return sum(tensor.ByteSize() for tensor in tensors)


def int32_bias(bias: Tensor, scale: Tensor) -> tuple[Tensor, QParams, bool]:
    """Codes of a bias that is added to an integer accumulator.

        code = round_half_even(bias / scale), clamped to 32 bits; computed in float64

    Args:
        bias: float32 [out_channels].
        scale: float32 [] or [out_channels]: input scale times weight scale.

    Returns:
        tuple: int32 codes, their QParams, and whether all fit without clamping.
    """
    exact = (bias.detach().double() / scale.double()).round()
    low, high = _INT32.low, _INT32.high
    codes = exact.clamp(low, high).to(torch.int32)
    granularity = PerAxis(0) if scale.dim() else PerTensor()
    qparams = QParams(scale, torch.zeros_like(scale, dtype=torch.int32), low, high, granularity)
    return codes, qparams, bool((exact.abs() <= high).all())
