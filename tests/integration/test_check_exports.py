# SPDX-License-Identifier: Apache-2.0
"""What qhw exports is judged legal on its own target; what onnxruntime quantizes is judged as its settings say."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import qhw
from qhw.engine import SilentProgress
from qhw.legality import CheckReport, judge
from qhw.schema import load_target_file
from qhw_plugins.onnx_reader import OnnxReader

ROOT = Path(__file__).parents[2]
OWN = ("whitepaper/generic-int8", "onnxruntime/cpu-x86-vnni", "google/litert-int8", "espressif/esp32-p4")


def held(path: Path, target: str) -> CheckReport:
    spec = load_target_file(ROOT / f"targets/qhw_targets/{target}.toml")
    return judge(OnnxReader().read(path, None), spec, str(path))


@pytest.mark.slow
@pytest.mark.parametrize("target", [*OWN, "onnxruntime/cpu-x86-avx2"])
def test_the_exported_example_is_legal_on_its_own_target(target: str, tmp_path: Path) -> None:
    digits = pytest.importorskip("examples.digits")
    pytest.importorskip("sklearn")
    model, example = digits.model()
    result = qhw.quantize(
        model, target, example_inputs=example, calibration=digits.calibration(), progress=SilentProgress()
    )
    (path, *_) = qhw.export(result, tmp_path)
    report = held(path, target)
    assert [one.message for one in report.violations] == []
    assert report.count("legal") >= 12
    assert (report.count("host"), report.count("unjudged")) == (0, 0)


def float_model(folder: Path) -> Path:
    """Convolution, ReLU, pool and product, with weights of both signs."""
    generator = np.random.default_rng(0)
    weights = {
        "w": generator.normal(size=(4, 3, 3, 3)), "b": generator.normal(size=4),
        "m": generator.normal(size=(4, 5)), "c": generator.normal(size=5),
    }  # fmt: skip
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["conv"], name="conv"),
        helper.make_node("Relu", ["conv"], ["relu"], name="relu"),
        helper.make_node("GlobalAveragePool", ["relu"], ["pool"], name="pool"),
        helper.make_node("Flatten", ["pool"], ["flat"], name="flat"),
        helper.make_node("Gemm", ["flat", "m", "c"], ["gemm"], name="gemm"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("gemm", TensorProto.FLOAT, [1, 5])],
        [numpy_helper.from_array(np.float32(array), name) for name, array in weights.items()],
    )
    path = folder / "float.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def quantized_by_onnxruntime(folder: Path, **settings: Any) -> Path:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            generator = np.random.default_rng(1)
            self.batches: Iterator[np.ndarray] = iter(generator.normal(size=(4, 1, 3, 8, 8)).astype(np.float32))

        def get_next(self) -> dict[str, np.ndarray] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch}

    path = folder / "quantized.onnx"
    kinds = {"s8": QuantType.QInt8, "u8": QuantType.QUInt8}
    form = {"qdq": QuantFormat.QDQ, "qoperator": QuantFormat.QOperator}[settings.pop("form", "qdq")]
    quantize_static(
        float_model(folder), path, Reader(), quant_format=form, activation_type=kinds[settings.pop("activations")],
        weight_type=kinds["s8"], **settings,
    )  # fmt: skip
    return path


@pytest.mark.parametrize("per_channel", [False, True], ids=["per tensor", "per channel"])
@pytest.mark.parametrize("activations", ["s8", "u8"])
def test_onnxruntimes_own_quantization_is_legal_on_it(activations: str, per_channel: bool, tmp_path: Path) -> None:
    path = quantized_by_onnxruntime(tmp_path, activations=activations, per_channel=per_channel)
    report = held(path, "onnxruntime/cpu-x86-vnni")
    assert [one.message for one in report.violations] == []
    assert {one.name for one in report.operators if one.status == "legal"} >= {"conv", "gemm"}


def test_its_integer_operators_are_read_too(tmp_path: Path) -> None:
    path = quantized_by_onnxruntime(tmp_path, activations="u8", per_channel=True, form="qoperator")
    report = held(path, "onnxruntime/cpu-x86-vnni")
    assert report.form == "ONNX QOperator"
    assert [one.message for one in report.violations] == []
    assert {one.type for one in report.operators if one.status == "legal"} >= {"QLinearConv", "QGemm"}


def test_no_scale_of_it_is_a_power_of_two(tmp_path: Path) -> None:
    path = quantized_by_onnxruntime(tmp_path, activations="s8", per_channel=True, extra_options={
        "ActivationSymmetric": True, "WeightSymmetric": True,
    })  # fmt: skip
    report = held(path, "espressif/esp32-p4")
    found = {(one.node, one.clause) for one in report.violations}
    scales = {"formats.s8.scale.kind", "formats.w8.scale.kind"}
    assert {clause for _, clause in found} == scales
    assert {node for node, _ in found} >= {"conv", "pool", "gemm"}
    assert {(node, clause) for node in ("conv", "gemm") for clause in scales} <= found


def test_zero_points_of_it_are_illegal_where_all_must_be_0(tmp_path: Path) -> None:
    path = quantized_by_onnxruntime(tmp_path, activations="s8", per_channel=False)
    found = {(one.node, one.clause) for one in held(path, "espressif/esp32-p4").violations}
    assert ("conv", "formats.s8.zero_point") in found
    assert not any(clause.startswith("formats.w8t.zero_point") for _, clause in found)


@pytest.mark.parametrize("line", ["3 operators judged: 0 legal, 3 illegal", "14 violations of 3 clauses"])
def test_the_page_shows_what_the_command_finds(line: str, tmp_path: Path) -> None:
    page = (ROOT / "docs/check.md").read_text(encoding="utf-8")
    assert line in page
    path = quantized_by_onnxruntime(tmp_path, activations="s8", per_channel=True)
    report = held(path, "espressif/esp32-p4")
    clauses = {one.clause for one in report.violations}
    assert line in (f"{len(report.violations)} violations of {len(clauses)} clauses", report.summary[: len(line)])
    assert all(f"\n{clause}  " in page for clause in clauses)
    assert all(f"\n  {one.clause} " in page for one in report.unjudged)
