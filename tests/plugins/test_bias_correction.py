# SPDX-License-Identifier: Apache-2.0
"""Bias correction: mean errors vanish on the data, and what is expected without data is what normal inputs give."""

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.decisions import Step
from qhw.engine import QuantizedModel
from qhw.errors import PlanError
from qhw.extension import Registry, load_plugins
from qhw.graph import Graph
from qhw.numerics import fake_quantize
from qhw.schema import parse_target
from qhw_plugins import batch_norm_folding, batch_norm_ranges, bias_correction, min_max, mse, nearest
from tests import pipelines

PLUGINS = (batch_norm_folding, batch_norm_ranges, bias_correction, min_max, mse, nearest, pipelines)
EMPIRICAL, ANALYTIC = "empirical_bias_correction", "analytic_bias_correction"
TARGET = """
schema_version = 1
name = "acme/coarse"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { codes = [-3, 3], zero_point = 0, per = "tensor" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"] }
kernels.each = { input = ["a"], output = ["a"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.Add = { kernels = ["each"] }
fallback = "host"
"""

Correct = Callable[..., QuantizedModel]


@pytest.fixture(scope="module")
def plugins() -> Registry:
    extra = [(module.__name__.rpartition(".")[2], module) for module in PLUGINS]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="module")
def correct(plugins: Registry) -> Correct:
    """Quantize with the corrections named, in order of preference, and no others."""

    def make(model: nn.Module | Graph, x: Any, *names: str, **wishes: Any) -> QuantizedModel:
        data = wishes.get("calibration")
        prefer = [*names, "min_max" if data is not None else "batch_norm_ranges"]
        without = [name for name in (EMPIRICAL, ANALYTIC) if name not in names]
        return qhw.quantize(
            model if isinstance(model, Graph) else model.eval(),
            parse_target(wishes.pop("target", TARGET)),
            example_inputs=x,
            registry=plugins,
            prefer=prefer,
            without=without,
            **wishes,
        )

    return make


def step_of(result: QuantizedModel, name: str) -> Any:
    return next(step for step in result.plan.steps if step.algorithm == name)


def left_out_of(step: Step) -> dict[str, str]:
    return {site.name: site.verdict.sentence() for site in step.left_out}


def refusal_of(result: QuantizedModel, name: str) -> str:
    return next(r for r in result.plan.refused if r.algorithm == name).verdict.sentence()


def with_weights_only(result: QuantizedModel) -> Any:
    """The result's graph with weights on their grid and activations in float."""
    graph = result.float_graph.copy()
    for point in result.plan.points:
        if point.role == "weight":
            weight = graph.tensor(point.tensor).detach()
            graph.set_tensor(point.tensor, fake_quantize(weight, result.encodings()[point.group]))
    return graph


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, stride=2), (4, 7, 7)),
    "same-padding": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1), (4, 5, 5)),
    "transposed-grouped": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), (4, 5, 5)),
    "linear": (lambda: nn.Linear(4, 6), (4,)),
    "tokens": (lambda: nn.Linear(4, 6), (5, 4)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_mean_error_of_the_first_layer_is_zero_on_the_data(correct: Correct, name: str) -> None:
    make, shape = LAYERS[name]
    torch.manual_seed(0)
    model = nn.Sequential(make())
    data = torch.randn(40, *shape) + 0.7
    axis = -1 if isinstance(model[0], nn.Linear) else 1
    errors = []
    for names in ((), (EMPIRICAL,)):
        result = correct(model, data[:2], *names, calibration=data)
        with torch.no_grad():
            error = with_weights_only(result)(data).double() - model(data).double()
        errors.append(error.movedim(axis, 0).flatten(1).mean(1).abs().max().item())
    assert errors[0] > 0.01
    assert errors[1] < 1e-6  # float32 outputs of order one, averaged in float64


def conv_net() -> nn.Module:
    torch.manual_seed(2)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6(),
        nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Flatten(1), nn.Linear(4 * 36, 3),
    )  # fmt: skip
    data = torch.randn(256, 3, 6, 6)
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # plain averages
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(0.3)
    net.train()
    with torch.no_grad():
        net(data)
    return net.eval()


