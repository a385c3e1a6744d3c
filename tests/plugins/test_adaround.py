# SPDX-License-Identifier: Apache-2.0
"""AdaRound: its formulas against autograd and by hand, its result against every possible rounding of a small layer."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.decisions import Resources
from qhw.errors import PlanError
from qhw.extension import Registry, load_plugins
from qhw.numerics import PerAxis, PerGroup, QParams
from qhw.schema import TargetSpec, parse_target
from qhw_plugins import adaround, batch_norm_folding, min_max, mse, nearest
from qhw_plugins.adaround import AdaRound, AdaRoundOptions, annealed, gradient_of, learn_rounding, start_of
from qhw_plugins.layer_rows import LayerRows, RowGrid
from tests import pipelines

INF = math.inf
TARGET = """
schema_version = 1
name = "acme/four"
formats.a8 = { bits = 8, signed = false, per = "tensor" }
formats.w4 = { codes = [-7, 7], zero_point = 0, per = "out_channel" }
formats.w4t = { bits = 4, signed = true, zero_point = 0, per = "tensor" }
formats.w4p = { bits = 4, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
formats.w4a = { bits = 4, signed = false, per = "out_channel" }
formats.w4g = { bits = 4, signed = true, zero_point = 0, per = "group", group_size = 4 }
formats.w8 = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
kernels.mac = { input = ["a8"], weight = ["w4", "w4t", "w4p", "w4a", "w4g", "w8"], output = ["a8"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""


@pytest.fixture(scope="module")
def registry() -> Registry:
    modules = (adaround, batch_norm_folding, min_max, mse, nearest, pipelines)
    return load_plugins(entry_points=(), extra=[(m.__name__.rpartition(".")[2], m) for m in modules])


@pytest.fixture(scope="module")
def target() -> TargetSpec:
    return parse_target(TARGET)


class Form:
    """A linear operator's rows are its weight."""

    def weight_rows(self, weight: Tensor) -> Tensor:
        return weight.unsqueeze(0)


def problem(clip: tuple[float, float] = (-INF, INF), outputs: int = 3) -> tuple[LayerRows, RowGrid, Tensor]:
    inputs = 6
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=generator)
    x = torch.randn(1, 400, inputs, generator=generator)
    x = x @ (torch.eye(inputs) + 0.4 * torch.randn(inputs, inputs, generator=generator))
    qparams = QParams(torch.full((outputs,), 0.4), torch.zeros(outputs, dtype=torch.int32), -7, 7, PerAxis(0))
    bias = torch.randn(1, 1, outputs, generator=generator)
    wanted = (x @ weight.t() + bias).clamp(*clip)
    return LayerRows(x, wanted, clip), RowGrid(weight, qparams, Form()), bias


def loss_by_autograd(v: Tensor, rows: LayerRows, grid: RowGrid, bias: Tensor, strength: float, beta: float) -> Tensor:
    """Eqs. 33 to 35 as they stand in the paper."""
    h = torch.clip(torch.sigmoid(v) * 1.2 - 0.1, 0, 1)
    weight = grid.scale * torch.clip(grid.floor + h, grid.low, grid.high)
    error = torch.clip(rows.inputs @ weight.transpose(1, 2) + bias, *rows.clip) - rows.outputs
    return error.square().sum(2).mean() + strength * (1 - (2 * h - 1).abs() ** beta).sum()


@pytest.mark.parametrize("clip", [(-INF, INF), (0.0, INF), (0.0, 2.0)], ids=["nothing", "relu", "relu6-like"])
@pytest.mark.parametrize(("strength", "beta"), [(0.0, 20.0), (0.01, 20.0), (0.5, 2.0)])
def test_the_gradient_is_that_of_the_equations(clip: tuple[float, float], strength: float, beta: float) -> None:
    rows, grid, bias = problem(clip)
    v = (torch.randn(grid.floor.shape, generator=torch.Generator().manual_seed(1)) * 2).requires_grad_()
    loss_by_autograd(v, rows, grid, bias, strength, beta).backward()
    found = gradient_of(v.detach(), rows, grid, bias, strength, beta)
    # Both sum 400 rows of float32 products, in another order.
    torch.testing.assert_close(found, v.grad, rtol=1e-4, atol=1e-4)


def test_the_start_is_the_weight_itself_and_rounds_to_nearest() -> None:
    rest = torch.tensor([0.01, 0.3, 0.49, 0.51, 0.9])
    v = start_of(rest)
    torch.testing.assert_close(torch.clip(torch.sigmoid(v) * 1.2 - 0.1, 0, 1), rest)
    assert ((v >= 0) == (rest >= 0.5)).all()


def test_beta_falls_from_20_to_2_by_cosine() -> None:
    assert (annealed(0.0), annealed(0.5), annealed(1.0)) == (20.0, 11.0, 2.0)


def test_no_step_is_nearest_rounding() -> None:
    rows, grid, bias = problem()
    up, steps = learn_rounding(rows, grid, bias, AdaRoundOptions(iterations=0))
    assert steps == 0
    assert torch.equal(grid.floor + up, grid.nearest)


@pytest.mark.slow
@pytest.mark.parametrize("clip", [(-INF, INF), (0.0, INF)], ids=["nothing", "relu"])
def test_it_comes_closer_to_the_best_of_all_roundings(clip: tuple[float, float]) -> None:
    rows, grid, bias = problem(clip, outputs=40)
    x, wanted = rows.inputs[0].double().numpy(), rows.outputs[0].double().numpy()
    up, _ = learn_rounding(rows, grid, bias, AdaRoundOptions(batch_rows=400))
    found = plain = best = 0.0
    for output in range(40):

        def error(choice: Any, output: int = output) -> float:
            code = np.clip(grid.floor[0, output].numpy() + np.array(choice), -7, 7)
            y = np.clip(x @ (0.4 * code) + float(bias[0, 0, output]), *clip)
            return float(((y - wanted[:, output]) ** 2).mean())

        best += min(error(choice) for choice in itertools.product((0, 1), repeat=6))
        found += error(up[0, output].numpy())
        plain += error((grid.nearest - grid.floor)[0, output].numpy())
    # A relaxation of a choice among 64 may miss the best, but over 40 outputs it makes up for half of what is lost.
    assert best <= found <= best + 0.5 * (plain - best)


def small(kind: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net: nn.Module
    if kind == "conv":
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.ReLU6())
    elif kind == "depthwise":
        net = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=6, padding=1), nn.ReLU6())
    elif kind == "grouped":
        net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 6, 3, groups=2, dilation=2, padding=2))
    elif kind == "transposed":
        net = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    else:
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 16), nn.ReLU(), nn.Linear(16, 5))
    return net.eval(), torch.randn(96, 3, 8, 8)


