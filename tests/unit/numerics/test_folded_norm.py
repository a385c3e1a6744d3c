# SPDX-License-Identifier: Apache-2.0
"""What is kept of a folded batch norm comes back from its saved form, and a damaged one is named."""

from dataclasses import replace

import pytest
import torch

from qhw.errors import RangeError
from qhw.numerics import ChannelNormal, FoldedBatchNorm

NORM = FoldedBatchNorm(
    torch.tensor([0.5, 2.0], dtype=torch.float64),
    1e-5,
    0.1,
    ChannelNormal(torch.tensor([0.0, -1.0], dtype=torch.float64), torch.tensor([1.0, 0.0], dtype=torch.float64)),
)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_the_saved_form_brings_it_back(momentum: float | None) -> None:
    found = FoldedBatchNorm.from_dict(*replace(NORM, momentum=momentum).as_dict())
    assert (found.eps, found.momentum) == (1e-5, momentum)
    assert torch.equal(found.inner_std, NORM.inner_std)
    assert torch.equal(found.normal.mean, NORM.normal.mean) and torch.equal(found.normal.std, NORM.normal.std)


@pytest.mark.parametrize("value", [[0.0, 1.0], [-1.0, 1.0], [float("nan"), 1.0], [1.0]])
def test_a_deviation_that_is_none_is_named(value: list[float]) -> None:
    tensors, header = NORM.as_dict()
    tensors["inner_std"] = torch.tensor(value, dtype=torch.float64)
    with pytest.raises(RangeError, match=r"batch norm: inner_std must be positive, one per channel\. Quantize again\."):
        FoldedBatchNorm.from_dict(tensors, header)


@pytest.mark.parametrize("missing", ["inner_std", "mean", "std"])
def test_a_field_that_is_missing_is_named(missing: str) -> None:
    tensors, header = NORM.as_dict()
    del tensors[missing]
    with pytest.raises(RangeError, match=rf"batch norm: saved form is damaged \(KeyError\('{missing}'\)\)"):
        FoldedBatchNorm.from_dict(tensors, header)
