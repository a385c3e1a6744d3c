# SPDX-License-Identifier: Apache-2.0
"""Each way to break an interface, with its sentence."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, Field

from qhw.decisions import Rank, Survey, Verdict
from qhw.extension import Algorithm, AlgorithmOptions, Executor, Exporter
from qhw.extension.check import class_problem


class Good(Algorithm):
    name = "good"
    stage = "round"
    summary = "Rounds well."
    ranks = (Rank(pipeline="whitepaper-ptq", before="nearest"), Rank(pipeline="other"))

    class Options(AlgorithmOptions):
        percent: float = Field(99.9, description="Share of values inside the range.")

    def survey(self, graph: Any, points: Any, target: Any, resources: Any) -> Any:
        return Survey(verdict=Verdict(taken=True))

    def apply(self, work: Any, step: Any, context: Any) -> Any:
        raise AssertionError("a check must not run it")


class Writer(Exporter):
    name = "writer"
    summary = "Writes."

    def check(self, result: Any) -> tuple[str, ...]:
        return ()

    def export(self, result: Any, folder: Path) -> tuple[Path, ...]:
        return ()


class Runner(Executor):
    name = "runner"
    summary = "Runs."

    def available(self) -> str | None:
        return None

    def load(self, artefact: Path) -> Any:
        return list

    def versions(self) -> dict[str, str]:
        return {}


def bad(base: type = Good, **changes: object) -> type:
    return type("Bad", (base,), changes)


@pytest.mark.parametrize(("cls", "interface"), [(Good, Algorithm), (Writer, Exporter), (Runner, Executor)])
def test_good_classes_pass(cls: type, interface: Any) -> None:
    assert class_problem(cls, interface) is None


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        (Good(), "a Good was returned; it must be a class derived from Algorithm."),
        (Writer, "class Writer was returned; it must be a class derived from Algorithm."),
        ("good", "a str was returned; it must be a class derived from Algorithm."),
    ],
    ids=["object", "another interface", "text"],
)
def test_what_is_no_algorithm_is_refused(candidate: object, sentence: str) -> None:
    assert class_problem(candidate, Algorithm) == sentence


class NoName(Algorithm):
    """Everything is missing; the name is asked for first."""


@pytest.mark.parametrize(
    ("candidate", "sentence"),
    [
        (NoName, "NoName.name must match [a-z][a-z0-9_]*; got None."),
        (bad(name="Good"), "Bad.name must match [a-z][a-z0-9_]*; got 'Good'."),
        (bad(name="good\n"), "Bad.name must match [a-z][a-z0-9_]*; got 'good\\n'."),
        (bad(summary=""), "Bad.summary must be one line of text; got ''."),
        (bad(summary="a\nb"), "Bad.summary must be one line of text; got 'a\\nb'."),
        (
            bad(stage="rounding"),
            "Bad.stage must be one of prepare, equalize, weight_range, round, correct, activation_range, train, fit; "
            "got 'rounding'.",
        ),
        (
            bad(stage=["round"]),
            "Bad.stage must be one of prepare, equalize, weight_range, round, correct, "
            "activation_range, train, fit; got ['round'].",
        ),
        (bad(survey=7), "Bad.survey must be a method; got 7."),
        (
            bad(survey=lambda self, graph, points: None),
            "Bad.survey must take (self, graph, points, target, resources); got (self, graph, points).",
        ),
        (
            bad(apply=lambda self, step, work, context: None),
            "Bad.apply must take (self, work, step, context); got (self, step, work, context).",
        ),
        (
            bad(apply=lambda self, work, step, context, seed: None),
            "Bad.apply must take (self, work, step, context); got (self, work, step, context, seed).",
        ),
        (
            bad(apply=staticmethod(lambda work, step, context: None)),
            "Bad.apply must take (self, work, step, context); got (work, step, context).",
        ),
        (bad(ranks=[Rank(pipeline="p")]), "Bad.ranks must be a tuple of Rank; got [Rank(pipeline='p', before=None)]."),
        (bad(ranks=("p",)), "Bad.ranks must be a tuple of Rank; got ('p',)."),
        (
            bad(ranks=(Rank(pipeline="p"), Rank(pipeline="p", before="mse"))),
            "Bad.ranks names pipeline 'p' twice. Keep one rank per pipeline.",
        ),
        (
            bad(ranks=(Rank(pipeline="p", before="good"),)),
            "Bad.ranks puts it before itself. Name another algorithm, or leave 'before' out.",
        ),
        (bad(Options=3), "Bad.Options must be a class derived from AlgorithmOptions; got 3."),
        (bad(Options=BaseModel), f"Bad.Options must be a class derived from AlgorithmOptions; got {BaseModel!r}."),
        (
            bad(__init__=lambda self: None),
            "Bad.__init__ must take (options=None) and nothing else; work belongs in the call.",
        ),
        (
            bad(__init__=lambda self, options, seed: None),
            "Bad.__init__ must take (options=None) and nothing else; work belongs in the call.",
        ),
    ],
)
def test_each_broken_rule_has_its_sentence(candidate: type, sentence: str) -> None:
    assert class_problem(candidate, Algorithm) == sentence


def test_further_arguments_with_defaults_are_allowed() -> None:
    assert class_problem(bad(apply=lambda self, work, step, context, trace=None: None), Algorithm) is None


def test_a_missing_method_is_named_with_its_arguments() -> None:
    class Half(Algorithm):
        name = "half"
        stage = "round"
        summary = "Half."

        def survey(self, graph: Any, points: Any, target: Any, resources: Any) -> Any:
            return None

    assert class_problem(Half, Algorithm) == "Half.apply is missing. Define apply(self, work, step, context)."


def test_an_abstract_method_of_the_plugins_own_is_named() -> None:
    class Mixin(ABC):
        @abstractmethod
        def loss(self) -> float: ...

    class Unfinished(Good, Mixin):
        pass

    assert class_problem(Unfinished, Algorithm) == "Unfinished.loss is abstract. Define it."


def test_an_option_without_description_is_refused() -> None:
    class Terse(Good):
        class Options(AlgorithmOptions):
            percent: float = 99.9

    assert class_problem(Terse, Algorithm) == (
        "Terse.Options.percent has no description. Write Field(..., description=...)."
    )


def test_an_option_without_default_is_refused() -> None:
    class Demanding(Good):
        class Options(AlgorithmOptions):
            percent: float = Field(description="Share of values inside the range.")

    assert class_problem(Demanding, Algorithm) == (
        "Demanding.Options.percent has no default. Pipelines call by name alone, so each option needs one."
    )


def test_an_exporter_is_held_to_its_own_methods_and_flags() -> None:
    assert class_problem(bad(Writer, export=lambda self, result: ()), Exporter) == (
        "Bad.export must take (self, result, folder); got (self, result)."
    )
    assert class_problem(bad(Writer, portable="yes"), Exporter) == "Bad.portable must be True or False; got 'yes'."
    assert class_problem(bad(Writer, Options=None), Exporter) == (
        "Bad.Options must be a class derived from AlgorithmOptions; got None."
    )


def test_an_executor_is_held_to_its_own_methods() -> None:
    assert class_problem(bad(Runner, load=lambda self: None), Executor) == (
        "Bad.load must take (self, artefact); got (self)."
    )
    assert class_problem(bad(Runner, __init__=lambda self, threads: None), Executor) == (
        "Bad.__init__ must take no arguments; work belongs in the call."
    )
