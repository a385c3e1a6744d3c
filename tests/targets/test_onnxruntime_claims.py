# SPDX-License-Identifier: Apache-2.0
"""The rows of onnxruntime/cpu-x86-vnni, asked of the runtime itself: is the operator integer in its optimized graph?"""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qhw.schema import TargetSpec, load_target_file

IMAGE = (1, 4, 8, 8)
LOOP = {"kernel_shape": [2, 2]}
INTEGERS = (TensorProto.UINT8, TensorProto.INT8)
# kind -> (ONNX operator, its attributes, input shapes, int64 constants behind them, number of outputs)
ROWS: dict[str, tuple[str, dict[str, object], list[tuple[int, ...]], list[list[int]], int]] = {
    "Conv": ("Conv", {}, [IMAGE], [], 1),
    "DepthwiseConv": ("Conv", {"group": 4}, [IMAGE], [], 1),
    "Gemm": ("Gemm", {"transB": 1}, [(2, 16)], [], 1),
    "MatMul": ("MatMul", {}, [(2, 5, 16), (2, 16, 5)], [], 1),
    "Add": ("Add", {}, [IMAGE, IMAGE], [], 1),
    "Mul": ("Mul", {}, [IMAGE, IMAGE], [], 1),
    "Concat": ("Concat", {"axis": 1}, [IMAGE, IMAGE], [], 1),
    "AveragePool": ("AveragePool", LOOP, [IMAGE], [], 1),
    "GlobalAveragePool": ("GlobalAveragePool", {}, [IMAGE], [], 1),
    "MaxPool": ("MaxPool", LOOP, [IMAGE], [], 1),
    "ReduceMax": ("ReduceMax", {}, [IMAGE], [[2, 3]], 1),
    "ReduceMin": ("ReduceMin", {}, [IMAGE], [[2, 3]], 1),
    "Sigmoid": ("Sigmoid", {}, [IMAGE], [], 1),
    "LeakyRelu": ("LeakyRelu", {}, [IMAGE], [], 1),
    "Softmax": ("Softmax", {"axis": 1}, [(2, 10)], [], 1),
    "Reshape": ("Reshape", {}, [IMAGE], [[1, -1]], 1),
    "Flatten": ("Flatten", {}, [IMAGE], [], 1),
    "Squeeze": ("Squeeze", {}, [IMAGE], [[0]], 1),
    "Unsqueeze": ("Unsqueeze", {}, [IMAGE], [[0]], 1),
    "Transpose": ("Transpose", {"perm": [0, 2, 3, 1]}, [IMAGE], [], 1),
    "Slice": ("Slice", {}, [IMAGE], [[0], [2], [1]], 1),
    "Gather": ("Gather", {"axis": 1}, [IMAGE], [[0, 1]], 1),
    "Split": ("Split", {"axis": 1, "num_outputs": 2}, [IMAGE], [], 2),
    "Expand": ("Expand", {}, [IMAGE], [[2, 4, 8, 8]], 1),
    "Tile": ("Tile", {}, [IMAGE], [[1, 1, 2, 1]], 1),
    "DepthToSpace": ("DepthToSpace", {"blocksize": 2}, [IMAGE], [], 1),
}
FLOAT = {
    "Sub": ("Sub", {}, [IMAGE, IMAGE], [], 1),
    "Tanh": ("Tanh", {}, [IMAGE], [], 1),
    "Pad": ("Pad", {}, [IMAGE], [[0, 0, 1, 1, 0, 0, 1, 1]], 1),
    "ReduceMean": ("ReduceMean", {}, [IMAGE], [[2, 3]], 1),
    "HardSwish": ("HardSwish", {}, [IMAGE], [], 1),
}
WEIGHTS = {"Conv": (8, 4, 3, 3), "DepthwiseConv": (4, 1, 3, 3), "Gemm": (8, 16)}


@pytest.fixture(scope="module")
def spec(targets_root: Path) -> TargetSpec:
    return load_target_file(targets_root / "onnxruntime" / "cpu-x86-vnni.toml")


