# SPDX-License-Identifier: Apache-2.0
"""Plans that come back from a file: obeyed where the edit is legal, refused with the field where it is not."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan, Resources, StepReport
from qhw.engine import Calibration, QuantizedModel, run, select
from qhw.engine.replay import check_plan
from qhw.errors import PlanError, PluginError
from qhw.extension import Algorithm, AlgorithmOptions, Registry
from qhw.graph import Graph
from qhw.numerics import PerTensor
from qhw.schema import TargetSpec


@pytest.fixture(scope="module")
def plan(graph: Graph, target: TargetSpec, registry: Registry) -> QuantPlan:
    return select(graph, target, registry, Resources(calibration=True))


Replay = Callable[[Callable[[Any], Any]], QuantizedModel]


@pytest.fixture
def replay(graph: Graph, target: TargetSpec, registry: Registry, plan: QuantPlan, images: Tensor) -> Replay:
    """Edits the plan's JSON, reads it and runs it."""

    def make(edit: Callable[[Any], Any]) -> QuantizedModel:
        data = json.loads(plan.to_json())
        edit(data)
        read = QuantPlan.from_json(json.dumps(data), where="mine.json")
        return run(graph, target, read, registry, Calibration(images[:32], graph))

    return make


def test_a_plan_knows_the_target_of_a_file(
    graph: Graph, target: TargetSpec, registry: Registry, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = qhw.plan(graph, target, calibration=images, registry=registry)
    for plan in (made, QuantPlan.from_json(made.to_json())):
        assert qhw.quantize(graph, plan, calibration=images[:32], registry=registry).target == target
    monkeypatch.setattr(qhw.api, "_planned", {})  # as another process starts
    message = (
        r"^plan: was made for 'acme/tiny', which no installed plugin brings\. Pass its file: target=PATH in Python"
    )
    with pytest.raises(PlanError, match=message):
        qhw.quantize(graph, made, calibration=images[:32], registry=registry)
    assert qhw.quantize(graph, made, calibration=images[:32], target=target, registry=registry).target == target


@pytest.mark.parametrize("change", [{"dtype": "float31"}, {"dtype": ""}, {"shape": [2, -3, 8, 8]}], ids=str)
def test_edited_inputs_are_refused_before_the_model_is_captured(
    plan: QuantPlan, target: TargetSpec, registry: Registry, net: nn.Module, images: Tensor, change: dict[str, Any]
) -> None:
    data = json.loads(plan.to_json())
    data["inputs"][0].update(change)
    edited = QuantPlan.from_json(json.dumps(data))
    with pytest.raises(PlanError, match=r"^plan: inputs\.x: must have a dtype of torch and sizes of 0 or more; got '"):
        qhw.quantize(net, edited, target=target, calibration=images[:32], registry=registry)


def named(items: Any, name: str) -> Any:
    return next(item for item in items if item["name"] == name)


def test_json_gives_the_same_plan_and_the_same_bytes(plan: QuantPlan) -> None:
    again = QuantPlan.from_json(plan.to_json())
    assert again == plan
    assert again.to_json() == plan.to_json()


def test_a_plan_that_nobody_edited_is_applied_as_it_is(
    plan: QuantPlan, graph: Graph, target: TargetSpec, registry: Registry
) -> None:
    assert check_plan(plan, graph, target, registry) is plan


def test_an_edited_weight_format_is_obeyed_and_recorded(replay: Replay) -> None:
    result = replay(lambda data: named(data["points"], "fc.weight").update(format="w4"))
    qparams = result.encodings()["fc.weight"]
    assert (qparams.quant_min, qparams.quant_max, qparams.granularity) == (-7, 7, PerTensor())
    assert result.plan.point("fc.weight").format == "w4"
    assert result.plan.overrides.formats == {"fc.weight": "w4"}
    assert result.encodings()["conv2.weight"].quant_max == 127


def test_what_follows_from_an_edited_format_is_derived_anew(replay: Replay) -> None:
    """16-bit results need the wide kernel, which takes 16-bit inputs and has another bias."""
    result = replay(lambda data: named(data["points"], "fc").update(format="a16"))
    assert [result.plan.point(name).format for name in ("sin", "fc", "fc.bias")] == ["a16", "a16", "wide"]
    assert result.plan.point("conv2").format == "a8"
    kernels = {operator.name: operator.kernel for operator in result.plan.operators}
    assert (kernels["conv2"], kernels["fc"]) == ("mac", "mac16")


def test_the_plan_of_an_edited_result_can_be_replayed(
    replay: Replay, graph: Graph, target: TargetSpec, registry: Registry
) -> None:
    result = replay(lambda data: named(data["points"], "fc").update(format="a16"))
    assert check_plan(QuantPlan.from_json(result.plan.to_json()), graph, target, registry) == result.plan


def drop(name: str) -> Callable[[Any], None]:
    return lambda data: data["points"].remove(named(data["points"], name))


def point(name: str, **fields: Any) -> Callable[[Any], None]:
    return lambda data: named(data["points"], name).update(fields)


def step(index: int, **fields: Any) -> Callable[[Any], None]:
    return lambda data: data["steps"][index].update(fields)


def rename(data: Any) -> None:
    named(data["points"], "fc")["name"] = "fcc"
    data["points"].append({**named(data["points"], "fcc"), "name": "fc"})


EDITS = {
    "format-unknown": (
        point("fc", format="a9"),
        r"points\.fc\.format: must be one of a8, a16 on 'acme/tiny'; got 'a9'",
    ),
    "format-of-a-weight-for-an-activation": (point("fc", format="w8"), r"points\.fc\.format: must be one of a8, a16"),
    "format-of-a-bias": (point("fc.bias", format="wide"), r"points\.fc\.bias\.format: follows from the kernel\. Edit"),
    "point-removed": (drop("conv2.weight"), r"points: 'conv2\.weight' is missing\. Keep every point; plan again with"),
    "point-unknown": (rename, r"points: the model has no point 'fcc' on this target\. Closest: fc\. Take it out"),
    "point-twice": (
        lambda data: data["points"].append(named(data["points"], "fc")),
        r"points: a name stands twice\. Keep every point",
    ),
    "group-edited": (
        point("fc", group="conv2"),
        r"points\.fc\.group: must be 'fc', as model and target say; got 'conv2'",
    ),
    "range-edited": (point("fc", minimum=-1.0), r"points\.fc\.minimum: must be None, .* Only 'format' may be edited"),
    "kernel-edited": (
        lambda data: named(data["operators"], "fc").update(kernel="mac16"),
        r"operators\.fc: follows from model, target and formats, and may not be edited\. Edit a point's format",
    ),
    "algorithm-unknown": (step(3, algorithm="msee"), r"steps\.3\.algorithm: no algorithm 'msee'\. Closest: mse\."),
    "algorithm-of-another-stage": (
        step(3, algorithm="nearest"),
        r"steps\.3\.stage: 'nearest' belongs to stage round; got activation_range\.",
    ),
    "site-unknown": (
        step(3, sites=["cone1"]),
        r"steps\.3\.sites: no group of activation points is called 'cone1'\. Cl",
    ),
    "site-of-another-role": (step(1, sites=["fc"]), r"steps\.1\.sites: no group of weight points is called 'fc'\."),
    "option-unknown": (
        step(3, options={"bins": 4}),
        r"steps\.3\.options\.bins: Extra inputs are not permitted; options of 'mse': search\. Give one",
    ),
    "steps-out-of-order": (
        lambda data: data["steps"].reverse(),
        r"steps\.1\.stage: 'round' must come before 'activation_range'\. The order is prepare, equalize",
    ),
    "step-removed": (lambda data: data["steps"].pop(3), r"x: no step of the plan gave it a range\. Add a range step"),
    "folding-removed": (
        lambda data: data["steps"].pop(0),
        r"bn1: the plan counts on it being folded, and no step folde",
    ),
    "another-model": (
        lambda data: data.update(model_fingerprint="0" * 64),
        r"plan: was made for another model \(fingerprint 000000000000, this one has [0-9a-f]{12}\)\. Plan again for "
        r"this model; if its weights are drawn at random, seed them, as torch\.manual_seed\(0\)\.$",
    ),
    "another-target": (
        lambda data: data.update(target="acme/big"),
        r"plan: was made for 'acme/big', not for 'acme/tiny'\. Plan again\.",
    ),
    "a-changed-target": (
        lambda data: data.update(target_fingerprint="0" * 64),
        r"plan: was made for 'acme/tiny' as it stood then; 'acme/tiny' reads otherwise now\. Plan again\.",
    ),
    "wrong-version": (lambda data: data.update(plan_version=2), r"mine\.json: plan_version: Input should be 1\. Write"),
    "field-unknown": (
        lambda data: data.update(seed=1),
        r"mine\.json: seed: Extra inputs are not permitted\. Write the",
    ),
    "field-missing": (lambda data: data.pop("points"), r"mine\.json: points: Field required\. Write the plan anew"),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_is_not_legal_is_refused_with_its_field(replay: Replay, name: str) -> None:
    edit, message = EDITS[name]
    with pytest.raises(PlanError, match=message) as caught:
        replay(edit)
    assert "\n" not in str(caught.value)


def test_a_removed_step_is_refused_before_any_data_is_read(
    plan: QuantPlan, graph: Graph, target: TargetSpec, registry: Registry
) -> None:
    with pytest.raises(
        PlanError, match=r"^plan: a step needs calibration data, and none was given\. Pass calibration="
    ):
        run(graph, target, plan, registry, None)


@pytest.mark.parametrize("text", ["", "{", '{"plan_version": 1', "[]", "null", "[" * 5000], ids=range(6))
def test_text_that_is_no_plan(text: str) -> None:
    with pytest.raises(PlanError, match=r"^p\.json: [^\n]*\. Write the plan anew with 'qhw plan --out'\.$"):
        QuantPlan.from_json(text, where="p.json")


def test_truncated_json_is_refused_wherever_it_ends(plan: QuantPlan) -> None:
    text = plan.to_json().rstrip()
    for end in range(0, len(text), 997):
        with pytest.raises(PlanError, match=r"^plan: text: Invalid JSON"):
            QuantPlan.from_json(text[:end])


class CoarseOptions(AlgorithmOptions):
    """One option with a bound."""

    factor: int = Field(1, description="For tests.")


def coarse(answer: Any) -> type[Algorithm]:
    def apply(self: Any, work: Any, step: Any, context: Any) -> StepReport:
        return answer(self, step)  # type: ignore[no-any-return]

    def survey(self: Any, graph: Any, points: Any, target: Any, resources: Any) -> Any:
        raise AssertionError("a replay asks nobody")

    body = {"name": "coarse", "stage": "round", "summary": "s", "Options": CoarseOptions}
    return type("Coarse", (Algorithm,), body | {"apply": apply, "survey": survey})


def replayed(
    edit: dict[str, Any], answer: Any, plan: QuantPlan, graph: Graph, target: TargetSpec, registry: Registry, data: Any
) -> QuantizedModel:
    fields = json.loads(plan.to_json())
    fields["steps"][2] |= {"algorithm": "coarse", **edit}
    return run(graph, target, QuantPlan.from_json(json.dumps(fields)), registry, Calibration(data, graph))


def broken(self: Any, step: Any) -> Any:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            broken,
            r"plugin 'stranger' .*: plugin author: algorithm 'coarse': apply raised KeyError: 'lost'\. Repair it;",
        ),
        (lambda self, step: None, r"plugin author: algorithm 'coarse': apply must return StepReport; got NoneType\."),
    ],
    ids=["raises", "returns-nothing"],
)
def test_an_algorithm_that_fails_in_apply_is_named(
    answer: Any,
    message: str,
    plan: QuantPlan,
    graph: Graph,
    target: TargetSpec,
    load: Callable[..., Registry],
    plugin: Callable[..., Any],
    images: Tensor,
) -> None:
    registry = load(("stranger", plugin((coarse(answer),))))
    with pytest.raises(PluginError, match=message):
        replayed({}, answer, plan, graph, target, registry, images[:32])


