# SPDX-License-Identifier: Apache-2.0
"""One step of a plan, and what it reports when it has run."""

from pydantic import Field

from qhw.decisions.base import Json, PlanData
from qhw.decisions.stages import Stage
from qhw.decisions.verdict import Site, Verdict


class Step(PlanData):
    """An algorithm to run, where, and why."""

    stage: Stage
    algorithm: str
    options: dict[str, Json] = Field({}, description="Options that differ from the algorithm's defaults.")
    sites: tuple[str, ...]
    becomes: dict[str, str] = Field(
        {}, description="Operators whose function it changes: name to their kind behind it."
    )
    verdict: Verdict
    left_out: tuple[Site, ...] = Field((), description="Places where it does not act, each with the reason.")


class Refusal(PlanData):
    """An algorithm that the plan does not use, and why."""

    stage: Stage
    algorithm: str
    verdict: Verdict


class StepReport(PlanData):
    """What a step did, site by site, as plain figures. No timings: equal inputs give equal reports."""

    stage: Stage
    algorithm: str
    summary: str = Field(description="One line for people.")
    sites: dict[str, dict[str, Json]] = Field({}, description="Site name to measured figures.")
