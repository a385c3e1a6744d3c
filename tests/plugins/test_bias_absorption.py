# SPDX-License-Identifier: Apache-2.0
"""Absorption by hand for every kind of layer; where pre-activations stay above c, the function is preserved."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan, Refusal, Resources, Step, StepReport
from qhw.engine import Calibration, Context, SilentProgress, Work
from qhw.errors import CalibrationError, PlanError
from qhw.extension import Registry
from qhw.graph import place
from qhw.schema import TargetSpec, parse_target
from qhw.testing import MODELS, calibration_for, example
from qhw_plugins import batch_norm_folding, bias_absorption, cross_layer_equalization, min_max, nearest
from qhw_plugins.bias_absorption import BiasAbsorption, BiasAbsorptionOptions, absorb, pads_zeros
from qhw_plugins.equalization_pairs import Pair, PairFinder
from tests.equalizing import registry_of

TARGET = """
schema_version = 1
name = "acme/plain"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { codes = [-127, 127], zero_point = 0, per = "tensor" }
biases.b = { bits = 32, scale = "input*weight" }
kernels.mac = { input = ["a"], weight = ["w"], bias = "b", output = ["a"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu"] }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""
ALONE = ("bias_absorption",)
BOTH = ("cross_layer_equalization", "bias_absorption")


PLUGINS = (batch_norm_folding, cross_layer_equalization, bias_absorption, min_max, nearest)


@pytest.fixture(scope="module")
def registry() -> Registry:
    return registry_of(*PLUGINS, alone=ALONE, both=BOTH)


@pytest.fixture(scope="module")
def target() -> TargetSpec:
    return parse_target(TARGET)


@dataclass
class Done:
    """A model before and after the stage, and what was planned and reported."""

    plan: QuantPlan
    before: Work
    work: Work
    reports: dict[str, StepReport]

    @property
    def sites(self) -> tuple[str, ...]:
        return next((step.sites for step in self.plan.steps if step.algorithm == "bias_absorption"), ())

    @property
    def sentence(self) -> str:
        verdicts = (s.verdict for s in (*self.plan.steps, *self.plan.refused) if s.algorithm == "bias_absorption")
        return next(verdicts).sentence()

    @property
    def left_out(self) -> dict[str, str]:
        step = next(step for step in self.plan.steps if step.algorithm == "bias_absorption")
        return {site.name: site.verdict.sentence() for site in step.left_out}

    def tensor(self, name: str) -> np.ndarray:
        return self.work.graph.tensor(name).detach().double().numpy()


Prepare = Callable[..., Done]


@pytest.fixture(scope="module")
def prepare(registry: Registry, target: TargetSpec) -> Prepare:
    """Plan, fold, equalize; with `data=None` there is no calibration data."""

    def make(
        model: nn.Module, inputs: Any, *, data: Any = None, spec: TargetSpec = target, edit: Any = None, **wishes: Any
    ) -> Done:
        graph = qhw.capture(model, inputs)
        # Ranges of activations need data in any plan; absorption is surveyed as the test says.
        plan = qhw.plan(graph, spec, calibration=list(calibration_for(inputs)), registry=registry, **wishes)
        if data is None:
            plan = without_data(plan, graph, spec, registry)
        plan = edit(plan) if edit else plan
        work, before = Work(graph.copy(), spec, plan), Work(graph.copy(), spec, plan)
        context = Context(None if data is None else Calibration(data, graph), SilentProgress(), 0)
        reports = {}
        for step in plan.steps:
            if step.stage in ("prepare", "equalize"):
                algorithm = registry.algorithm(step.algorithm)
                options = algorithm.Options.model_validate(step.options)
                reports[step.algorithm] = algorithm(options).apply(work, step, context)
                if step.algorithm != "bias_absorption":
                    algorithm(options).apply(before, step, context)
        return Done(plan, before, work, reports)

    return make


def without_data(plan: QuantPlan, graph: Any, spec: TargetSpec, registry: Registry) -> QuantPlan:
    """The plan with absorption as it is decided without calibration data."""
    absorbed = [operator.name for operator in plan.operators if operator.where == "folded"]
    overrides = plan.overrides
    options = dict(overrides.options.get("bias_absorption", {}))
    algorithm = registry.algorithm("bias_absorption")
    points = place(graph, spec, absorbed=absorbed, keep_float=overrides.keep_float)
    survey = algorithm(algorithm.Options.model_validate(options)).survey(graph, points, spec, Resources())
    steps = [step for step in plan.steps if step.algorithm != "bias_absorption"]
    index = next((i for i, step in enumerate(steps) if step.stage not in ("prepare", "equalize")), len(steps))
    left_out = tuple(site for site in survey.sites if not site.verdict.taken)
    if survey.taken:
        step = Step(
            stage="equalize",
            algorithm="bias_absorption",
            options=options,
            sites=tuple(site.name for site in survey.taken),
            verdict=survey.verdict,
            left_out=left_out,
        )
        steps.insert(index, step)
        return plan.model_copy(update={"steps": tuple(steps)})
    reasons = (*survey.verdict.reasons, *(reason for site in left_out for reason in site.verdict.reasons))
    verdict = survey.verdict.model_copy(update={"reasons": reasons})
    refused = tuple(refusal for refusal in plan.refused if refusal.algorithm != "bias_absorption")
    refused = (*refused, Refusal(stage="equalize", algorithm="bias_absorption", verdict=verdict))
    return plan.model_copy(update={"steps": tuple(steps), "refused": refused})


BETA = torch.tensor([5.0, 0.5, -4.0, 2.0])
GAMMA = torch.tensor([1.0, 0.5, 1.0, -0.25])
AMOUNT = np.array([2.0, 0.0, 0.0, 1.25])  # max(0, 5 - 3), max(0, 0.5 - 1.5), max(0, -4 - 3), max(0, 2 - 0.75)

SECONDS: dict[str, Callable[[], nn.Module]] = {
    "conv": lambda: nn.Conv2d(4, 3, 3),
    "dilated": lambda: nn.Conv2d(4, 3, 2, stride=2, dilation=2),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, groups=4),
    "padded": lambda: nn.Conv2d(4, 3, 3, padding=1),
    "without-bias": lambda: nn.Conv2d(4, 3, 1, bias=False),
}


def normed(second: nn.Module, *between: nn.Module) -> Any:
    """A convolution, a batch norm whose statistics are known, Relu, another layer."""
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), *(between or (nn.ReLU(),)), second)
    with torch.no_grad():
        model[1].weight.copy_(GAMMA)
        model[1].bias.copy_(BETA)
        model[1].running_mean.normal_()
        model[1].running_var.uniform_(0.5, 2.0)
    return model.eval()


