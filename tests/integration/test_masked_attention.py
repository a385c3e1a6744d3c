# SPDX-License-Identifier: Apache-2.0
"""Masked attention: what no softmax can tell from 0 has no part in the range of scores, nor of their terms."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.schema import TargetSpec, parse_target

INF = float("inf")
LOWEST = torch.finfo(torch.float32).min

TARGET = """
schema_version = 1
name = "test/attention"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.c8 = { bits = 8, signed = true, per = "tensor" }
accumulators.acc = { bits = 32, overflow = "wrap" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "acc" }
kernels.two = { input = ["a8", "a8"], output = ["a8"] }
kernels.constant = { input = ["a8"], weight = ["c8"], output = ["a8"] }
kernels.one = { input = ["a8"], output = ["a8"] }
operators.Gemm = { kernels = ["mac"] }
operators.MatMul = { kernels = ["two"] }
operators.Add = { kernels = ["two", "constant"] }
operators.Softmax = { kernels = ["one"] }
operators.Transpose = {}
fallback = "host"
"""
SPEC = parse_target(TARGET)


class Attention(nn.Module):
    """Scores of keys against queries; `hide` covers those that the mask leaves out."""

    def __init__(self, hide: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        with torch.no_grad():
            self.q.weight.mul_(4)
        self.hide = hide

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        y: Tensor = self.hide(scores, mask[:, None, :]).softmax(-1) @ self.v(x)
        return y


class Causal(nn.Module):
    """The mask is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention(self._hide)
        self.register_buffer("mask", torch.full((8, 8), -INF).triu(1))

    def _hide(self, scores: Tensor, mask: Tensor) -> Tensor:
        return scores + self.mask

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.attention(x, x[:, :, 0])
        return y


def added(low: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, mask: scores + (1.0 - mask.to(scores.dtype)) * low


def filled(low: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda scores, mask: scores.masked_fill(~mask, low)


def batches(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(64, 8, generator=generator) > 0.3
    mask[:, 0] = True
    return torch.randn(64, 8, 16, generator=generator), mask


def sqnr(model: nn.Module, spec: TargetSpec = SPEC) -> float:
    """Of the simulation on samples that were not calibrated with, in dB."""
    takes = 1 if isinstance(model, Causal) else 2
    seen, fresh = batches(1)[:takes], batches(2)[:takes]
    result = qhw.quantize(model.eval(), spec, example_inputs=seen, calibration=[seen])
    with torch.no_grad():
        wanted, got = model(*fresh), result(*fresh)
    return float(10 * torch.log10(wanted.pow(2).sum() / (wanted - got).pow(2).sum()))


@pytest.mark.parametrize(
    "hide",
    [added(-1e4), added(LOWEST), filled(-1e4), filled(LOWEST), filled(-INF)],
    ids=["added -1e4", "added lowest float", "filled -1e4", "filled lowest float", "filled -inf"],
)
def test_a_masked_attention_is_as_good_as_one_without_a_mask(hide: Callable[[Tensor, Tensor], Tensor]) -> None:
    # 20 dB is 10 % of the output; with the mask in the range all scores are one code, and a few dB are left.
    assert sqnr(Attention(added(0.0))) > 20
    assert sqnr(Attention(hide)) > 20


def test_a_mask_on_the_scale_of_the_scores_has_no_part_in_it() -> None:
    tied = parse_target(TARGET.replace('["two", "constant"]', '["two"], same_scale = "all"'))
    assert sqnr(Attention(added(-1e4)), tied) > 20


def test_an_infinite_constant_stays_on_the_host() -> None:
    plan = qhw.plan(Causal(), SPEC, batches(1)[0], calibration=[batches(1)[0]])
    placed = next(one for one in plan.operators if one.kind == "Add")
    assert (placed.where, placed.subject) == ("host", "graph")
    assert placed.reason == "its constant operand holds infinite values, as masks do, which no grid has"
    assert sqnr(Causal()) > 20
