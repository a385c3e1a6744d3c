# SPDX-License-Identifier: Apache-2.0
"""Scores: of the thing measured, on the same samples, with an interval from the literature."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import agreement, evaluate, top1
from qhw.errors import CalibrationError
from qhw.graph import Graph


def predictions(same: int, samples: int) -> tuple[Tensor, Tensor]:
    """Class scores of two models that agree on `same` of `samples`."""
    a = torch.eye(2)[torch.zeros(samples, dtype=torch.int64)]
    b = torch.eye(2)[(torch.arange(samples) >= same).long()]
    return a, b


@pytest.mark.parametrize(
    ("same", "samples", "low", "high"),
    [
        # Newcombe, 1998, "Two-sided confidence intervals for the single proportion", table I, method 3.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
        # By hand: z**2 / (n + z**2) = 3.8415 / 13.8415 on the far side of 10 of 10.
        (10, 10, 1 - 0.27753, 1.0),
        (1, 1, 1 - 3.8414588 / 4.8414588, 1.0),
    ],
)
def test_the_interval_is_wilsons(same: int, samples: int, low: float, high: float) -> None:
    found = agreement(*predictions(same, samples))
    assert found.samples == samples
    assert found.share == same / samples
    assert (found.low, found.high) == (pytest.approx(low, abs=5e-5), pytest.approx(high, abs=5e-5))


def test_agreement_of_nothing_is_refused() -> None:
    with pytest.raises(CalibrationError, match=r"^evaluation: agreement needs at least one sample\.$"):
        agreement(torch.zeros(0, 2), torch.zeros(0, 2))


def test_top1_counts_the_largest_output() -> None:
    outputs = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    assert top1(outputs, torch.tensor([1, 0, 0])) == pytest.approx(200 / 3)


@pytest.mark.parametrize(
    ("outputs", "labels"),
    [
        (torch.zeros(4), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3, 2), torch.zeros(4, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.int64)),
        (torch.zeros(4, 3), torch.zeros(4)),
        (torch.zeros(8, 3), torch.zeros(4, dtype=torch.int64)),
    ],
    ids=["outputs-flat", "outputs-deep", "labels-deep", "labels-float", "more-outputs-than-labels"],
)
def test_shapes_that_top1_cannot_score(outputs: Tensor, labels: Tensor) -> None:
    message = (
        r"^evaluation: top-1 needs outputs \[samples, classes\] and integer labels \[samples\]; got \[[\d, ]+\] and "
        r"\[[\d, ]+\] torch\.\w+\. Pass --metric module:callable\.$"
    )
    with pytest.raises(CalibrationError, match=message):
        top1(outputs, labels)


class Choose(nn.Module):
    """Class scores by the sign of the first value, and a second output."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.stack([-x[:, 0], x[:, 0]], 1), x * 2


@pytest.fixture(scope="module")
def choose() -> Graph:
    return qhw.capture(Choose().eval(), torch.randn(2, 3))


X = torch.linspace(-1, 1, 250 * 3).reshape(250, 3)
LABELS = (X[:, 0] > 0).long()


def runners(graph: Graph) -> dict[str, Any]:
    """The model, and one that is wrong wherever the first value exceeds a half."""
    return {
        "float": lambda inputs: graph.module(*inputs),
        "worse": lambda inputs: graph.module(torch.where(inputs[0] > 0.5, -inputs[0], inputs[0])),
    }


@pytest.mark.parametrize(
    "data",
    [
        {"x": X, "labels": LABELS},
        {"x": X.numpy(), "labels": LABELS.numpy()},
        [(X[:200], LABELS[:200]), (X[200:], LABELS[200:])],
        [((X,), LABELS)],
        [({"x": X}, LABELS.tolist())],
    ],
    ids=["tensors", "arrays", "batches", "tuple-inputs", "dict-inputs"],
)
def test_all_are_scored_on_the_same_samples_by_the_first_output(choose: Graph, data: Any) -> None:
    one, other = evaluate(choose, runners(choose), data)
    wrong = int((X[:, 0] > 0.5).sum())
    assert (one.subject, one.metric, one.value, one.samples) == ("float", "top-1", 100.0, 250)
    assert one.agreement is not None and one.agreement.share == 1.0
    assert other.value == pytest.approx(100 * (250 - wrong) / 250)
    assert other.agreement is not None and other.agreement.share == (250 - wrong) / 250


