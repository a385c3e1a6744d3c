# SPDX-License-Identifier: Apache-2.0
"""Moves of stored tensors, as a reader meets them before constants are folded: rows of a table, a slice, a reshape."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

__all__ = ["MOVES", "moved"]

MOVES = frozenset({"Flatten", "Gather", "Reshape", "Slice", "Squeeze", "Transpose", "Unsqueeze"})
"""Operators that give values of their first operand, as they are."""
_LARGEST = 2**26  # elements of a result


def moved(node: onnx.NodeProto, operands: Sequence[NDArray[Any] | None]) -> NDArray[Any] | None:
    """The result of a node that moves a stored tensor; None for any other node, and where it cannot be had.

    Args:
        node: Read as of the newest opset, which is how most write these operators.
        operands: Its inputs; None for one that is left out.
    """
    if node.op_type not in MOVES or len(node.output) != 1 or not operands or operands[0] is None:
        return None
    if node.op_type == "Gather" and _gathered(node, *(() if a is None else a.shape for a in operands[:2])) > _LARGEST:
        return None
    given = {name: array for name, array in zip(node.input, operands, strict=True) if array is not None}
    try:
        (found,) = ReferenceEvaluator(node).run(None, given)
    # A file that nobody checked: numpy and onnx raise whatever they come upon, and then the result is not known.
    except Exception:
        return None
    return np.asarray(found)


def _gathered(node: onnx.NodeProto, table: tuple[int, ...], places: tuple[int, ...] = ()) -> int:
    """Elements that a Gather gives."""
    axis = next((item.i for item in node.attribute if item.name == "axis"), 0) % max(len(table), 1)
    return math.prod(table[:axis]) * math.prod(places) * math.prod(table[axis + 1 :])
