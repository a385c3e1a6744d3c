# SPDX-License-Identifier: Apache-2.0
"""Ranges from batch norms: against equations 18 and 19 by hand, on networks without any data."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import PlanError, RangeError
from qhw.extension import Registry, load_plugins
from qhw.schema import parse_target
from qhw.testing import example
from qhw_plugins import batch_norm_folding, batch_norm_ranges, bias_correction, min_max, mse, nearest
from tests import pipelines

PLUGINS = (batch_norm_folding, batch_norm_ranges, bias_correction, min_max, mse, nearest, pipelines)
TARGET = """
schema_version = 1
name = "acme/plain"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"] }
kernels.each = { input = ["a"], output = ["a"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.Add = { kernels = ["each"], fused = ["Relu"] }
operators.Sigmoid = { kernels = ["each"] }
operators.MaxPool = { kernels = ["each"], same_scale = "input_output" }
operators.GlobalAveragePool = { kernels = ["each"], same_scale = "input_output" }
fallback = "host"
"""
WISHES = {"prefer": ["batch_norm_ranges"]}


@pytest.fixture(scope="module")
def plugins() -> Registry:
    extra = [(module.__name__.rpartition(".")[2], module) for module in PLUGINS]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="module")
def without_data(plugins: Registry) -> Callable[..., QuantizedModel]:
    """Quantize a module without calibration; or with data, to see what changes."""

    def make(model: nn.Module, x: Tensor, **wishes: Any) -> QuantizedModel:
        target = parse_target(wishes.pop("target", TARGET))
        return qhw.quantize(model.eval(), target, example_inputs=x, registry=plugins, **(WISHES | wishes))

    return make


class Block(nn.Module):
    """Everything that the ranges meet: ReLU6 and no activation behind a batch norm, a sum, a pooling, a last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.conv3, self.bn3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2)
        generator = torch.Generator().manual_seed(0)
        for index, norm in enumerate((self.bn1, self.bn2, self.bn3)):
            norm.weight.data = torch.tensor([1.0, -0.5, 0.25, 2.0]) * (index + 1) / 3
            norm.bias.data = torch.tensor([0.5, 0.0, -0.5, 0.25])
            norm.running_mean = torch.randn(4, generator=generator)  # type: ignore[assignment]
            norm.running_var = torch.rand(4, generator=generator) + 0.5  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        y = F.relu6(self.bn2(self.conv2(x)))
        y = F.relu(self.bn3(self.conv3(y)) + x)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def ranges(result: QuantizedModel) -> dict[str, tuple[float, float]]:
    """Reported ranges, group by group."""
    report = next(report for report in result.steps if report.stage == "activation_range")
    return {name: (float(s["min"]), float(s["max"])) for name, s in report.sites.items()}  # type: ignore[arg-type]


def test_ranges_are_mean_plus_and_minus_six_deviations(without_data: Any, x: Tensor) -> None:
    found = ranges(without_data(Block(), x))
    assert list(found) == ["x", "conv1", "conv2", "conv3", "add", "fc"]
    assert found["x"] == (-6.0, 6.0)
    assert found["conv1"] == pytest.approx((0.0, 0.25 + 6 * 2 / 3))
    assert found["conv2"] == pytest.approx((0.0, 6.0))  # 0.25 + 6 * 4 / 3 = 8.25, cut by ReLU6
    assert found["conv3"] == pytest.approx((0.25 - 12.0, 0.25 + 12.0))


def test_a_residual_sum_has_the_sum_of_means_and_variances(without_data: Any, x: Tensor) -> None:
    low, high = ranges(without_data(Block(), x))["add"]
    samples = 0.25 + 2 / 3 * torch.randn(1_000_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    branch = samples.relu()
    # The widest channel: N(0.25, 2) of the third batch norm plus the rectified N(0.25, 2 / 3) of the first.
    expected = 0.25 + float(branch.mean()) + 6 * float((branch.var() + 4.0).sqrt())
    assert low == 0.0
    assert high == pytest.approx(expected, rel=2e-3)  # a million samples: standard error of the mean 0.0004


@pytest.mark.parametrize("alpha", [1.0, 3.0])
def test_alpha_is_an_option(without_data: Any, x: Tensor, alpha: float) -> None:
    result = without_data(Block(), x, options={"batch_norm_ranges": {"alpha": alpha}})
    assert ranges(result)["conv3"] == pytest.approx((0.25 - 2 * alpha, 0.25 + 2 * alpha))


def test_inputs_are_what_the_options_say(without_data: Any, x: Tensor) -> None:
    options = {"batch_norm_ranges": {"input_mean": 0.5, "input_std": 0.25}}
    result = without_data(Block(), x, options=options)
    assert ranges(result)["x"] == (-1.0, 2.0)
    assert "x is taken as normalized: mean 0.5, variance 0.0625" in sentence(result)


def sentence(result: QuantizedModel) -> str:
    return next(s.verdict.sentence() for s in result.plan.steps if s.stage == "activation_range")


def test_the_verdict_says_what_tells_the_ranges(without_data: Any, x: Tensor) -> None:
    assert sentence(without_data(Block(), x)) == (
        "3 batch norms tell ranges (graph.batch_norms); "
        "the finest float32 scale that covers the range that batch norms tell (formats.a.scale.kind); "
        "x is taken as normalized: mean 0, variance 1 "
        "(--set batch_norm_ranges.input_std=..., input_mean=...) (batch_norm_ranges.input_std)"
    )


def test_the_first_layers_agree_with_data_that_is_as_assumed(without_data: Any) -> None:
    """White noise through a network whose batch norms keep its statistics: the ranges cover what comes out."""
    torch.manual_seed(0)
    model = Block()
    data = torch.randn(512, 3, 8, 8)
    model.train()
    for norm in (model.bn1, model.bn2, model.bn3):
        norm.momentum = None
    with torch.no_grad():
        model(data)
    model.eval()
    result = without_data(model, data[:2])
    with torch.no_grad():
        expected = model(data)
        error = (result(data) - expected).abs().max()
    assert error <= 0.05 * (expected.max() - expected.min())
    result.set_enabled(False)
    assert torch.allclose(result(data), expected, atol=1e-4)


class Widened(nn.Module):
    """A convolution with batch norm, a function, and another convolution."""

    def __init__(self, function: Callable[[Tensor], Tensor], **norm: Any) -> None:
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, **norm), nn.Conv2d(4, 2, 1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.function(self.bn(self.conv(x))))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()), "there is no batch norm with running statistics"),
        (
            Widened(F.relu, track_running_stats=False),
            "there is no batch norm with running statistics (graph.batch_norms)",
        ),
        (
            Widened(lambda x: torch.cumsum(x, 2)),
            "1 batch norm tells ranges (graph.batch_norms); "
            "2 of 4 activation ranges can be told from batch norms, and without data nothing tells the others",
        ),
        (Widened(torch.sigmoid), "behind Sigmoid (sigmoid) nothing is known of the channels without data"),
        (Widened(lambda x: torch.cumsum(x, 2)), "behind aten.cumsum.default (cumsum) nothing is known of the channels"),
    ],
    ids=["no-batch-norm", "no-statistics", "unknown-operator", "function", "name-of-the-unknown"],
)
def test_without_the_facts_it_is_refused(without_data: Any, x: Tensor, model: nn.Module, words: str) -> None:
    with pytest.raises(PlanError) as caught:
        without_data(model, x)
    message = str(caught.value)
    assert words in message.partition("batch_norm_ranges: ")[2].partition("; min_max: ")[0]
    assert message.endswith("Pass calibration= (--calibration DATA).")