def taps(weight: np.ndarray, kind: str) -> np.ndarray:
    """W2 c in loops: for each output, each input channel, each tap."""
    total = np.zeros(weight.shape[0])
    for output in range(weight.shape[0]):
        for channel in range(weight.shape[1]):
            amount = AMOUNT[output] if kind == "depthwise" else AMOUNT[channel]
            for tap in weight[output, channel].flatten():
                total[output] += tap * amount
    return total


@pytest.mark.parametrize("kind", [kind for kind in SECONDS if kind != "without-bias"])
def test_biases_follow_equation_23(prepare: Prepare, kind: str) -> None:
    model = normed(SECONDS[kind]())
    done = prepare(model, torch.randn(2, 3, 7, 7))
    assert done.sites == ("0",)
    before = done.before.graph
    assert np.allclose(done.tensor("0.bias"), before.tensor("0.bias").detach().double().numpy() - AMOUNT, rtol=1e-6)
    w2, b2 = (p.detach().double().numpy() for p in (model[3].weight, model[3].bias))
    assert np.allclose(done.tensor("3.bias"), b2 + taps(w2, kind), rtol=1e-5, atol=1e-6)
    assert np.array_equal(done.tensor("3.weight"), w2)
    normal = done.work.normals["0"]
    assert np.allclose(normal.mean.numpy(), BETA.numpy() - AMOUNT)
    assert torch.equal(normal.std, GAMMA.double().abs())
    assert done.reports["bias_absorption"].sites == {
        "0": {"channels": 4, "absorbed": 2, "largest": 2.0, "from": "batch_norm", "zero_padding": kind == "padded"}
    }
    assert done.reports["bias_absorption"].summary == "2 channels of 1 operator absorbed"


