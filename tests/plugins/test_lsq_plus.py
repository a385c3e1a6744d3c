# SPDX-License-Identifier: Apache-2.0
"""LSQ+: its gradients by hand, and against plain autograd of the paper's own formula."""

import pytest
import torch

import qhw
from qhw.numerics import Grid, LearnedQuantizer, PerTensor, QParams
from qhw_plugins.lsq_plus import OffsetQuantizer
from tests.plugins.test_learned_ranges import ACTIVATIONS, WEIGHTS, refusal, step_of
from tests.training_support import quantized, steps, trainable

LSQ_PLUS = {"train": {"prefer": ["lsq_plus"]}}


def quantizer(scale=0.5, zero_point=3, low=0, high=15):
    qparams = QParams(torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), low, high, PerTensor())
    return OffsetQuantizer(qparams, Grid(low, high), name="x")


def test_gradients_by_hand():
    # s = 0.5, offset = -1.5, so z = 3 and codes 0 .. 15 reach from -1.5 to 6.0.
    cases = [
        # x, by x, by s, by offset; inside: round(x/s) - x/s and 0; outside: the clipped code and 1
        (1.1, 1.0, 2 - 2.2, 0.0),
        (-0.7, 1.0, -1 + 1.4, 0.0),
        (-1.5, 1.0, 0.0, 0.0),
        (-9.0, 0.0, 0.0, 1.0),
        (50.0, 0.0, 15.0, 1.0),
    ]
    for value, by_x, by_scale, by_offset in cases:
        module = quantizer()
        x = torch.tensor([value]).requires_grad_()
        module(x).sum().backward()
        assert x.grad.item() == by_x
        assert module.scale_parameter.grad.item() == pytest.approx(by_scale, abs=1e-5)
        assert module.offset.grad.item() == by_offset
    assert module.zero_point.requires_grad is False


def paper(x, scale, beta, low, high):
    """x_bar = round(clamp((x - beta) / s, n, p)), x_hat = s x_bar + beta, its rounding passed straight through."""
    code = torch.clamp((x - beta) / scale, low, high)
    code = code + (code.round() - code).detach()
    return scale * code + beta


@pytest.mark.parametrize("seed", range(5))
def test_gradients_are_those_of_the_papers_formula(seed):
    generator = torch.Generator().manual_seed(seed)
    module = quantizer(scale=0.25, zero_point=6)
    x = torch.randn(4000, generator=generator) * 2
    # Ours tells inside by the rounded code, the paper by the quotient: they differ in the half steps beyond the ends.
    quotient = x / 0.25 + 6
    x = x[((quotient - 15).abs() > 0.6) & (quotient.abs() > 0.6)]
    upstream = torch.randn(x.shape, generator=generator)
    mine = x.clone().requires_grad_()
    y = module(mine)
    y.backward(upstream)
    leaves = [x.double(), torch.tensor(0.25).double(), torch.tensor(-1.5).double()]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    expected = paper(*leaves, 0, 15)
    expected.backward(upstream.double())
    torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(mine.grad.double(), leaves[0].grad)
    # float32 sums of some 4,000 terms
    torch.testing.assert_close(module.scale_parameter.grad.double(), leaves[1].grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(module.offset.grad.double(), leaves[2].grad, rtol=1e-4, atol=1e-3)


def test_real_zero_stays_exact_and_the_zero_point_follows_the_offset():
    module = quantizer()
    with torch.no_grad():
        module.offset.fill_(-1.8)  # 3.6 codes: the nearest is 4
    assert int(module.qparams.zero_point) == 4
    assert float(module(torch.zeros(1)).detach()) == 0.0
    with torch.no_grad():
        module.offset.fill_(-100.0)
    assert int(module.qparams.zero_point) == 15


def test_activations_get_offsets_and_weights_learn_as_they_do():
    result = trainable(**LSQ_PLUS)
    assert step_of(result, "lsq_plus").sites == ACTIVATIONS
    assert step_of(result, "learned_ranges").sites == WEIGHTS
    assert all(isinstance(result.quantizer(group), OffsetQuantizer) for group in ACTIVATIONS)
    assert all(type(result.quantizer(group)) is LearnedQuantizer for group in WEIGHTS)
    assert result.quantizer("11").gradient_scale == pytest.approx((5 * 255) ** -0.5)
    before = {group: result.quantizer(group).offset.detach().clone() for group in ACTIVATIONS}
    steps(result, 4, lr=0.02)
    assert any(not torch.equal(result.quantizer(group).offset, offset) for group, offset in before.items())
    frozen = qhw.freeze(result)
    for group in ACTIVATIONS:
        quantizer = result.quantizer(group)
        expected = (-quantizer.offset / quantizer.scale).round().clamp(0, 255)
        assert int(frozen.encodings()[group].zero_point) == int(expected)


@pytest.mark.parametrize(("clause", "value"), [("zero_point = 0", "0"), ("zero_point = [0, 128]", "0, 128")])
def test_a_prescribed_zero_point_is_refused(clause, value):
    result = trainable(activation=f", {clause}", **LSQ_PLUS)
    said = f"zero point is prescribed as {value}: it has no offset to learn (formats.a.zero_point)"
    assert said in refusal(result, "lsq_plus")
    assert set(step_of(result, "learned_ranges").sites) == {*ACTIVATIONS, *WEIGHTS}


def test_it_is_taken_only_by_request():
    assert "--prefer lsq_plus takes it in" in refusal(trainable(), "lsq_plus")
    assert "activation ranges learn with an offset" in step_of(trainable(**LSQ_PLUS), "lsq_plus").verdict.sentence()
    assert quantized().plan.steps
