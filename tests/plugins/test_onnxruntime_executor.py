# SPDX-License-Identifier: Apache-2.0
"""The onnxruntime executor: what it runs, what it refuses, what it says about itself."""

import builtins
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from qhw.errors import ExportError
from qhw_plugins.onnxruntime_executor import OnnxRuntime, optimized_operators


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """relu(a - b), float32 [batch, 3] each."""
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 3]) for name in ("a", "b", "y")]
    nodes = [helper.make_node("Sub", ["a", "b"], ["d"]), helper.make_node("Relu", ["d"], ["y"])]
    graph = helper.make_graph(nodes, "test", infos[:2], infos[2:])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8), path)
    return path


A = np.array([[1, 2, 3]], np.float32)


def test_it_is_available_where_onnxruntime_is() -> None:
    assert OnnxRuntime().available() is None


def test_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *rest: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", refuse)
    assert OnnxRuntime().available() == (
        "onnxruntime cannot be imported (No module named 'onnxruntime'). Run: pip install onnxruntime"
    )


def test_it_computes_the_outputs_in_order(model: Path) -> None:
    (found,) = OnnxRuntime().load(model)({"a": A, "b": np.array([[0, 4, 1]], np.float32)})
    np.testing.assert_array_equal(found, [[1, 0, 2]])  # relu([1 - 0, 2 - 4, 3 - 1])


def test_inputs_need_not_be_contiguous_nor_in_order(model: Path) -> None:
    b = np.array([[0, 9], [4, 9], [1, 9]], np.float32)[:, :1].T
    (found,) = OnnxRuntime().load(model)({"b": b, "a": A, "unread": A})
    np.testing.assert_array_equal(found, [[1, 0, 2]])


@pytest.mark.parametrize("content", [b"", b"no model", b"\x08\x08\x12\x00"], ids=["empty", "text", "a cut-off model"])
def test_it_refuses_junk_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "junk.onnx"
    path.write_bytes(content)
    with pytest.raises(ExportError, match=r"junk\.onnx: onnxruntime refuses it: [^\n]+$") as caught:
        OnnxRuntime().load(path)
    assert "\n" not in str(caught.value)


def test_it_refuses_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"absent\.onnx: onnxruntime refuses it: [^\n]+$"):
        OnnxRuntime().load(tmp_path / "absent.onnx")


def test_a_missing_input_is_named_with_those_there_are(model: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx: input 'b' is missing\. Inputs: a, b\.$"):
        OnnxRuntime().load(model)({"a": A})


@pytest.mark.parametrize(
    "b",
    [A.astype(np.float64), A.astype(np.int8), A[0], np.zeros((1, 4), np.float32)],
    ids=["float64", "int8", "an axis too few", "a size that does not fit"],
)
def test_a_wrong_input_is_refused_in_one_line(b: np.ndarray, model: Path) -> None:
    with pytest.raises(ExportError, match=r"model\.onnx: onnxruntime fails: [^\n]+$") as caught:
        OnnxRuntime().load(model)({"a": A, "b": b})
    assert "\n" not in str(caught.value)


def test_versions_name_the_runtime_and_the_machine() -> None:
    versions = OnnxRuntime().versions()
    assert list(versions) == ["onnxruntime", "machine", "cpu"]
    assert versions["onnxruntime"] == onnxruntime.__version__ and versions["machine"]


def test_the_optimized_graph_is_counted(model: Path, tmp_path: Path) -> None:
    assert optimized_operators(model, tmp_path) == {"Sub": 1, "Relu": 1}