def above(model: Any, size: int = 7) -> Tensor:
    """Images on which every pre-activation lies above c: beta + gamma (x - mean) / std with x near the mean."""
    with torch.no_grad():
        model[0].weight *= 0.01
        model[0].bias.copy_(model[1].running_mean)
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("kind", [kind for kind in SECONDS if kind not in ("padded", "without-bias")])
def test_pre_activations_above_c_preserve_the_function(prepare: Prepare, kind: str) -> None:
    model = normed(SECONDS[kind]())
    x = above(model)
    done = prepare(model, x)
    assert torch.allclose(done.work.graph(x), model(x), atol=1e-5)


def test_zero_padding_is_exact_inside_and_inexact_at_the_border(prepare: Prepare) -> None:
    model = normed(SECONDS["padded"]())
    x = above(model)
    done = prepare(model, x)
    difference = (done.work.graph(x) - model(x)).abs()
    assert difference[:, :, 1:-1, 1:-1].max() <= 1e-5
    assert difference[:, :, 0].min() > 1e-3


def test_linear_layers_and_flattened_images(prepare: Prepare) -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = normed(nn.Identity())
            self.fc = nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.body(x).flatten(1))
            return y

    model = Flat().eval()
    x = above(model.body, 2)
    done = prepare(model, x)
    assert done.sites == ("body.0",)
    w2, b2 = model.fc.weight.detach().double().numpy(), model.fc.bias.detach().double().numpy()
    assert np.allclose(done.tensor("fc.bias"), b2 + w2 @ np.repeat(AMOUNT, 4), rtol=1e-5)
    assert torch.allclose(done.work.graph(x), model(x), atol=1e-5)


def test_linear_pair_with_its_batch_norm(prepare: Prepare) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[1].weight.copy_(GAMMA)
        model[1].bias.copy_(BETA)
    done = prepare(model, torch.randn(2, 3))
    expected = model[3].bias.detach().double().numpy() + model[3].weight.detach().double().numpy() @ AMOUNT
    assert np.allclose(done.tensor("3.bias"), expected, rtol=1e-5)


def test_amounts_below_zero_absorb_nothing(prepare: Prepare) -> None:
    model = normed(SECONDS["conv"]())
    nn.init.zeros_(model[1].bias)
    done = prepare(model, torch.randn(2, 3, 7, 7))
    for name in ("0.bias", "3.bias"):
        assert torch.equal(done.work.graph.tensor(name), done.before.graph.tensor(name))
    assert done.reports["bias_absorption"].summary == "0 channels of 1 operator absorbed"


def test_after_equalization_beta_and_gamma_are_those_of_the_rescaled_channels(prepare: Prepare) -> None:
    model = normed(SECONDS["conv"]())
    x = torch.randn(2, 3, 7, 7)
    done = prepare(model, x, pipeline="both")
    assert done.sites == ("0",)
    r1 = abs(done.before.graph.tensor("0.weight").detach().double().numpy()).max((1, 2, 3))  # after equalization
    folded = prepare(model, x).tensor("0.weight")
    scale = abs(folded).max((1, 2, 3)) / r1
    assert abs(np.log(scale)).max() > 0.1
    bias = done.before.graph.tensor("0.bias").detach().double().numpy()
    assert np.allclose(done.tensor("0.bias"), bias - AMOUNT / scale, rtol=1e-5, atol=1e-6)
    assert np.allclose(done.work.normals["0"].mean.numpy(), (BETA.numpy() - AMOUNT) / scale, rtol=1e-5)


