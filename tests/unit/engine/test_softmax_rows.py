# SPDX-License-Identifier: Apache-2.0
"""What no softmax can tell from 0, against softmax computed by hand in float64."""

import math

import pytest
import torch

from qhw.engine.softmax_rows import REACH, masked_scores, masked_term

INF = float("inf")


def test_scores_keep_their_softmax() -> None:
    scores = torch.tensor([[3.0, 2.0, -10.0, -1e4], [-INF, 0.0, -20.0, 5.0], [-INF, -INF, -INF, -INF]])
    seen = masked_scores(scores)
    assert seen[0].tolist() == pytest.approx([3.0, 2.0, -10.0, 3.0 - REACH])
    assert seen[1].tolist() == pytest.approx([5.0 - REACH, 0.0, 5.0 - REACH, 5.0])
    assert seen[2].tolist() == [-INF] * 4
    exact = [[math.exp(x - max(row)) for x in row] for row in scores[:2].tolist()]
    wanted = torch.tensor([[x / sum(row) for x in row] for row in exact], dtype=torch.float64)
    assert (seen[:2].double().softmax(-1) - wanted).abs().max() < 2**-23  # two scores of 2^-24 each


def test_a_term_goes_as_low_as_the_spread_of_the_other_asks_for() -> None:
    mask = torch.tensor([[[0.0, -1e4, 0.0]], [[-INF, -INF, -INF]]])
    scores = torch.tensor([[[1.0, 7.0, -2.0], [0.0, 0.5, 0.0]], [[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]])
    seen = masked_term(mask, scores)
    assert seen[0, 0].tolist() == pytest.approx([0.0, -REACH - 9.0, 0.0])  # from -2 to 7
    assert seen[0, 1].tolist() == pytest.approx([0.0, -REACH - 0.5, 0.0])
    assert torch.equal(masked_term(scores, mask), scores)  # what masks spread over covers no score
