# SPDX-License-Identifier: Apache-2.0
"""TFLite's built-in operators as kinds and facts, and where their options lie in the file.

Numbers are those of the TFLite schema (tensorflow/compiler/mlir/lite/schema/schema.fbs): codes of BuiltinOperator,
TensorType and ActivationFunctionType, and places of fields in the tables of options.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qhw_plugins.flat_tables import FlatTable

__all__ = ["ACTIVATIONS", "FLOATS", "KINDS", "TYPES", "activation_of", "facts_of"]

KINDS: Mapping[int, tuple[str, str]] = {
    0: ("ADD", "Add"), 1: ("AVERAGE_POOL_2D", "AveragePool"), 2: ("CONCATENATION", "Concat"), 3: ("CONV_2D", "Conv"),
    4: ("DEPTHWISE_CONV_2D", "DepthwiseConv"), 5: ("DEPTH_TO_SPACE", "DepthToSpace"), 6: ("DEQUANTIZE", ""),
    9: ("FULLY_CONNECTED", "Gemm"), 11: ("L2_NORMALIZATION", "L2Normalization"), 14: ("LOGISTIC", "Sigmoid"),
    17: ("MAX_POOL_2D", "MaxPool"), 18: ("MUL", "Mul"), 19: ("RELU", "Relu"), 20: ("RELU_N1_TO_1", "Clip"),
    21: ("RELU6", "Clip"), 22: ("RESHAPE", "Reshape"), 23: ("RESIZE_BILINEAR", "Resize"), 25: ("SOFTMAX", "Softmax"),
    26: ("SPACE_TO_DEPTH", "SpaceToDepth"), 28: ("TANH", "Tanh"), 34: ("PAD", "Pad"), 36: ("GATHER", "Gather"),
    39: ("TRANSPOSE", "Transpose"), 40: ("MEAN", "ReduceMean"), 41: ("SUB", "Sub"), 42: ("DIV", "Div"),
    43: ("SQUEEZE", "Squeeze"), 45: ("STRIDED_SLICE", "Slice"), 47: ("EXP", "Exp"), 49: ("SPLIT", "Split"),
    50: ("LOG_SOFTMAX", "LogSoftmax"), 54: ("PRELU", "PRelu"), 55: ("MAXIMUM", "Max"), 56: ("ARG_MAX", "ArgMax"),
    57: ("MINIMUM", "Min"), 59: ("NEG", "Neg"), 60: ("PADV2", "Pad"), 65: ("SLICE", "Slice"),
    67: ("TRANSPOSE_CONV", "ConvTranspose"), 69: ("TILE", "Tile"), 70: ("EXPAND_DIMS", "Unsqueeze"), 73: ("LOG", "Log"),
    74: ("SUM", "ReduceSum"), 75: ("SQRT", "Sqrt"), 76: ("RSQRT", "Rsqrt"), 78: ("POW", "Pow"),
    81: ("REDUCE_PROD", "ReduceProd"), 82: ("REDUCE_MAX", "ReduceMax"), 89: ("REDUCE_MIN", "ReduceMin"),
    97: ("RESIZE_NEAREST_NEIGHBOR", "Resize"), 98: ("LEAKY_RELU", "LeakyRelu"), 100: ("MIRROR_PAD", "Pad"),
    101: ("ABS", "Abs"), 102: ("SPLIT_V", "Split"), 111: ("ELU", "Elu"), 114: ("QUANTIZE", ""),
    117: ("HARD_SWISH", "HardSwish"), 126: ("BATCH_MATMUL", "MatMul"), 130: ("BROADCAST_TO", "Expand"),
    150: ("GELU", "Gelu"), 152: ("RELU_0_TO_1", "Clip"),
}  # fmt: skip
"""Code -> TFLite's name and the kind; an empty kind only quantizes."""

FLOATS = frozenset({0, 1, 10})
"""Codes of float types."""

TYPES: Mapping[int, tuple[str, int, bool]] = {
    2: ("int32", 32, True), 3: ("uint8", 8, False), 4: ("int64", 64, True), 7: ("int16", 16, True),
    9: ("int8", 8, True), 15: ("uint32", 32, False), 16: ("uint16", 16, False), 17: ("int4", 4, True),
    19: ("int2", 2, True), 20: ("uint4", 4, False),
}  # fmt: skip
"""Code -> name, bits and sign of integers."""

ACTIVATIONS: Mapping[int, tuple[str, dict[str, Any]]] = {
    1: ("Relu", {"minimum": 0.0}),
    2: ("Clip", {"minimum": -1.0, "maximum": 1.0}),
    3: ("Clip", {"minimum": 0.0, "maximum": 6.0}),
    4: ("Tanh", {}),
    5: ("Unknown", {}),
}
"""Fused activation -> kind and facts."""

_ACTIVATION_SLOTS = {"CONV_2D": 3, "DEPTHWISE_CONV_2D": 4, "TRANSPOSE_CONV": 3, "FULLY_CONNECTED": 0,
                     "AVERAGE_POOL_2D": 5, "MAX_POOL_2D": 5, "CONCATENATION": 1, "ADD": 0, "SUB": 0, "MUL": 0, "DIV": 0,
                     "L2_NORMALIZATION": 0}  # fmt: skip