@cache
def net() -> Graph:
    """The network above, captured once: quantizing leaves it alone."""
    return qhw.capture(conv_net(), torch.randn(2, 3, 6, 6))


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(70, 3, 6, 6, generator=torch.Generator().manual_seed(9))


def layer_means(graph: Any, data: Tensor) -> list[Tensor]:
    """Mean output per channel of every layer with weights, in order."""
    found: list[Tensor] = []
    values: dict[Any, Any] = {}
    layers = {operator.node: operator for operator in graph.operators if operator.weight is not None}
    with torch.no_grad():
        for node in graph.module.graph.nodes:
            if node.op == "placeholder":
                values[node] = data
            elif node.op == "get_attr":
                values[node] = graph.tensor(str(node.target))
            elif node.op == "call_function":
                args, kwargs = torch.fx.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                if node.name in layers:
                    found.append(values[node].double().movedim(1, 0).flatten(1).mean(1))
    return found


def test_every_layer_is_corrected_after_those_before_it(correct: Correct, images: Tensor) -> None:
    model = net()
    wanted = layer_means(correct(model, images[:2], calibration=images).float_graph, images)
    plain = layer_means(with_weights_only(correct(model, images[:2], calibration=images)), images)
    result = correct(model, images[:2], EMPIRICAL, calibration=images)
    found = layer_means(with_weights_only(result), images)
    for index in range(4):
        assert (plain[index] - wanted[index]).abs().max() > 0.005, index
        assert (found[index] - wanted[index]).abs().max() < 1e-5, index
    step = step_of(result, EMPIRICAL)
    assert step.sites == ("0.weight", "3.weight", "6.weight", "9.weight")
    assert step.verdict.sentence() == "calibration data is given (resources.calibration)"
    report = next(r for r in result.steps if r.algorithm == EMPIRICAL)
    assert report.summary == "4 biases corrected by 70 samples"
    moved = (found[0] - plain[0]).abs()
    assert report.sites["0.weight"] == {
        "mean_abs": pytest.approx(moved.mean().item(), rel=1e-4),
        "max_abs": pytest.approx(moved.max().item(), rel=1e-4),
    }


def test_one_image_is_enough(correct: Correct, images: Tensor) -> None:
    model = conv_net()
    one = images[:1]
    result = correct(model, one, EMPIRICAL, calibration=one)
    wanted = layer_means(correct(model, one, calibration=one).float_graph, one)
    assert (layer_means(with_weights_only(result), one)[0] - wanted[0]).abs().max() < 1e-5


def test_no_data_is_refused(correct: Correct, images: Tensor) -> None:
    result = correct(net(), images[:2], EMPIRICAL)
    assert refusal_of(result, EMPIRICAL) == "needs calibration data (resources.calibration)"


def expected_by_numpy(result: QuantizedModel, plain: QuantizedModel) -> dict[str, np.ndarray]:
    """Equation 28 for the second and third layer of `conv_net`, written out with loops over channels."""
    from math import erf, exp, pi, sqrt

    model = conv_net()
    expected: dict[str, np.ndarray] = {}
    for index, norm, upper in ((3, 1, None), (6, 4, 6.0)):
        gamma = np.abs(model[norm].weight.detach().double().numpy())  # type: ignore[index]
        beta = model[norm].bias.detach().double().numpy()  # type: ignore[index]
        mean = np.zeros(len(beta))
        for c in range(len(beta)):
            if upper is None:
                z = -beta[c] / gamma[c]
                mean[c] = gamma[c] * exp(-z * z / 2) / sqrt(2 * pi) + beta[c] * (1 - 0.5 * (1 + erf(z / sqrt(2))))
            else:  # midpoint rule over the density
                grid = np.linspace(beta[c] - 9 * gamma[c], beta[c] + 9 * gamma[c], 200_001)
                middle = (grid[1:] + grid[:-1]) / 2
                density = np.exp(-0.5 * ((middle - beta[c]) / gamma[c]) ** 2)
                mean[c] = (density * np.clip(middle, 0, upper)).sum() / density.sum()
        name = f"{index}.weight"
        weight = plain.float_graph.tensor(name).detach()
        change = fake_quantize(weight, plain.encodings()[name]).double().numpy() - weight.double().numpy()
        taps = change.sum(axis=(2, 3))  # [out, in / groups]
        expected[name] = taps[:, 0] * mean if index == 3 else taps @ mean
    return expected


