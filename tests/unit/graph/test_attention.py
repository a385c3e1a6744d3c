# SPDX-License-Identifier: Apache-2.0
"""Attention is products and a softmax, by the equation; what is more than that stays one operator."""

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qhw.graph import capture


class Attend(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mask = nn.Parameter(options.pop("mask")) if "mask" in options else None
        self.options = options

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, self.mask, **self.options)


def operands(*lead: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*lead, *shape, generator=generator) for shape in ((5, 4), (7, 4), (7, 6)))
    return q, k, v


MASK = torch.linspace(-3, 3, 35).reshape(5, 7)
PLAIN: dict[str, tuple[dict[str, Any], float, Any]] = {
    # options, factor of the scores, what is added to them
    "plain": ({}, 0.5, 0.0),
    "scaled": ({"scale": 0.3}, 0.3, 0.0),
    "masked": ({"mask": MASK}, 0.5, MASK.numpy()),
    "causal": ({"is_causal": True}, 0.5, np.triu(np.full((5, 7), -np.inf), 1)),
}


@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=["one head", "heads"])
@pytest.mark.parametrize("case", PLAIN)
def test_it_is_the_softmax_of_scaled_and_masked_scores(case: str, lead: tuple[int, ...]) -> None:
    options, factor, added = PLAIN[case]
    q, k, v = operands(*lead)
    graph = capture(Attend(**options), (q, k, v))
    masks = ["Add"] if np.any(added) else []
    assert [one.kind for one in graph.operators] == ["Mul", "Transpose", "MatMul", *masks, "Softmax", "MatMul"]
    assert all(one.weight is not None for one in graph.operators if one.kind in ("Mul", "Add"))
    scores = factor * q.double().numpy() @ np.swapaxes(k.double().numpy(), -1, -2) + added
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = weights / weights.sum(-1, keepdims=True) @ v.double().numpy()
    np.testing.assert_allclose(graph(q, k, v).detach().numpy(), expected, rtol=0, atol=1e-5)


def test_a_causal_mask_has_finite_values() -> None:
    graph = capture(Attend(is_causal=True), operands(2))
    (mask,) = [tensor for tensor in graph.module.state_dict().values() if tensor.dim() == 2]
    assert mask.unique().tolist() == [-(2.0**15), 0.0]


@pytest.mark.parametrize("name", ["bools", "groups"])
def test_other_attention_stays_one_operator(name: str) -> None:
    q, k, v = operands(2, 4)
    if name == "groups":
        graph = capture(Attend(enable_gqa=True), (q, k[:, :2], v[:, :2]))
        expected = F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True)
        assert torch.equal(graph(q, k[:, :2], v[:, :2]), expected)
    else:
        model = Attend()
        model.mask = nn.Parameter(MASK > 0, requires_grad=False)
        graph = capture(model, (q, k, v))
    assert [one.kind for one in graph.operators] == ["Attention"]
