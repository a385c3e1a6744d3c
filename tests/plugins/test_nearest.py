# SPDX-License-Identifier: Apache-2.0
"""Nearest rounding, and the signal-to-noise ratio it reports, by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import PlanError
from qhw.extension import load_plugins

Quantize = Callable[..., QuantizedModel]
COVER = ["min_max_weights"]


def linear(weight: list[list[float]]) -> nn.Module:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return nn.Sequential(layer).eval()


def test_weights_go_to_the_closest_code_ties_to_even(quantize: Quantize) -> None:
    # Scale 1: the largest magnitude is 127.
    result = quantize(linear([[127.0, 0.5, 1.5, -2.5, 2.4, -2.6]]), torch.randn(32, 6), prefer=COVER)
    assert result.codes(result.plan.point("0.weight")).tolist() == [[127, 0, 2, -2, 2, -3]]


def test_the_signal_to_noise_ratio_is_in_db(quantize: Quantize) -> None:
    result = quantize(linear([[127.0, 0.25]]), torch.randn(32, 2), prefer=COVER)
    report = next(step for step in result.steps if step.algorithm == "nearest")
    wanted = 10 * math.log10((127**2 + 0.0625) / 0.0625)  # signal 127**2 + 1/16, noise 1/16
    assert report.sites["0.weight"]["sqnr_db"] == pytest.approx(wanted, abs=0.005)
    assert report.summary == f"1 weight rounded to nearest, lowest SQNR {wanted:.1f} dB"


@pytest.mark.parametrize("weight", [[[127.0, 1.0]], [[0.0, 0.0]]], ids=["no-error", "no-weight"])
def test_a_ratio_that_does_not_exist_is_left_out(quantize: Quantize, weight: list[list[float]]) -> None:
    result = quantize(linear(weight), torch.randn(32, 2), prefer=COVER)
    report = next(step for step in result.steps if step.algorithm == "nearest")
    assert report.sites == {"0.weight": {"sqnr_db": None}}
    assert report.summary == "1 weight rounded to nearest"


def test_a_weight_without_a_scale_is_named(quantize: Quantize) -> None:
    model, data = linear([[1.0, 2.0]]), torch.randn(32, 2)
    result = quantize(model, data, prefer=COVER)
    plan = result.plan.model_copy(update={"steps": tuple(s for s in result.plan.steps if s.stage != "weight_range")})
    with pytest.raises(PlanError, match=r"^0\.weight: has no scale yet\. Add a weight_range step to the plan, before"):
        qhw.quantize(model, plan, calibration=data, target=result.target, registry=load_plugins())
