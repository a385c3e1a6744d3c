# SPDX-License-Identifier: Apache-2.0
"""Sequential MSE: the scale it takes is the best of its candidates by numpy; layers see those before them quantized."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import qhw
from qhw.extension import Registry, load_plugins
from qhw.schema import parse_target
from qhw_plugins import batch_norm_folding, min_max, mse, nearest, sequential_mse
from tests import pipelines
from tests.plugins.test_adaround import TARGET, errors, small


@pytest.fixture(scope="module")
def registry() -> Registry:
    modules = (sequential_mse, batch_norm_folding, min_max, mse, nearest, pipelines)
    return load_plugins(entry_points=(), extra=[(m.__name__.rpartition(".")[2], m) for m in modules])


@pytest.mark.parametrize("wanted", ["w4", "w4t"])
def test_the_scale_is_the_best_of_its_candidates(registry: Registry, wanted: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(12, 5, bias=False)
    x = torch.randn(64, 12) @ torch.randn(12, 12)
    net = nn.Sequential(layer, nn.ReLU()).eval()
    asked: dict[str, Any] = {"example_inputs": x[:2], "calibration": x, "registry": registry}
    result = qhw.quantize(net, parse_target(TARGET), prefer=("sequential_mse",), formats={"0.weight": wanted}, **asked)
    weight, data = layer.weight.detach().numpy().astype(np.float32), x.numpy()[:-1]  # the last sample is held back
    low = -7 if wanted == "w4" else -8
    axis = 1 if wanted == "w4" else None
    top, bottom = weight.max(axis, keepdims=True), -weight.min(axis, keepdims=True)
    covering = np.maximum(np.maximum(top, 0) / 7, np.maximum(bottom, 0) / -low)
    scales = [np.float32(covering * share) for share in np.linspace(1.0, 0.3, 20)]
    float_out = np.maximum(data @ weight.T, 0)
    losses = np.stack(
        [
            ((np.maximum(data @ (s * np.clip(np.rint(weight / s), low, 7)).T, 0) - float_out) ** 2).mean(0)
            for s in scales
        ]
    )
    best = losses.argmin(0) if axis else np.full(5, losses.sum(1).argmin())
    found = result.encodings()["0.weight"].scale.reshape(-1).numpy()
    expected = np.array([scales[index].reshape(-1)[channel if axis else 0] for channel, index in enumerate(best)])
    # The scale is rounded to float32 after a product in another order.
    np.testing.assert_allclose(found, expected if axis else expected[:1], rtol=1e-6)


@pytest.mark.parametrize("kind", ["conv", "depthwise", "transposed", "linear"])
def test_outputs_are_closer_than_with_ranges_by_weights(registry: Registry, kind: str) -> None:
    net, x = small(kind)
    target = parse_target(TARGET)
    asked: dict[str, Any] = {"example_inputs": x[:2], "calibration": x, "registry": registry}
    results = [
        qhw.quantize(net, target, prefer=prefer, **asked) for prefer in (("min_max_weights",), ("sequential_mse",))
    ]
    for result in results:
        result.set_enabled(False, [p.group for p in result.plan.points if p.role not in ("weight", "bias")])
    before, after = errors(net, x, *results)
    assert after < before


def test_scales_of_groups_are_left_to_others(registry: Registry) -> None:
    net, x = small("linear")
    plan = qhw.plan(
        net, parse_target(TARGET), x[:2], calibration=x, prefer=("sequential_mse",), formats={"3.weight": "w4g"},
        registry=registry,
    )  # fmt: skip
    step = next(step for step in plan.steps if step.algorithm == "sequential_mse")
    assert [(site.name, site.verdict.sentence()) for site in step.left_out] == [
        ("3.weight", "a scale per group is not one per output (formats.w4g.per)")
    ]
