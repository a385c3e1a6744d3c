# SPDX-License-Identifier: Apache-2.0
"""Selecting algorithms: a pure function of graph, target, resources, registered algorithms and the user's overrides."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from qhw.decisions import (
    STAGES,
    InputShape,
    Json,
    Overrides,
    Pipeline,
    QuantPlan,
    Reason,
    Refusal,
    Resources,
    Site,
    Stage,
    Step,
    Survey,
    Verdict,
)
from qhw.engine.blame import blaming, must_be
from qhw.engine.notes import open_facts
from qhw.engine.number_formats import check_number_formats, check_static_biases
from qhw.engine.options import options_for
from qhw.engine.site_names import stray_site
from qhw.errors import PlanError, PluginError
from qhw.extension import Algorithm, Registry
from qhw.extension.registry import Entry
from qhw.graph import Graph, Placement, place
from qhw.schema import TargetSpec, to_json

__all__ = ["changed", "select", "select_stage", "target_fingerprint"]

T = TypeVar("T")

_NEEDED: Mapping[str, tuple[Stage, str]] = {
    "weight": ("weight_range", "weights"),
    "activation": ("activation_range", "activations"),
    "input": ("activation_range", "activations"),
    "edge": ("activation_range", "activations"),
}


def select(
    graph: Graph,
    target: TargetSpec,
    registry: Registry,
    resources: Resources,
    overrides: Overrides | None = None,
) -> QuantPlan:
    """Decide which algorithms run where, and say why.

    Args:
        graph: The captured model.
        target: The resolved target.
        registry: What the plugins bring.
        resources: What is at hand.
        overrides: What the user asked for.

    Raises:
        PlanError: a point is left without a range, a name is unknown, a tensor to be quantized is not float32, or the
            target cannot run the model.
    """
    overrides = overrides or Overrides()
    pipeline = (
        _known(registry.pipeline, overrides.pipeline, "--pipeline")
        if overrides.pipeline
        else registry.default_pipeline()
    )
    order = _Order(registry, pipeline, overrides)
    chosen = _Chosen()
    prepared = _Prepared(graph, target, overrides)
    _require_float32(graph, prepared.placement)
    for stage in STAGES:
        _run_stage(stage, order, prepared, target, resources, chosen)
        if stage == "prepare":
            prepared.settle()
    placement = prepared.placement
    check_number_formats(target, (point.format for point in placement.points if point.role != "bias"), registry)
    check_static_biases(target, placement.points)
    _require_ranges(target, placement, chosen)
    _require_used(overrides, chosen)
    return QuantPlan(
        target=target.name,
        target_fingerprint=target_fingerprint(target),
        model_fingerprint=graph.fingerprint(),
        inputs=tuple(
            InputShape(name=name, shape=shape, dtype=graph.input_dtypes[name]) for name, shape in graph.inputs.items()
        ),
        pipeline=pipeline.name,
        resources=resources,
        overrides=overrides,
        operators=placement.operators,
        points=placement.points,
        steps=tuple(chosen.steps),
        refused=tuple(chosen.refused),
        notes=open_facts(target, placement),
    )


def select_stage(
    stage: Stage, graph: Graph, plan: QuantPlan, target: TargetSpec, registry: Registry, overrides: Overrides
) -> tuple[tuple[Step, ...], tuple[Refusal, ...]]:
    """Decide one stage of another pipeline for a model that a plan has been applied to.

    Args:
        stage: Which.
        graph: The model in its present state.
        plan: The plan that was applied; its points and placements stay.
        target: The resolved target.
        registry: What the plugins bring.
        overrides: What the user asks for; names the pipeline.

    Returns:
        tuple: the steps, and the algorithms refused.

    Raises:
        PlanError: a name is unknown, or an option is of an algorithm that is not used.
    """
    pipeline = _known(registry.pipeline, str(overrides.pipeline), "--pipeline")
    chosen = _Chosen()
    settled = _Settled(graph, Placement(plan.operators, plan.points))
    _run_stage(stage, _Order(registry, pipeline, overrides), settled, target, plan.resources, chosen)
    _require_used(overrides, chosen)
    return tuple(chosen.steps), tuple(chosen.refused)


def target_fingerprint(target: TargetSpec) -> str:
    """SHA-256 of a resolved target's JSON form."""
    return hashlib.sha256(to_json(target).encode()).hexdigest()


class _Settled:
    """A model whose placement is decided."""

    def __init__(self, graph: Graph, placement: Placement) -> None:
        self.graph = graph
        self.placement = placement

    def take(self, sites: Iterable[Site]) -> None:
        """A step acts on these sites: nothing moves any more."""