def errors(net: nn.Module, x: Tensor, *results: nn.Module) -> list[float]:
    with torch.no_grad():
        return [float((r(x) - net(x)).square().mean()) for r in results]


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("conv", "w4"),
        ("conv", "w4p"),
        ("depthwise", "w4t"),
        ("grouped", "w4a"),
        ("transposed", "w4t"),
        ("linear", "w4"),
        ("linear", "w4a"),
    ],
)
def test_outputs_move_towards_the_float_model(registry: Registry, target: TargetSpec, kind: str, wanted: str) -> None:
    net, x = small(kind)
    asked = {"example_inputs": x[:2], "calibration": x, "formats": {"*.weight": wanted}, "registry": registry}
    few = {"adaround": {"iterations": 300, "rows": 2048, "batch_rows": 256}}
    plain = qhw.quantize(net, target, **asked)
    learned = qhw.quantize(net, target, prefer=("adaround",), options=few, **asked)
    for result in (plain, learned):
        result.set_enabled(False, [p.group for p in result.plan.points if p.role not in ("weight", "bias")])
    before, after = errors(net, x, plain, learned)
    assert after <= before
    report = next(step for step in learned.steps if step.algorithm == "adaround")
    assert any(site["loss"] < site["loss_nearest"] for site in report.sites.values())  # type: ignore[operator]
    for point in learned.plan.points:
        if point.role == "weight":
            weight, qparams = learned.float_graph.tensor(point.tensor).detach(), learned.encodings()[point.group]
            on_grid = qhw.numerics.fake_quantize(weight, qparams)
            torch.testing.assert_close(on_grid, weight, rtol=1e-6, atol=0)


def test_groups_of_inputs_are_rounded_on_their_own_scales(registry: Registry, target: TargetSpec) -> None:
    net, x = small("linear")
    asked = {"example_inputs": x[:2], "calibration": x, "formats": {"3.weight": "w4g"}, "registry": registry}
    result = qhw.quantize(net, target, prefer=("adaround",), options={"adaround": {"iterations": 100}}, **asked)
    assert result.encodings()["3.weight"].granularity == PerGroup(axis=1, group_size=4)
    report = next(step for step in result.steps if step.algorithm == "adaround")
    assert report.sites["3.weight"]["loss"] <= report.sites["3.weight"]["loss_nearest"]


