# SPDX-License-Identifier: Apache-2.0
"""ONNX operators that compute on codes: where each has its operands, scales, zero points and bias."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["INTEGER_OPERATORS", "IntegerForm"]


@dataclass(frozen=True)
class IntegerForm:
    """One operator's inputs by position.

    Attributes:
        computes: The operator that it is in integers.
        values: Value, scale (None: it has none) and zero point of each operand.
        output: Scale and zero point of the result; None: it gives an int32 or a real.
        bias: Position of the bias.
        repeats: The operands repeat to the end of the inputs.
    """

    computes: str
    values: tuple[tuple[int, int | None, int], ...]
    output: tuple[int, int] | None = None
    bias: int | None = None
    repeats: bool = False

    def operands(self, count: int) -> tuple[tuple[int, int | None, int], ...]:
        """Value, scale and zero point of each operand of a node with that many inputs."""
        if not self.repeats:
            return self.values
        return tuple((i, i + 1, i + 2) for i in range(self.values[0][0], count, 3))

    def result(self, count: int) -> tuple[int, int] | None:
        """Scale and zero point of the result."""
        return None if self.output is None or self.output[0] >= count else self.output

    def weight_axis(self, shape: tuple[int, ...] | None, given: Mapping[str, Any]) -> int | None:
        """The axis along which a constant operand has scales."""
        if shape is None:
            return None
        if self.computes == "Conv":
            return 0
        if self.computes == "Gemm":
            return 0 if given.get("transB", 0) else 1
        return len(shape) - 1 if shape else None


_TWO = ((0, 1, 2), (3, 4, 5))
_ONE = ((0, 1, 2),)

INTEGER_OPERATORS: Mapping[str, IntegerForm] = {
    "QLinearConv": IntegerForm("Conv", _TWO, (6, 7), bias=8),
    "QLinearMatMul": IntegerForm("MatMul", _TWO, (6, 7)),
    "QGemm": IntegerForm("Gemm", _TWO, (7, 8), bias=6),
    "QLinearAdd": IntegerForm("Add", _TWO, (6, 7)),
    "QLinearMul": IntegerForm("Mul", _TWO, (6, 7)),
    "QLinearConcat": IntegerForm("Concat", ((2, 3, 4),), (0, 1), repeats=True),
    "QLinearAveragePool": IntegerForm("AveragePool", _ONE, (3, 4)),
    "QLinearGlobalAveragePool": IntegerForm("GlobalAveragePool", _ONE, (3, 4)),
    "QLinearReduceMean": IntegerForm("ReduceMean", _ONE, (3, 4)),
    "QLinearLeakyRelu": IntegerForm("LeakyRelu", _ONE, (3, 4)),
    "QLinearSigmoid": IntegerForm("Sigmoid", _ONE, (3, 4)),
    "QLinearSoftmax": IntegerForm("Softmax", _ONE, (3, 4)),
    "ConvInteger": IntegerForm("Conv", ((0, None, 2), (1, None, 3))),
    "MatMulInteger": IntegerForm("MatMul", ((0, None, 2), (1, None, 3))),
}
"""QOperator forms of onnx and of onnxruntime's own domain."""
