# SPDX-License-Identifier: Apache-2.0
"""What training made is a result like any other: saved, loaded, exported, run by onnxruntime, proven in integers."""

from pathlib import Path

import numpy as np
import pytest
import torch

import qhw
from qhw.engine import SilentProgress
from tests.machine import onnxruntime_here
from tests.training_support import images, network, steps

onnxruntime = pytest.importorskip("onnxruntime")

TARGET = onnxruntime_here()
WAYS = {
    "as planned": {},
    "kept": {"prefer": ["kept_batch_norm"]},
    "double forward": {"prefer": ["double_forward"]},
    "lsq+": {"prefer": ["lsq_plus"]},
    "re-estimated": {"prefer": ["reestimated_ranges"]},
}


def frozen(pipeline="whitepaper-qat", **train):
    data = images(64)
    result = qhw.quantize(network(), TARGET, example_inputs=data[:2], calibration=data, pipeline=pipeline)
    before = result.encodings()
    qhw.trainable(result, **train)
    steps(result, 6, lr=5e-3)
    made = qhw.freeze(result, calibration=data)
    assert any(not torch.equal(qparams.scale, before[group].scale) for group, qparams in made.encodings().items())
    return made


@pytest.mark.parametrize("way", WAYS)
def test_every_code_is_that_of_onnxruntime(way, tmp_path):
    result = frozen(**WAYS[way])
    artefact = qhw.export(result, tmp_path / "out")[0]
    found = qhw.verify(result, images(40, seed=5), artefact=artefact, progress=SilentProgress())
    assert found.not_run is None
    assert found.is_proven, found.first_difference
    assert not found.overflowing


@pytest.mark.parametrize("pipeline", ["ranges-ptq", "whitepaper-ptq", "whitepaper-qat"])
def test_the_artefact_computes_what_the_result_does(pipeline, tmp_path):
    result = frozen(pipeline)
    artefact = qhw.export(result, tmp_path / "out")[0]
    session = onnxruntime.InferenceSession(str(artefact), providers=["CPUExecutionProvider"])
    x = images(16, seed=6)
    names = [node.name for node in session.get_inputs()]
    (found,) = session.run(None, {names[0]: x.numpy()})
    with torch.no_grad():
        expected = result(x).numpy()
    # Ties may fall the other way in the simulation: codes of the last tensor differ by one at most here and there.
    step = float(result.encodings()["11"].scale)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1.01 * step)
    assert np.mean(found == expected) > 0.95


def test_it_is_saved_and_loaded_and_trained_again(tmp_path: Path):
    result = frozen(prefer=["kept_batch_norm"])
    qhw.save(result, tmp_path / "first")
    loaded = qhw.load(tmp_path / "first")
    with torch.no_grad():
        assert torch.equal(loaded(images()), result(images()))
    assert [step.algorithm for step in loaded.plan.steps] == [step.algorithm for step in result.plan.steps]
    assert loaded.provenance["trained"] is True
    assert loaded.folded_norms.keys() == result.folded_norms.keys()
    for name, norm in result.folded_norms.items():
        assert torch.equal(loaded.folded_norms[name].inner_std, norm.inner_std)
        assert torch.equal(loaded.folded_norms[name].normal.mean, norm.normal.mean)
        assert torch.equal(loaded.folded_norms[name].normal.std, norm.normal.std)
        assert (loaded.folded_norms[name].eps, loaded.folded_norms[name].momentum) == (norm.eps, norm.momentum)
    again = [qhw.trainable(one) for one in (result, loaded)]
    assert steps(again[0], 3) == steps(again[1], 3)
    one, other = map(qhw.freeze, again)
    with torch.no_grad():
        assert torch.equal(one(images()), other(images()))


def test_a_result_that_trains_is_neither_saved_nor_exported_nor_verified(tmp_path):
    data = images(64)
    result = qhw.quantize(network(), TARGET, example_inputs=data[:2], calibration=data, pipeline="whitepaper-qat")
    qhw.trainable(result)
    for ask in (
        lambda: qhw.save(result, tmp_path / "a"),
        lambda: qhw.export(result, tmp_path / "b"),
        lambda: qhw.verify(result, data, progress=SilentProgress()),
    ):
        with pytest.raises(qhw.QhwError, match=r"being trained.*Call qhw\.freeze\(result\) first"):
            ask()
    assert not any((tmp_path / name).exists() for name in ("a", "b"))
