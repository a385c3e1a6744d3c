# SPDX-License-Identifier: Apache-2.0
"""Which clips a quantizer takes over, and that nothing changes by it."""

import math

import torch
from torch import nn

import qhw
from qhw.numerics import LearnedQuantizer
from tests.training_support import images, network, trainable


def clips(result):
    return {m.name: m.clip for m in result.modules() if isinstance(m, LearnedQuantizer) and m.clip[1] != -m.clip[0]}


def relus(result):
    return sum("relu" in str(n.target) or "tanh" in str(n.target) for n in result.module.graph.nodes)


def test_a_relu_in_front_of_its_quantizer_is_taken_over_and_nothing_changes(monkeypatch):
    fused = trainable()
    assert clips(fused) == dict.fromkeys(("0", "3", "6"), (0.0, math.inf))
    assert relus(fused) == 0
    monkeypatch.setattr("qhw.training.form.fuse_clips", lambda graph: None)
    apart = trainable()
    assert relus(apart) == 3 and not clips(apart)
    for result in (fused, apart):
        result.train()
    x = images(64)
    y, expected = fused(x), apart(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    for (name, mine), (other, theirs) in zip(fused.named_parameters(), apart.named_parameters(), strict=True):
        assert name == other
        if mine.grad is not None:
            # A scale's gradient is a sum of up to 64 * 8 * 8 * 8 terms that is formed in another order.
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-3)
    frozen, other = qhw.freeze(fused), qhw.freeze(apart)
    with torch.no_grad():
        assert torch.equal(frozen(x), other(x))


def test_switched_off_the_clip_stays():
    model = network()
    result = trainable(model)
    result.set_enabled(False)
    torch.testing.assert_close(result(images()), model(images()), rtol=1e-4, atol=1e-5)


class Clips(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6))

    def forward(self, x):
        x = nn.functional.relu6(self.convs[0](x))
        x = nn.functional.hardtanh(self.convs[1](x), -0.5, 0.75)
        x = self.convs[2](x).clamp(0.1, 0.9)  # its gradient passes at the bounds
        x = nn.functional.leaky_relu(self.convs[3](x))
        x = torch.relu(self.convs[4](x)) + x
        return self.convs[5](torch.relu(x)).mean((2, 3))


def test_only_clips_with_the_same_gradient_are_taken_over():
    torch.manual_seed(0)
    result = trainable(Clips().eval())
    found = sorted(clips(result).values())
    assert (0.0, 6.0) in found and (-0.5, 0.75) in found
    assert (0.1, 0.9) not in found
    x = images()
    with torch.no_grad():
        assert (
            torch.equal(result(x), qhw.freeze(result)(x))
            or float((result(x) - qhw.freeze(result)(x)).abs().max()) < 0.05
        )


def test_a_quantizer_that_looks_at_its_input_keeps_its_relu():
    result = trainable(train={"prefer": ["kept_batch_norm", "reestimated_ranges"]})
    assert relus(result) == 3
    result.train()
    result(images())
    assert float(result.quantizer("0").low) > -0.05  # the lowest of the ReLU's output is 0, at 0.1 of the average
