# SPDX-License-Identifier: Apache-2.0
"""The digits example: its weights reach the recorded accuracy, and its test split stays out of everything else."""

import json
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from examples import digits
from examples.digits import data
from examples.digits.train import COMMAND, RECORD, shift_randomly
from qhw.errors import CalibrationError
from qhw.graph import capture


@pytest.fixture
def scans():
    """scikit-learn's digits as they come: images float64 [1797, 8, 8] with values 0 to 16."""
    return pytest.importorskip("sklearn.datasets", reason="the images come with scikit-learn").load_digits()


def _bytes_of(images):
    return {image.numpy().tobytes() for image in images}


def test_float_accuracy_equals_the_record(scans):
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    model, _ = digits.model()
    with torch.inference_mode():
        hits = torch.cat([model(images).argmax(1) == labels for images, labels in digits.evaluation()])
    assert (int(hits.sum()), len(hits)) == (record["test_correct"], record["test_images"])
    assert record["test_accuracy"] == record["test_correct"] / record["test_images"] >= 0.985
    assert record["command"] == COMMAND


def test_record_counts_the_parameters_of_the_model():
    model, _ = digits.model()
    assert not model.training
    # Convolutions, two batch-norm vectors a channel, then the linear layer; by hand from the shapes in network.py.
    stem = 9 * 32 + 2 * 32
    blocks = sum(9 * i + 2 * i + i * o + 2 * o for i, o in ((32, 64), (64, 64), (64, 160), (160, 160)))
    by_hand = stem + blocks + 160 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == by_hand
    assert json.loads(RECORD.read_text(encoding="utf-8"))["parameters"] == by_hand


def test_weights_are_small_float32_and_finite():
    assert digits.WEIGHTS.stat().st_size < 300_000
    tensors = load_file(digits.WEIGHTS)
    floats = {name: t for name, t in tensors.items() if not name.endswith("num_batches_tracked")}
    assert {t.dtype for t in floats.values()} == {torch.float32}
    assert all(bool(t.isfinite().all()) for t in floats.values())


def test_splits_are_disjoint_and_complete():
    train, test = data.split_indices("train"), data.split_indices("test")
    assert (len(train), len(test)) == (1297, 500)
    assert sorted([*train, *test]) == list(range(1797))


def test_images_are_the_scans_mapped_to_minus_one_to_one(scans):
    split = data.load_split("test")
    chosen = data.split_indices("test")
    assert np.array_equal(split.images[:, 0].double().numpy(), scans.images[chosen] / 8 - 1)
    assert np.array_equal(split.labels.numpy(), scans.target[chosen])
    assert (float(split.images.min()), float(split.images.max())) == (-1.0, 1.0)


def test_calibration_is_unlabelled_and_holds_no_test_image(scans):
    batches = list(digits.calibration())
    assert all(isinstance(b, torch.Tensor) and b.dtype == torch.float32 for b in batches)
    images = torch.cat(batches)
    assert images.shape == (512, 1, 8, 8)
    held_out = torch.cat([images for images, _ in digits.evaluation()])
    # By content, not by index: a scan that occurs twice in the data would leak too.
    assert not _bytes_of(images) & _bytes_of(held_out)
    assert not _bytes_of(data.load_split("train").images) & _bytes_of(held_out)


def test_example_inputs_and_data_have_the_same_shape(scans):
    _, example = digits.model()
    assert all(b.shape[1:] == example.shape[1:] and b.dtype == example.dtype for b in digits.calibration())


def test_capture_finds_every_kind_the_example_is_for():
    graph = capture(*digits.model())
    kinds = {operator.kind for operator in graph.operators}
    assert kinds >= {"Conv", "DepthwiseConv", "Relu", "Clip", "Add", "GlobalAveragePool", "Gemm"}
    # Kernel area x input channels a group x output channels x output positions, an image; batch norms count nothing.
    stem = 9 * 32 * 64
    blocks = ((32, 64, 64), (64, 64, 64), (64, 160, 16), (160, 160, 16))
    by_hand = stem + sum((9 * i + i * o) * positions for i, o, positions in blocks) + 160 * 10
    counted = sum(operator.macs for operator in graph.operators if "Norm" not in operator.kind)
    assert counted == by_hand


def test_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        CalibrationError, match=r'scikit-learn, which is not installed\. Run: pip install "scikit-learn'
    ):
        next(digits.calibration())


def test_other_bundled_data_is_refused(scans, monkeypatch):
    scans.images = scans.images[:10]
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda: scans)
    with pytest.raises(CalibrationError, match=r"must give images \[1797, 8, 8\]; got \[10, 8, 8\]"):
        data.load_split("train")


def test_shifts_move_whole_images_by_at_most_one_pixel():
    image = torch.full((1, 1, 8, 8), -1.0)
    image[0, 0, 3, 5] = 1.0
    shifted = shift_randomly(image.expand(200, 1, 8, 8), torch.Generator().manual_seed(0))
    places = {tuple(place) for place in (shifted[:, 0] == 1).nonzero()[:, 1:].tolist()}
    assert places == {(row, column) for row in (2, 3, 4) for column in (4, 5, 6)}
    assert torch.equal(shifted.sum((1, 2, 3)), torch.full((200,), -62.0))