class _Prepared:
    """The model as the steps chosen so far leave it, as far as placement goes.

    Attributes:
        graph: A copy of the captured graph where a step changes an operator's function.
        placement: Its points on the target.
    """

    def __init__(self, graph: Graph, target: TargetSpec, overrides: Overrides) -> None:
        self.graph = graph
        self._target = target
        self._overrides = overrides
        self._absorbed: list[str] = []
        self._is_settled = False
        self.placement = self._place()

    def take(self, sites: Iterable[Site]) -> None:
        """A step acts on these sites."""
        becomes: dict[str, str] = {}
        for site in sites:
            self._absorbed.extend(site.absorbs)
            becomes |= site.becomes
        if becomes:
            self.graph = changed(self.graph, becomes)
            self.placement = self._place()

    def settle(self) -> None:
        """Place for good, now that the first steps have folded what they can: batch norms, before all.

        Only now it counts what the host may run, and the formats that the user demands have their tensors.
        """
        self._is_settled = True
        self.placement = self._place()

    def _place(self) -> Placement:
        kept = self._overrides.keep_float
        if not self._is_settled:
            lenient = self._target.model_copy(update={"fallback": "host"})
            return place(self.graph, lenient, keep_float=kept)
        formats = self._overrides.formats
        return place(self.graph, self._target, absorbed=self._absorbed, keep_float=kept, formats=formats)


def changed(graph: Graph, becomes: Mapping[str, str]) -> Graph:
    """The graph with operators that compute other functions, its tensors shared; itself where nothing changes."""
    if not becomes:
        return graph
    copy = graph.copy(share_tensors=True)
    copy.become(becomes)
    return copy


class _Chosen:
    """Steps and refusals as they accumulate."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.refused: list[Refusal] = []


@dataclass(frozen=True)
class _Candidate:
    entry: Entry[type[Algorithm]]
    options: Mapping[str, Json]
    refusal: Reason | None = None


class _Order:
    """Per stage, the algorithms in order of preference: the pipeline's, strangers' ranks, the user's wishes."""

    def __init__(self, registry: Registry, pipeline: Pipeline, overrides: Overrides) -> None:
        for option, names in (("--prefer", overrides.prefer), ("--without", overrides.without)):
            for name in names:
                _known(registry.algorithm, name, option)
        both = sorted(set(overrides.prefer) & set(overrides.without))
        if both:
            raise PlanError(f"plan: '{both[0]}' is both preferred and left out. Drop one of --prefer and --without.")
        for name, values in overrides.options.items():
            options_for(_known(registry.algorithm, name, "--set"), values, f"--set {name}")
        self._absent: dict[Stage, list[str]] = {}
        for preference in pipeline.stages:
            for name in preference.algorithms:
                if name not in registry.algorithms and registry.blocked:
                    self._absent.setdefault(preference.stage, []).append(name)
                    continue
                stage = _known(registry.algorithm, name, f"pipeline '{pipeline.name}': stage {preference.stage}").stage
                if stage != preference.stage:
                    raise PlanError(
                        f"pipeline '{pipeline.name}': stage {preference.stage}: '{name}' belongs to stage {stage}. "
                        "Choose another --pipeline; its author must move the name."
                    )
        self._registry = registry
        self._pipeline = pipeline
        self._overrides = overrides
        self._stages = {preference.stage: preference for preference in pipeline.stages}

    @property
    def pipeline_name(self) -> str:
        """Name of the pipeline."""
        return self._pipeline.name

    def mode(self, stage: Stage) -> str:
        """`first` or `all`."""
        return self._stages[stage].mode if stage in self._stages else "first"

    def absent(self, stage: Stage) -> list[Refusal]:
        """Algorithms that the pipeline names and that went with a plugin the user blocks."""
        reason = "{value} came with none of the plugins that are not blocked"
        return [
            _refusal(stage, name, Reason(subject="QHW_BLOCK", value=name, rule=reason))
            for name in self._absent.get(stage, ())
        ]

    def skipped(self, stage: Stage, steps: Iterable[Step]) -> dict[str, str]:
        """Sites that the pipeline leaves alone at a stage, each with the algorithm of an earlier stage it went to."""
        names = self._stages[stage].skip_sites_of if stage in self._stages else ()
        return {site: step.algorithm for step in steps if step.algorithm in names for site in step.sites}

    def candidates(self, stage: Stage) -> list[_Candidate]:
        """All registered algorithms of a stage, most preferred first; those that may not run carry the reason."""
        known = {name: entry for name, entry in self._registry.algorithms.items() if entry.value.stage == stage}
        listed = _with_strangers(
            [n for n in self._stages[stage].algorithms if n in known] if stage in self._stages else [],
            {
                name: rank.before
                for name, entry in sorted(known.items())
                for rank in entry.value.ranks
                if rank.pipeline == self._pipeline.name
            },
        )
        preferred = [name for name in dict.fromkeys(self._overrides.prefer) if name in known]
        if stage == "train" and not (listed or preferred):
            return []  # training is not refused where nobody asks for it
        listed = [*preferred, *(name for name in listed if name not in preferred)]
        rest = [name for name in sorted(known) if name not in listed]
        return [self._candidate(known[name], name in rest) for name in (*listed, *rest)]

    def _candidate(self, entry: Entry[type[Algorithm]], unlisted: bool) -> _Candidate:
        refusal = None
        if entry.name in self._overrides.without:
            refusal = Reason(subject="--without", value=entry.name, rule="left out by request")
        elif unlisted:
            refusal = Reason(
                subject=f"pipeline {self._pipeline.name}",
                value=entry.name,
                rule=f"not part of this pipeline; --prefer {entry.name} takes it in",
            )
        return _Candidate(entry, self._overrides.options.get(entry.name, {}), refusal)


