# SPDX-License-Identifier: Apache-2.0
"""The shipped pipelines: every name is a shipped algorithm of the right stage, and the paper's branches are taken."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.extension import Registry, load_plugins

TARGET = "whitepaper/generic-int8"


@pytest.fixture(scope="module")
def shipped() -> Registry:
    """All that is installed."""
    return load_plugins()


def net(batch_norm: bool = True) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if batch_norm else lambda channels: nn.Identity()
    layers = [nn.Conv2d(3, 8, 3, bias=False), norm(8), nn.ReLU(), nn.Conv2d(8, 6, 3, bias=False), norm(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(96, 4)).eval()


def steps(model: nn.Module, images: Tensor | None, registry: Registry, **wishes: Any) -> dict[str, list[str]]:
    """Stage -> the algorithms that the plan runs there."""
    plan = qhw.plan(model, TARGET, torch.zeros(2, 3, 8, 8), calibration=images, registry=registry, **wishes)
    found: dict[str, list[str]] = {}
    for step in plan.steps:
        found.setdefault(step.stage, []).append(step.algorithm)
    return found


@pytest.mark.parametrize("name", ["whitepaper-ptq", "ranges-ptq"])
def test_a_pipeline_names_shipped_algorithms_of_the_right_stage(shipped: Registry, name: str) -> None:
    for preference in shipped.pipeline(name).stages:
        for algorithm in preference.algorithms:
            assert shipped.algorithm(algorithm).stage == preference.stage


def test_the_papers_pipeline_is_the_default(shipped: Registry) -> None:
    assert shipped.default_pipeline().name == "whitepaper-ptq"


@pytest.mark.parametrize("weight", ["w4", "w4t", "w3", "w3t"])
def test_with_data_few_bits_are_rounded_by_learning(shipped: Registry, images: Tensor, weight: str) -> None:
    assert steps(net(), images, shipped, formats={"*.weight": weight}) == {
        "prepare": ["batch_norm_folding"],
        "equalize": ["cross_layer_equalization", "bias_absorption"],
        "weight_range": ["mse_weights"],
        "round": ["adaround"],
        "activation_range": ["cross_entropy", "mse"],
        "fit": ["requantization_fit"],
    }


def test_with_data_many_bits_are_rounded_to_nearest_and_biases_corrected(shipped: Registry, images: Tensor) -> None:
    found = steps(net(), images, shipped)
    assert (found["round"], found["correct"]) == (["nearest"], ["empirical_bias_correction"])


def test_without_data_batch_norms_tell_ranges_and_corrections(shipped: Registry) -> None:
    found = steps(net(), None, shipped, formats={"*.weight": "w4"})
    assert found["round"] == ["nearest"]
    assert found["correct"] == ["analytic_bias_correction"]
    assert found["activation_range"] == ["batch_norm_ranges"]


def test_without_data_and_batch_norms_the_plan_says_what_is_needed(shipped: Registry) -> None:
    with pytest.raises(qhw.QhwError, match=r"no algorithm fits .* batch_norm_ranges: there is no batch norm"):
        steps(net(batch_norm=False), None, shipped)


def test_without_data_a_batch_norm_network_is_quantized_end_to_end(shipped: Registry, images: Tensor) -> None:
    model = net()
    with torch.no_grad():  # statistics as training leaves them: those of the data
        model.train()
        for _ in range(100):
            model(images)
        model.eval()
    result = qhw.quantize(model, TARGET, example_inputs=images[:2], registry=shipped)
    with torch.no_grad():
        wanted, found = model(images), result(images)
    # 8 bits per tensor and ranges of 6 standard deviations: some per cent of the outputs' spread, not tens.
    assert float((found - wanted).std() / wanted.std()) < 0.1


def test_a_blocked_plugin_is_left_out_and_the_plan_says_so(images: Tensor) -> None:
    registry = load_plugins(block=("adaround", "cross_entropy"))
    plan = qhw.plan(net(), TARGET, images[:2], calibration=images, registry=registry, formats={"*.weight": "w4"})
    assert [step.algorithm for step in plan.steps if step.stage == "round"] == ["nearest"]
    refused = {refusal.algorithm: refusal.verdict.sentence() for refusal in plan.refused}
    assert refused["adaround"] == "adaround came with none of the plugins that are not blocked (QHW_BLOCK)"
