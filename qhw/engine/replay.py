# SPDX-License-Identifier: Apache-2.0
"""Checking a plan before it is applied: it may come from a file that somebody edited.

What may be edited: formats of points, and steps. Everything else follows from the model, the target and these, and is
derived anew; a plan that says otherwise is refused with the field.
"""

from qhw.decisions import STAGES, QuantPlan, Step
from qhw.engine.options import options_for
from qhw.engine.select import changed, target_fingerprint
from qhw.engine.site_names import stray_site
from qhw.errors import PlanError, PluginError
from qhw.extension import Registry
from qhw.graph import Graph, Placement, QuantPoint, place
from qhw.schema import TargetSpec, closest

__all__ = ["check_plan"]


def check_plan(plan: QuantPlan, graph: Graph, target: TargetSpec, registry: Registry) -> QuantPlan:
    """The plan as it is to be applied, with what follows from edited formats derived anew.

    Args:
        plan: As it was made, or read from a file.
        graph: The captured model.
        target: The resolved target.
        registry: Where the algorithms of its steps are found.

    Raises:
        PlanError: it belongs to another model or target, or an edit is not legal; names the field.
    """
    _check_belongs(plan, graph, target)
    for index, step in enumerate(plan.steps):
        _check_step(step, f"plan: steps.{index}", registry)
    order = [STAGES.index(step.stage) for step in plan.steps]
    if order != sorted(order):
        late = next(i for i in range(1, len(order)) if order[i] < order[i - 1])
        raise PlanError(
            f"plan: steps.{late}.stage: '{plan.steps[late].stage}' must come before '{plan.steps[late - 1].stage}'. "
            f"The order is {', '.join(STAGES)}."
        )
    plan = _with_formats(plan, graph, target)
    _check_sites(plan, graph)
    return plan


def _check_belongs(plan: QuantPlan, graph: Graph, target: TargetSpec) -> None:
    found = graph.fingerprint()
    if found != plan.model_fingerprint:
        raise PlanError(
            f"plan: was made for another model (fingerprint {plan.model_fingerprint[:12]}, this one has "
            f"{found[:12]}). Plan again for this model; if its weights are drawn at random, seed them, as "
            "torch.manual_seed(0)."
        )
    if target.name != plan.target:
        raise PlanError(f"plan: was made for '{plan.target}', not for '{target.name}'. Plan again.")
    if target_fingerprint(target) != plan.target_fingerprint:
        raise PlanError(
            f"plan: was made for '{plan.target}' as it stood then; '{target.name}' reads otherwise now. Plan again."
        )


def _check_step(step: Step, where: str, registry: Registry) -> None:
    try:
        algorithm = registry.algorithm(step.algorithm)
    except PluginError as error:
        raise PlanError(f"{where}.algorithm: {error}") from error
    if algorithm.stage != step.stage:
        raise PlanError(f"{where}.stage: '{step.algorithm}' belongs to stage {algorithm.stage}; got {step.stage}.")
    options_for(algorithm, step.options, f"{where}.options")


def _with_formats(plan: QuantPlan, graph: Graph, target: TargetSpec) -> QuantPlan:
    """The plan with points and operators as they follow from its formats."""
    graph = changed(graph, {name: kind for step in plan.steps for name, kind in step.becomes.items()})
    absorbed = [operator.name for operator in plan.operators if operator.where == "folded"]
    wishes = plan.overrides

    def placed(formats: dict[str, str]) -> Placement:
        return place(graph, target, absorbed=absorbed, keep_float=wishes.keep_float, formats=formats)

    original = placed(wishes.formats)
    if (original.points, original.operators) == (plan.points, plan.operators):
        return plan
    edits = _edited_formats(plan, original, target)
    if original.operators != plan.operators:
        theirs = {operator.name: operator for operator in plan.operators}
        name = next((o.name for o in original.operators if theirs.get(o.name) != o), plan.operators[-1].name)
        raise PlanError(
            f"plan: operators.{name}: follows from model, target and formats, and may not be edited. Edit a point's "
            "format, or plan again with --keep-float or --format."
        )
    formats = {pattern: wanted for pattern, wanted in wishes.formats.items() if pattern not in edits} | edits
    made = placed(formats)
    overrides = wishes.model_copy(update={"formats": formats})
    return plan.model_copy(update={"points": made.points, "operators": made.operators, "overrides": overrides})


def _edited_formats(plan: QuantPlan, original: Placement, target: TargetSpec) -> dict[str, str]:
    """Point -> format, where somebody changed it and nothing else."""
    named = {point.name: point for point in plan.points}
    missing = [point.name for point in original.points if point.name not in named]
    if missing or len(named) < len(plan.points):
        what = f"'{missing[0]}' is missing" if missing else "a name stands twice"
        raise PlanError(f"plan: points: {what}. Keep every point; plan again with --keep-float to leave one out.")
    known = {point.name: point for point in original.points}
    edits: dict[str, str] = {}
    for point in plan.points:
        if point.name not in known:
            hint = closest(point.name, known)
            raise PlanError(
                f"plan: points: the model has no point '{point.name}' on this target."
                f"{f' Closest: {hint}.' if hint else ''} Take it out, or plan again."
            )
        if point != known[point.name]:
            edits[point.name] = _edited_format(point, known[point.name], target)
    return edits


def _edited_format(point: QuantPoint, known: QuantPoint, target: TargetSpec) -> str:
    where = f"plan: points.{point.name}"
    for field in QuantPoint.model_fields:
        if field != "format" and getattr(point, field) != getattr(known, field):
            raise PlanError(
                f"{where}.{field}: must be {getattr(known, field)!r}, as model and target say; got "
                f"{getattr(point, field)!r}. Only 'format' may be edited."
            )
    if point.role in ("bias", "edge"):
        follows = "the kernel" if point.role == "bias" else "the operator that reads it"
        raise PlanError(f"{where}.format: follows from {follows}. Edit the format of a weight or of a tensor instead.")
    if point.format not in known.legal:
        raise PlanError(
            f"{where}.format: must be one of {', '.join(known.legal)} on '{target.name}'; got '{point.format}'."
        )
    return point.format


def _check_sites(plan: QuantPlan, graph: Graph) -> None:
    """Each step acts on things that exist, of the kind that its stage is for."""
    operators = {operator.name for operator in graph.operators}
    for index, step in enumerate(plan.steps):
        stray = stray_site(step.stage, step.sites, plan.points, operators)
        if stray is not None:
            raise PlanError(f"plan: steps.{index}.sites: {stray} Take it out, or plan again.")