def test_analytic_corrections_follow_the_equation(correct: Correct, images: Tensor) -> None:
    plain, result = correct(net(), images[:2]), correct(net(), images[:2], ANALYTIC)
    for name, shift in expected_by_numpy(result, plain).items():
        bias = name.replace("weight", "bias")
        moved = plain.float_graph.tensor(bias).double() - result.float_graph.tensor(bias).double()
        assert np.abs(shift).max() > 0.01
        assert np.allclose(moved.detach().numpy(), shift, atol=1e-6)  # biases are float32
    step = step_of(result, ANALYTIC)
    assert step.verdict.sentence() == (
        "3 batch norms tell mean inputs (graph.batch_norms); input is taken as normalized: mean 0, variance 1 "
        "(--set analytic_bias_correction.input_std=..., input_mean=...) (analytic_bias_correction.input_std)"
    )
    assert [s.algorithm for s in result.plan.steps] == [
        "batch_norm_folding", "mse_weights", "nearest", ANALYTIC, "batch_norm_ranges"
    ]  # fmt: skip


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "tokens"])  # no batch norm is over features there
def test_the_analytic_correction_takes_out_what_normal_inputs_shift(correct: Correct, name: str) -> None:
    """A batch norm before the layer, on the host, tells its input; the input is drawn from just that distribution."""
    make, shape = LAYERS[name]
    torch.manual_seed(1)
    norm: Any = (nn.BatchNorm1d if len(shape) < 3 else nn.BatchNorm2d)(4, eps=0.0)
    norm.weight.data.uniform_(0.5, 1.5)
    norm.bias.data.normal_()
    model = nn.Sequential(norm, nn.ReLU(), make())
    data = torch.randn(4000, *shape)
    axis = 1
    errors = []
    for names in ((), (ANALYTIC,)):
        result = correct(model, data[:2], *names, target=TARGET.replace("[-3, 3]", "[-2, 2]"))
        with torch.no_grad():
            error = with_weights_only(result)(data).double() - model(data).double()
        if "padding" in name or name in ("conv1d", "transposed", "transposed-grouped"):  # borders are not counted
            for dim in range(2, error.dim()):
                inside = 4 if name == "transposed" else error.shape[dim] - 4
                error = error.narrow(dim, 2, inside)
        errors.append(error.movedim(axis, 0).flatten(1).mean(1).abs().max().item())
    assert errors[0] > 0.02
    assert errors[1] < 0.15 * errors[0]  # 4,000 samples or more: sampling errors of the mean below 0.01


def test_another_input_mean_moves_the_first_layer(correct: Correct, images: Tensor) -> None:
    options = {ANALYTIC: {"input_mean": 2.0}}
    result = correct(net(), images[:2], ANALYTIC, options=options)
    plain = correct(net(), images[:2])
    weight = plain.float_graph.tensor("0.weight").detach()
    change = fake_quantize(weight, plain.encodings()["0.weight"]).double() - weight.double()
    moved = plain.float_graph.tensor("0.bias") - result.float_graph.tensor("0.bias")
    assert torch.allclose(moved.detach().double(), 2.0 * change.sum((1, 2, 3)), atol=1e-5)
    report = next(r for r in correct(net(), images[:2], ANALYTIC).steps if r.algorithm == ANALYTIC)
    assert report.sites["0.weight"] == {"mean_abs": 0.0, "max_abs": 0.0}  # zero mean: nothing shifts