def test_a_triple_absorbs_into_both_layers(prepare: Prepare) -> None:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for layer in (nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4)):
        norm = nn.BatchNorm2d(4)
        with torch.no_grad():
            norm.weight.copy_(GAMMA)
            norm.bias.copy_(BETA)
        layers += [layer, norm, nn.ReLU()]
    model: Any = nn.Sequential(*layers, nn.Conv2d(4, 2, 1)).eval()
    done = prepare(model, torch.randn(2, 3, 7, 7))
    assert done.sites == ("0", "3")
    before = {name: done.before.graph.tensor(name).detach().double().numpy() for name in ("3.weight", "3.bias")}
    wanted = before["3.bias"] - AMOUNT + before["3.weight"].sum((1, 2, 3)) * AMOUNT
    assert np.allclose(done.tensor("3.bias"), wanted, rtol=1e-5, atol=1e-6)
    last = model[6].bias.detach().double().numpy() + model[6].weight.detach().double().numpy()[:, :, 0, 0] @ AMOUNT
    assert np.allclose(done.tensor("6.bias"), last, rtol=1e-5)
    # What leaves the second layer before its activation is what its batch norm said, less what was absorbed behind.
    assert np.allclose(done.work.normals["3"].mean.numpy(), BETA.numpy() - AMOUNT)


# With calibration data


