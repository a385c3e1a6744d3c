# SPDX-License-Identifier: Apache-2.0
"""Re-estimated ranges against numpy."""

import numpy as np
import pytest
import torch

import qhw
from qhw.errors import PlanError, RangeError
from qhw.numerics import Grid, PerAxis, PerTensor, QParams
from qhw_plugins.reestimated_ranges import RangeQuantizer
from tests.plugins.test_learned_ranges import ACTIVATIONS, FIXED, WEIGHTS, refusal, step_of
from tests.training_support import images, quantized, steps, trainable

REESTIMATED = {"train": {"prefer": ["reestimated_ranges"], "without": ["kept_batch_norm"]}}


def affine(low, high, quant_min, quant_max):
    """Scale and zero point of a range by the standard's formula, in numpy."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = np.float32((high - low) / (quant_max - quant_min))
    return scale, int(np.clip(quant_min - np.rint(low / scale), quant_min, quant_max))


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_the_range_of_activations_is_a_running_average(momentum):
    start = QParams(torch.tensor(0.02), torch.tensor(100, dtype=torch.int32), 0, 255, PerTensor())
    module = RangeQuantizer(start, Grid(0, 255), momentum, "x").train()
    low, high = -100 * 0.02, 155 * 0.02
    for seed in range(4):
        x = torch.randn(500, generator=torch.Generator().manual_seed(seed)) * (seed + 1)
        y = module(x)
        low += momentum * (float(x.min()) - low)
        high += momentum * (float(x.max()) - high)
        scale, zero_point = affine(low, high, 0, 255)
        assert float(module.scale) == pytest.approx(float(scale), rel=1e-5)
        assert int(module.zero_point) == zero_point
        codes = np.clip(np.rint(x.numpy() / module.scale.numpy()) + zero_point, 0, 255) - zero_point
        np.testing.assert_array_equal(y.numpy(), (codes.astype(np.float32) * module.scale.numpy()))


def test_weights_follow_the_range_of_each_step():
    scale = torch.full((4,), 0.5)
    start = QParams(scale, torch.zeros(4, dtype=torch.int32), -8, 7, PerAxis(0))
    module = RangeQuantizer(start, Grid(-8, 7, zero_point=0), 1.0, "w").train()
    weight = torch.randn(4, 3, 3)
    module(weight)
    rows = weight.reshape(4, -1).numpy()
    expected = np.maximum(rows.max(1) / 7, -rows.min(1) / 8)
    np.testing.assert_allclose(module.scale.numpy(), expected, rtol=1e-6)


def test_outside_training_nothing_moves():
    start = QParams(torch.tensor(0.02), torch.tensor(100, dtype=torch.int32), 0, 255, PerTensor())
    module = RangeQuantizer(start, Grid(0, 255), 0.5, "x").eval()
    module(torch.randn(100) * 50)
    assert float(module.scale) == pytest.approx(0.02)
    module.train()
    module.enabled = False
    module(torch.randn(100) * 50)
    assert float(module.scale) == pytest.approx(0.02)


def test_the_gradient_passes_inside_and_stops_outside():
    start = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -8, 7, PerTensor())
    module = RangeQuantizer(start, Grid(-8, 7, zero_point=0), 0.1, "x").eval()
    x = torch.tensor([0.3, 5.0, -5.0]).requires_grad_()
    module(x).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0]
    assert not list(module.parameters())


def test_a_result_trains_with_it_and_is_frozen_with_the_last_ranges():
    result = trainable(**REESTIMATED)
    assert set(step_of(result, "reestimated_ranges").sites) == {*WEIGHTS, *ACTIVATIONS}
    before = {group: result.quantizer(group).scale.clone() for group in ACTIVATIONS}
    losses = steps(result, 4)
    assert all(np.isfinite(losses))
    assert all(not torch.equal(result.quantizer(group).scale, before[group]) for group in ACTIVATIONS)
    encodings = qhw.freeze(result).encodings()
    for group in ACTIVATIONS:
        assert torch.equal(encodings[group].scale, result.quantizer(group).scale)


def test_power_of_two_scales_stay_powers_of_two():
    result = trainable(activation=', scale = { kind = "power_of_two" }', **REESTIMATED)
    steps(result, 3)
    scales = torch.stack([result.quantizer(group).scale for group in ACTIVATIONS])
    assert bool((scales.frexp().mantissa == 0.5).all())


def test_a_range_that_is_no_number_is_named():
    result = trainable(**REESTIMATED)
    result.train()
    with pytest.raises(RangeError, match=r"^input: "):
        result(images() * float("nan"))


@pytest.mark.parametrize(("where", "kept"), [("activation", ACTIVATIONS), ("weight", WEIGHTS)])
def test_a_prescribed_scale_is_refused(where, kept):
    result = trainable(**{where: FIXED}, **REESTIMATED)
    step = step_of(result, "reestimated_ranges")
    assert not set(step.sites) & set(kept)
    assert {site.name for site in step.left_out} == set(kept)
    assert {site.verdict.sentence() for site in step.left_out} == {
        f"the scale is fixed (formats.{where[0]}.scale.kind)"
    }


def test_without_a_free_scale_it_is_refused():
    result = quantized(activation=FIXED, weight=FIXED, pipeline="whitepaper-qat", prefer=["reestimated_ranges"])
    assert refusal(result, "reestimated_ranges").startswith("no scale is free to follow")


def test_the_momentum_is_an_option_within_its_bounds():
    options = {"reestimated_ranges": {"momentum": 0.25}}
    result = trainable(train={**REESTIMATED["train"], "options": options})
    assert result.quantizer("0").momentum == 0.25
    assert result.quantizer("0.weight").momentum == 1.0
    with pytest.raises(PlanError, match="momentum"):
        trainable(train={**REESTIMATED["train"], "options": {"reestimated_ranges": {"momentum": 0.0}}})
