# SPDX-License-Identifier: Apache-2.0
"""Stored tensors of an ONNX file as numpy arrays: every size is checked, and no path leaves the file's folder."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from qhw.errors import ArtefactError
from qhw.numerics import FloatElements

__all__ = ["CODE_TYPES", "REALS", "SMALL_FLOATS", "CodeType", "array_of", "read_model_bytes", "type_name"]

MAX_BYTES = 2**31
_MAX_ELEMENTS = 2**33


@dataclass(frozen=True)
class CodeType:
    """A type that codes are stored in; `elements`: what codes of a small float stand for."""

    name: str
    bits: int
    signed: bool
    elements: FloatElements | None = None


_INTEGERS = (
    ("int2", 2), ("uint2", 2), ("int4", 4), ("uint4", 4), ("int8", 8), ("uint8", 8),
    ("int16", 16), ("uint16", 16), ("int32", 32), ("uint32", 32), ("int64", 64), ("uint64", 64),
)  # fmt: skip
SMALL_FLOATS = {
    "float8e4m3fn": FloatElements(4, 3, 448.0),
    "float8e4m3fnuz": FloatElements(4, 3, 240.0, exponent_bias=8),
    "float8e5m2": FloatElements(5, 2, 57344.0),
    "float8e5m2fnuz": FloatElements(5, 2, 57344.0, exponent_bias=16),
    "float6e2m3": FloatElements(2, 3, 7.5),
    "float6e3m2": FloatElements(3, 2, 28.0),
    "float4e2m1": FloatElements(2, 1, 6.0),
}
"""By the names of ONNX, in lower case."""

CODE_TYPES: dict[int, CodeType] = {
    getattr(TensorProto, kind.name.upper()): kind
    for kind in (
        *(CodeType(name, bits, name.startswith("int")) for name, bits in _INTEGERS),
        *(CodeType(name, elements.bits, True, elements) for name, elements in SMALL_FLOATS.items()),
    )
    if hasattr(TensorProto, kind.name.upper())  # the installed onnx may be older
}

REALS = frozenset((TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16))
"""Types of real numbers, as models compute in."""


def type_name(data_type: int) -> str:
    """What messages call a type."""
    names: dict[int, str] = {number: name for name, number in TensorProto.DataType.items()}
    return names.get(data_type, f"type {data_type}").lower()


def read_model_bytes(path: Path) -> bytes:
    """A file's bytes.

    Raises:
        ArtefactError: it cannot be read, or is no plain file.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise ArtefactError(f"{path}: must be a file; got a folder or a device. Check the path.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}. Check the path.") from error
    if len(raw) > MAX_BYTES:
        raise ArtefactError(f"{path}: must be at most {MAX_BYTES} bytes. Store its weights in files of their own.")
    return raw


def array_of(tensor: TensorProto, folder: Path, where: str) -> NDArray[Any]:
    """A stored tensor; of small floats the patterns, as uint8.

    Args:
        tensor: From the file.
        folder: The file's own, where external data lies.
        where: File and tensor, for messages.

    Raises:
        ArtefactError: sizes do not fit, or external data cannot be had.
    """
    dims = [int(size) for size in tensor.dims]
    if any(size < 0 for size in dims) or len(dims) > 64 or math.prod(dims) > _MAX_ELEMENTS:
        raise ArtefactError(f"{where}: shape {dims[:8]} is none that a stored tensor can have. Export the model again.")
    if tensor.data_location == TensorProto.EXTERNAL:
        tensor = _with_external(tensor, folder, where)
    _check_size(tensor, dims, where)
    try:
        array = numpy_helper.to_array(tensor)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError, OverflowError, MemoryError) as error:
        reason = " ".join(str(error).split())[:120].rstrip(".")
        raise ArtefactError(f"{where}: cannot be read as a tensor: {reason}. Export the model again.") from error
    kind = CODE_TYPES.get(tensor.data_type)
    if kind is not None and kind.elements is not None:
        return np.asarray(array).view(np.uint8) & ((1 << kind.bits) - 1)
    if kind is not None and kind.bits < 8:
        array = array.astype(np.int8)
    return np.asarray(array)


def _check_size(tensor: TensorProto, dims: list[int], where: str) -> None:
    """Whether as many bytes are there as the shape needs: numpy would make room for them first."""
    if tensor.data_type not in CODE_TYPES and tensor.data_type not in _PLAIN:
        raise ArtefactError(f"{where}: is of {type_name(tensor.data_type)}, which holds no weights or scales.")
    stored = max(
        len(tensor.raw_data),
        *(
            len(getattr(tensor, field))
            for field in ("float_data", "int32_data", "int64_data", "double_data", "uint64_data")
        ),
    )
    kind = CODE_TYPES.get(tensor.data_type)
    elements_per_unit = 16 if kind is not None and kind.bits < 8 else 1
    if math.prod(dims) > stored * elements_per_unit:
        raise ArtefactError(f"{where}: shape {dims[:8]} needs more data than is stored. Export the model again.")


_PLAIN = frozenset(
    getattr(TensorProto, name)
    for name in ("FLOAT", "FLOAT16", "DOUBLE", "BFLOAT16", "FLOAT8E8M0", "BOOL")
    if hasattr(TensorProto, name)
)


def _with_external(tensor: TensorProto, folder: Path, where: str) -> TensorProto:
    facts = {entry.key: entry.value for entry in tensor.external_data}
    location = facts.get("location", "")
    path = Path(location)
    if not location or "\0" in location or path.is_absolute() or "\\" in location:
        raise ArtefactError(
            f"{where}: its data lies at {location[:80]!r}; must be a path relative to the model's folder."
        )
    try:
        root = folder.resolve()
        resolved = (root / path).resolve()
        if not resolved.is_relative_to(root):
            raise ArtefactError(f"{where}: its data lies outside the model's folder, at {location[:80]!r}. Move it in.")
        if not resolved.is_file():
            raise ArtefactError(f"{where}: its data at {location[:80]!r} is missing. Put the file beside the model.")
        offset = int(facts.get("offset", "0"))
        length = int(facts["length"]) if "length" in facts else resolved.stat().st_size - offset
        if offset < 0 or not 0 <= length <= MAX_BYTES or offset + length > resolved.stat().st_size:
            raise ArtefactError(f"{where}: its data in {location[:80]!r} ends before {offset} + {length} bytes.")
        with resolved.open("rb") as file:
            file.seek(offset)
            raw = file.read(length)
    except (OSError, ValueError, RuntimeError) as error:
        raise ArtefactError(
            f"{where}: its data at {location[:80]!r} cannot be read. Export the model again."
        ) from error
    inside = TensorProto()
    inside.dims.extend(tensor.dims)
    inside.data_type = tensor.data_type
    inside.raw_data = raw
    return inside