def test_options_of_a_plan_reach_the_algorithm_and_are_checked(
    plan: QuantPlan,
    graph: Graph,
    target: TargetSpec,
    load: Callable[..., Registry],
    plugin: Callable[..., Any],
    images: Tensor,
) -> None:
    seen: list[int] = []

    def answer(self: Any, step: Any) -> StepReport:
        seen.append(self.options.factor)
        return StepReport(stage="round", algorithm="coarse", summary="s")

    registry = load(("stranger", plugin((coarse(answer),))))
    replayed({"options": {"factor": 3}}, answer, plan, graph, target, registry, images[:32])
    assert seen == [3]
    message = r"^plan: steps\.2\.options\.factor: Input should be a valid integer; options of 'coarse': factor\. Give"
    with pytest.raises(PlanError, match=message):
        replayed({"options": {"factor": "3"}}, answer, plan, graph, target, registry, images[:32])


def test_a_plan_refuses_another_model_of_the_same_shape(
    plan: QuantPlan, graph: Graph, target: TargetSpec, registry: Registry, images: Tensor
) -> None:
    other = graph.copy()
    other.set_tensor("fc.bias", torch.zeros(5))
    with pytest.raises(PlanError, match=r"^plan: was made for another model"):
        run(other, target, plan, registry, Calibration(images[:32], graph))


def test_shared_groups_follow_an_edit_of_one_member(registry: Registry, images: Tensor) -> None:
    class Join(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))  # type: ignore[no-any-return]

    text = """
    schema_version = 1
    name = "acme/join"
    formats.a8 = { bits = 8, signed = true, per = "tensor" }
    formats.b8 = { bits = 8, signed = false, per = "tensor" }
    formats.w8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
    kernels.mac = { input = ["a8", "b8"], weight = ["w8"], output = ["a8", "b8"] }
    operators.Conv = { kernels = ["mac"] }
    operators.Concat = { same_scale = "all" }
    """
    target = qhw.schema.parse_target(text)
    graph = qhw.capture(Join().eval(), images[:2])
    fields = json.loads(select(graph, target, registry, Resources(calibration=True)).to_json())
    named(fields["points"], "b")["format"] = "b8"
    result = run(graph, target, QuantPlan.from_json(json.dumps(fields)), registry, Calibration(images[:32], graph))
    assert [result.plan.point(name).format for name in ("a", "b", "concat", "c")] == ["b8", "b8", "b8", "a8"]
