# SPDX-License-Identifier: Apache-2.0
"""Selection: a pure function of its inputs, whose every refusal has a fact that flips it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor, nn

import qhw
from qhw.decisions import (
    Overrides,
    Pipeline,
    QuantPlan,
    Rank,
    Reason,
    Refusal,
    Resources,
    Site,
    StagePreference,
    StepReport,
    Survey,
    Verdict,
)
from qhw.engine import select
from qhw.errors import PlanError, PluginError
from qhw.extension import Algorithm, AlgorithmOptions, Registry
from qhw.graph import Graph
from qhw.schema import TargetSpec

DATA = Resources(calibration=True)


def algorithm(name: str, stage: str, role: str, survey: Any = None, ranks: tuple[Rank, ...] = ()) -> type[Algorithm]:
    """An algorithm that takes every point of a role, or does what `survey` says."""

    def take_all(self: Any, graph: Any, points: Any, target: Any, resources: Any) -> Survey:
        taken = Verdict(taken=True)
        groups = dict.fromkeys(point.group for point in points.points if point.role == role)
        return Survey(verdict=taken, sites=tuple(Site(name=group, verdict=taken) for group in groups))

    def apply(self: Any, work: Any, step: Any, context: Any) -> StepReport:
        return StepReport(stage=step.stage, algorithm=name, summary="nothing")

    body = {"name": name, "stage": stage, "summary": "for tests", "ranks": ranks, "apply": apply}
    return type(name, (Algorithm,), body | {"survey": survey or take_all})


def steps(plan: QuantPlan) -> list[str]:
    return [step.algorithm for step in plan.steps]


def refusal(plan: QuantPlan, name: str) -> Refusal:
    return next(refusal for refusal in plan.refused if refusal.algorithm == name)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_model_in_another_type_than_float32_is_refused_at_once(
    dtype: torch.dtype, target: TargetSpec, registry: Registry
) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval().to(dtype)
    graph = qhw.capture(model, torch.randn(2, 3, 8, 8, dtype=dtype))
    name = str(dtype).removeprefix("torch.")
    message = rf"must be float32 to be quantized; got {name}\. Convert the model with model\.float\(\), and its example"
    with pytest.raises(PlanError, match=message):
        select(graph, target, registry, DATA)


def test_equal_inputs_give_equal_plans(graph: Graph, target: TargetSpec, registry: Registry) -> None:
    assert select(graph, target, registry, DATA).to_json() == select(graph, target, registry, DATA).to_json()


def test_the_order_of_registration_does_not_matter(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry]
) -> None:
    assert select(graph, target, load(), DATA) == select(graph, target, load(order=-1), DATA)


def test_the_pipelines_first_choice_runs_and_the_second_is_refused_with_the_reason(
    graph: Graph, target: TargetSpec, registry: Registry
) -> None:
    plan = select(graph, target, registry, DATA)
    assert steps(plan) == ["batch_norm_folding", "mse_weights", "nearest", "mse"]
    assert refusal(plan, "min_max").verdict.sentence() == "its sites went to mse, which comes first (pipeline order)"


def test_a_stranger_that_ranks_before_a_shipped_algorithm_is_chosen(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    rank = (Rank(pipeline="ranges-ptq", before="mse"),)
    tight = algorithm("tight", "activation_range", "activation", ranks=rank)
    plan = select(graph, target, load(("stranger", plugin((tight,)))), DATA)
    assert steps(plan) == ["batch_norm_folding", "mse_weights", "nearest", "tight", "mse"]
    assert plan.steps[3].sites == ("conv1", "conv2", "fc")
    assert plan.steps[4].sites == ("x", "sin")  # what the stranger left: inputs


def test_strangers_that_rank_before_each_other_find_their_places(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    def ranked(name: str, before: str | None) -> type[Algorithm]:
        return algorithm(name, "round", "weight", ranks=(Rank(pipeline="ranges-ptq", before=before),))

    # a_one stands before z_two, which stands before nearest, though its name comes later.
    strangers = plugin((ranked("a_one", "z_two"), ranked("z_two", "nearest"), ranked("b_last", None)))
    plan = select(graph, target, load(("stranger", strangers)), DATA)
    assert [step.algorithm for step in plan.steps if step.stage == "round"] == ["a_one"]
    assert [r.algorithm for r in plan.refused if r.stage == "round"] == ["z_two", "nearest", "b_last"]


def test_an_algorithm_outside_the_pipeline_is_refused_with_the_option_that_takes_it_in(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    registry = load(("stranger", plugin((algorithm("other", "round", "weight"),))))
    plan = select(graph, target, registry, DATA)
    sentence = "not part of this pipeline; --prefer other takes it in (pipeline ranges-ptq)"
    assert refusal(plan, "other").verdict.sentence() == sentence
    plan = select(graph, target, registry, DATA, Overrides(prefer=("other", "other")))
    assert [step.algorithm for step in plan.steps if step.stage == "round"] == ["other"]


def test_prefer_and_without_are_obeyed(graph: Graph, target: TargetSpec, registry: Registry) -> None:
    assert steps(select(graph, target, registry, DATA, Overrides(prefer=("min_max",))))[-1] == "min_max"
    plan = select(graph, target, registry, DATA, Overrides(without=("mse", "mse_weights")))
    assert steps(plan) == ["batch_norm_folding", "min_max_weights", "nearest", "min_max"]
    assert refusal(plan, "mse").verdict.sentence() == "left out by request (--without)"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (Overrides(prefer=("mze",)), r"^--prefer: no algorithm 'mze'\. Closest: mse\."),
        (Overrides(without=("neerest",)), r"^--without: no algorithm 'neerest'\. Closest: nearest\."),
        (Overrides(pipeline="range-ptq"), r"^--pipeline: no pipeline 'range-ptq'\. Closest: ranges-ptq\."),
        (Overrides(prefer=("mse",), without=("mse",)), r"^plan: 'mse' is both preferred and left out\. Drop one of"),
        (Overrides(keep_float=("conv9",)), r"^--keep-float: no operator matches 'conv9'\. Closest: conv"),
        (Overrides(formats={"fc": "a9"}), r"^--format fc=a9: 'acme/tiny' has no format 'a9'\."),
    ],
    ids=["prefer-unknown", "without-unknown", "pipeline-unknown", "both", "keep-float-unknown", "format-unknown"],
)
def test_wishes_that_cannot_be_met(
    graph: Graph, target: TargetSpec, registry: Registry, overrides: Overrides, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        select(graph, target, registry, DATA, overrides)


@pytest.mark.parametrize(
    ("stage", "name", "message"),
    [
        ("round", "nereast", r"^pipeline 'mine': stage round: no algorithm 'nereast'\. Closest: nearest\."),
        ("round", "mse", r"^pipeline 'mine': stage round: 'mse' belongs to stage activation_range\. Choose another"),
    ],
    ids=["unregistered", "wrong-stage"],
)
def test_a_pipeline_with_a_wrong_name_is_refused(
    graph: Graph,
    target: TargetSpec,
    load: Callable[..., Registry],
    plugin: Callable[..., Any],
    stage: Any,
    name: str,
    message: str,
) -> None:
    mine = Pipeline(name="mine", summary="m", stages=(StagePreference(stage=stage, algorithms=(name,)),))
    with pytest.raises(PlanError, match=message):
        select(graph, target, load(("stranger", plugin((), (mine,)))), DATA, Overrides(pipeline="mine"))


def test_without_data_the_error_says_what_was_tried_and_the_way_out(
    graph: Graph, target: TargetSpec, registry: Registry
) -> None:
    message = (
        r"^x: no algorithm fits target 'acme/tiny' for its activations \(8-bit, per tensor\)\. mse: needs calibration "
        r"data \(resources\.calibration\); min_max: needs calibration data \(resources\.calibration\)\. "
        r"Pass calibration= \(--calibration DATA\)\.$"
    )
    with pytest.raises(PlanError, match=message):
        select(graph, target, registry, Resources())


def test_without_any_weight_range_the_error_names_the_weight(
    graph: Graph, target: TargetSpec, registry: Registry
) -> None:
    message = (
        r"^conv1\.weight: no algorithm fits target 'acme/tiny' for its weights \(8-bit, per out_channel\)\. "
        r"mse_weights: left out by request \(--without\); min_max_weights: .* Choose another pipeline, or install"
    )
    with pytest.raises(PlanError, match=message):
        select(graph, target, registry, DATA, Overrides(without=("mse_weights", "min_max_weights")))


def test_an_algorithm_that_raises_in_survey_is_named(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    def survey(self: Any, graph: Any, points: Any, target: Any, resources: Any) -> Survey:
        raise ZeroDivisionError("division\nby zero")

    registry = load(("stranger", plugin((algorithm("broken", "round", "weight", survey),))))
    message = (
        r"^plugin 'stranger' \(given by the caller\): plugin author: algorithm 'broken': survey raised "
        r"ZeroDivisionError: division by zero\. Repair it; .* QHW_BLOCK=stranger$"
    )
    with pytest.raises(PluginError, match=message):
        select(graph, target, registry, DATA, Overrides(prefer=("broken",)))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"algorithm 'broken': survey must return Survey; got NoneType\."),
        (
            Survey(
                verdict=Verdict(taken=True),
                sites=(Site(name="conv1", verdict=Verdict(taken=True), absorbs=("nowhere",)),),
            ),
            r"algorithm 'broken': survey changes 'nowhere', which is no operator of the graph\.",
        ),
        (
            Survey(verdict=Verdict(taken=True), sites=(Site(name="cone1", verdict=Verdict(taken=True)),)),
            r"algorithm 'broken': survey names a site of its own: no group of points or operator is called 'cone1'\. "
            r"Closest: conv1\.",
        ),
    ],
    ids=["no-survey", "absorbs-nothing", "site-of-no-name"],
)
def test_an_algorithm_that_answers_nonsense_is_named(
    graph: Graph,
    target: TargetSpec,
    load: Callable[..., Registry],
    plugin: Callable[..., Any],
    answer: Any,
    message: str,
) -> None:
    broken = algorithm("broken", "prepare", "weight", lambda self, graph, points, target, resources: answer)
    with pytest.raises(PluginError, match=message):
        select(graph, target, load(("s", plugin((broken,)))), DATA, Overrides(prefer=("broken",)))


def test_an_algorithm_of_weights_that_names_operators_is_told_what_they_are_called(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    answer = Survey(verdict=Verdict(taken=True), sites=(Site(name="conv1", verdict=Verdict(taken=True)),))
    broken = algorithm("broken", "round", "weight", lambda self, graph, points, target, resources: answer)
    with pytest.raises(PluginError, match=r"no group of weight points is called 'conv1'\. Closest: conv1\.weight\."):
        select(graph, target, load(("s", plugin((broken,)))), DATA, Overrides(prefer=("broken",)))


def test_a_target_that_refuses_host_operators_takes_a_model_whose_batch_norms_fold(
    target_with: Callable[..., TargetSpec], registry: Registry, images: Tensor
) -> None:
    """The batch norm alone could not run there; the plan counts what is left after folding."""
    target = target_with(('fallback = "host"', 'fallback = "refuse"'))
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval(), images[:2])
    assert steps(select(graph, target, registry, DATA))[0] == "batch_norm_folding"
    with pytest.raises(PlanError, match=r"runs whole models only .* cannot run 1 \(BatchNormalization"):
        select(graph, target, registry, DATA, Overrides(without=("batch_norm_folding",)))


class Twice(nn.Module):
    """A convolution whose result has two readers, or whose weight, bias or norm is shared."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.other = nn.Conv2d(3, 3, 1)
        self.norm = nn.BatchNorm2d(3, track_running_stats=shared != "statistics")
        self.shared = shared
        if shared in ("weight", "bias"):
            setattr(self.other, shared, getattr(self.conv, shared))

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        if self.shared == "module":
            return self.norm(self.other(self.norm(y)))  # type: ignore[no-any-return]
        z = self.norm(y)
        return z + y if self.shared == "reader" else self.other(z)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        ("nothing", "1 of 1 batch norms follow an operator with weights (graph.batch_norms)"),
        ("reader", "2 operators or outputs read what it normalizes (graph.norm.readers)"),
        ("weight", "conv.weight is shared with another operator (graph.norm.weight)"),
        ("bias", "conv.bias is shared with another operator (graph.norm.bias)"),
        ("module", "norm is called more than once (graph.norm.module)"),
    ],
)
def test_one_fact_about_a_batch_norm_decides_whether_it_is_folded(
    target: TargetSpec, registry: Registry, shared: str, words: str
) -> None:
    graph = qhw.capture(Twice(shared).eval(), torch.randn(2, 3, 4, 4))
    plan = select(graph, target, registry, DATA)
    is_folded = "batch_norm_folding" in steps(plan)
    assert is_folded == (shared == "nothing")
    verdict = plan.steps[0].verdict if is_folded else refusal(plan, "batch_norm_folding").verdict
    assert words in [reason.sentence() for reason in verdict.reasons]