def test_the_same_network_with_the_facts_is_taken(without_data: Any, x: Tensor) -> None:
    assert list(ranges(without_data(Widened(F.relu), x))) == ["x", "conv", "last"]


def test_with_data_it_takes_what_it_can_and_leaves_the_rest(without_data: Any, x: Tensor) -> None:
    result = without_data(Widened(torch.sigmoid), x, calibration=x)
    steps = {s.algorithm: s for s in result.plan.steps if s.stage == "activation_range"}
    assert steps["batch_norm_ranges"].sites == ("x", "conv")
    assert steps["mse"].sites == ("sigmoid", "last")
    left_out = {site.name: site.verdict.sentence() for site in steps["batch_norm_ranges"].left_out}
    behind = "behind Sigmoid (sigmoid) nothing is known of the channels without data (graph.sigmoid.kind)"
    assert left_out == {"sigmoid": behind, "last": behind}


def test_data_comes_first_unless_it_is_preferred(without_data: Any, x: Tensor) -> None:
    result = without_data(Widened(F.relu), x, calibration=x, prefer=["mse", "batch_norm_ranges"])
    refusal = next(r for r in result.plan.refused if r.algorithm == "batch_norm_ranges")
    assert refusal.verdict.sentence() == "its sites went to mse, which comes first (pipeline order)"


