# SPDX-License-Identifier: Apache-2.0
"""What the interfaces give to those who derive from them."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import Field, ValidationError

from qhw.decisions import Resources, Step, StepReport, Survey, Verdict
from qhw.extension import Algorithm, AlgorithmOptions, Exporter, PluginInfo


class Sample(Algorithm):
    name = "sample"
    stage = "round"
    summary = "sample"

    class Options(AlgorithmOptions):
        percent: float = Field(99.9, description="Share of values inside the range.")

    options: Options

    def survey(self, graph: Any, points: Any, target: Any, resources: Resources) -> Survey:
        return Survey(verdict=Verdict(taken=True))

    def apply(self, work: Any, step: Step, context: Any) -> StepReport:
        return StepReport(stage=self.stage, algorithm=self.name, summary="done")


def test_absent_options_are_the_defaults() -> None:
    assert Sample().options == Sample.Options(percent=99.9)


def test_given_options_are_stored_as_they_are() -> None:
    options = Sample.Options(percent=50.0)
    assert vars(Sample(options)) == {"options": options}


def test_an_algorithm_without_options_has_empty_ones() -> None:
    class Plain(Sample):
        Options = AlgorithmOptions  # type: ignore[assignment]

    assert Plain().options == AlgorithmOptions()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"percnt": 1.0}, "Extra inputs are not permitted"), ({"percent": "1.0"}, "should be a valid number")],
    ids=["unknown field", "text for a number"],
)
def test_options_are_closed_and_strict(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Sample.Options(**fields)


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError, match="Instance is frozen"):
        Sample().options.percent = 1.0  # type: ignore[misc]


def test_an_exporter_takes_options_too() -> None:
    class Writer(Exporter):
        name = "writer"
        summary = "writer"

        class Options(AlgorithmOptions):
            opset: int = Field(21, description="Operator set.")

        def check(self, result: Any) -> tuple[str, ...]:
            return ()

        def export(self, result: Any, folder: Path) -> tuple[Path, ...]:
            return ()

    assert Writer().options == Writer.Options(opset=21)
    assert Writer(Writer.Options(opset=22)).options == Writer.Options(opset=22)
    assert Writer.portable is False


@pytest.mark.parametrize("summary", ["", "two\nlines"], ids=["empty", "two lines"])
def test_plugin_info_has_a_one_line_summary(summary: str) -> None:
    with pytest.raises(ValidationError, match="summary"):
        PluginInfo(api=1, summary=summary)
