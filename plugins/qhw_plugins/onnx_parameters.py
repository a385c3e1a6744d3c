# SPDX-License-Identifier: Apache-2.0
"""Constants of an ONNX graph, and the grids that scales and zero points make of them."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto

from qhw.errors import ArtefactError
from qhw.legality import Constant, Encoding, encoding_of
from qhw_plugins.onnx_stored import CODE_TYPES, CodeType, array_of, type_name

__all__ = ["Parameters"]

_SMALL = 64
"""Elements up to which a constant may be a bound, a shape or a list of axes."""


_PLAIN = frozenset(
    getattr(TensorProto, name)
    for name in ("FLOAT", "DOUBLE", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64")
)


class Parameters:
    """Stored tensors by name, read when they are asked for, and constants that nodes make of them.

    Args:
        graph: From the file.
        folder: The file's own.
        label: What messages call the file.
    """

    def __init__(self, graph: GraphProto, folder: Path, label: str) -> None:
        self._folder = folder
        self._label = label
        self._stored: dict[str, TensorProto] = {tensor.name: tensor for tensor in graph.initializer}
        self._arrays: dict[str, NDArray[Any]] = {}
        self._made: dict[str, Constant] = {}
        self._parts: set[str] = set()

    def where(self, name: str) -> str:
        """File and tensor, for messages."""
        return f"{self._label}: {name[:120]}"

    def __contains__(self, name: str) -> bool:
        return name in self._stored or name in self._made

    def add_stored(self, name: str, tensor: TensorProto) -> None:
        """A tensor that a Constant node holds."""
        self._stored[name] = tensor

    def add(self, name: str, constant: Constant) -> None:
        """A constant that a node makes of others."""
        self._made[name] = constant

    def add_part(self, name: str, whole: str) -> None:
        """Values of a stored tensor that are picked or placed as nobody knows before the model runs."""
        if whole in self._stored or whole in self._parts:
            self._parts.add(name)

    def array(self, name: str) -> NDArray[Any]:
        """A stored tensor.

        Raises:
            ArtefactError: it is not stored, or cannot be read.
        """
        if name not in self._arrays:
            if name not in self._stored:
                raise ArtefactError(f"{self.where(name)}: must be stored in the file; it is computed. Fold it first.")
            self._arrays[name] = array_of(self._stored[name], self._folder, self.where(name))
        return self._arrays[name]

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a constant; None where it is not known."""
        if name in self._made:
            return self._made[name].shape
        return tuple(int(size) for size in self._stored[name].dims) if name in self._stored else None

    def small(self, name: str) -> list[float] | None:
        """Values of a small constant of numbers; None for anything else."""
        tensor = self._stored.get(name)
        if tensor is None or math.prod(tensor.dims) > _SMALL or len(tensor.dims) > 1:
            return None
        try:
            return [float(value) for value in np.atleast_1d(self.array(name)).astype(np.float64)]
        except (ArtefactError, ValueError, TypeError):
            return None

    def plain(self, names: Sequence[str]) -> list[NDArray[Any] | None]:
        """Stored tensors that numpy has a type for, as a node reads them; none where one is anything else."""
        is_plain = all(not name or (name in self._stored and self.data_type(name) in _PLAIN) for name in names)
        return [self.array(name) if name else None for name in names] if is_plain else []

    def constant(self, name: str) -> Constant:
        """A constant as an operator reads it: with its grid where a node made one, else of plain numbers."""
        if name in self._made:
            return self._made[name]
        shape = self.shape(name)
        small = shape is not None and math.prod(shape) <= _SMALL
        return Constant(name, shape, reals=self.array(name) if small and name in self._stored else None)

    def code_type(self, name: str) -> CodeType | None:
        """Type of a stored tensor of codes."""
        tensor = self._stored.get(name)
        return None if tensor is None else CODE_TYPES.get(tensor.data_type)

    def encoding(
        self,
        scale: str,
        zero_point: str | None,
        kind: CodeType,
        *,
        axis: int | None,
        block_size: int = 0,
        shape: tuple[int, ...] | None = None,
    ) -> Encoding:
        """The grid of a scale and a zero point.

        Args:
            scale: Name of the scale.
            zero_point: Name of the zero point; None or empty: 0.
            kind: Type of the codes.
            axis: As the node has it.
            block_size: 0: none.
            shape: Of the tensor, where known.
        """
        if scale not in self._stored:
            return _dynamic(kind)
        if zero_point and zero_point not in self._stored:
            return _dynamic(kind)
        zeros: NDArray[Any] = self.array(zero_point) if zero_point else np.zeros((), np.int64)
        if zeros.dtype.kind not in "iu":
            raise ArtefactError(
                f"{self.where(zero_point or scale)}: a zero point must be an integer; got {zeros.dtype}. "
                "Quantize the model again."
            )
        return encoding_of(
            self.where(scale),
            self.array(scale).astype(np.float64),
            zeros.astype(np.int64),
            bits=kind.bits,
            signed=kind.signed,
            axis=axis,
            block_size=block_size or None,
            shape=shape,
            type=kind.name,
            elements=kind.elements,
        )

    def data_type(self, name: str) -> int | None:
        """ONNX type of a stored tensor."""
        tensor = self._stored.get(name)
        return None if tensor is None else int(tensor.data_type)

    def dequantized(self, codes: str, encoding: Encoding, name: str) -> Constant:
        """A constant of stored codes, or of those that a QuantizeLinear computes of stored reals."""
        made = self._made.get(codes)
        if made is not None and made.encoding is not None:
            return Constant(made.name, made.shape, encoding, made.codes)
        if codes in self._parts:
            return Constant(name, None, encoding)
        shape = self.shape(codes)
        kind = self.data_type(codes)
        array = self.array(codes)
        if array.dtype.kind not in "iu":
            what = type_name(kind) if kind is not None else str(array.dtype)
            raise ArtefactError(f"{self.where(codes)}: codes must be integers; got {what}. Export the model again.")
        return Constant(name, shape, encoding, codes=array)

    def quantized(self, reals: str, encoding: Encoding) -> Constant:
        """Real constants behind a QuantizeLinear: round half to even, then saturate; no codes of computed ones."""
        if reals not in self._stored:  # a class token that is spread over the batch
            return Constant(reals, self.shape(reals), encoding)
        array = self.array(reals)
        if array.dtype.kind != "f" and array.dtype.kind not in "iu":
            array = array.astype(np.float32)
        if encoding.is_dynamic:
            return Constant(reals, tuple(array.shape), encoding)
        with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
            scale = np.float32(encoding.spread(encoding.scale, array.shape))
            zero = encoding.spread(encoding.zero_point, array.shape)
            exact = array.astype(np.float32) / scale
            if encoding.elements is not None:
                patterns = encoding.elements.encode(encoding.elements.round_to(torch.from_numpy(exact)))
                return Constant(reals, tuple(array.shape), encoding, codes=patterns.numpy())
            steps = np.rint(exact)
            codes = np.clip(np.nan_to_num(steps.astype(np.float64)) + zero, encoding.quant_min, encoding.quant_max)
        return Constant(reals, tuple(array.shape), encoding, codes=codes.astype(np.int64))


def _dynamic(kind: CodeType) -> Encoding:
    plain = encoding_of("", 1.0, 0, bits=kind.bits, signed=kind.signed, type=kind.name, elements=kind.elements)
    return replace(plain, is_dynamic=True)