class Builder:
    """A QDQ model of one operator, all scales and zero points equal."""

    def __init__(self, integer: int) -> None:
        self.dtype = helper.tensor_dtype_to_np_dtype(integer)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def around(self, name: str, zero_point: int) -> str:
        """QuantizeLinear and DequantizeLinear behind a tensor."""
        scale = self.constant(f"{name}_scale", np.float32(0.02))
        zero = self.constant(f"{name}_zero", np.array(zero_point, self.dtype))
        self.nodes.append(helper.make_node("QuantizeLinear", [name, scale, zero], [f"{name}_q"]))
        self.nodes.append(helper.make_node("DequantizeLinear", [f"{name}_q", scale, zero], [f"{name}_dq"]))
        return f"{name}_dq"

    def parameters(self, shape: tuple[int, ...]) -> list[str]:
        """An int8 weight with one scale per output channel, and its int32 bias."""
        channels = shape[0]
        codes = np.random.default_rng(0).integers(-127, 128, shape).astype(np.int8)
        scale = self.constant("w_scale", np.full(channels, 0.01, np.float32))
        zero = self.constant("w_zero", np.zeros(channels, np.int8))
        bias_scale = self.constant("b_scale", np.full(channels, 0.0002, np.float32))
        weight, bias = self.constant("w", codes), self.constant("b", np.arange(channels, dtype=np.int32))
        self.nodes.append(helper.make_node("DequantizeLinear", [weight, scale, zero], ["w_dq"], axis=0))
        self.nodes.append(helper.make_node("DequantizeLinear", [bias, bias_scale], ["b_dq"], axis=0))
        return ["w_dq", "b_dq"]


def optimized(kind: str, integer: int, row: tuple, path: Path, then: str | None = None) -> set[str]:  # type: ignore[type-arg]
    """Names of the operators that the runtime is left with, quantization at the edges put aside."""
    name, attributes, shapes, constants, outputs = row
    lowest = 0 if integer == TensorProto.UINT8 else -128
    zero_point = lowest if then else lowest + 100
    built = Builder(integer)
    inputs = [built.around(f"x{i}", zero_point) for i in range(len(shapes))]
    inputs += built.parameters(WEIGHTS[kind]) if kind in WEIGHTS else []
    inputs += [built.constant(f"c{i}", np.array(value, np.int64)) for i, value in enumerate(constants)]
    results = [f"y{i}" for i in range(outputs)]
    built.nodes.append(helper.make_node(name, inputs, results, **attributes))
    if then:
        built.nodes.append(helper.make_node(then, results, ["activated"]))
        results = ["activated"]
    results = [built.around(result, zero_point) for result in results]
    graph = helper.make_graph(
        built.nodes,
        kind,
        [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(shapes)],
        [helper.make_tensor_value_info(result, TensorProto.FLOAT, None) for result in results],
        built.constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path / "optimized.onnx")
    options.log_severity_level = 4
    onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    left = onnx.load(path / "optimized.onnx").graph
    produced = {node.output[0]: node for node in left.node}
    edges = {"QuantizeLinear", "DequantizeLinear"}
    inside = [node for node in left.node if node.op_type not in edges]
    reads_float = {
        node.op_type
        for node in inside
        if any(produced[tensor].op_type == "DequantizeLinear" for tensor in node.input if tensor in produced)
    }
    return {f"float {name}" for name in reads_float} or {node.op_type for node in inside}


def test_every_listed_operator_is_asked(spec: TargetSpec) -> None:
    assert set(ROWS) == set(spec.operators)
    assert set(FLOAT) & set(spec.operators) == set()


@pytest.mark.parametrize("integer", INTEGERS, ids=["uint8", "int8"])
@pytest.mark.parametrize("kind", ROWS)
def test_listed_operators_compute_on_integers(kind: str, integer: int, tmp_path: Path) -> None:
    left = optimized(kind, integer, ROWS[kind], tmp_path)
    assert left and not any(name.startswith("float ") for name in left), left


@pytest.mark.parametrize("kind", FLOAT)
def test_operators_left_out_compute_in_float(kind: str, tmp_path: Path) -> None:
    left = optimized(kind, TensorProto.UINT8, FLOAT[kind], tmp_path)
    assert any(name.startswith("float ") for name in left), left


@pytest.mark.parametrize("integer", INTEGERS, ids=["uint8", "int8"])
@pytest.mark.parametrize("kind", ["Conv", "DepthwiseConv", "Gemm", "MatMul", "Add", "Mul"])
def test_fused_relu_leaves_no_trace(kind: str, integer: int, tmp_path: Path, spec: TargetSpec) -> None:
    assert isinstance(spec.operators[kind].fused, tuple) and "Relu" in spec.operators[kind].fused
    left = optimized(kind, integer, ROWS[kind], tmp_path, then="Relu")
    assert "Relu" not in left and not any(name.startswith("float ") for name in left), left