def test_one_sample_cannot_be_held_back_and_the_report_says_so(registry: Registry, target: TargetSpec) -> None:
    net, x = small("conv")
    few = {"adaround": {"iterations": 10}}
    for count, words in ((1, "output error as learned"), (2, "held-back output error")):
        asked = {"example_inputs": x[:2], "calibration": x[:count], "prefer": ("adaround",), "registry": registry}
        result = qhw.quantize(net, target, options=few, **asked)
        assert words in next(step.summary for step in result.steps if step.algorithm == "adaround")


def test_held_back_samples_decide_and_no_output_gets_worse(registry: Registry, target: TargetSpec) -> None:
    net, x = small("conv")
    asked = {"example_inputs": x[:2], "calibration": x, "prefer": ("adaround",), "registry": registry}
    # A step far too long: most of what it learns is worse than nearest, and is not kept.
    wild = {"adaround": {"iterations": 60, "learning_rate": 1.0, "regularization": 100.0}}
    result = qhw.quantize(net, target, options=wild, **asked)
    report = next(step for step in result.steps if step.algorithm == "adaround")
    assert sum(site["outputs_kept_nearest"] for site in report.sites.values()) > 0  # type: ignore[misc]
    assert all(site["loss"] <= site["loss_nearest"] for site in report.sites.values())  # type: ignore[operator]


def test_equal_seeds_give_equal_bytes_for_any_loader(registry: Registry, target: TargetSpec) -> None:
    net, x = small("conv")
    few = {"adaround": {"iterations": 60}}

    def weights(data: Any, seed: int = 0) -> Tensor:
        asked = {"example_inputs": x[:2], "calibration": data, "prefer": ("adaround",), "registry": registry}
        return qhw.quantize(net, target, options=few, seed=seed, **asked).float_graph.tensor("3.weight").detach()

    assert torch.equal(weights(x), weights(x.split(7)))


@pytest.mark.parametrize(
    "data", [torch.zeros(4, 3, 8, 8), torch.ones(1, 3, 8, 8)], ids=["all-zero", "one-constant-image"]
)
def test_data_that_says_nothing_changes_nothing_for_the_worse(
    registry: Registry, target: TargetSpec, data: Tensor
) -> None:
    net, x = small("conv")
    few = {"adaround": {"iterations": 50}}
    result = qhw.quantize(
        net, target, example_inputs=x[:2], calibration=data, prefer=("adaround",), options=few, registry=registry
    )
    assert all(torch.isfinite(parameter).all() for parameter in result.parameters())


def test_a_shared_weight_is_rounded_once(registry: Registry, target: TargetSpec) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x).relu())  # type: ignore[no-any-return]

    x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    few = {"adaround": {"iterations": 50}}
    result = qhw.quantize(
        Twice().eval(),
        target,
        example_inputs=x[:2],
        calibration=x,
        prefer=("adaround",),
        options=few,
        registry=registry,
    )
    report = next(step for step in result.steps if step.algorithm == "adaround")
    assert list(report.sites) == ["conv.weight"]


def survey(target: TargetSpec, wanted: str, options: dict[str, Any], resources: Resources, registry: Registry) -> Any:
    net, x = small("conv")
    graph = qhw.capture(net, x[:2])
    from qhw.graph import place

    points = place(graph, target, formats={"*.weight": wanted})
    return AdaRound(AdaRoundOptions(**options)).survey(graph, points, target, resources)


def test_the_width_of_the_weights_decides(registry: Registry, target: TargetSpec) -> None:
    data = Resources(calibration=True)
    few, many = (survey(target, wanted, {}, data, registry) for wanted in ("w4", "w8"))
    assert few.verdict.taken and not many.verdict.taken
    assert [site.verdict.sentence() for site in few.sites][:1] == [
        "4 bits: how each weight is quantized decides (formats.w4.bits)"
    ]
    assert many.sites[0].verdict.sentence() == (
        "8 bits: more than 6, where others do (--set adaround.max_bits) (formats.w8.bits)"
    )
    assert survey(target, "w8", {"max_bits": 8}, data, registry).verdict.taken


def test_without_data_it_is_refused(registry: Registry, target: TargetSpec) -> None:
    answer = survey(target, "w4", {}, Resources(), registry)
    assert answer.verdict.sentence() == "needs calibration data (resources.calibration)"
    net, x = small("conv")
    with pytest.raises(PlanError, match=r"no algorithm fits target 'acme/four' for its activations .* Pass calib"):
        qhw.plan(net, target, x[:2], registry=registry)
