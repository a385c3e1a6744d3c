# SPDX-License-Identifier: Apache-2.0
"""ReLU6 becomes ReLU where channels need equalization across it, and what that costs is measured."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan, StepReport
from qhw.errors import CaptureError, PlanError, PluginError
from qhw.graph import place
from qhw.schema import parse_target
from qhw_plugins.relu6_replacement import Relu6Replacement

TARGET = """
schema_version = 1
name = "acme/plain"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { bits = 4, signed = true, zero_point = 0, per = "PER" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"] }
operators.Conv = { kernels = ["mac"], fused = FUSED }
operators.DepthwiseConv = { kernels = ["mac"], fused = FUSED }
operators.Gemm = { kernels = ["mac"] }
fallback = "host"
"""


def target(per: str = "tensor", fused: Sequence[str] = ("Relu", "Clip"), bits: int = 4) -> Any:
    listed = "[" + ", ".join(f'"{kind}"' for kind in fused) + "]"
    return parse_target(TARGET.replace("PER", per).replace("FUSED", listed).replace("bits = 4", f"bits = {bits}"))


def network(spread: float = 3.0, gain: float = 1.0) -> nn.Module:
    """Two blocks with ReLU6 behind a batch norm whose channels differ by 2^spread from first to last."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU6(),
        nn.Conv2d(8, 4, 1), nn.Flatten(), nn.Linear(4 * 4 * 4, 5),
    )  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.sign(torch.randn(8, 3, 3, 3)) * 0.1)
        model[1].weight.copy_(gain * torch.logspace(0, spread, 8, 2.0))
        model[1].running_var.fill_(4.0)
        model[3].weight.copy_(torch.sign(torch.randn(8, 1, 3, 3)) * 0.1)
        model[5].weight.copy_(torch.sign(torch.randn(4, 8, 1, 1)) * 0.1)
    return model.eval()


def images() -> Tensor:
    return torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def step(plan: QuantPlan) -> Any:
    return next((step for step in plan.steps if step.algorithm == "relu6_replacement"), None)


def refusal(plan: QuantPlan) -> str:
    return next(r.verdict.sentence() for r in plan.refused if r.algorithm == "relu6_replacement")


def test_the_plan_is_that_of_a_model_with_relu() -> None:
    plan = qhw.plan(qhw.capture(network(), images()[:1]), target())
    assert step(plan).sites == ("2",)
    kinds = {operator.name: operator.kind for operator in plan.operators}
    bounds = {point.name: (point.minimum, point.maximum) for point in plan.points if point.role == "activation"}
    assert (kinds["2"], bounds["0"]) == ("Relu", (0.0, None))
    assert (kinds["4"], bounds["3"]) == ("Clip", (0.0, 6.0))
    equalized = next(step for step in plan.steps if step.algorithm == "cross_layer_equalization")
    assert equalized.sites == ("0", "5")


def test_precision_is_the_mean_over_channels_of_the_bits_that_their_own_range_gets() -> None:
    # ranges 1, 2^(3/7), ... 2^3: mean log2(largest / own) is 1.5 of 4 bits; behind it, all channels are alike
    plan = qhw.plan(qhw.capture(network(), images()[:1]), target())
    reasons = {reason.subject: reason.value for reason in step(plan).verdict.reasons}
    assert reasons["graph.0.weight.precision"] == pytest.approx(2.5)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"bits": 8}, "channels get 6.5 bits of their own range on average"),
        ({"per": "out_channel"}, "weights have a scale per out channel"),
        ({"fused": ("Clip",)}, "'acme/plain' does not list Relu where it lists Clip"),
    ],
)
def test_what_makes_it_needless_is_named(changed: dict[str, Any], expected: str) -> None:
    plan = qhw.plan(qhw.capture(network(), images()[:1]), target(**changed))
    assert step(plan) is None
    assert expected in refusal(plan)


def test_a_model_without_bounds_has_nothing_to_replace() -> None:
    x = torch.randn(8, 4)
    plan = qhw.plan(qhw.capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU()), x), target(), calibration=x)
    assert "the model has no ReLU6" in refusal(plan)


def test_a_bound_that_no_scale_passes_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU6())
    plan = qhw.plan(qhw.capture(model, images()), target(), calibration=images())
    assert "0 layers hand their scale on through it" in refusal(plan)


def test_the_precision_that_is_wanted_may_be_set() -> None:
    graph = qhw.capture(network(), images()[:1])
    options = {"relu6_replacement": {"min_precision": 2.6}}
    assert step(qhw.plan(graph, target(bits=5), options={"relu6_replacement": {"min_precision": 3.6}})) is not None
    assert step(qhw.plan(graph, target(), options=options)) is not None
    with pytest.raises(PlanError, match=r"channels get 2\.5 bits.*enough with the bound in place"):
        qhw.plan(graph, target(), options={"relu6_replacement": {"min_precision": 2.4}})


