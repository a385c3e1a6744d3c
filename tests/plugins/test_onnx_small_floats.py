# SPDX-License-Identifier: Apache-2.0
"""Small floats and groups in ONNX: what is written passes onnx.checker, and onnx's own evaluator computes what the
simulation does. What is written is legal on its target.
"""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.errors import ExportError
from qhw.numerics import FloatElements, PerAxis, PerTensor, QParams
from qhw_plugins.onnx_builder import Builder
from qhw_plugins.onnx_encodings import dequantized, implies, quantized, storage_of
from qhw_plugins.onnxruntime_executor import OnnxRuntime

E4M3, E5M2 = FloatElements(4, 3, 448.0), FloatElements(5, 2, 57344.0)
INPUTS = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))


def grid(elements: FloatElements, scale: float = 0.5) -> QParams:
    low, high = elements.code_bounds
    return QParams(torch.tensor(scale), torch.zeros((), dtype=torch.int32), low, high, PerTensor(), elements)


@pytest.mark.parametrize(
    ("elements", "scale", "expected"),
    [
        (E4M3, 0.5, "float8e4m3fn"),
        (FloatElements(4, 3, 240.0), 0.5, "float8e4m3fn"),  # as many codes of it as the device has
        (FloatElements(4, 3, 240.0, exponent_bias=8), 0.5, "float8e4m3fnuz"),
        (FloatElements(4, 3, 480.0), 0.5, None),
        (E5M2, 0.5, "float8e5m2"),
        (FloatElements(2, 1, 6.0), 0.5, "float4e2m1"),
        (FloatElements(2, 3, 7.5), 0.5, None),
        (FloatElements(5, 10, 65504.0), 1.0, "float16"),
        (FloatElements(5, 10, 65504.0), 0.5, None),
        (FloatElements(8, 7, 255 * 2.0**120), 1.0, "bfloat16"),
    ],
    ids=lambda value: value.words if isinstance(value, FloatElements) else str(value),
)
def test_a_small_float_goes_into_the_type_that_holds_all_of_it(
    elements: FloatElements, scale: float, expected: str | None
) -> None:
    for activation in (False, True):
        storage = storage_of(grid(elements, scale), activation=activation)
        assert (None if storage is None else storage.name) == expected


def evaluated(b: Builder, x: np.ndarray, output: str) -> np.ndarray:
    """A graph from x [4, 8] to one output, checked, in onnx's own evaluator."""
    graph = onnx.helper.make_graph(
        b.nodes,
        "g",
        [onnx.helper.make_tensor_value_info("x", TensorProto.FLOAT, [4, 8])],
        [onnx.helper.make_tensor_value_info(output, TensorProto.FLOAT, [4, 8])],
        list(b.initializers.values()),
    )
    opsets = [onnx.helper.make_opsetid("", max(b.needs, default=13))]
    ir = onnx.helper.find_min_ir_version_for(opsets)
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=ir)
    onnx.checker.check_model(model, full_check=True)
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": x})[0])


@pytest.mark.parametrize("largest", [448.0, 240.0])
def test_an_activation_saturates_where_its_device_does(largest: float) -> None:
    """At scale 0.5 elements up to 448 reach 224, and those up to 240 reach 120; 2 * 0.3 = 0.6 is nearest to 0.625."""
    b = Builder(19)
    qparams = grid(FloatElements(4, 3, largest))
    storage = storage_of(qparams, activation=True)
    assert storage is not None
    output = quantized(b, "x", qparams, storage, "g", "y")
    x = np.zeros((4, 8), np.float32)
    x[0, :4] = [1000.0, -1000.0, 0.3, 100.0]
    found = evaluated(b, x, output)
    assert found[0, :4].tolist() == [largest / 2, -largest / 2, 0.3125, 96.0]  # 200 lies between 192 and 208: even


def test_half_precision_saturates_as_well() -> None:
    b = Builder(13)
    qparams = grid(FloatElements(5, 10, 65504.0), 1.0)
    storage = storage_of(qparams, activation=True)
    assert storage is not None
    x = np.zeros((4, 8), np.float32)
    x[0, :2] = [1e5, 0.1]
    found = evaluated(b, x, quantized(b, "x", qparams, storage, "g", "y"))
    assert found[0, :2].tolist() == [65504.0, float(np.float16(0.1))]


