# SPDX-License-Identifier: Apache-2.0
"""Calibration data that is certainly unfit is remarked once, in one line, in the log and in the result."""

import logging

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import Calibration
from qhw.graph import Graph

FLAT = torch.linspace(-1, 1, 40).reshape(40, 1, 1, 1).expand(40, 3, 8, 8)
NOISE = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 4)), NOISE[:1])


def batches(data: Tensor, size: int) -> list[Tensor]:
    return list(torch.split(data, size))


def remarks(data: Tensor, graph: Graph, size: int = 7) -> list[str]:
    samples = Calibration(batches(data, size), graph, name="data")
    assert samples.remarks == ()
    for _ in range(2):
        list(samples)
    return list(samples.remarks)


def test_ordinary_samples_are_not_remarked(graph: Graph) -> None:
    assert remarks(NOISE, graph) == []
    assert remarks(NOISE[:32], graph) == []


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (NOISE[:31], ["data: 31 samples are few: ranges may miss what the model meets later. Give 32 or more."]),
        (
            NOISE[:1],
            ["data: 1 sample is few: ranges may miss what the model meets later. Give 32 or more."],
        ),
        (
            torch.zeros_like(NOISE),
            ["data: input 'input' is 0 everywhere: it has no range to learn. Check the data."],
        ),
        (
            torch.full_like(NOISE, -2.5),
            ["data: input 'input' is -2.5 everywhere: it has no range to learn. Check the data."],
        ),
        (
            NOISE[:1].expand_as(NOISE).contiguous(),
            ["data: input 'input' is the same in all 40 samples. Check the data."],
        ),
        (FLAT.contiguous(), ["data: every sample of input 'input' holds one value throughout. Check the data."]),
    ],
    ids=["31 samples", "one sample", "zeros", "one value", "one sample repeated", "flat images"],
)
def test_unfit_samples_are_remarked_whatever_the_batches(data: Tensor, expected: list[str], graph: Graph) -> None:
    for size in (1, 7, 40):
        assert remarks(data, graph, size) == expected


def test_one_other_sample_at_the_end_is_enough(graph: Graph) -> None:
    for data in (torch.zeros_like(NOISE), FLAT, NOISE[:1].expand_as(NOISE)):
        assert remarks(torch.cat([data, NOISE[1:2]]), graph) == []


def test_inputs_that_are_no_floats_and_numbers_per_sample_may_be_flat() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(1, 2)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.fc(x) * mask  # type: ignore[no-any-return]

    graph = qhw.capture(Net().eval(), (torch.ones(2, 1), torch.ones(2, 1, dtype=torch.int64)))
    data = {"x": torch.linspace(0, 1, 40).reshape(40, 1), "mask": torch.ones(40, 1, dtype=torch.int64)}
    samples = Calibration(data, graph)
    list(samples)
    assert samples.remarks == ()


def test_a_remark_is_logged_once_and_kept_with_the_result(graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    target, expected = "google/litert-int8", "calibration: 8 samples are few"
    with caplog.at_level(logging.WARNING, logger="qhw"):
        result = qhw.quantize(graph, target, calibration=batches(NOISE[:8], 4))
    found = [record.getMessage() for record in caplog.records if expected in record.getMessage()]
    assert len(found) == 1 and found[0].startswith(f"warning: {expected}")
    assert result.provenance["calibration_remarks"] == [found[0].removeprefix("warning: ")]
    caplog.clear()
    result = qhw.quantize(graph, target, calibration=batches(NOISE, 4))
    assert caplog.records == [] and "calibration_remarks" not in result.provenance


def test_data_to_verify_with_may_be_few(graph: Graph, caplog: pytest.LogCaptureFixture) -> None:
    result = qhw.quantize(graph, "google/litert-int8", calibration=batches(NOISE, 4))
    with caplog.at_level(logging.WARNING, logger="qhw"):
        assert qhw.verify(result, NOISE[:2]).samples == 2
    assert caplog.records == []


def test_a_generator_is_looked_at_once(graph: Graph) -> None:
    samples = Calibration(iter(batches(NOISE[:8], 4)), graph, name="data")
    list(samples)
    assert len(samples.remarks) == 1
