# SPDX-License-Identifier: Apache-2.0
"""Moments of clipped normals: against the paper's formula for ReLU, numeric integration, and the limits."""

import math

import numpy as np
import pytest
import torch

from qhw.errors import RangeError
from qhw.numerics import ChannelNormal

MEANS = torch.tensor([-4.0, -1.0, 0.0, 0.3, 2.0, 7.0], dtype=torch.float64)
STDS = torch.tensor([1.0, 0.5, 2.0, 1e-3, 3.0, 0.7], dtype=torch.float64)


def integrated(mean: float, std: float, low: float, high: float) -> tuple[float, float]:
    """Mean and standard deviation by the midpoint rule over 16 standard deviations."""
    edges = np.linspace(mean - 8 * std, mean + 8 * std, 400_001)
    x = (edges[1:] + edges[:-1]) / 2
    weight = np.exp(-0.5 * ((x - mean) / std) ** 2)
    weight /= weight.sum()
    y = np.clip(x, low, high)
    first = float((weight * y).sum())
    return first, math.sqrt(float((weight * (y - first) ** 2).sum()))


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, math.inf), (0.0, 6.0), (-1.0, 1.0), (-math.inf, 2.0), (-math.inf, math.inf)],
    ids=["relu", "relu6", "hardtanh", "upper-only", "nothing"],
)
def test_clipped_moments_equal_numeric_integration(low: float, high: float) -> None:
    found = ChannelNormal(MEANS, STDS).clipped(low, high)
    for index in range(len(MEANS)):
        mean, std = integrated(float(MEANS[index]), float(STDS[index]), low, high)
        # The midpoint rule with 400,000 steps errs by about 1e-9; the variance is a difference of squares up to 60.
        assert found.mean[index].item() == pytest.approx(mean, abs=1e-7)
        assert found.std[index].item() == pytest.approx(std, abs=2e-6)


def test_relu_is_the_formula_of_the_paper() -> None:
    # Eq. 28: E[x] = gamma N(-beta / gamma) + beta (1 - P(-beta / gamma)), written out with erf.
    found = ChannelNormal(MEANS, STDS).clipped(0.0).mean
    for beta, gamma, mean in zip(MEANS.tolist(), STDS.tolist(), found.tolist(), strict=True):
        a = -beta / gamma
        density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
        expected = gamma * density + beta * (1 - 0.5 * (1 + math.erf(a / math.sqrt(2))))
        assert mean == pytest.approx(expected, abs=1e-12)


def test_a_channel_without_spread_is_its_clipped_mean() -> None:
    sure = ChannelNormal(torch.tensor([-1.0, 3.0, 9.0]).double(), torch.zeros(3).double()).clipped(0.0, 6.0)
    assert sure.mean.tolist() == [0.0, 3.0, 6.0]
    assert sure.std.tolist() == [0.0, 0.0, 0.0]


def test_bounds_may_differ_by_channel() -> None:
    high = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    found = ChannelNormal(MEANS, STDS).clipped(0.0, high)
    for index in range(len(MEANS)):
        one = ChannelNormal(MEANS[index : index + 1], STDS[index : index + 1]).clipped(0.0, float(high[index]))
        assert torch.equal(found.mean[index : index + 1], one.mean)


def test_scaling_and_shifting() -> None:
    factor = torch.tensor([2.0, -3.0, 1.0, 0.5, 1.0, 1.0], dtype=torch.float64)
    found = ChannelNormal(MEANS, STDS).scaled(factor).shifted(torch.ones(6).double())
    assert torch.equal(found.mean, MEANS * factor + 1)
    assert torch.equal(found.std, STDS * factor.abs())


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (torch.zeros(2), torch.zeros(3), r"^normal: mean and std must be \[channels\]; got \[2\] and \[3\]\. Give one"),
        (torch.zeros(1), torch.tensor([-1.0]), r"^normal: mean and std must be finite, std not negative\. Repair"),
        (torch.tensor([math.nan]), torch.ones(1), r"^normal: mean and std must be finite"),
    ],
    ids=["shapes", "negative", "nan"],
)
def test_bad_statistics_are_refused(mean: torch.Tensor, std: torch.Tensor, message: str) -> None:
    with pytest.raises(RangeError, match=message):
        ChannelNormal(mean, std)