def test_a_step_says_why_it_leaves_a_site_out(target: TargetSpec, registry: Registry) -> None:
    layers = (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Tanh(), nn.BatchNorm2d(3))
    plan = select(qhw.capture(nn.Sequential(*layers).eval(), torch.randn(2, 3, 4, 4)), target, registry, DATA)
    assert plan.steps[0].sites == ("1",)
    assert plan.steps[0].verdict.sentence() == ("1 of 2 batch norms can be folded (graph.batch_norms)")
    assert [(site.name, site.verdict.sentence()) for site in plan.steps[0].left_out] == [
        ("3", "it follows Tanh, which has no weights (graph.3.producer)")
    ]
    assert [operator.where for operator in plan.operators] == ["accelerator", "folded", "host", "host"]


def test_the_kind_of_scale_is_the_reason_that_a_range_step_gives(
    graph: Graph, target_with: Callable[..., TargetSpec], registry: Registry
) -> None:
    power = target_with(
        (
            'signed = true, per = "tensor" }',
            'signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }',
        )
    )
    plan = select(graph, power, registry, DATA)
    reason = next(r for r in plan.steps[-1].verdict.reasons if r.subject.startswith("formats"))
    assert (reason.subject, reason.value) == ("formats.a8.scale.kind", "power-of-two")