def _known(look_up: Callable[[str], T], name: str, where: str) -> T:
    try:
        return look_up(name)
    except PluginError as error:
        raise PlanError(f"{where}: {error}") from error


def _with_strangers(listed: list[str], ranked: dict[str, str | None]) -> list[str]:
    """A stage's order with the algorithms that ask for a place in it: before the one they name, else last."""
    waiting = {name: before for name, before in ranked.items() if name not in listed}
    while waiting:
        # One whose neighbour waits for a place itself comes after that one; two that wait for each other, by name.
        name = next((name for name, before in waiting.items() if before not in waiting), next(iter(waiting)))
        before = waiting.pop(name)
        listed.insert(listed.index(before) if before in listed else len(listed), name)
    return listed


def _run_stage(
    stage: Stage,
    order: _Order,
    prepared: _Prepared | _Settled,
    target: TargetSpec,
    resources: Resources,
    chosen: _Chosen,
) -> None:
    """Survey a stage's algorithms in order and give each its sites; what its steps change, the next ones see."""
    chosen.refused.extend(order.absent(stage))
    done = order.skipped(stage, chosen.steps)
    taken_by: dict[str, str] = {}
    for candidate in order.candidates(stage):
        name = candidate.entry.name
        if candidate.refusal is not None:
            chosen.refused.append(_refusal(stage, name, candidate.refusal))
            continue
        survey = _without(done, _survey(candidate, prepared, target, resources), order.pipeline_name)
        free = [site for site in survey.taken if order.mode(stage) == "all" or site.name not in taken_by]
        if not free:
            chosen.refused.append(Refusal(stage=stage, algorithm=name, verdict=_why_not(survey, taken_by)))
            continue
        taken_by.update({site.name: name for site in free})
        prepared.take(free)
        chosen.steps.append(
            Step(
                stage=stage,
                algorithm=name,
                options=dict(candidate.options),
                sites=tuple(site.name for site in free),
                becomes={name: kind for site in free for name, kind in site.becomes.items()},
                verdict=_step_verdict(survey, free),
                left_out=tuple(site for site in survey.sites if not site.verdict.taken),
            )
        )


def _survey(candidate: _Candidate, prepared: _Prepared | _Settled, target: TargetSpec, resources: Resources) -> Survey:
    entry = candidate.entry
    options = options_for(entry.value, candidate.options, f"--set {entry.name}")
    doing = f"algorithm '{entry.name}': survey"
    with blaming(entry.record, doing):
        answer = entry.value(options).survey(prepared.graph, prepared.placement, target, resources)
    survey = must_be(answer, Survey, entry.record, doing)
    operators = {operator.name for operator in prepared.graph.operators}
    strange = [n for site in survey.taken for n in (*site.absorbs, *site.becomes) if n not in operators]
    if strange:
        raise entry.record.author_error(f"{doing} changes '{strange[0]}', which is no operator of the graph.")
    sites = [site.name for site in survey.taken]
    placed = {operator.name for operator in prepared.placement.operators}  # batch norms that are folded, too
    stray = stray_site(entry.value.stage, sites, prepared.placement.points, operators | placed)
    if stray is not None:
        raise entry.record.author_error(f"{doing} names a site of its own: {stray}")
    return survey