def test_a_pooling_on_the_scale_of_its_input_shares_its_range(without_data: Any, x: Tensor) -> None:
    result = without_data(Widened(lambda y: F.max_pool2d(F.relu(y), 2)), x)
    assert list(ranges(result)) == ["x", "conv", "last"]
    assert ranges(result)["conv"] == (0.0, 6.0)


@pytest.mark.parametrize("gamma", [0.0, 1e-30])
def test_dead_channels_have_the_range_of_their_mean(without_data: Any, x: Tensor, gamma: float) -> None:
    model = Widened(F.relu)
    model.bn.weight.data.fill_(gamma)
    model.bn.bias.data.copy_(torch.tensor([-1.0, 0.0, 2.0, 1.0]))
    result = without_data(model, x)
    assert ranges(result)["conv"] == (0.0, 2.0)
    assert torch.isfinite(result(x)).all()


def test_a_network_of_dead_channels_still_has_scales(without_data: Any, x: Tensor) -> None:
    model = Widened(F.relu)
    model.bn.weight.data.zero_()
    result = without_data(model, x)
    assert ranges(result)["conv"] == (0.0, 0.0)
    assert torch.isfinite(result(x)).all()


def test_a_batch_norm_on_the_host_tells_its_own_output(without_data: Any, x: Tensor) -> None:
    class Before(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.bn(x))  # type: ignore[no-any-return]

    model = Before()
    model.bn.weight.data.fill_(0.5)
    assert ranges(without_data(model, x))["bn"] == (-3.0, 3.0)


def test_a_range_that_the_target_states_cuts(without_data: Any, x: Tensor) -> None:
    row = 'operators.Conv = { kernels = ["mac"], fused = ["Relu", "Clip"]'
    target = TARGET.replace(row, f"{row}, range = {{ min = -2.0, max = 1.5 }}")
    assert ranges(without_data(Widened(F.relu), x, target=target))["conv"] == (0.0, 1.5)


def test_the_depthwise_example_runs_without_data(without_data: Any) -> None:
    with pytest.raises(PlanError, match="Pass calibration="):  # its stem and batch norm are fine without the preference
        without_data(*example("depthwise_separable"), prefer=[])
    model, inputs = example("depthwise_separable")
    result = without_data(model, inputs)
    error = (result(inputs) - model(inputs)).abs().max()  # type: ignore[arg-type]
    assert error <= 0.1 * model(inputs).abs().max()  # type: ignore[arg-type]
    assert result.provenance.get("calibration_samples") is None


def test_a_plan_that_was_edited_beyond_what_can_be_told_is_refused(plugins: Registry, x: Tensor) -> None:
    graph = qhw.capture(Widened(torch.sigmoid).eval(), x)
    plan = qhw.plan(graph, parse_target(TARGET), calibration=x, registry=plugins, **WISHES)
    steps = tuple(
        s.model_copy(update={"sites": ("sigmoid",)}) if s.algorithm == "batch_norm_ranges" else s for s in plan.steps
    )
    edited = plan.model_copy(update={"steps": steps})
    with pytest.raises(PlanError, match=r"^sigmoid: behind Sigmoid \(sigmoid\) .* Plan again, or give"):
        qhw.quantize(graph, edited, calibration=x, registry=plugins)


@pytest.mark.parametrize("name", ["conv.weight", "bn.weight", "bn.running_var", "last.bias"])
def test_broken_parameters_are_named_where_data_is_given(without_data: Any, x: Tensor, name: str) -> None:
    model = Widened(F.relu)
    model.state_dict()[name][0] = torch.nan
    with pytest.raises(RangeError, match=rf"^{name}: holds NaN or infinite values"):
        without_data(model, x, calibration=x)