def test_the_cost_is_measured_against_the_float_model_by_hand() -> None:
    model, x = network(gain=2.0), images()
    result = qhw.quantize(model, target(), example_inputs=x[:1], calibration=x)
    figures = next(report for report in result.steps if report.algorithm == "relu6_replacement").sites["2"]
    with torch.no_grad():
        before = model(x).double().numpy()
        model[2] = nn.ReLU()
        after = model(x).double().numpy()
    assert not np.array_equal(before, after)
    sqnr = 10 * np.log10((before**2).sum() / ((before - after) ** 2).sum())
    assert figures["float_sqnr_db"] == pytest.approx(sqnr, abs=1e-2)  # float32 sums in another order
    assert figures["float_agreement"] == (before.argmax(1) == after.argmax(1)).mean()
    assert figures["maximum"] == 6.0


def test_without_data_the_step_says_that_nothing_was_measured() -> None:
    result = qhw.quantize(network(), target(), example_inputs=images()[:1])
    report = next(report for report in result.steps if report.algorithm == "relu6_replacement")
    assert "not measured" in report.summary
    assert report.sites["2"] == {"maximum": 6.0}


def test_a_model_that_lives_by_its_bounds_is_an_error_with_a_way_out() -> None:
    model, x = network(gain=50.0), images()
    with pytest.raises(PlanError, match=r"must keep 10 dB without the bounds.*--without relu6_replacement"):
        qhw.quantize(model, target(), example_inputs=x[:1], calibration=x)
    kept = qhw.quantize(model, target(), example_inputs=x[:1], calibration=x, without=("relu6_replacement",))
    assert step(kept.plan) is None


def test_a_saved_plan_and_a_saved_result_keep_the_replacement(tmp_path: Any) -> None:
    model, x = network(), images()
    graph = qhw.capture(model, x[:1])
    plan = QuantPlan.from_json(qhw.plan(graph, target(), calibration=x).to_json())
    result = qhw.quantize(graph, plan, target=target(), calibration=x)
    qhw.save(result, tmp_path / "result")
    again = qhw.load(tmp_path / "result")
    assert torch.equal(again(x), result(x))
    assert next(operator for operator in graph.operators if operator.name == "2").kind == "Clip"  # the user's is whole


def test_a_plan_whose_step_was_taken_out_is_refused() -> None:
    graph = qhw.capture(network(), images()[:1])
    plan = qhw.plan(graph, target())
    edited = plan.model_copy(update={"steps": tuple(s for s in plan.steps if s.algorithm != "relu6_replacement")})
    with pytest.raises(PlanError, match="plan: points"):
        qhw.quantize(graph, edited, target=target())


@pytest.mark.parametrize(("name", "kind"), [("2", "Sigmoid"), ("0", "Relu")])
def test_only_functions_of_one_input_can_change(name: str, kind: str) -> None:
    graph = qhw.capture(network(), images()[:1])
    with pytest.raises(PlanError, match=f"{name}: .* cannot become {kind}"):
        graph.become({name: kind})
    with pytest.raises(CaptureError, match="no operator 'nowhere'"):
        graph.become({"nowhere": "Relu"})


def test_a_changed_function_runs_and_is_placed() -> None:
    model, x = network(), 10 * images()
    graph = qhw.capture(model, x[:1])
    graph.become({"2": "Relu", "4": "Relu"})
    model[2] = model[4] = nn.ReLU()
    with torch.no_grad():
        assert torch.equal(graph.module(x), model(x))
    assert [o.kind for o in graph.operators if o.name in ("2", "4")] == ["Relu", "Relu"]
    assert place(graph, target(fused=("Relu",)), absorbed=("1",)).operator("2").fused_into == "0"


def test_a_bad_option_is_named() -> None:
    graph = qhw.capture(network(), images()[:1])
    with pytest.raises((PlanError, PluginError), match="min_precision"):
        qhw.plan(graph, target(), options={"relu6_replacement": {"min_precision": -1}})


def test_a_step_that_does_not_change_what_its_plan_says_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(self: Any, work: Any, step: Any, context: Any) -> StepReport:
        return StepReport(stage=step.stage, algorithm=self.name, summary="nothing done")

    monkeypatch.setattr(Relu6Replacement, "apply", nothing)
    words = r"2: the plan counts on it being Relu, and no step changed Clip\. Put that step back, or plan again with"
    with pytest.raises(PlanError, match=words):
        others = ("cross_layer_equalization", "bias_absorption")
        qhw.quantize(network(), target(), example_inputs=images()[:1], without=others)