def test_weights_are_stored_as_onnx_reads_them() -> None:
    """Patterns of e4m3 per channel: 0x38 is 1, 0xB8 is -1, 0x7E is 448."""
    b = Builder(19)
    low, high = E4M3.code_bounds
    zeros = torch.zeros(2, dtype=torch.int32)
    qparams = QParams(torch.tensor([0.5, 2.0]), zeros, low, high, PerAxis(0), E4M3)
    storage = storage_of(qparams, activation=False)
    assert storage is not None
    codes = torch.tensor([[0x38, 0xB8], [0x7E, 0x00]], dtype=torch.uint8)
    dequantized(b, codes, qparams, storage, "w", "w/dequantized")
    held = b.initializers["w/codes"]
    assert held.data_type == TensorProto.FLOAT8E4M3FN
    assert numpy_helper.to_array(held).astype(np.float32).tolist() == [[1.0, -1.0], [448.0, 0.0]]


def test_a_relu_before_floats_of_both_signs_is_not_left_out() -> None:
    assert not implies(grid(E4M3), 0.0, None)
    assert implies(grid(E4M3), -224.0, 224.0)
    assert not implies(grid(E4M3), -224.0, 200.0)


def result_for(target: str, formats: dict[str, str]) -> QuantizedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
    return qhw.quantize(
        model, target, example_inputs=(INPUTS[:1],), calibration=[INPUTS], formats=formats, progress=SilentProgress()
    )


LIVE = {"input": "bf16"}
TARGETS: dict[str, tuple[dict[str, str], int, int]] = {
    "intel/gaudi2": ({}, 19, TensorProto.FLOAT8E4M3FN),
    "intel/gaudi3": ({}, 19, TensorProto.FLOAT8E4M3FN),
    "nvidia/hopper-fp8": ({}, 19, TensorProto.FLOAT8E4M3FN),
    "nvidia/tensorrt-fp8": ({}, 19, TensorProto.FLOAT8E4M3FN),
    "nvidia/tensorrt-int4-weights": ({}, 21, TensorProto.INT4),
    "ocp/mxfp4": (LIVE, 23, TensorProto.FLOAT4E2M1),
    "ocp/mxfp8": (LIVE, 21, TensorProto.FLOAT8E4M3FN),
    "ocp/mxint8": (LIVE, 21, TensorProto.INT8),
}


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_written_computes_what_is_simulated_and_is_legal(target: str, tmp_path: Path) -> None:
    """But for the order of float32 sums, 192 products in all; one that falls on the other side of the middle between
    two small floats changes its sample's results by more, which happens to few of 32 samples.
    """
    formats, opset, stored = TARGETS[target]
    result = result_for(target, formats)
    (path,) = qhw.export(result, tmp_path)
    model = onnx.load(path)
    assert model.opset_import[0].version == opset
    assert {tensor.data_type for tensor in model.graph.initializer if tensor.name.endswith("/codes")} == {stored}
    expected = result(INPUTS).detach().numpy()
    bound = 192 * 2.0**-24 * np.abs(expected).max()
    found = ReferenceEvaluator(model).run(None, {"input": INPUTS.numpy()})[0]
    assert int((np.abs(found - expected).max(1) > bound).sum()) <= 2
    report = qhw.check(path, target)
    assert [one.message for one in report.violations] == []
    assert report.count("legal") >= 1
    if stored != TensorProto.FLOAT4E2M1:  # onnxruntime 1.32 has no kernel for it
        ran = OnnxRuntime().load(path)({"input": INPUTS.numpy()})[0]
        assert int((np.abs(ran - expected).max(1) > bound).sum()) <= 2


def test_what_has_no_type_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"formats\.e2m3 holds 6-bit floats \(e2m3\), and this form has no type for"):
        qhw.export(result_for("ocp/mxfp6", LIVE), tmp_path)
    with pytest.raises(ExportError, match=r"formats\.e4m3_live\.scale\.dynamic: this form cannot say"):
        qhw.export(result_for("ocp/mxfp8", {}), tmp_path)


def test_the_bias_beside_small_floats_stays_float(tmp_path: Path) -> None:
    (path,) = qhw.export(result_for("nvidia/tensorrt-fp8", {}), tmp_path)
    biases = [tensor for tensor in onnx.load(path).graph.initializer if tensor.name.endswith("bias")]
    assert {tensor.data_type for tensor in biases} == {TensorProto.FLOAT}
    assert len(biases) == 2
