# SPDX-License-Identifier: Apache-2.0
"""Folding, equalization and absorption leave what the four trained networks compute, but for float rounding."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan
from qhw.engine import Calibration, Context, SilentProgress, Work
from qhw.extension import Registry
from qhw_plugins import batch_norm_folding, bias_absorption, cross_layer_equalization, min_max, nearest
from tests.equalizing import registry_of

pytestmark = pytest.mark.slow

TARGET = "whitepaper/generic-int8"
PLUGINS = (batch_norm_folding, bias_absorption, cross_layer_equalization, min_max, nearest)
# Sites of equalization, and of absorption. MobileNetV2 has ReLU6, whose bound no scale may move: two pairs without one.
NETWORKS = {"resnet20": (9, 9), "resnet32": (15, 15), "mobilenetv2": (2, 0), "unbalanced": (37, 34)}


@pytest.fixture(scope="module")
def registry() -> Registry:
    return registry_of(*PLUGINS, preserving=("cross_layer_equalization", "bias_absorption"))


@pytest.fixture(scope="module")
def models() -> Any:
    pytest.importorskip("PIL")
    from bench.data import load_models

    try:
        return load_models()
    except SystemExit as missing:
        pytest.skip(str(missing))


def network(models: Any, name: str) -> Any:
    if name.startswith("resnet"):
        return models.resnet(int(name.removeprefix("resnet")))
    return models.mobilenet_v2(unbalanced=name == "unbalanced")


def apply(
    model: nn.Module, images: Tensor, registry: Registry, **wishes: Any
) -> tuple[Work, QuantPlan, dict[str, Any]]:
    """The working copy after the steps that preserve the function, its plan, and what the steps report."""
    graph = qhw.capture(model, images[:2])
    target = qhw.load_target(TARGET)
    plan = qhw.plan(graph, target, calibration=images, registry=registry, **wishes)
    work, context = Work(graph.copy(), target, plan), Context(Calibration(images, graph), SilentProgress(), 0)
    reports = {}
    for step in plan.steps:
        if step.stage in ("prepare", "equalize"):
            algorithm = registry.algorithm(step.algorithm)
            options = algorithm.Options.model_validate(step.options)
            reports[step.algorithm] = algorithm(options).apply(work, step, context)
    return work, plan, reports


def sites(plan: QuantPlan, algorithm: str) -> int:
    return sum(len(step.sites) for step in plan.steps if step.algorithm == algorithm)


def check(found: Tensor, expected: Tensor) -> None:
    """Scaling and folding round each weight anew, by 6e-8: some 1e-6 of the logits after 50 layers."""
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    assert torch.equal(found.argmax(1), expected.argmax(1))


@pytest.mark.needs_data
@pytest.mark.parametrize("name", NETWORKS)
def test_the_default_steps_keep_the_function(name: str, models: Any, registry: Registry) -> None:
    model, (images, _) = network(models, name), models.cifar10("test", 64)
    work, plan, _ = apply(model, images, registry)
    assert (sites(plan, "cross_layer_equalization"), sites(plan, "bias_absorption")) == NETWORKS[name]
    with torch.inference_mode():
        check(work.graph(images), model(images))


@pytest.mark.needs_data
def test_absorbed_biases_keep_the_function_where_the_second_operator_pads_nothing(
    models: Any, registry: Registry
) -> None:
    """Trained networks hold nothing to absorb; here every fourth channel of a layer stays above zero, as measured.

    Without batch norms c is the least of the pre-activations seen, so that no value of these images is cut.
    """
    model, (images, _) = network(models, "unbalanced"), models.cifar10("test", 64)
    folded = apply(model, images, registry, without=("cross_layer_equalization", "bias_absorption"))[0].graph
    raised = folded.copy()
    count = 0
    for operator in raised.operators:
        if operator.kind == "DepthwiseConv" and operator.bias is not None:
            bias = raised.tensor(operator.bias).detach().clone()
            bias[::4] += 20.0 * bias.abs().max()
            raised.set_tensor(operator.bias, bias)
            count += len(bias[::4])
    options = {"bias_absorption": {"exact_only": True}}
    work, plan, reports = apply(raised.module, images, registry, options=options)
    assert sites(plan, "bias_absorption") == 17
    absorbed, *words = reports["bias_absorption"].summary.split()
    assert (int(absorbed) >= count, " ".join(words)) == (True, "channels of 17 operators absorbed")
    with torch.inference_mode():
        check(work.graph(images), raised(images))


@pytest.mark.needs_data
def test_a_resnet_has_no_pair_where_absorption_is_exact(models: Any, registry: Registry) -> None:
    """All of its second convolutions pad with zeros, which stand for a lower value once the bias is absorbed."""
    images, _ = models.cifar10("test", 8)
    wishes = {"options": {"bias_absorption": {"exact_only": True}}}
    with pytest.raises(qhw.QhwError, match="makes the borders inexact"):
        apply(network(models, "resnet20"), images, registry, **wishes)
