# SPDX-License-Identifier: Apache-2.0
"""The example network in exact integers: the runtime's outputs to the bit, and a score of its own."""

from pathlib import Path

import numpy as np
import pytest
import torch

import qhw
from examples import digits
from qhw.engine import QuantizedModel
from qhw.integer import IntegerModel
from qhw_plugins.onnxruntime_executor import OnnxRuntime
from tests.machine import has_vnni

TARGET = "onnxruntime/cpu-x86-vnni"


@pytest.fixture(scope="module")
def graph() -> qhw.Graph:
    return qhw.capture(*digits.model())


@pytest.fixture(scope="module")
def result(graph: qhw.Graph) -> QuantizedModel:
    return qhw.quantize(graph, TARGET, calibration=digits.calibration())


def test_the_integer_outputs_are_the_runtimes_to_the_bit(result: QuantizedModel, tmp_path: Path) -> None:
    if not has_vnni():
        pytest.skip("this machine does not compute as the target: no VNNI")
    artefact = qhw.export(result, tmp_path)[0]
    inputs, _ = next(iter(digits.evaluation()))
    x = torch.as_tensor(np.asarray(inputs))
    (theirs,) = OnnxRuntime().load(artefact)({result.input_names[0]: x.numpy()})
    assert torch.equal(IntegerModel(result)(x), torch.from_numpy(theirs))
    found = qhw.verify(result, artefact=artefact)
    assert found.is_proven and found.samples == 8


def test_the_integer_result_is_scored_where_the_target_says_how(graph: qhw.Graph, result: QuantizedModel) -> None:
    scores = qhw.evaluate(graph, result, digits.evaluation())
    assert [score.subject for score in scores] == ["float", "simulated", "integer"]
    assert scores[2].value == pytest.approx(scores[0].value, abs=1.0)  # five of the 500 scans
    open_target = qhw.quantize(graph, "whitepaper/generic-int8", calibration=digits.calibration())
    assert [s.subject for s in qhw.evaluate(graph, open_target, digits.evaluation())] == ["float", "simulated"]