def test_a_prescribed_encoding_leaves_nothing_to_choose(
    registry: Registry, target_with: Callable[..., TargetSpec], images: Tensor
) -> None:
    kernel = 'kernels.act = { input = ["a8"], output = ["a8"] }\n'
    fixed = "fixed_output = { a8 = { scale = 0.0078125, zero_point = 0 } }"
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Tanh()).eval(), images[:2])

    def sites(row: str) -> tuple[str, ...]:
        text = f'{kernel}operators.Tanh = {{ kernels = ["act"]{row} }}\nfallback'
        return select(graph, target_with(("fallback", text)), registry, DATA).steps[-1].sites

    assert sites("") == ("input", "0", "1")
    assert sites(f", {fixed}") == ("input", "0")


def test_reasons_read_as_sentences() -> None:
    assert Reason(subject="bits", value=4, rule="{value}-bit weights").sentence() == "4-bit weights (bits)"
    assert Reason(subject="a", value=["b", "c"], rule="one of {value}").sentence() == "one of b, c (a)"
    assert Reason(subject="a", value=True, rule="is {value}").sentence() == "is true (a)"
    assert Reason(subject="a", value=None, rule="is {value}").sentence() == "is absent (a)"


def test_options_reach_the_survey_and_the_step(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    class Factor(AlgorithmOptions):
        factor: int = Field(1, description="for tests")

    def survey(self: Any, graph: Any, points: Any, target: Any, resources: Any) -> Survey:
        sites = tuple(Site(name=p.group, verdict=Verdict(taken=True)) for p in points.points if p.role == "weight")
        reason = Reason(subject="--set", value=self.options.factor, rule="factor {value}")
        return Survey(verdict=Verdict(taken=True, reasons=(reason,)), sites=sites)

    scaled = algorithm("scaled", "round", "weight", survey, (Rank(pipeline="ranges-ptq", before="nearest"),))
    scaled.Options = Factor
    registry = load(("stranger", plugin((scaled,))))
    plan = select(graph, target, registry, DATA, Overrides(options={"scaled": {"factor": 3}}))
    step = next(step for step in plan.steps if step.algorithm == "scaled")
    assert step.options == {"factor": 3}
    assert step.verdict.sentence().startswith("factor 3 (--set)")
    assert QuantPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neerest": {}}, r"^--set: no algorithm 'neerest'\. Closest: nearest\."),
        (
            {"mse_weights": {"clipping_weight": 0.5}},
            r"^--set mse_weights\.clipping_weight: Input should be greater than or equal to 1; options of "
            r"'mse_weights': search, clipping_weight\. Give one of these, or leave it out\.$",
        ),
        (
            {"nearest": {"speed": 1}},
            r"^--set nearest\.speed: Extra inputs are not permitted; options of 'nearest': none",
        ),
        (
            {"min_max_weights": {}},
            r"^--set min_max_weights: the plan does not use 'min_max_weights': its sites went to mse_weights, which "
            r"comes first \(pipeline order\)\. Leave the option out\.$",
        ),
    ],
    ids=["unknown-algorithm", "out-of-range", "unknown-option", "not-in-the-plan"],
)
def test_an_option_that_cannot_be_met_is_an_error(
    graph: Graph, target: TargetSpec, registry: Registry, options: Any, message: str
) -> None:
    with pytest.raises(PlanError, match=message):
        select(graph, target, registry, DATA, Overrides(options=options))