def test_weights_that_lie_on_the_grid_already_count_by_their_float_form(
    correct: Correct, images: Tensor, plugins: Registry
) -> None:
    """A rounding algorithm writes codes into the weights: the float model is the reference all the same."""
    from qhw.decisions import StepReport
    from qhw.extension import Algorithm, PluginInfo, hookimpl
    from qhw_plugins.nearest import Nearest

    class Onto(Nearest):
        name = "onto_the_grid"

        def apply(self, work: Any, step: Any, context: Any) -> StepReport:
            for group in step.sites:
                weight = work.weight(group)
                work.graph.set_tensor(work.group(group)[0].tensor, fake_quantize(weight, work.qparams[group]))
            return StepReport(stage=step.stage, algorithm=self.name, summary="done")

    class Plugin:
        @hookimpl
        def qhw_plugin_info(self) -> PluginInfo:
            return PluginInfo(api=1, summary="Rounds.")

        @hookimpl
        def qhw_register_algorithms(self) -> list[type[Algorithm]]:
            return [Onto]

    extra: list[Any] = [(module.__name__.rpartition(".")[2], module) for module in PLUGINS]
    registry = load_plugins(block=(), entry_points=(), extra=[*extra, ("onto", Plugin())])
    for name, data in ((ANALYTIC, None), (EMPIRICAL, images)):
        expected = correct(net(), images[:2], name, calibration=data)
        result = qhw.quantize(
            net(),
            parse_target(TARGET),
            registry=registry,
            prefer=["onto_the_grid", name, *(["batch_norm_ranges"] if data is None else [])],
            calibration=data,
        )
        assert "onto_the_grid" in [step.algorithm for step in result.plan.steps]
        for bias in ("3.bias", "6.bias"):
            assert torch.allclose(result.float_graph.tensor(bias), expected.float_graph.tensor(bias), atol=1e-6)


class Two(nn.Module):
    """A convolution with batch norm, a function, another convolution with batch norm."""

    def __init__(self, function: Callable[[Tensor], Tensor], bias: bool = True, **norm: Any) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **norm)
        self.last = nn.Conv2d(4, 2, 1, bias=bias)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.bn(self.conv(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "sites", "words"),
    [
        (Two(F.relu), ("conv.weight", "last.weight"), ""),
        (
            Two(torch.sigmoid),
            ("conv.weight",),
            "behind Sigmoid (sigmoid) nothing is known of the channels without data (graph.sigmoid.kind)",
        ),
        (
            Two(lambda x: torch.cumsum(x, 2)),
            ("conv.weight",),
            "behind aten.cumsum.default (cumsum) nothing is known of the channels without data (graph.cumsum.kind)",
        ),
        (Two(F.relu, bias=False), ("conv.weight",), "last has no bias (graph.last.bias)"),
    ],
    ids=["told", "sigmoid", "unknown-operator", "no-bias"],
)
def test_sites_that_cannot_be_told_are_left_to_the_other(
    correct: Correct, images: Tensor, model: nn.Module, sites: tuple[str, ...], words: str
) -> None:
    result = correct(model, images[:2], ANALYTIC, EMPIRICAL, calibration=images)
    step = step_of(result, ANALYTIC)
    assert step.sites == sites
    assert "1 batch norm tells mean inputs (graph.batch_norms)" in step.verdict.sentence()
    assert left_out_of(step) == ({"last.weight": words} if words else {})
    if len(sites) == 1 and "bias" not in words:
        assert step_of(result, EMPIRICAL).sites == ("last.weight",)


@pytest.mark.parametrize(
    "model",
    [nn.Sequential(nn.Conv2d(3, 2, 1)), Two(F.relu, track_running_stats=False)],
    ids=["no-batch-norm", "no-statistics"],
)
def test_without_batch_norms_nothing_is_expected(correct: Correct, images: Tensor, model: nn.Module) -> None:
    result = correct(model, images[:2], ANALYTIC, calibration=images)
    assert refusal_of(result, ANALYTIC) == "there is no batch norm with running statistics (graph.batch_norms)"


class Shared(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.a, self.bn, self.b, self.c = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
        if what == "weight":
            self.c = self.b
        elif what == "bias":
            self.c.bias = self.b.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.relu(self.b(F.relu(self.bn(self.a(x))))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("weight", "2 operators share b.weight, each with another input (graph.b.weight.readers)"),
        ("bias", "2 operators share b.bias (graph.b.bias.readers)"),
    ],
)
@pytest.mark.parametrize("name", [EMPIRICAL, ANALYTIC])
def test_shared_parameters_are_left_alone(correct: Correct, images: Tensor, what: str, words: str, name: str) -> None:
    step = step_of(correct(Shared(what), images[:2], name, calibration=images), name)
    assert step.sites == ("a.weight",)
    assert set(left_out_of(step).values()) == {words}


