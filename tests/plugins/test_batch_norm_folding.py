# SPDX-License-Identifier: Apache-2.0
"""Folding keeps the function: each layer against equations 11 and 12 and against the float model."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.graph import Graph
from qhw_plugins.batch_norm_folding import fold

Quantize = Callable[..., QuantizedModel]


def randomize(model: nn.Module) -> nn.Module:
    """Statistics far from the identity, gammas of both signs."""
    generator = torch.Generator().manual_seed(5)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            norm.running_mean = torch.randn(norm.num_features, generator=generator)
            norm.running_var = torch.rand(norm.num_features, generator=generator) * 4 + 0.01
            if norm.affine:
                nn.init.normal_(norm.weight, generator=generator)
                nn.init.normal_(norm.bias, generator=generator)
    return model.eval()


LAYERS: dict[str, tuple[Callable[[bool], nn.Module], Any, tuple[int, ...]]] = {
    "conv1d": (lambda b: nn.Conv1d(6, 8, 3, bias=b), nn.BatchNorm1d, (4, 6, 9)),
    "conv2d": (lambda b: nn.Conv2d(6, 8, 3, bias=b), nn.BatchNorm2d, (4, 6, 7, 7)),
    "depthwise": (lambda b: nn.Conv2d(8, 8, 3, groups=8, bias=b), nn.BatchNorm2d, (4, 8, 7, 7)),
    "grouped": (lambda b: nn.Conv2d(6, 8, 3, groups=2, bias=b), nn.BatchNorm2d, (4, 6, 7, 7)),
    "transposed": (lambda b: nn.ConvTranspose2d(6, 8, 3, bias=b), nn.BatchNorm2d, (4, 6, 5, 5)),
    "transposed-grouped": (lambda b: nn.ConvTranspose2d(6, 8, 3, groups=2, bias=b), nn.BatchNorm2d, (4, 6, 5, 5)),
    "transposed-1d": (lambda b: nn.ConvTranspose1d(6, 8, 3, groups=2, bias=b), nn.BatchNorm1d, (4, 6, 5)),
    "linear": (lambda b: nn.Linear(6, 8, bias=b), nn.BatchNorm1d, (4, 6)),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_function_is_preserved(name: str, bias: bool, affine: bool) -> None:
    make, norm, shape = LAYERS[name]
    torch.manual_seed(0)
    model = randomize(nn.Sequential(make(bias), norm(8, affine=affine)))
    x = torch.randn(shape)
    graph = qhw.capture(model, x)
    fold(graph, graph.operator("0"), graph.operator("1"))
    assert [operator.name for operator in graph.operators] == ["0"]
    expected = model(x)
    assert (graph(x) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_weights_and_bias_follow_the_equations(quantize: Quantize, images: Tensor) -> None:
    model: Any = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=0.1, momentum=None)))
    conv, norm = model
    found = quantize(model, images).float_graph
    factor = norm.weight.detach().double() / (norm.running_var.double() + 0.1).sqrt()
    weight = conv.weight.detach().double() * factor[:, None, None, None]
    bias = norm.bias.detach().double() + factor * (conv.bias.detach().double() - norm.running_mean.double())
    assert torch.allclose(found.tensor("0.weight").double(), weight, rtol=2**-22, atol=0)
    assert torch.allclose(found.tensor("0.bias").double(), bias, rtol=2**-22, atol=1e-7)
    assert found.tensor("0.bias").dtype == torch.float32


def test_float64_models_are_folded_in_float64() -> None:
    model = randomize(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    graph = qhw.capture(model, x)
    fold(graph, graph.operator("0"), graph.operator("1"))
    assert (graph(x) - model(x)).abs().max() < 1e-12


class Refused(nn.Module):
    """Batch norms that cannot be folded: behind a pooling, a result with two readers, a weight read twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.good, self.bn4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(torch.max_pool2d(self.conv1(x), 2))
        y = self.conv2(x)
        y = self.bn2(y) + y
        y = self.bn3(self.conv3(self.conv3(y)))
        return self.bn4(self.good(y))  # type: ignore[no-any-return]


def test_what_cannot_be_folded_stays_on_the_host_and_the_plan_still_works(quantize: Quantize, images: Tensor) -> None:
    model = randomize(Refused())
    result = quantize(model, images)
    where = {operator.name: operator.where for operator in result.plan.operators}
    assert [where[f"bn{index}"] for index in (1, 2, 3, 4)] == ["host", "host", "host", "folded"]
    step = result.plan.steps[0]
    assert (step.algorithm, step.sites) == ("batch_norm_folding", ("bn4",))
    assert step.verdict.sentence() == "1 of 4 batch norms can be folded (graph.batch_norms)"
    assert [(site.name, site.verdict.sentence()) for site in step.left_out] == [
        ("bn1", "it follows MaxPool, which has no weights (graph.bn1.producer)"),
        ("bn2", "2 operators or outputs read what it normalizes (graph.bn2.readers)"),
        ("bn3", "conv3.weight is shared with another operator (graph.bn3.weight)"),
    ]
    expected = model(images)
    result.set_enabled(False)
    assert (result(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
    result.set_enabled(True)
    assert (result(images) - expected).abs().max() <= 0.2 * expected.abs().max()


@pytest.mark.parametrize(
    ("model", "shape", "words"),
    [
        (nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(4)), (40, 4, 6), "it normalizes another axis than the linear"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)),
            (40, 3, 4, 4),
            "",  # without statistics it is no batch norm of the graph, but what torch computes instead
        ),
        (nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1)), (40, 3, 4, 4), "it follows input, which has no weights"),
    ],
    ids=["another-axis", "no-statistics", "first-in-the-model"],
)
def test_refused_norms_run_in_float(quantize: Quantize, model: nn.Module, shape: tuple[int, ...], words: str) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    result = quantize(model.eval(), x)
    refusal = next(r for r in result.plan.refused if r.algorithm == "batch_norm_folding")
    assert words in refusal.verdict.sentence()
    result.set_enabled(False)
    assert torch.allclose(result(x), model(x), atol=1e-5)


def test_a_model_without_batch_norms_says_so(quantize: Quantize, images: Tensor) -> None:
    refusal = quantize(nn.Sequential(nn.Conv2d(3, 4, 1)).eval(), images).plan.refused[0]
    assert refusal.verdict.sentence() == "the model has no batch norm (graph.batch_norms)"


def test_a_bias_shared_with_another_layer_is_left_alone(quantize: Quantize, images: Tensor) -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn, self.b = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1)
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.bn(self.a(x)))  # type: ignore[no-any-return]

    model = randomize(Shared())
    result = quantize(model, images)
    result.set_enabled(False)
    assert torch.allclose(result(images), model(images), atol=1e-5)


def test_the_graph_is_compiled_equally_often_for_few_and_many_batch_norms(
    quantize: Quantize, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = 0
    original = torch.fx.GraphModule.recompile

    def counted(self: Any) -> Any:
        nonlocal compiled
        compiled += 1
        return original(self)

    def count(blocks: int) -> int:
        nonlocal compiled
        layers = [layer for _ in range(blocks) for layer in (nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3))]
        graph = qhw.capture(nn.Sequential(*layers).eval(), images[:2])
        compiled = 0
        quantize(graph, images[:32])  # type: ignore[arg-type]
        return compiled

    monkeypatch.setattr(torch.fx.GraphModule, "recompile", counted)
    assert isinstance(qhw.capture(nn.Conv2d(3, 3, 1), images[:2]), Graph)
    assert count(2) == count(6)