def test_sites_of_an_earlier_algorithm_are_left_alone_where_the_pipeline_says_so(
    graph: Graph, target: TargetSpec, load: Callable[..., Registry], plugin: Callable[..., Any]
) -> None:
    def first_only(self: Any, graph: Any, points: Any, target: Any, resources: Any) -> Survey:
        taken = Verdict(taken=True)
        return Survey(verdict=taken, sites=(Site(name="conv1.weight", verdict=taken),))

    careful, repair = algorithm("careful", "round", "weight", first_only), algorithm("repair", "correct", "weight")
    stages = (
        StagePreference(stage="weight_range", algorithms=("mse_weights",)),
        StagePreference(stage="round", algorithms=("careful", "nearest")),
        StagePreference(stage="correct", algorithms=("repair",), skip_sites_of=("careful",)),
        StagePreference(stage="activation_range", algorithms=("mse",)),
    )
    mine = Pipeline(name="mine", summary="m", stages=stages)
    registry = load(("stranger", plugin((careful, repair), (mine,))))
    plan = select(graph, target, registry, DATA, Overrides(pipeline="mine", keep_float=("bn1",)))
    step = next(step for step in plan.steps if step.algorithm == "repair")
    assert step.sites == ("conv2.weight", "fc.weight")
    assert [(site.name, site.verdict.sentence()) for site in step.left_out] == [
        ("conv1.weight", "careful has dealt with it (pipeline mine)")
    ]
