# SPDX-License-Identifier: Apache-2.0
"""Quantized tensors in ONNX: the type that holds a grid, and QuantizeLinear / DequantizeLinear or Cast nodes."""

from dataclasses import dataclass

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

from qhw.numerics import BFLOAT16, FLOAT16, FloatElements, PerAxis, PerGroup, PerTensor, QParams, quantize
from qhw_plugins.onnx_builder import Builder, packed
from qhw_plugins.onnx_stored import SMALL_FLOATS

__all__ = ["Storage", "dequantized", "implies", "quantized", "storage_of"]


@dataclass(frozen=True)
class Storage:
    """An ONNX type of integers or of small floats, and the opset from which Q and DQ take it.

    Attributes:
        name: As in ONNX.
        kind: Its number there.
        numpy: Type of stored codes.
        low: Lowest code; of a small float 0.
        high: Highest.
        opset: The first that has it.
        elements: What codes stand for, of small floats.
    """

    name: str
    kind: int
    numpy: type
    low: int
    high: int
    opset: int
    elements: FloatElements | None = None

    @property
    def is_packed(self) -> bool:
        """Whether two codes share a byte."""
        return self.bits == 4

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.elements.bits if self.elements is not None else (self.high - self.low).bit_length()

    @property
    def is_cast(self) -> bool:
        """Whether a tensor has this type itself, without scale: float16 or bfloat16."""
        return self.kind in (TensorProto.FLOAT16, TensorProto.BFLOAT16)

    def holds(self, elements: FloatElements) -> bool:
        """Whether all values of a float are values of this one."""
        own = self.elements
        layouts = [(e.exponent_bits, e.mantissa_bits, e.bias) for e in (own, elements) if e is not None]
        return own is not None and layouts[0] == layouts[1] and elements.finite_max <= own.finite_max


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
_FLOATS = tuple(
    Storage(name, getattr(TensorProto, name.upper()), np.uint8, 0, 2**elements.bits - 1, opset, elements)
    for name, elements, opset in (
        ("float4e2m1", SMALL_FLOATS["float4e2m1"], 23),
        ("float8e4m3fn", SMALL_FLOATS["float8e4m3fn"], 19),
        ("float8e4m3fnuz", SMALL_FLOATS["float8e4m3fnuz"], 19),
        ("float8e5m2", SMALL_FLOATS["float8e5m2"], 19),
        ("float8e5m2fnuz", SMALL_FLOATS["float8e5m2fnuz"], 19),
        ("float16", FLOAT16, 13),
        ("bfloat16", BFLOAT16, 13),
    )
)
_INT32 = Storage("int32", TensorProto.INT32, np.int32, -(2**31), 2**31 - 1, 13)


def storage_of(qparams: QParams, *, activation: bool, int4: bool = True) -> Storage | None:
    """The smallest ONNX type that holds a grid, or None where there is none.

    Float16 and bfloat16 are types of tensors, which have no scale. Parameters only: the 4-bit integers, because
    onnxruntime 1.32 fuses a QLinearConv over uint4 activations and then refuses its own graph; int32 with zero point 0,
    because ONNX dequantizes it but quantizes nothing to it.

    Args:
        qparams: The grid.
        activation: Whether the tensor is quantized at run time.
        int4: False stores 4-bit codes of parameters in 8-bit types, too.
    """
    if qparams.elements is not None:
        elements, has_scale = qparams.elements, bool((qparams.scale != 1).any())
        floats = (one for one in _FLOATS if isinstance(elements, FloatElements) and one.holds(elements))
        return next((one for one in floats if not (one.is_cast and has_scale)), None)
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
    elements = qparams.elements
    for bound, end in ((low, qparams.quant_min), (high, qparams.quant_max)):
        if bound is None or not np.isfinite(bound):
            continue
        real = torch.tensor(bound, dtype=torch.float32)
        if elements is None and int(quantize(real, qparams)) != end:
            return False
        last = None if elements is None else elements.lowest if bound is low else elements.highest
        if elements is not None and float(elements.round_to(real / qparams.scale)) != last:
            return False
    return True


def quantized(
    b: Builder, x: str, qparams: QParams, storage: Storage, group: str, name: str, *, saturated: bool = False
) -> str:
    """QuantizeLinear -> DequantizeLinear on an activation; a Cast there and back for float16 and bfloat16.

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
    low, high = _bounds(qparams)
    if storage.is_cast:
        if storage.kind == TensorProto.FLOAT16:  # a Cast gives infinity past it, and what simulates it saturates
            bounds = [b.constant(bound, np.float32) for bound in (low, high)]
            x = x if saturated else b.op("Clip", [x, *bounds], f"{name}/clip")
        narrow = b.op("Cast", [x], f"{name}/{storage.name}", to=storage.kind)
        return b.op("Cast", [narrow], name, to=TensorProto.FLOAT)
    parameters = _parameters(b, qparams, storage, group)
    again = _follows_another_pair(b, x, parameters)
    ends = _unused_ends(qparams, storage)
    cut_low, cut_high = (again or (is_unused and not saturated) for is_unused in ends)
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
    """An initializer of codes and its DequantizeLinear; the same codes and scale are stored once per group.

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
        b.initializer(_stored(array, storage), stored)
    parameters = _parameters(b, qparams, storage, group)
    return b.op("DequantizeLinear", [stored, *parameters], name, **attributes)


def _unused_ends(qparams: QParams, storage: Storage) -> tuple[bool, bool]:
    """Whether a type has values below and above those of a grid."""
    if qparams.elements is not None and storage.elements is not None:
        is_unused = qparams.elements.highest < storage.elements.highest
        return is_unused, is_unused
    return qparams.quant_min > storage.low, qparams.quant_max < storage.high


def _bounds(qparams: QParams) -> tuple[float, float]:
    scale, zero_point = qparams.scale.numpy(), int(qparams.zero_point)
    if qparams.elements is not None:
        elements = qparams.elements
        return float(np.float32(elements.lowest) * scale), float(np.float32(elements.highest) * scale)
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
        b.initializer(_stored(qparams.zero_point.cpu().numpy(), storage), zero_point)
    return [scale, zero_point]


def _stored(codes: np.ndarray, storage: Storage) -> np.ndarray | TensorProto:
    """Codes in their type; integers of whole bytes as they are, small floats as the patterns that they are."""
    if storage.is_packed:
        return packed(codes, storage.kind)
    plain: np.ndarray = np.asarray(codes.astype(storage.numpy))
    if storage.elements is None:
        return plain
    return TensorProto(data_type=storage.kind, dims=list(plain.shape), raw_data=plain.tobytes())


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
