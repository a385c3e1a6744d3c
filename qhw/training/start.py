# SPDX-License-Identifier: Apache-2.0
"""From a quantized model to one that trains, in place."""

from collections.abc import Mapping, Sequence
from typing import Any

from qhw.decisions import Overrides, QuantPlan, Reason, Step
from qhw.engine import QuantizedModel, blaming, select_stage
from qhw.engine.options import options_for
from qhw.errors import PlanError, TrainingError
from qhw.extension import Registry, default_registry
from qhw.training.form import TrainingForm

__all__ = ["trainable"]


def trainable(
    result: QuantizedModel,
    *,
    pipeline: str | None = None,
    prefer: Sequence[str] = (),
    without: Sequence[str] = (),
    options: Mapping[str, Mapping[str, Any]] | None = None,
    because: Reason | None = None,
    registry: Registry | None = None,
) -> QuantizedModel:
    """Let a quantized model train: its quantizers learn, its batch norms are treated as target and plan say.

    It stays a plain module with the same inputs and outputs. Its parameters are new ones: make the optimizer behind
    this call. Nothing changes in what it computes in eval mode, but for float rounding.

    Args:
        result: A quantized model; changed in place. `qhw.freeze` turns it back.
        pipeline: The pipeline whose stage `train` decides; absent: what the plan holds, or what its pipeline names.
        prefer: Algorithms that come first.
        without: Algorithms to leave out.
        options: Algorithm -> its options.
        because: A fact that makes training worth its while, to stand with the reasons of the plan's steps.
        registry: Plugins to use; absent: all that are installed.

    Returns:
        QuantizedModel: the same object.

    Raises:
        TrainingError: it is being trained already, or no pipeline says how it is trained.
        PlanError: a name is unknown, or a wish cannot be met.
    """
    if not isinstance(result, QuantizedModel):
        raise TrainingError(
            f"trainable: takes a result of qhw.quantize or qhw.load; got {type(result).__name__}. Quantize it first."
        )
    if result.trained_form is not None:
        raise TrainingError("trainable: the result is being trained already. Freeze it first, or go on training.")
    registry = registry or default_registry()
    is_asked = bool(pipeline or prefer or without or options)
    plan = result.plan
    if is_asked or not training_steps(plan):
        plan = _planned(result, registry, Overrides.of(pipeline, prefer, without, options=options))
    if because is not None:
        plan = plan.model_copy(update={"steps": tuple(_because(step, because) for step in plan.steps)})
    form = TrainingForm(result, plan, registry)
    for step in _norms_first(training_steps(plan), result.groups()):
        entry = registry.algorithms.get(step.algorithm)
        if entry is None:
            raise PlanError(f"plan: step '{step.algorithm}' has no algorithm here. Install its plugin, or plan again.")
        made = entry.value(options_for(entry.value, step.options, f"plan: step '{step.algorithm}'.options"))
        with blaming(entry.record, f"algorithm '{entry.name}': attach"):
            made.attach(form, step)  # type: ignore[attr-defined]
    built = form.build()
    result.plan = plan
    result.train_as(form, *built)
    return result


def training_steps(plan: QuantPlan) -> tuple[Step, ...]:
    """The steps of a plan that say how its result is trained."""
    return tuple(step for step in plan.steps if step.stage == "train")


def _because(step: Step, reason: Reason) -> Step:
    """A step of training with one more reason, in front."""
    if step.stage != "train":
        return step
    verdict = step.verdict.model_copy(update={"reasons": (reason, *step.verdict.reasons)})
    return step.model_copy(update={"verdict": verdict})


def _norms_first(steps: tuple[Step, ...], groups: tuple[str, ...]) -> list[Step]:
    """Steps on operators before those on tensors, whose scales start from what the former leave."""
    return sorted(steps, key=lambda step: all(site in groups for site in step.sites))


def _planned(result: QuantizedModel, registry: Registry, asked: Overrides) -> QuantPlan:
    """The plan with other steps of training."""
    plan = result.plan
    wanted = asked.pipeline or _pipeline_for(plan, registry)
    asked = asked.model_copy(update={"pipeline": wanted})
    steps, refused = select_stage("train", result.float_graph, plan, result.target, registry, asked)
    if not steps:
        raise TrainingError(
            f"trainable: pipeline '{wanted}' trains nothing here. Choose another pipeline with a stage 'train'."
        )
    others = [step for step in plan.steps if step.stage != "train"]
    before = [step for step in others if step.stage != "fit"]
    after = [step for step in others if step.stage == "fit"]
    kept = [refusal for refusal in plan.refused if refusal.stage != "train"]
    return plan.model_copy(
        update={"steps": (*before, *steps, *after), "refused": (*kept, *refused)},
    )


def _pipeline_for(plan: QuantPlan, registry: Registry) -> str:
    """The pipeline that trains the results of the plan's own."""
    known = registry.pipelines.get(plan.pipeline)
    if known is not None:
        if any(preference.stage == "train" for preference in known.value.stages):
            return plan.pipeline
        if known.value.training is not None:
            return known.value.training
    raise TrainingError(
        f"trainable: pipeline '{plan.pipeline}' does not say how its results are trained. Pass pipeline=, one with a "
        "stage 'train' (qhw plugin list)."
    )