_CLIPS = {"RELU_N1_TO_1": (-1.0, 1.0), "RELU6": (0.0, 6.0), "RELU_0_TO_1": (0.0, 1.0)}
_CHANNELS_LAST = {0: 0, 1: 2, 2: 3, 3: 1}
"""Axes of an image as TFLite has it -> as qhw has it."""


def activation_of(name: str, options: FlatTable | None) -> int:
    """Code of the activation that an operator computes along; 0: none."""
    slot = _ACTIVATION_SLOTS.get(name)
    return 0 if options is None or slot is None else options.integer(slot, "b")


def layout_axis(axis: int, rank: int) -> int:
    """An axis of a tensor as qhw has it: images have their channels behind the batch."""
    axis %= max(rank, 1)
    return _CHANNELS_LAST[axis] if rank == 4 else axis


def facts_of(
    name: str,
    kind: str,
    options: FlatTable | None,
    source: Sequence[int] | None,
    weight: Sequence[int] | None,
    axes: Sequence[int] | None,
) -> tuple[str, dict[str, Any]]:
    """Kind and facts of an operator.

    Args:
        name: As TFLite has it.
        kind: As the table has it.
        options: Its options.
        source: Shape of the first operand.
        weight: Shape of the constant operand.
        axes: Constant axes of a reduction.
    """
    if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "TRANSPOSE_CONV"):
        return _conv(name, kind, options, source, weight)
    if name == "FULLY_CONNECTED" and weight is not None and len(weight) == 2:
        return kind, {"in_channels": weight[1], "out_channels": weight[0], "reduced_elements": weight[1]}
    if name == "BATCH_MATMUL" and source:
        adjoint = options is not None and bool(options.integer(0, "b"))
        return kind, {"reduced_elements": source[-2 if adjoint and len(source) > 1 else -1]}
    if name in ("AVERAGE_POOL_2D", "MAX_POOL_2D") and options is not None:
        kernel = [options.integer(4), options.integer(3)]
        stride = [options.integer(2), options.integer(1)]
        padding = "valid" if options.integer(0, "b") else "same"
        facts = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": [1, 1]}
        return kind, facts | {"reduced_elements": math.prod(kernel)}
    if kind.startswith("Reduce") and source and axes is not None:
        return _reduction(kind, options, source, axes)
    if name in _CLIPS:
        return kind, dict(zip(("minimum", "maximum"), _CLIPS[name], strict=True))
    if name == "RELU":
        return kind, {"minimum": 0.0}
    if name == "LEAKY_RELU":
        return kind, {"slope": float(options.number(0, "f", 0.0)) if options is not None else 0.0}
    if name in ("CONCATENATION", "GATHER") and source is not None and options is not None:
        return kind, {"axis": layout_axis(options.integer(0), len(source)), "axis_rank": len(source)}
    if kind in ("Softmax", "LogSoftmax") and source:
        return kind, {"axis": layout_axis(-1, len(source)), "axis_rank": len(source)}
    if kind == "Resize":
        return kind, {"mode": "linear" if "BILINEAR" in name else "nearest"}
    if kind == "Pad":
        return kind, {"mode": "reflect" if name == "MIRROR_PAD" else "constant"}
    return kind, {}


def _conv(
    name: str, kind: str, options: FlatTable | None, source: Sequence[int] | None, weight: Sequence[int] | None
) -> tuple[str, dict[str, Any]]:
    if options is None or weight is None or len(weight) != 4:
        return kind, {}
    depthwise = name == "DEPTHWISE_CONV_2D"
    dilation_slot = {"CONV_2D": 4, "DEPTHWISE_CONV_2D": 5}.get(name)
    out_channels = weight[3] if depthwise else weight[0]
    channels = source[-1] if source else None
    if channels is None or channels < 1:
        channels = weight[3]
    groups = max(channels if depthwise else channels // max(weight[3], 1), 1)
    facts = {
        "kernel": list(weight[1:3]),
        "stride": [options.integer(2), options.integer(1)],
        "dilation": [1, 1]
        if dilation_slot is None
        else [options.integer(dilation_slot + 1, default=1), options.integer(dilation_slot, default=1)],
        "padding": "valid" if options.integer(0, "b") else "same",
        "groups": groups,
        "in_channels": channels,
        "out_channels": out_channels,
    }
    if kind == "DepthwiseConv" and channels == 1:
        return "Conv", facts
    return kind, facts


def _reduction(
    kind: str, options: FlatTable | None, source: Sequence[int], axes: Sequence[int]
) -> tuple[str, dict[str, Any]]:
    chosen = sorted({layout_axis(int(axis), len(source)) for axis in axes})
    stored = sorted({int(axis) % max(len(source), 1) for axis in axes})
    count = math.prod(source[axis] for axis in stored)
    facts = {
        "axes": chosen,
        "axis_rank": len(source),
        "keepdim": options is not None and bool(options.integer(0, "b")),
        "reduced_elements": count,
    }
    whole = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}.get(kind)
    if whole is not None and len(source) == 4 and chosen == [2, 3]:
        return whole, facts | {"kernel": list(source[1:3])}
    return kind, facts