def _refusal(stage: Stage, name: str, reason: Reason) -> Refusal:
    return Refusal(stage=stage, algorithm=name, verdict=Verdict(taken=False, reasons=(reason,)))


def _why_not(survey: Survey, taken_by: Mapping[str, str]) -> Verdict:
    """Why no site is left: its own verdict, its sites' verdicts, or that others came first."""
    if survey.taken:
        first = sorted({taken_by[site.name] for site in survey.taken})
        come = "comes" if len(first) == 1 else "come"
        rule = f"its sites went to {{value}}, which {come} first"
        reason = Reason(subject="pipeline order", value=list(first), rule=rule)
        return Verdict(taken=False, reasons=(reason,))
    own = () if survey.verdict.taken else survey.verdict.reasons
    reasons = _distinct((*own, *(reason for site in survey.sites for reason in site.verdict.reasons)))
    if not reasons:
        reasons = (Reason(subject="graph", value=0, rule="there is no site to act on"),)
    return Verdict(taken=False, reasons=reasons)


def _step_verdict(survey: Survey, sites: list[Site]) -> Verdict:
    """Why the step runs."""
    return Verdict(
        taken=True, reasons=_distinct((*survey.verdict.reasons, *(r for s in sites for r in s.verdict.reasons)))
    )


def _without(done: Mapping[str, str], survey: Survey, pipeline: str) -> Survey:
    """A survey without the sites that an algorithm of an earlier stage has dealt with."""

    def left(site: Site) -> Site:
        if site.name not in done or not site.verdict.taken:
            return site
        reason = Reason(subject=f"pipeline {pipeline}", value=done[site.name], rule="{value} has dealt with it")
        return site.model_copy(update={"verdict": Verdict(taken=False, reasons=(reason,))})

    return survey.model_copy(update={"sites": tuple(map(left, survey.sites))}) if done else survey


def _distinct(reasons: Iterable[Reason]) -> tuple[Reason, ...]:
    found: dict[str, Reason] = {}
    for reason in reasons:
        found.setdefault(reason.model_dump_json(), reason)
    return tuple(found.values())


def _require_float32(graph: Graph, placement: Placement) -> None:
    """Scales, ranges and codes are found in float32; another type would be rounded before it is quantized."""
    for point in placement.points:
        if point.role == "bias":
            continue
        found = graph.tensor(point.tensor) if point.role == "weight" else graph.node(point.tensor).meta["dtype"]
        dtype = str(found if isinstance(found, str) else found.dtype).removeprefix("torch.")
        if dtype != "float32":
            raise PlanError(
                f"{point.name}: must be float32 to be quantized; got {dtype}. Convert the model with model.float(), "
                "and its example inputs and data, then plan again."
            )


def _require_ranges(target: TargetSpec, placement: Placement, chosen: _Chosen) -> None:
    """Every point gets its scale from some step, from the hardware, or the plan is refused with what was tried."""
    covered = {(step.stage, site) for step in chosen.steps for site in step.sites}
    fixed = {point.group for point in placement.points if point.is_given}
    for point in placement.points:
        if point.role not in _NEEDED or point.group in fixed:
            continue
        stage, what = _NEEDED[point.role]
        if (stage, point.group) in covered:
            continue
        tried = "; ".join(f"{r.algorithm}: {r.verdict.sentence()}" for r in chosen.refused if r.stage == stage)
        spec = target.formats[point.format]
        raise PlanError(
            f"{point.name}: no algorithm fits target '{target.name}' for its {what} "
            f"({spec.element_bits}-bit, per {spec.per}). {tried or 'None is registered'}. {_way_out(stage, chosen)}"
        )


def _require_used(overrides: Overrides, chosen: _Chosen) -> None:
    """Options of an algorithm that the plan does not run are a wish that is not met."""
    used = {step.algorithm for step in chosen.steps}
    for name in overrides.options:
        if name not in used:
            why = next((r.verdict.sentence() for r in chosen.refused if r.algorithm == name), "it has no stage here")
            raise PlanError(f"--set {name}: the plan does not use '{name}': {why}. Leave the option out.")


def _way_out(stage: Stage, chosen: _Chosen) -> str:
    needs_data = any(
        reason.subject == "resources.calibration"
        for refusal in chosen.refused
        if refusal.stage == stage
        for reason in refusal.verdict.reasons
    )
    return (
        "Pass calibration= (--calibration DATA)."
        if needs_data
        else "Choose another pipeline, or install a plugin that has one."
    )
