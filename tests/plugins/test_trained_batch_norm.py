# SPDX-License-Identifier: Apache-2.0
"""Which batch norms are kept or folded at each step, and every reason against it."""

import pytest
import torch
from torch import nn

from qhw.errors import PlanError
from qhw.training import DoubleForward, KeptNorm
from tests.plugins.test_learned_ranges import refusal, step_of
from tests.training_support import images, network, quantized, randomize, trainable

NORMS = ("1", "4", "7")


def kept(result):
    return [module for module in result.modules() if isinstance(module, KeptNorm)]


def test_per_channel_they_are_kept():
    result = trainable()
    step = step_of(result, "kept_batch_norm")
    assert step.sites == NORMS
    assert step.verdict.sentence().startswith("3 of 3 batch norms stay, and merge into scales per output channel")
    assert [module.batch_norm.name for module in kept(result)] == list(NORMS)


# A fact of the format that is flipped -> the words that refuse, as far as the fact decides.
FLIPPED = {
    "per": ({"per": "tensor"}, "a scale per tensor cannot take each channel's batch norm: it stays folded"),
    "power of two": ({"weight": ', scale = { kind = "power_of_two" }'}, "a power_of_two scale cannot take any factor"),
    "listed": (
        {"weight": ', scale = { kind = "enumerated", values = [0.01, 0.1] }'},
        "an enumerated scale cannot take any factor",
    ),
}


@pytest.mark.parametrize("fact", FLIPPED)
def test_a_format_that_cannot_take_the_factor_is_refused(fact):
    words, said = FLIPPED[fact]
    result = trainable(**words)
    assert said.replace("an enumerated", "a enumerated") in refusal(result, "kept_batch_norm")
    assert not kept(result)


def test_a_weight_with_a_zero_point_is_refused():
    from tests.training_support import TARGET, WORDS, parse_target

    text = TARGET.format(**WORDS).replace(
        "codes = [-8, 7], zero_point = 0", 'bits = 4, signed = true, zero_point = "free"'
    )
    result = trainable(accelerator=parse_target(text))
    assert "a negative factor needs symmetry" in refusal(result, "kept_batch_norm")


def test_without_batch_norms_both_are_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    result = trainable(model, train={"prefer": ["double_forward"]})
    for name in ("kept_batch_norm", "double_forward"):
        assert "no batch norm was folded into weights" in refusal(result, name)


class Up(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.ConvTranspose2d(3, 4, 2), nn.BatchNorm2d(4)
        self.conv, self.last = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.conv(torch.relu(self.norm(self.up(x))))).mean((2, 3))


@pytest.mark.parametrize("algorithm", ["kept_batch_norm", "double_forward"])
def test_a_batch_norm_in_a_transposed_convolution_stays_there(algorithm):
    torch.manual_seed(0)
    result = trainable(randomize(Up()), train={"prefer": [algorithm]})
    step = step_of(result, algorithm)
    assert step.sites == ("last",)
    left = {site.name: site.verdict.sentence() for site in step.left_out}
    assert left == {"norm": "a batch norm in ConvTranspose stays there (graph.up.kind)"}
    before = result(images())
    result.train()
    assert not torch.equal(result(images()), before)  # the other one uses the batch


def test_a_batch_norm_behind_a_float_operator_is_not_taken():
    model = network()
    result = quantized(model, keep_float=["0"])
    trained = trainable(model, keep_float=["0"])
    assert "1" not in step_of(trained, "kept_batch_norm").sites
    with torch.no_grad():
        assert float((trained(images()) - result(images())).abs().max()) < 0.1


def test_double_forward_is_taken_by_request_at_any_granularity():
    for words in ({}, {"per": "tensor"}, {"weight": ', scale = { kind = "power_of_two" }'}):
        result = trainable(train={"prefer": ["double_forward"]}, **words)
        step = step_of(result, "double_forward")
        assert step.sites == NORMS
        assert step.verdict.sentence().startswith("3 of 3 batch norms are folded at each step")
        layers = [module for module in result.modules() if isinstance(module, DoubleForward)]
        assert [layer.freeze_after for layer in layers] == [None] * 3
        assert "its sites went to double_forward" in refusal(result, "kept_batch_norm") or words


def test_the_freeze_is_an_option():
    train = {"prefer": ["double_forward"], "options": {"double_forward": {"freeze_after": 7}}}
    result = trainable(train=train)
    assert {m.freeze_after for m in result.modules() if isinstance(m, DoubleForward)} == {7}
    train["options"] = {"double_forward": {"freeze_after": -1}}
    with pytest.raises(PlanError, match="freeze_after"):
        trainable(train=train)