def test_a_metric_of_the_users(choose: Graph) -> None:
    def largest(outputs: Tensor, labels: Tensor) -> float:
        return float(outputs.max())

    scores = evaluate(choose, runners(choose), {"x": X, "labels": LABELS}, largest)
    assert [(score.metric, score.value) for score in scores] == [("largest", 1.0), ("largest", 1.0)]
    assert scores[1].agreement is not None


def test_outputs_that_are_no_class_scores_have_no_agreement(choose: Graph) -> None:
    def first(outputs: Tensor, labels: Tensor) -> float:
        return float(outputs[0, 0])

    regression = evaluate(choose, runners(choose), {"x": X, "labels": X[:, 0]}, first)
    assert [score.agreement for score in regression] == [None, None]
    one_column = {"float": lambda inputs: inputs[0][:, :1]}
    assert evaluate(choose, one_column, {"x": X, "labels": LABELS}, first)[0].agreement is None


def failing() -> Iterator[Any]:
    yield X, LABELS
    raise OSError("gone")


BAD: dict[str, tuple[Any, str]] = {
    "no-labels": ({"x": X}, r"^evaluation: holds no 'labels'\. Add the array, or leave the data out\.$"),
    "too-few-labels": (
        {"x": X, "labels": LABELS[:240]},
        r"^evaluation: all must hold equally many samples; got x",
    ),
    "too-few-in-a-batch": ([(X, LABELS[:9])], r"^evaluation: batch 0: 250 samples need as many labels; got 9\.$"),
    "one-label": ([(X, 3)], r"^evaluation: batch 0: 250 samples need as many labels; got 0\.$"),
    "labels-of-text": (
        [(X, ["cat"] * 250)],
        r"^evaluation: batch 0: labels must be numbers; got list\.",
    ),
    "no-pair": ([X], r"^evaluation: every batch must be \(inputs, labels\)\. Check what the loader yields\.$"),
    "wrong-name": (
        [({"y": X}, LABELS)],
        r"^evaluation: batch 0: no input 'y' in the model\. Inputs",
    ),
    "missing": ({"labels": LABELS}, r"^evaluation: batch 0: input 'x' is missing\. Inputs of the model: x\.$"),
    "too-many": ([((X, X), LABELS)], r"^evaluation: batch 0: the model takes 1 inputs \(x\); got 2\.$"),
    "wrong-shape": (
        [(X[:, :2], LABELS)],
        r"^evaluation: batch 0: input 'x' must have shape \[batch, 3\]; got",
    ),
    "empty": ([], r"^evaluation: holds no sample\. Pass at least one batch\.$"),
    "empty-batch": ([(X[:0], LABELS[:0])], r"^evaluation: holds no sample\. Pass"),
    "tensor": (X, r"^evaluation: must be a dict of arrays with 'labels', or batches; got Tensor\.$"),
    "number": (3, r"^evaluation: must be a dict of arrays with 'labels', or batches; got int\.$"),
    "loader-raises": (failing(), r"^evaluation: batch 1 cannot be read: OSError: gone\. Repair the loader\.$"),
}


@pytest.mark.parametrize("name", BAD)
def test_data_that_does_not_fit(choose: Graph, name: str) -> None:
    data, message = BAD[name]
    with pytest.raises(CalibrationError, match=message):
        evaluate(choose, runners(choose), data)


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        (
            lambda outputs, labels: outputs @ labels,
            r"metric '<lambda>' fails on outputs \[250, 2\] and labels \[250\]: ",
        ),
        (lambda outputs, labels: None, r"metric '<lambda>' fails on .*: TypeError: .*\. It must return one number\.$"),
    ],
    ids=["raises", "returns-nothing"],
)
def test_a_metric_that_fails_is_named(choose: Graph, metric: Any, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        evaluate(choose, runners(choose), {"x": X, "labels": LABELS}, metric)


def test_surplus_samples_are_not_passed_over(choose: Graph) -> None:
    data = {"x": X.numpy(), "labels": np.zeros(10, dtype=np.int64)}
    with pytest.raises(CalibrationError, match=r"got x: 250, labels: 10\.$"):
        evaluate(choose, runners(choose), data)