def test_a_layer_kept_in_float_is_no_site(correct: Correct, images: Tensor) -> None:
    result = correct(net(), images[:2], EMPIRICAL, calibration=images, keep_float=["3"])
    assert step_of(result, EMPIRICAL).sites == ("0.weight", "6.weight", "9.weight")


def test_dead_channels_are_corrected_by_their_mean(correct: Correct, images: Tensor) -> None:
    model = Two(F.relu)
    model.bn.weight.data.zero_()
    model.bn.bias.data.copy_(torch.tensor([1.0, -1.0, 0.0, 2.0]))
    plain, result = correct(model, images[:2]), correct(model, images[:2], ANALYTIC)
    weight = plain.float_graph.tensor("last.weight").detach()
    change = fake_quantize(weight, plain.encodings()["last.weight"]).double() - weight.double()
    moved = plain.float_graph.tensor("last.bias") - result.float_graph.tensor("last.bias")
    by_hand = change[:, :, 0, 0] @ torch.tensor([1.0, 0.0, 0.0, 2.0]).double()
    assert torch.allclose(moved.detach().double(), by_hand, atol=1e-6)


def test_a_residual_sum_adds_expectations(correct: Correct, images: Tensor) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.bn1 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.b, self.bn2 = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
            self.last = nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.bn1(self.a(x)) + self.bn2(self.b(x)))  # type: ignore[no-any-return]

    torch.manual_seed(4)
    model = Residual()
    model.bn1.bias.data.normal_()
    model.bn2.bias.data.normal_()
    plain, result = correct(model, images[:2]), correct(model, images[:2], ANALYTIC)
    weight = plain.float_graph.tensor("last.weight").detach()
    change = fake_quantize(weight, plain.encodings()["last.weight"]).double() - weight.double()
    moved = plain.float_graph.tensor("last.bias") - result.float_graph.tensor("last.bias")
    by_hand = change[:, :, 0, 0] @ (model.bn1.bias + model.bn2.bias).detach().double()
    assert torch.allclose(moved.detach().double(), by_hand, atol=1e-6)


def test_equal_inputs_give_equal_reports(correct: Correct, images: Tensor) -> None:
    first, second = (correct(net(), images[:2], EMPIRICAL, calibration=images) for _ in range(2))
    assert first.steps == second.steps


def test_a_plan_that_was_edited_beyond_what_can_be_told_is_refused(images: Tensor, plugins: Registry) -> None:
    graph = qhw.capture(Two(torch.sigmoid).eval(), images[:2])
    plan = qhw.plan(graph, parse_target(TARGET), calibration=images, prefer=[ANALYTIC], registry=plugins)
    steps = tuple(
        step.model_copy(update={"sites": ("last.weight",)}) if step.algorithm == ANALYTIC else step
        for step in plan.steps
    )
    edited = plan.model_copy(update={"steps": steps})
    with pytest.raises(PlanError, match=r"^last.weight: behind Sigmoid \(sigmoid\) .* Plan again with --without"):
        qhw.quantize(graph, edited, calibration=images, registry=plugins)


@pytest.mark.parametrize("name", [EMPIRICAL, ANALYTIC])
def test_a_plan_without_the_folding_that_it_counts_on_is_refused(images: Tensor, plugins: Registry, name: str) -> None:
    plan = qhw.plan(net(), parse_target(TARGET), calibration=images, prefer=[name], registry=plugins)
    edited = plan.model_copy(update={"steps": tuple(s for s in plan.steps if s.algorithm != "batch_norm_folding")})
    with pytest.raises(PlanError, match=r"^0: has no bias; the plan counts on a batch norm that gives it one"):
        qhw.quantize(net(), edited, calibration=images, registry=plugins)


@pytest.mark.parametrize("name", [EMPIRICAL, ANALYTIC])
def test_a_plan_without_weight_ranges_is_refused(images: Tensor, plugins: Registry, name: str) -> None:
    plan = qhw.plan(net(), parse_target(TARGET), calibration=images, prefer=[name], registry=plugins)
    edited = plan.model_copy(update={"steps": tuple(s for s in plan.steps if s.stage not in ("weight_range", "round"))})
    with pytest.raises(PlanError, match=r"^0\.weight: has no scale yet\. Add a weight_range step"):
        qhw.quantize(net(), edited, calibration=images, registry=plugins)
