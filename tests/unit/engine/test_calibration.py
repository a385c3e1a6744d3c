# SPDX-License-Identifier: Apache-2.0
"""Calibration data: the same micro-batches from every form of loader, and one line for each that does not fit."""

import hashlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import qhw
from qhw.engine import Calibration, QuantizedModel, has_labels
from qhw.errors import CalibrationError
from qhw.graph import Graph

LABELS = torch.arange(203)


def as_generator(x: Tensor) -> Iterator[Tensor]:
    yield from x.split(7)


FORMS: dict[str, Callable[[Tensor], Any]] = {
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "array-backwards-twice": lambda x: x.numpy()[::-1].copy()[::-1],
    "array-big-endian": lambda x: x.numpy().astype(">f4"),
    "channels-last": lambda x: x.to(memory_format=torch.channels_last),
    "dict-of-arrays": lambda x: {"x": x.numpy(), "labels": LABELS.numpy()},
    "list-by-1": lambda x: list(x.split(1)),
    "list-by-7": lambda x: list(x.split(7)),
    "list-by-64": lambda x: list(x.split(64)),
    "list-by-203": lambda x: [x],
    "dict-batches": lambda x: [{"x": part} for part in x.split(50)],
    "tuples": lambda x: [(part,) for part in x.split(40)],
    "generator": as_generator,
    "loader": lambda x: DataLoader(TensorDataset(x), batch_size=19),
    "loader-with-labels": lambda x: DataLoader(TensorDataset(x, LABELS), batch_size=64),
    "loader-with-2-workers": lambda x: DataLoader(TensorDataset(x), batch_size=25, num_workers=2),
    "inputs-in-a-tuple-with-label": lambda x: [((part,), torch.zeros(len(part))) for part in x.split(33)],
    "empty-batches-between": lambda x: [x[:0], x[:100], x[:0], x[100:]],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_micro_batches(graph: Graph, images: Tensor, form: str) -> None:
    data = Calibration(FORMS[form](images), graph)
    for _ in range(2):  # as often as needed
        batches = list(data)
        assert [len(batch) for (batch,) in batches] == [32] * 6 + [11]
        assert torch.equal(torch.cat([batch for (batch,) in batches]), images)
        assert all(batch.stride() == (192, 1, 24, 3) for (batch,) in batches)
    assert data.num_samples == 203
    assert data.digest == hashlib.sha256(images.numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("form", ["list-by-1", "list-by-7", "list-by-64", "channels-last"])
def test_the_result_has_the_same_bytes_for_every_batch_size(
    graph: Graph, images: Tensor, quantize: Callable[..., QuantizedModel], form: str
) -> None:
    one, other = quantize(graph, images), quantize(graph, FORMS[form](images), example_inputs=images[:2])
    for (name, a), (_, b) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_one_sample_is_enough(graph: Graph, images: Tensor, quantize: Callable[..., QuantizedModel]) -> None:
    assert quantize(graph, images[:1]).provenance["calibration_samples"] == 1


def test_a_label_is_said_once_to_be_passed_over(graph: Graph, images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    data = Calibration([(images[:5], LABELS[:5]), (images[5:9], LABELS[5:9])], graph)
    with caplog.at_level(logging.INFO, "qhw"):
        list(data)
        list(data)
    messages = [record.message for record in caplog.records if record.name == "qhw"]
    assert messages == ["calibration: batches are (inputs, label); the label is passed over."]


def test_labels_are_seen_without_using_an_iterator_up(graph: Graph, images: Tensor) -> None:
    assert has_labels([(images, LABELS)], graph)
    assert not has_labels([images], graph)
    assert not has_labels([], graph)
    once = iter([(images, LABELS)])
    assert not has_labels(once, graph)
    assert len(list(once)) == 1


def test_looking_for_labels_draws_no_random_numbers(graph: Graph, images: Tensor) -> None:
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    assert not has_labels(DataLoader(TensorDataset(images), shuffle=True), graph)
    assert torch.equal(torch.rand(1), wanted)


class Two(nn.Module):
    """Integer positions and floats."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 6)

    def forward(self, index: Tensor, bias: Tensor) -> Tensor:
        return self.table(index) + bias  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def two() -> tuple[Graph, Tensor, Tensor]:
    index, bias = torch.arange(100).reshape(50, 2) % 10, torch.randn(50, 2, 6)
    return qhw.capture(Two().eval(), (index[:2], bias[:2])), index, bias


@pytest.mark.parametrize(
    "form",
    [
        lambda i, b: {"bias": b.numpy(), "index": i.numpy()},
        lambda i, b: [(i, b)],
        lambda i, b: [(i, b, torch.zeros(50))],
        lambda i, b: [((i, b), torch.zeros(50))],
        lambda i, b: [({"bias": b, "index": i}, torch.zeros(50))],
        lambda i, b: DataLoader(TensorDataset(i, b), batch_size=8),
    ],
    ids=["dict", "tuple", "tuple-and-label", "nested-and-label", "dict-and-label", "loader"],
)
def test_several_inputs(two: tuple[Graph, Tensor, Tensor], form: Any) -> None:
    graph, index, bias = two
    batches = list(Calibration(form(index, bias), graph))
    assert [len(i) for i, _ in batches] == [32, 18]
    assert torch.equal(torch.cat([i for i, _ in batches]), index)
    assert torch.equal(torch.cat([b for _, b in batches]), bias)


def failing(images: Tensor) -> Iterator[Tensor]:
    yield images[:32]
    raise OSError("disk\nis gone")


X = torch.zeros(4, 3, 8, 8)
BAD: dict[str, tuple[Any, str]] = {
    "empty-list": ([], r"^calibration: holds no sample\. Pass at least one batch\.$"),
    "empty-tensor": (X[:0], r"^calibration: holds no sample\. Pass"),
    "empty-dict": ({}, r"^calibration: holds no sample\. Pass"),
    "no-iterable": (3, r"^calibration: must yield batches \(a tensor, a tuple or a dict by name\); got int\.$"),
    "file-name": ("data.npz", r"^calibration: must yield batches .*; got str\.$"),
    "path": (Path("data.npz"), r"^calibration: must yield batches .*; got PosixPath\.$"),
    "list-of-lists": ([[1.0]], r"^calibration: batch 0: input 'x' must be a tensor; got float\.$"),
    "wrong-shape": (
        torch.zeros(4, 1, 8, 8),
        r"^calibration: input 'x' must have shape \[batch, 3, 8, 8\]; got \[4, 1, 8, 8\]\. Give samples as",
    ),
    "no-batch-axis": (X[0], r"^calibration: input 'x' must have shape \[batch, 3, 8, 8\]; got \[3, 8, 8\]"),
    "number": (torch.tensor(1.0), r"^calibration: 'x' must be an array with one row per sample; got a single number"),
    "wrong-dtype": (X.double(), r"^calibration: input 'x' must be float32; got float64\. Convert it as your"),
    "objects": (
        np.array([object()] * 4).reshape(4, 1, 1, 1),
        r"^calibration: input 'x' must hold numbers; got an array of object\. Convert it\.$",
    ),
    "wrong-name": ({"y": X}, r"^calibration: no input 'y' in the model\. Inputs of the model: x\.$"),
    "missing-name": ([{"labels": X}], r"^calibration: batch 0: input 'x' is missing\. Inputs of the model: x\.$"),
    "list-in-dict": ({"x": [1, 2]}, r"^calibration: 'x' must be an array with one row per sample; got list\.$"),
    "unequal": ({"x": X, "z": X[:3]}, r"^calibration: all must hold equally many samples; got x: 4, z: 3\.$"),
    "too-many": ([(X, X, X)], r"^calibration: batch 0: the model takes 1 inputs \(x\); got 3\. Yield a tuple in that"),
    "nan": (
        [X, torch.cat([X[:1], X * float("nan")])],
        r"^calibration: batch 1: input 'x' holds NaN or infinite values in sample 1 \(counted from 0\)\. Remove such",
    ),
    "inf": (
        torch.cat([torch.zeros(70, 3, 8, 8), X + float("inf")]),
        r"^calibration: input 'x' holds NaN or infinite values in sample 70 \(counted from 0\)\.",
    ),
    "later-batch-bad": ([X, X, X[:, :2]], r"^calibration: batch 2: input 'x' must have shape"),
    "loader-raises": (
        failing(X),
        r"^calibration: batch 1 cannot be read: OSError: disk is gone\. Repair the loader\.$",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_does_not_fit_is_refused_in_one_line(graph: Graph, name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(CalibrationError, match=message) as caught:
        list(Calibration(data, graph))
    assert "\n" not in str(caught.value)


def test_samples_given_at_once_are_counted_before_any_is_read(graph: Graph, images: Tensor) -> None:
    for form in ("tensor", "array", "dict-of-arrays"):
        assert Calibration(FORMS[form](images), graph).num_samples == 203
    for form in ("list-by-7", "generator"):
        assert Calibration(FORMS[form](images), graph).num_samples is None


def test_data_is_called_by_its_name(graph: Graph, images: Tensor) -> None:
    data = Calibration(DataLoader(TensorDataset(images[:, :1])), graph, name="scans.npz")
    with pytest.raises(CalibrationError, match=r"^scans\.npz: batch 0: input 'x' must have shape"):
        list(data)

    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            raise OSError("gone")

    with pytest.raises(CalibrationError, match=r"^scans\.npz: batch 0 cannot be read: OSError: gone"):
        has_labels(Calibration(Loader(), graph, name="scans.npz"), graph)


def test_inputs_with_different_numbers_of_samples(two: tuple[Graph, Tensor, Tensor]) -> None:
    graph, index, bias = two
    with pytest.raises(CalibrationError, match=r"batch 0: all must hold equally many samples; got index: 50, bias: 49"):
        list(Calibration([(index, bias[:49])], graph))
    with pytest.raises(CalibrationError, match=r"^calibration: one tensor fits a model with one input; this one has"):
        list(Calibration(index, graph))


def test_a_loader_that_fails_is_not_blamed_on_the_algorithm(
    graph: Graph, images: Tensor, quantize: Callable[..., QuantizedModel]
) -> None:
    class Loader:
        def __iter__(self) -> Iterator[Tensor]:
            return failing(images)

    with pytest.raises(CalibrationError, match=r"^calibration: batch 1 cannot be read: OSError: disk is gone"):
        quantize(graph, Loader(), example_inputs=images[:2])


def test_a_graph_with_a_fixed_batch_says_so(quantize: Callable[..., QuantizedModel]) -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x.view(4, 6))  # type: ignore[no-any-return]

    graph = qhw.capture(Fixed().eval(), torch.zeros(4, 6), dynamic_batch=False)
    message = r"^calibration: the model fails on 32 samples at once: shape '\[4, 6\]' .*\. Let axis 0 be free when"
    with pytest.raises(CalibrationError, match=message):
        quantize(graph, torch.zeros(40, 6))
