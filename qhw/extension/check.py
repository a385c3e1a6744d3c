# SPDX-License-Identifier: Apache-2.0
"""Whether a registered class keeps its interface: names, options, argument names, ranks."""

import inspect
from abc import ABCMeta

from qhw.decisions import STAGES, Rank
from qhw.extension.interfaces import Algorithm, AlgorithmOptions, ArtefactReader, Executor, Exporter, NumberFormat
from qhw.extension.names import NAME
from qhw.schema import INTEGER, UNKNOWN


def class_problem(candidate: object, interface: ABCMeta) -> str | None:
    """What is wrong with a registered class, in one sentence that starts with its name; None when nothing is.

    Args:
        candidate: What the plugin's hook returned.
        interface: `Algorithm`, `Exporter`, `Executor`, `ArtefactReader` or `NumberFormat`.
    """
    if not (isinstance(candidate, type) and issubclass(candidate, interface)):
        what = f"class {candidate.__name__}" if isinstance(candidate, type) else f"a {type(candidate).__name__}"
        return f"{what} was returned; it must be a class derived from {interface.__name__}."
    problem = _identity_problem(candidate) or _methods_problem(candidate, interface)
    if problem is None and issubclass(candidate, Algorithm):
        problem = _stage_problem(candidate) or _ranks_problem(candidate)
    if problem is None and issubclass(candidate, Algorithm | Exporter):
        problem = _options_problem(candidate)
    if problem is None and issubclass(candidate, Exporter) and not isinstance(candidate.portable, bool):
        problem = f"portable must be True or False; got {candidate.portable!r}."
    if problem is None and issubclass(candidate, NumberFormat) and candidate.name in (INTEGER, UNKNOWN):
        problem = f"name must be a word of its own; got {candidate.name!r}, which needs no plugin."
    if problem is None:
        problem = _constructor_problem(candidate)
    return None if problem is None else f"{candidate.__name__}.{problem}"


def _identity_problem(candidate: type) -> str | None:
    name = getattr(candidate, "name", None)
    if not (isinstance(name, str) and NAME.fullmatch(name)):
        return f"name must match {NAME.pattern}; got {name!r}."
    summary = getattr(candidate, "summary", None)
    if not (isinstance(summary, str) and summary.strip() and len(summary.splitlines()) == 1):
        return f"summary must be one line of text; got {summary!r}."
    return None


def _methods_problem(candidate: type, interface: ABCMeta) -> str | None:
    for name in sorted(interface.__abstractmethods__):
        expected = list(inspect.signature(getattr(interface, name)).parameters)
        method = getattr(candidate, name)
        if getattr(method, "__isabstractmethod__", False):
            return f"{name} is missing. Define {name}({', '.join(expected)})."
        if not callable(method):
            return f"{name} must be a method; got {method!r}."
        got = inspect.signature(method).parameters
        extra = list(got.values())[len(expected) :]
        needed = [p for p in extra if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        if list(got)[: len(expected)] != expected or needed:
            return f"{name} must take ({', '.join(expected)}); got ({', '.join(got)})."
    left = sorted(getattr(candidate, "__abstractmethods__", ()))
    return f"{left[0]} is abstract. Define it." if left else None


def _stage_problem(candidate: type[Algorithm]) -> str | None:
    stage = getattr(candidate, "stage", None)
    return None if stage in STAGES else f"stage must be one of {', '.join(STAGES)}; got {stage!r}."


def _ranks_problem(candidate: type[Algorithm]) -> str | None:
    ranks = candidate.ranks
    if not (isinstance(ranks, tuple) and all(isinstance(rank, Rank) for rank in ranks)):
        return f"ranks must be a tuple of Rank; got {ranks!r}."
    pipelines = [rank.pipeline for rank in ranks]
    twice = sorted({name for name in pipelines if pipelines.count(name) > 1})
    if twice:
        return f"ranks names pipeline '{twice[0]}' twice. Keep one rank per pipeline."
    if any(rank.before == candidate.name for rank in ranks):
        return "ranks puts it before itself. Name another algorithm, or leave 'before' out."
    return None


def _options_problem(candidate: type[Algorithm] | type[Exporter]) -> str | None:
    options: object = candidate.Options
    if not (isinstance(options, type) and issubclass(options, AlgorithmOptions)):
        return f"Options must be a class derived from AlgorithmOptions; got {options!r}."
    for name, field in options.model_fields.items():
        if not (field.description or "").strip():
            return f"Options.{name} has no description. Write Field(..., description=...)."
        if field.is_required():
            return f"Options.{name} has no default. Pipelines call by name alone, so each option needs one."
    return None


def _constructor_problem(candidate: type) -> str | None:
    plain = issubclass(candidate, Executor | ArtefactReader | NumberFormat)
    takes = "no arguments" if plain else "(options=None) and nothing else"
    try:
        signature = inspect.signature(candidate)
        signature.bind()
        if not plain:
            signature.bind(options=None)
    except (TypeError, ValueError):
        return f"__init__ must take {takes}; work belongs in the call."
    return None
