# SPDX-License-Identifier: Apache-2.0
"""For tests of the ONNX plugins: targets of every number format, and running files in onnxruntime as we like."""

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, fx, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.numerics import FakeQuantizer
from qhw.schema import TargetSpec, load_target_file
from qhw_plugins.onnx_qdq import OnnxQdq, OnnxQdqOptions

_TARGET = """
schema_version = 1
name = "acme/onnx"
formats.a = {activation}
formats.w = {weight}
{bias}
kernels.mac = {{ input = ["a"], weight = ["w"], output = ["a"]{bias_of_mac} }}
kernels.ew = {{ input = ["a"], output = ["a"] }}
operators.Conv = {{ kernels = ["mac"], fused = ["Relu", "Clip"] }}
operators.ConvTranspose = {{ kernels = ["mac"], fused = ["Relu", "Clip"] }}
operators.Gemm = {{ kernels = ["mac"], fused = ["Relu", "Clip"] }}
operators.Embedding = {{ kernels = ["mac"] }}
operators.MatMul = {{ kernels = ["ew"] }}
operators.Add = {{ kernels = ["ew"], fused = ["Relu"] }}
operators.Mul = {{ kernels = ["ew"] }}
operators.Concat = {{ kernels = ["ew"] }}
operators.Sigmoid = {{ kernels = ["ew"] }}
operators.AveragePool = {{ kernels = ["ew"] }}
operators.GlobalAveragePool = {{ kernels = ["ew"] }}
operators.MaxPool = {{ same_scale = "input_output" }}
operators.Transpose = {{ same_scale = "input_output" }}
operators.Slice = {{ same_scale = "input_output" }}
operators.Pad = {{ same_scale = "input_output" }}
"""
U8 = '{ bits = 8, signed = false, per = "tensor" }'
S8 = '{ bits = 8, signed = true, per = "tensor" }'
W8 = '{ codes = [-127, 127], zero_point = 0, per = "out_channel" }'
_POWER = '{ bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }'
FORMATS = {
    "u8 activations, weights per axis": (U8, W8),
    "u8 activations, weights per tensor": (U8, '{ codes = [-127, 127], zero_point = 0, per = "tensor" }'),
    "u8 activations, asymmetric u8 weights": (U8, '{ bits = 8, signed = false, per = "tensor" }'),
    "s8 activations": (S8, W8),
    "symmetric s8 activations": ('{ bits = 8, signed = true, zero_point = 0, per = "tensor" }', W8),
    "activations in [-127, 127]": ('{ codes = [-127, 127], zero_point = 0, per = "tensor" }', W8),
    "7-bit activations": ('{ bits = 7, signed = false, per = "tensor" }', W8),
    "4-bit activations": ('{ bits = 4, signed = false, per = "tensor" }', W8),
    "int4 weights": (U8, '{ bits = 4, signed = true, zero_point = 0, per = "out_channel" }'),
    "weights per group": (U8, '{ bits = 4, signed = true, zero_point = 0, per = "group", group_size = 4 }'),
    "int16 activations": ('{ bits = 16, signed = true, zero_point = 0, per = "tensor" }', W8),
    "uint16 activations": ('{ bits = 16, signed = false, per = "tensor" }', W8),
    "power of two": (_POWER, _POWER),
}
"""Number formats (of activations, of weights) by what they are."""


def target(folder: Path, activation: str = U8, weight: str = W8, *, int32_bias: bool = False) -> TargetSpec:
    """A target that runs most operators in one pair of formats; biases left open, or int32."""
    text = _TARGET.format(
        activation=activation,
        weight=weight,
        bias='biases.b = { bits = 32, scale = "input*weight" }' if int32_bias else "",
        bias_of_mac=', bias = "b"' if int32_bias else "",
    )
    path = folder / "target.toml"
    path.write_text(text, encoding="utf-8")
    return load_target_file(path)


def quantized(model: nn.Module, example: Any, spec: TargetSpec | str, calibration: Any = None, **wishes: Any) -> Any:
    """A model quantized for a target; calibrated on the example when nothing else is given."""
    data = [example] if calibration is None else calibration
    return qhw.quantize(model.eval(), spec, example_inputs=example, calibration=data, **wishes)


def exported(result: QuantizedModel, folder: Path, **options: Any) -> Path:
    """model.onnx of a result."""
    place = folder / "artefact"
    place.mkdir(exist_ok=True)
    return OnnxQdq(OnnxQdqOptions(**options)).export(result, place)[0]


def run_plain(path: Path, inputs: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Outputs of a file with every optimization of onnxruntime off: each node computes as the ONNX text says."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray] = session.run(None, inputs)
    return found


def steps(result: QuantizedModel) -> list[float]:
    """For each output, in order: the scale of its quantizer, the size of one code; 0.0 where it stays in float."""
    output = next(node for node in result.module.graph.nodes if node.op == "output")
    leaves = [leaf for leaf in torch.utils._pytree.tree_leaves(output.args[0]) if isinstance(leaf, fx.Node)]
    modules = [result.module.get_submodule(str(leaf.target)) if leaf.op == "call_module" else None for leaf in leaves]
    return [float(module.scale) if isinstance(module, FakeQuantizer) else 0.0 for module in modules]


def assert_within_one_code(result: QuantizedModel, found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Outputs of the artefact and of the simulation differ by at most one code of the output's quantizer.

    The runtime multiplies by float32 scales in another order than the simulation, so a value within a few units in
    the last place of a tie may get the next code. 1e-5 relative is for float32 itself: sums of some hundred products
    where an output stays in float, and the product of code and scale.
    """
    for mine, other, step in zip(found, expected, steps(result), strict=True):
        assert mine.dtype == other.dtype and mine.shape == other.shape
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=step + 1e-5)


def as_inputs(result: QuantizedModel, values: Any) -> dict[str, np.ndarray]:
    """Inputs by name for the artefact, from what the model takes."""
    if isinstance(values, dict):
        return {name: values[name].numpy() for name in result.input_names}
    items = (values,) if isinstance(values, Tensor) else tuple(values)
    return {name: item.numpy() for name, item in zip(result.input_names, items, strict=True)}


def simulated(result: QuantizedModel, values: Any) -> list[np.ndarray]:
    """Outputs of the simulation, in order."""
    items = [torch.from_numpy(array) for array in as_inputs(result, values).values()]
    with torch.inference_mode():
        leaves = torch.utils._pytree.tree_leaves(result(*items))
    return [leaf.numpy() for leaf in leaves]
