# SPDX-License-Identifier: Apache-2.0
"""A quantized model as a file states it, whatever the form: encodings, constants, operators. Frozen data.

A value that is quantized and dequantized again is one tensor: `Use` names the value and the grid that it is read or
written on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qhw.errors import ArtefactError
from qhw.numerics import FloatElements

__all__ = ["Artefact", "ArtefactOperator", "Constant", "Encoding", "Use", "encoding_of"]

Numbers = NDArray[Any]


@dataclass(frozen=True, eq=False)
class Encoding:
    """A grid as the artefact states it: real = scale * (code - zero_point), or scale * element(code).

    Attributes:
        scale: float64 [], [channels], or one axis per axis of the tensor where blocks share a scale.
        zero_point: int64, shaped like the scale.
        quant_min: Lowest code that can occur: of the stored type, or of a clip in front of the quantizer.
        quant_max: Highest.
        bits: Of one stored element.
        signed: Of the stored type; None where the form has grids without a sign (codes from 0, freely shifted).
        axis: The axis with a scale per index, or along which blocks lie; None: one scale for the tensor.
        block_size: Elements along `axis` that share a scale; None: one each.
        type: What the artefact calls the stored type, as `int8`.
        elements: The small floats that codes stand for, up to the largest that can occur; None: codes are integers.
        is_dynamic: Scale and zero point are computed at run time; `scale` and `zero_point` say nothing then.
    """

    scale: Numbers
    zero_point: Numbers
    quant_min: int
    quant_max: int
    bits: int
    signed: bool | None
    axis: int | None = None
    block_size: int | None = None
    type: str = ""
    elements: FloatElements | None = None
    is_dynamic: bool = False

    @property
    def is_float(self) -> bool:
        """Whether a code is a small float, not an integer."""
        return self.elements is not None

    def spread(self, values: Numbers, shape: Sequence[int]) -> Numbers:
        """Scales or zero points so that they broadcast against a tensor of a shape on this grid."""
        if self.axis is None:
            return values
        if self.block_size is not None:
            return np.repeat(values, self.block_size, axis=self.axis)[tuple(slice(size) for size in shape)]
        layout = [1] * len(shape)
        layout[self.axis] = -1
        return values.reshape(layout)

    def same_grid(self, other: "Encoding") -> bool:
        """Whether a code means the same real on both, and both have the same codes."""
        kinds = [(e.bits, e.signed, e.is_dynamic, _layout(e.elements)) for e in (self, other)]
        return (
            kinds[0] == kinds[1]
            and np.array_equal(np.float32(self.scale), np.float32(other.scale))
            and np.array_equal(self.zero_point, other.zero_point)
        )

    def shift_to(self, signed: bool) -> int:
        """What is taken off the codes of a grid without a sign so that a signed or unsigned type holds them.

        The zero point of a grid that is symmetric becomes 0; codes of any other grid stay as they are.
        """
        if self.signed is not None or not signed:
            return 0
        half = 1 << (self.bits - 1)
        zero = int(self.zero_point.flat[0]) if self.zero_point.size else half
        is_symmetric = bool((self.zero_point == zero).all()) and abs(zero - half) <= 1 and self.quant_max - zero < half
        return zero if is_symmetric else half

    def as_signed(self, signed: bool) -> "Encoding":
        """A grid without a sign as a signed or unsigned type holds it; any other as it is."""
        if self.signed is not None:
            return self
        shift = self.shift_to(signed)
        return replace(
            self,
            signed=signed,
            zero_point=self.zero_point - shift,
            quant_min=self.quant_min - shift,
            quant_max=self.quant_max - shift,
        )

    def words(self) -> str:
        """As `uint8, scale 0.0235, zero point 128`."""
        if self.is_dynamic:
            return f"{self.type}, scale computed at run time"
        scales = np.unique(self.scale)
        zeros = np.unique(self.zero_point)
        scale = f"scale {scales[0]:.9g}" if len(scales) == 1 else f"{self.scale.size} scales"
        zero = f"zero point {zeros[0]}" if len(zeros) == 1 else f"{self.zero_point.size} zero points"
        return f"{self.type}, {scale}, {zero}"


def _layout(elements: FloatElements | None) -> tuple[int, int, int] | None:
    return None if elements is None else (elements.exponent_bits, elements.mantissa_bits, elements.bias)


@dataclass(frozen=True, eq=False)
class Use:
    """A value that an operator reads or writes, and its grid there; None: a real number there.

    Attributes:
        tensor: The value, as the operator that computes it or the graph's input names it.
        encoding: The grid.
        shape: With None for sizes that are not fixed; None where the artefact does not state it.
    """

    tensor: str
    encoding: Encoding | None = None
    shape: tuple[int | None, ...] | None = None


@dataclass(frozen=True, eq=False)
class Constant:
    """A weight or bias.

    Attributes:
        name: As the artefact has it.
        shape: Its shape; None where it is not known.
        encoding: Its grid; None where it is stored in real numbers.
        codes: Stored integers, or patterns of small floats; None where there are none or they are not in the artefact.
        reals: Stored reals, where there is no grid.
    """

    name: str
    shape: tuple[int, ...] | None = None
    encoding: Encoding | None = None
    codes: Numbers | None = None
    reals: Numbers | None = None


@dataclass(frozen=True, eq=False)
class ArtefactOperator:
    """One operator.

    Attributes:
        name: As the artefact names the node, or its first output.
        kind: As `qhw.graph.KNOWN_KINDS`; `Unknown` for one that has none.
        type: The artefact's own word, as `QLinearConv`.
        inputs: Values read that are not constants.
        output: The first value written.
        weight: The constant operand.
        bias: The bias.
        weight_axis: Axis of the output channels in the stored weight; None where there is none.
        input_axis: Axis of the input channels in the stored weight.
        attributes: Plain facts, as `qhw.graph.Operator` has them; those that are not known are left out.
        is_integer: It computes on codes (QOperator, TFLite), and not on what a DequantizeLinear gives.
        more_outputs: Further values written.
    """

    name: str
    kind: str
    type: str
    inputs: tuple[Use, ...]
    output: Use
    weight: Constant | None = None
    bias: Constant | None = None
    weight_axis: int | None = None
    input_axis: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    is_integer: bool = False
    more_outputs: tuple[Use, ...] = ()


@dataclass(frozen=True, eq=False)
class Artefact:
    """A quantized model.

    Attributes:
        form: As `ONNX QDQ`, for reports.
        operators: In execution order, without those that only quantize, or compute shapes.
        inputs: Values that the graph is given.
        outputs: Values that it gives, quantized or not.
        biases: `stored`: the artefact holds biases as they will be used; `derived`: the toolchain quantizes them.
        opset: ONNX only.
        activations: Encodings of activations by name where the artefact has no operators.
        parameters: Encodings of parameters by name, likewise.
        remarks: What could not be read, one line each.
        ends: What inputs and outputs are stored as: `float`, `integer`; None where that is not known, or mixed.
    """

    form: str
    operators: tuple[ArtefactOperator, ...] = ()
    inputs: frozenset[str] = frozenset()
    outputs: frozenset[str] = frozenset()
    biases: Literal["stored", "derived"] = "stored"
    opset: int | None = None
    activations: Mapping[str, Encoding] = field(default_factory=dict)
    parameters: Mapping[str, Encoding] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()
    ends: Literal["float", "integer"] | None = None


def encoding_of(
    where: str,
    scale: Numbers | Sequence[float] | float,
    zero_point: Numbers | Sequence[int] | int,
    *,
    bits: int,
    signed: bool | None,
    axis: int | None = None,
    block_size: int | None = None,
    shape: Sequence[int] | None = None,
    type: str = "",
    elements: FloatElements | None = None,
) -> Encoding:
    """A checked grid.

    Args:
        where: File and tensor, for messages.
        scale: One, one per index of `axis`, or one per block.
        zero_point: Likewise, or one for all.
        bits: 1 to 64.
        signed: None: codes count from 0, and no sign is stated.
        axis: Of the tensor; a scale of one element makes it None.
        block_size: See `Encoding`.
        shape: Of the tensor, to check the number of scales; absent: not checked.
        type: The artefact's name of the stored type.
        elements: See `Encoding`; zero points are 0 then.

    Raises:
        ArtefactError: a scale is no number, or the counts do not fit the tensor.
    """
    scales = np.asarray(scale, dtype=np.float64)
    zeros = np.asarray(zero_point)
    if not 1 <= bits <= 64:
        raise ArtefactError(f"{where}: bits must be from 1 to 64; got {bits}. Correct the file.")
    if scales.size == 0 or not bool(np.isfinite(scales).all()):
        got = "none" if scales.size == 0 else str(float(scales[~np.isfinite(scales)].flat[0]))
        raise ArtefactError(f"{where}: a scale must be a finite number; got {got}. Quantize the model again.")
    if not np.issubdtype(zeros.dtype, np.integer):
        raise ArtefactError(f"{where}: a zero point must be an integer; got {zeros.dtype}. Quantize the model again.")
    zeros = zeros.astype(np.int64)
    if zeros.size not in (1, scales.size):
        raise ArtefactError(f"{where}: has {scales.size} scales and {zeros.size} zero points. Give as many of each.")
    if scales.size == 1:
        scales, axis, block_size = scales.reshape(()), None, None
    zeros = np.broadcast_to(zeros.reshape(()), scales.shape) if zeros.size == 1 else zeros.reshape(scales.shape)
    if axis is not None and shape is not None:
        axis = _checked_axis(where, scales, axis, block_size, shape)
    if elements is not None:
        if bool(zeros.any()):
            raise ArtefactError(f"{where}: the zero point of {type} must be 0. Quantize the model again.")
        return Encoding(scales, zeros, 0, 0, bits, signed, axis, block_size, type, elements)
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    return Encoding(scales, zeros, low, high, bits, signed, axis, block_size, type)


def _checked_axis(where: str, scales: Numbers, axis: int, block_size: int | None, shape: Sequence[int]) -> int:
    if not -len(shape) <= axis < len(shape):
        raise ArtefactError(f"{where}: axis must lie within {len(shape)} axes; got {axis}. Correct the file.")
    axis %= len(shape)
    if block_size is not None:
        blocks = tuple(-(-size // block_size) if at == axis else size for at, size in enumerate(shape))
        if scales.shape != blocks:
            raise ArtefactError(
                f"{where}: needs scales of shape {list(blocks)}, one for each {block_size} along axis {axis}; got "
                f"{list(scales.shape)}. Quantize the model again."
            )
        return axis
    if scales.ndim != 1 or len(scales) != shape[axis]:
        raise ArtefactError(
            f"{where}: needs {shape[axis]} scales, one for each index of axis {axis}; got {list(scales.shape)}. "
            "Quantize the model again."
        )
    return axis
