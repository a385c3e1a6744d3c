# SPDX-License-Identifier: Apache-2.0
"""onnxruntime/cpu-x86-avx2: after the fit no pair of products overflows, so that any host with AVX2 gives the codes."""

from pathlib import Path

import pytest
import torch

import qhw
from examples import digits
from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.integer import IntegerModel, prove_accumulators
from qhw_plugins.onnxruntime_executor import OnnxRuntime

TARGET = "onnxruntime/cpu-x86-avx2"


@pytest.fixture(scope="module")
def graph() -> qhw.Graph:
    return qhw.capture(*digits.model())


@pytest.fixture(scope="module")
def result(graph: qhw.Graph) -> QuantizedModel:
    return qhw.quantize(graph, TARGET, calibration=digits.calibration())


def test_weights_are_made_small_enough_for_any_two_products(result: QuantizedModel) -> None:
    for point in result.plan.points:
        if point.role == "weight" and point.operator != "classifier":
            # Unsigned bytes: 255 (|v| + |w|) <= 32767 for products of one sign, whichever stand side by side.
            codes = result.codes(point).long().flatten(1)
            for part in (codes.clamp(min=0), (-codes).clamp(min=0)):
                largest = part.topk(min(2, part.shape[1]), 1).values.sum(1)
                assert int(largest.max()) * 255 <= 32768
    assert not any(proof.overflowing_channels for proof in prove_accumulators(result, witnesses=False))


def test_the_runtime_gives_the_codes_and_the_model_keeps_its_accuracy(
    graph: qhw.Graph, result: QuantizedModel, tmp_path: Path
) -> None:
    scores = {score.subject: score.value for score in qhw.evaluate(graph, result, digits.evaluation())}
    assert scores["integer"] == pytest.approx(scores["float"], abs=1.0)
    if "avx2" not in OnnxRuntime().versions()["cpu"].split():
        pytest.skip("this machine does not compute as the target: no AVX2")
    assert qhw.verify(result, artefact=qhw.export(result, tmp_path)[0]).is_proven


@pytest.mark.slow
def test_without_the_step_pairs_may_saturate_and_the_missing_field_is_named(graph: qhw.Graph) -> None:
    result = qhw.quantize(graph, TARGET, calibration=digits.calibration(), without=("reduce_range",))
    assert all(proof.overflowing_channels for proof in prove_accumulators(result, witnesses=False))
    with pytest.raises(IntegerError, match=r"accumulators\.pairs\.order is 'unknown'"):
        IntegerModel(result)


@pytest.mark.slow
def test_unsigned_weights_are_summed_exactly(graph: qhw.Graph) -> None:
    formats = {"*.weight": "w8u"}
    plan = qhw.plan(graph, TARGET, calibration=digits.calibration(), formats=formats)
    kernels = {operator.kernel for operator in plan.operators if operator.kind in ("Conv", "DepthwiseConv", "Gemm")}
    assert kernels == {"mac_u8u8"}
    result = qhw.quantize(graph, plan, calibration=digits.calibration())
    assert torch.isfinite(IntegerModel(result)(digits.model()[1])).all()
