# SPDX-License-Identifier: Apache-2.0
"""Learned ranges: what learns, in which form, and where it is refused."""

import math

import pytest
import torch

import qhw
from qhw.numerics import FakeQuantizer, LearnedQuantizer
from tests.training_support import images, quantized, steps, trainable

FIXED = ', scale = { kind = "fixed", values = [0.03125] }'
POWERS = ', scale = { kind = "power_of_two" }'
WEIGHTS = ("0.weight", "3.weight", "6.weight", "11.weight")
ACTIVATIONS = ("input", "0", "3", "6", "11")


def with_options(words=None, **options):
    return trainable(train={"options": {"learned_ranges": options}}, **(words or {}))


def refusal(result, name):
    return next(r.verdict.sentence() for r in result.plan.refused if r.algorithm == name and r.stage == "train")


def step_of(result, name):
    return next(step for step in result.plan.steps if step.algorithm == name)


def test_every_free_scale_learns_from_the_range_that_was_set():
    result = quantized()
    start = result.encodings()
    qhw.trainable(result)
    step = step_of(result, "learned_ranges")
    assert set(step.sites) == {*WEIGHTS, *ACTIVATIONS}
    assert step.verdict.sentence() == "a float32 scale learns with the weights (formats.a.scale.kind)"
    for group in ACTIVATIONS:
        quantizer = result.quantizer(group)
        assert isinstance(quantizer, LearnedQuantizer)
        assert torch.equal(quantizer.scale.detach(), start[group].scale)
        assert isinstance(quantizer.zero_point, torch.nn.Parameter)
        assert int(quantizer.zero_point) == int(start[group].zero_point)
    assert not isinstance(result.quantizer("11.weight").zero_point, torch.nn.Parameter)


@pytest.mark.parametrize(("where", "kept"), [("activation", ACTIVATIONS), ("weight", WEIGHTS)])
def test_a_prescribed_scale_is_refused_and_stays(where, kept):
    result = trainable(**{where: FIXED})
    step = step_of(result, "learned_ranges")
    assert not set(step.sites) & set(kept)
    left = {site.name: site.verdict.sentence() for site in step.left_out}
    name = where[0]
    assert left == dict.fromkeys(kept, f"the scale is fixed (formats.{name}.scale.kind)")
    before = [result.quantizer(group).scale.clone() for group in kept]
    assert all(type(result.quantizer(group)) is FakeQuantizer for group in kept)
    steps(result, 2, lr=0.1)
    assert all(torch.equal(result.quantizer(g).scale, s) for g, s in zip(kept, before, strict=True))


def test_without_a_free_scale_it_is_refused():
    result = quantized(activation=FIXED, weight=FIXED, pipeline="whitepaper-qat", without=["kept_batch_norm"])
    assert refusal(result, "learned_ranges").startswith("no scale is free to learn")


@pytest.mark.parametrize(("domain", "kind", "log"), [
    ("linear", "", False), ("log2", "", True), ("linear", POWERS, True), ("log2", POWERS, True),
])  # fmt: skip
def test_the_domain_is_what_the_option_and_the_format_say(domain, kind, log):
    result = with_options({"activation": kind}, domain=domain)
    for group in ACTIVATIONS:
        quantizer = result.quantizer(group)
        scale = float(quantizer.scale.detach())
        value = float(quantizer.scale_parameter.detach())
        assert value == (0.0 if log else pytest.approx(scale))
        assert not kind or math.log2(scale) == round(math.log2(scale))
    steps(result, 3, lr=0.4)
    assert not kind or all(math.frexp(float(result.quantizer(g).scale.detach()))[0] == 0.5 for g in ACTIVATIONS)


def test_a_step_in_the_log_domain_changes_every_scale_by_the_same_ratio():
    result = with_options(domain="log2")
    before = {group: result.quantizer(group).scale.detach().clone() for group in (*ACTIVATIONS, *WEIGHTS)}
    steps(result, 1, lr=0.125)  # the first step of Adam is lr in size where the gradient is not 0
    for group, scale in before.items():
        ratio = (result.quantizer(group).scale.detach() / scale).log2().abs()
        assert bool(((ratio - 0.125).abs() < 1e-3).all()), group


def test_zero_points_stay_where_the_option_says_so():
    result = with_options(zero_point=False)
    assert not any(isinstance(result.quantizer(g).zero_point, torch.nn.Parameter) for g in ACTIVATIONS)
    before = [int(result.quantizer(g).zero_point) for g in ACTIVATIONS]
    steps(result, 3, lr=0.3)
    assert [int(result.quantizer(g).zero_point) for g in ACTIVATIONS] == before


def test_lsq_divides_gradients_by_the_root_of_elements_times_codes():
    plain, scaled = with_options(), with_options(gradient_scale="lsq")
    for result in (plain, scaled):
        result.train()
        result(images()).square().sum().backward()
    # N: weights behind each of the scales, elements of one sample; Q_P: 7 and 255.
    expected = {
        "input": (3 * 8 * 8, 255), "0": (8 * 8 * 8, 255), "3": (8 * 8 * 8, 255), "6": (6 * 3 * 3, 255), "11": (5, 255),
        "0.weight": (3 * 9, 7), "3.weight": (9, 7), "6.weight": (8 * 9, 7), "11.weight": (54, 7),
    }  # fmt: skip
    for group, (count, highest) in expected.items():
        factor = 1 / math.sqrt(count * highest)
        one, other = plain.quantizer(group), scaled.quantizer(group)
        torch.testing.assert_close(other.scale_parameter.grad, one.scale_parameter.grad * factor, rtol=1e-4, atol=1e-6)
        if group in ACTIVATIONS:
            torch.testing.assert_close(other.zero_point.grad, one.zero_point.grad * factor, rtol=1e-4, atol=1e-6)
    weight = plain.module.get_parameter("6.weight").grad
    torch.testing.assert_close(scaled.module.get_parameter("6.weight").grad, weight, rtol=1e-5, atol=1e-6)