def plain(bias: bool = True) -> Any:
    torch.manual_seed(1)
    model: Any = nn.Sequential(nn.Conv2d(3, 4, 1, bias=bias), nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    if bias:
        with torch.no_grad():
            model[0].bias.copy_(torch.tensor([9.0, 0.0, 7.0, -3.0]))
    return model


def test_data_gives_the_lowest_pre_activation(prepare: Prepare) -> None:
    model = plain()
    data = torch.randn(70, 3, 6, 6, generator=torch.Generator().manual_seed(2))
    done = prepare(model, data[:2], data=data)
    assert done.sites == ("0",)
    with torch.no_grad():
        lowest = model[0](data).double().amin((0, 2, 3)).numpy()
    amount = np.maximum(lowest, 0.0)
    assert list(amount > 0) == [True, False, True, False]
    bias = model[0].bias.detach().double().numpy()
    assert np.allclose(done.tensor("0.bias"), bias - amount, atol=1e-5)
    w2, b2 = model[2].weight.detach().double().numpy(), model[2].bias.detach().double().numpy()
    assert np.allclose(done.tensor("2.bias"), b2 + w2.sum((2, 3)) @ amount, atol=1e-5)
    assert done.work.normals == {}
    figures = done.reports["bias_absorption"].sites["0"]
    assert figures["from"] == "calibration"
    assert figures["largest"] == pytest.approx(amount.max(), rel=1e-6)
    with torch.no_grad():  # on what was seen, exact
        assert torch.allclose(done.work.graph(data), model(data), atol=1e-4)


def test_linear_layers_on_tokens_take_the_minimum_over_all_tokens(prepare: Prepare) -> None:
    torch.manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    with torch.no_grad():
        model[0].bias.fill_(6.0)
    data = torch.randn(40, 5, 3)
    done = prepare(model, data[:2], data=data)
    with torch.no_grad():
        lowest = model[0](data).double().amin((0, 1)).clamp(min=0).numpy()
    assert np.allclose(done.tensor("0.bias"), 6.0 - lowest, atol=1e-5)


def test_batch_norms_go_before_data(prepare: Prepare) -> None:
    model = normed(SECONDS["conv"]())
    data = torch.randn(40, 3, 7, 7)
    figures = prepare(model, data[:2], data=data).reports["bias_absorption"].sites["0"]
    assert (figures["from"], figures["largest"]) == ("batch_norm", 2.0)


def test_data_of_a_size_that_was_frozen_is_named(prepare: Prepare, registry: Registry, target: TargetSpec) -> None:
    data = torch.randn(40, 3, 6, 6)
    graph = qhw.capture(plain_view(), data[:2], dynamic_batch=False)
    with pytest.raises(CalibrationError, match=r"calibration: the model fails on 32 samples at once: .*dynamic_batch"):
        qhw.quantize(graph, target, calibration=data, registry=registry, progress=SilentProgress())


def plain_view() -> nn.Module:
    class View(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.fc = plain(), nn.Linear(32, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.fc(self.body(x).reshape(2, 32))
            return y

    return View().eval()


# Verdicts


def test_the_verdict_counts_sources_and_paddings(prepare: Prepare) -> None:
    x = torch.randn(2, 3, 7, 7)
    done = prepare(normed(SECONDS["padded"]()), x)
    assert done.sentence == (
        "1 of 2 operators with weights hand on a bias (graph.pairs); "
        "1 by the statistics of a folded batch norm (graph.batch_norms); "
        "1 of them before zero padding, whose borders become inexact (options.exact_only)"
    )
    assert done.left_out == {"3": "the model returns it, so that its scale must stay (graph.3.is_output)"}
    data = torch.randn(40, 3, 6, 6)
    done = prepare(plain(), data[:2], data=data)
    assert done.sentence == (
        "1 of 2 operators with weights hand on a bias (graph.pairs); 1 by the calibration data (resources.calibration)"
    )
    assert done.left_out == {"2": "the model returns it, so that its scale must stay (graph.2.is_output)"}


def test_without_batch_norm_and_data_it_is_refused(prepare: Prepare) -> None:
    done = prepare(plain(), torch.randn(2, 3, 6, 6))
    assert done.sites == ()
    assert done.sentence == (
        "no operator with weights can hand its bias to another (graph.pairs); "
        "0 has no folded batch norm, and calibration data is absent (resources.calibration); "
        "the model returns it, so that its scale must stay (graph.2.is_output)"
    )


def test_exact_only_leaves_zero_padding_out(prepare: Prepare) -> None:
    x = torch.randn(2, 3, 7, 7)
    wish = {"options": {"bias_absorption": {"exact_only": True}}}
    assert prepare(normed(SECONDS["conv"]()), x, **wish).sites == ("0",)
    graph = qhw.capture(normed(SECONDS["padded"]()), x)
    verdicts = site_verdicts(graph, exact_only=True)
    assert verdicts["0"] == "zero padding of 1, 1 makes the borders inexact (exact_only) (graph.3.padding)"
    assert site_verdicts(graph)["0"] == ""


def site_verdicts(graph: Any, text: str = TARGET, **options: Any) -> dict[str, str]:
    spec = parse_target(text)
    norms = [o.name for o in graph.operators if o.kind == "BatchNormalization"]
    points = place(graph, spec, absorbed=norms)
    algorithm = BiasAbsorption(BiasAbsorptionOptions(**options))
    found = algorithm.survey(graph, points, spec, Resources(calibration=True))
    return {site.name: site.verdict.sentence() for site in found.sites}


@pytest.mark.parametrize(
    ("between", "word"),
    [
        ((nn.Identity(),), "nothing"),
        ((nn.PReLU(4),), "PRelu"),
        ((nn.LeakyReLU(),), "LeakyRelu"),
        ((nn.ReLU(), nn.AvgPool2d(2)), "Relu, AveragePool"),
        ((nn.ReLU(), nn.MaxPool2d(2)), "Relu, MaxPool"),
        ((nn.ReLU(), nn.ZeroPad2d(1)), "Relu, Pad"),
    ],
    ids=["nothing", "prelu", "leaky-relu", "average-pool", "max-pool", "padding"],
)
def test_only_relu_may_lie_in_between(between: tuple[nn.Module, ...], word: str) -> None:
    x = torch.randn(2, 3, 7, 7)
    last = nn.Conv2d(4, 3, 1)
    verdicts = site_verdicts(qhw.capture(normed(last, *between), x))
    assert verdicts["0"] == (
        f"{word} lies before the next operator with weights; a bias is absorbed through Relu alone (graph.0.activation)"
    )
    assert site_verdicts(qhw.capture(normed(last, nn.ReLU()), x))["0"] == ""


def test_relu6_and_transposed_convolutions_are_refused() -> None:
    x = torch.randn(2, 3, 7, 7)
    clipped = site_verdicts(qhw.capture(normed(nn.Conv2d(4, 3, 1), nn.ReLU6()), x))["0"]
    assert clipped.startswith("the bound 6.0 is not scale-equivariant")
    transposed = site_verdicts(qhw.capture(normed(nn.ConvTranspose2d(4, 3, 3, stride=2)), x))["0"]
    assert transposed == "the taps of a ConvTranspose that meet the input differ between outputs (graph.3.kind)"


# Biases that do not exist


def test_an_operator_without_a_bias_needs_a_place_for_one() -> None:
    graph = qhw.capture(normed(SECONDS["without-bias"]()), torch.randn(2, 3, 7, 7))
    assert site_verdicts(graph)["0"] == ("its bias is absent, and the plan has no scale for a new one (graph.3.bias)")
    none = TARGET.replace('bias = "b"', 'bias = "none"')
    assert site_verdicts(graph, none)["0"] == "the kernel of 3 adds none (kernels.mac.bias)"
    assert site_verdicts(graph, TARGET.replace('bias = "b", ', ""))["0"] == ""
    assert site_verdicts(graph, TARGET.replace("bits = 32", 'bits = "float"'))["0"] == ""


def test_a_first_operator_without_a_bias_needs_one_too_where_data_decides() -> None:
    graph = qhw.capture(plain(bias=False), torch.randn(2, 3, 6, 6))
    assert site_verdicts(graph)["0"] == "its bias is absent, and the plan has no scale for a new one (graph.0.bias)"
    assert site_verdicts(graph, TARGET.replace('bias = "b", ', ""))["0"] == ""


def test_products_of_rank_three_take_no_bias() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.matrix = nn.Linear(3, 4), nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.fc(x)) @ self.matrix

    text = TARGET.replace('bias = "b", ', "")
    assert site_verdicts(qhw.capture(Product(), torch.randn(2, 5, 3)), text)["fc"] == (
        "a matrix product of rank 3 takes no bias (graph.matmul.rank)"
    )
    assert site_verdicts(qhw.capture(Product(), torch.randn(2, 3)), text)["fc"] == ""


@pytest.mark.parametrize("kind", ["conv", "linear", "product"])
def test_biases_are_added_where_they_do_not_exist(kind: str) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv1d(3, 4, 1, bias=False) if kind == "conv" else nn.Linear(3, 4, bias=False)
            self.second = nn.Conv1d(4, 2, 1, bias=False) if kind == "conv" else nn.Linear(4, 2, bias=False)
            self.matrix = nn.Parameter(torch.randn(4, 2))

        def forward(self, x: Tensor) -> Tensor:
            y = torch.relu(self.first(x))
            z: Tensor = torch.mm(y, self.matrix) if kind == "product" else self.second(y)
            return z

    torch.manual_seed(0)
    model: Any = Bare().eval()
    nn.init.uniform_(model.first.weight, 0.5, 1.0)
    x = torch.rand(2, 3, 5) + 1.0 if kind == "conv" else torch.rand(2, 3) + 1.0
    graph = qhw.capture(model, x)
    pair = PairFinder(graph).after(graph.operator("first"))
    assert isinstance(pair, Pair)
    absorb(graph, [pair], [torch.tensor([1.0, 0.5, 0.0, 1.5], dtype=torch.float64)])
    assert all(operator.bias for operator in graph.operators if operator.kind in ("Conv", "Gemm"))
    assert torch.equal(graph.tensor("first.bias").detach(), -torch.tensor([1.0, 0.5, 0.0, 1.5]))
    assert torch.allclose(graph(x), model(x), atol=1e-5)


@pytest.mark.parametrize(
    ("padding", "kernel", "expected"),
    [(0, 3, False), (1, 3, True), ("valid", 3, False), ("same", 3, True), ("same", 1, False), ((0, 1), 3, True)],
)
def test_zero_padding_is_seen(padding: Any, kernel: int, expected: bool) -> None:
    graph = qhw.capture(nn.Conv2d(3, 4, kernel, padding=padding), torch.randn(2, 3, 7, 7))
    assert pads_zeros(graph.operators[0]) is expected


# Whole models


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_change_only_where_gaussians_reach_below_c(prepare: Prepare, name: str) -> None:
    """Their random batch norms have betas of 0.3 at most, below three gammas, so that nothing is absorbed."""
    model, inputs = example(name)
    done = prepare(model, inputs)
    for report in done.reports.values():
        assert "absorbed" not in report.summary or report.summary.startswith("0 channels")
    for operator in done.work.graph.operators:
        if operator.bias is not None:
            assert torch.equal(done.work.graph.tensor(operator.bias), done.before.graph.tensor(operator.bias))


def test_gaussian_pre_activations_lie_above_c_in_nearly_all_cases(prepare: Prepare) -> None:
    """Of normal values 0.135 % lie more than 3 deviations below the mean."""
    model = normed(nn.Conv2d(4, 2, 1))
    x = torch.randn(200, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        raw = model[0](x)
    model[1].running_mean, model[1].running_var = raw.mean((0, 2, 3)), raw.var((0, 2, 3), correction=0)
    done = prepare(model, x[:2])
    graph = done.work.graph
    with torch.no_grad():
        pre = F.conv2d(x, graph.tensor("0.weight"), graph.tensor("0.bias"))
        same = (graph(x) - model(x)).abs() <= 1e-5
    for channel in (0, 3):
        below = float((pre[:, channel] < 0).double().mean())
        assert below == pytest.approx(0.00135, abs=0.0005)
    assert float(same.double().mean()) > 0.995


def test_quantized_models_run_the_whole_way(registry: Registry, target: TargetSpec) -> None:
    model = normed(SECONDS["conv"]())
    data = torch.randn(64, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    result = qhw.quantize(
        model, target, example_inputs=data[:2], calibration=data, registry=registry, pipeline="both",
        progress=SilentProgress(),
    )  # fmt: skip
    assert [step.algorithm for step in result.plan.steps if step.stage == "equalize"] == list(BOTH)
    with torch.no_grad():
        expected, found = model(data), result(data)
    assert (found - expected).abs().mean() < 0.05 * expected.abs().max()


def test_an_edited_plan_cannot_add_a_site_that_is_none(prepare: Prepare) -> None:
    def edit(plan: QuantPlan) -> QuantPlan:
        changed = {"sites": ("3",)}
        steps = tuple(s.model_copy(update=changed) if s.stage == "equalize" else s for s in plan.steps)
        return plan.model_copy(update={"steps": steps})

    with pytest.raises(PlanError, match=r"plan: step 'bias_absorption': 3: the model returns it"):
        prepare(normed(SECONDS["conv"]()), torch.randn(2, 3, 7, 7), edit=edit)


@pytest.mark.needs_data
@pytest.mark.slow
def test_the_unbalanced_network_keeps_its_function(prepare: Prepare) -> None:
    """Its batch norms have no beta above 3 |gamma|, so that absorption finds nothing and changes nothing."""
    pytest.importorskip("PIL")
    from bench.data import load_models

    try:
        models = load_models()
    except SystemExit as missing:
        pytest.skip(str(missing))
    model = models.mobilenet_v2(unbalanced=True)
    images, _ = models.cifar10("test", 64)
    done = prepare(model, images[:2], pipeline="both")
    assert len(done.sites) == 34
    with torch.inference_mode():
        expected, found = model(images), done.work.graph(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    assert torch.equal(found.argmax(1), expected.argmax(1))
