# SPDX-License-Identifier: Apache-2.0
"""Random small models of what onnxruntime/cpu-x86-vnni runs in integers, and what the runtime makes of them."""

from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import numpy_helper

from qhw.engine import QuantizedModel
from qhw_plugins.onnx_qdq import OnnxQdq, OnnxQdqOptions
from qhw_plugins.onnxruntime_executor import optimized_operators
from tests import random_steps as steps
from tests.random_models import Drawn, Repertoire, quantized

TARGET = "onnxruntime/cpu-x86-vnni"
FORMATS: tuple[dict[str, str], ...] = (
    {},
    {"*.weight": "w8t"},
    {"*.weight": "w8u"},
    {"*": "s8", "*.weight": "w8"},
    {"*": "s8", "*.weight": "w8t"},
)

_INTEGER = {
    "QLinearConv", "QLinearMatMul", "QGemm", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool",
    "QLinearGlobalAveragePool", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearSoftmax", "NhwcMaxPool",
}  # fmt: skip
_EITHER = {
    "MaxPool", "ReduceMax", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Gather",
    "Split", "Expand", "Tile", "DepthToSpace", "Identity", "ReduceMin",
}  # fmt: skip
_SHAPES = {"Shape", "Constant", "ConstantOfShape"}
_MOVING = _EITHER - {"MaxPool", "ReduceMax", "ReduceMin", "Concat"}


REPERTOIRE = Repertoire(
    ranks=(4, 4, 4, 3, 2),
    layers=(steps.conv, steps.linear),
    clips={
        "relu": torch.relu, "relu6": F.relu6, "clip": lambda x: torch.clamp(x, -1.5, 2.0),
        "odd_clip": lambda x: torch.clamp(x, -0.37, 1.13), "low_clip": lambda x: torch.clamp(x, min=-0.61),
        "high_clip": lambda x: torch.clamp(x, max=0.83),
    },
    steps=(
        *[steps.conv] * 4,
        *[steps.linear] * 3,
        steps.matmul,
        *[partial(steps.elementwise, functions={"add": torch.add, "mul": torch.mul})] * 4,
        *[steps.concat] * 2,
        *[steps.average_pool] * 2,
        steps.max_pool,
        steps.whole,
        partial(steps.reduction, functions={"maximum": torch.amax, "minimum": torch.amin}),
        partial(steps.function, functions={"sigmoid": torch.sigmoid}),
        *[
            partial(
                steps.movement,
                kinds=(
                    "flatten", "reshape", "unsqueeze", "squeeze", "transpose", "slice", "strided_slice", "select",
                    "split", "chunk", "expand", "tile", "pixel_shuffle",
                ),
            )
        ]
        * 2,
        steps.shuffled_channels,
    ),
)  # fmt: skip


def calibrated(seed: int) -> Drawn:
    """The model of a seed, in formats that the seed draws."""
    return quantized(seed, REPERTOIRE, TARGET, FORMATS[seed % len(FORMATS)])


def exported(result: QuantizedModel, folder: Path) -> Path:
    """model.onnx of a result."""
    return OnnxQdq(OnnxQdqOptions()).export(result, folder)[0]


def float_islands(path: Path, folder: Path) -> tuple[str, ...]:
    """Operators that the runtime runs in float, of the artefact with its codes shown; empty where all is integer.

    Moving reals is none, nor is quantizing them again on the grid that they come from: their codes stay.
    """
    optimized_operators(path, folder, codes=True)
    graph = onnx.load(folder / "optimized.onnx").graph
    grids = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    allowed = _INTEGER | _EITHER | _SHAPES | {"QuantizeLinear", "DequantizeLinear"}
    islands = {node.op_type for node in graph.node if node.op_type not in allowed}
    for node in graph.node:
        if node.op_type == "DequantizeLinear":
            for reader in (other for other in graph.node if node.output[0] in other.input):
                is_same = reader.op_type == "QuantizeLinear" and _is_one_grid(node, reader, grids)
                if not is_same and reader.op_type not in _MOVING:
                    islands.add(f"{reader.op_type} of reals")
    return tuple(sorted(islands))


def _is_one_grid(a: onnx.NodeProto, b: onnx.NodeProto, grids: dict[str, np.ndarray]) -> bool:
    return all(np.array_equal(grids[m], grids[n]) for m, n in zip(a.input[1:], b.input[1:], strict=True))
