# SPDX-License-Identifier: Apache-2.0
"""A pipeline is data: which algorithms each stage prefers, and in which order."""

from typing import Literal

from pydantic import Field, model_validator

from qhw.decisions.base import PlanData
from qhw.decisions.stages import STAGES, Stage


class StagePreference(PlanData):
    """What one stage does.

    `first`: every site goes to the first algorithm that takes it. `all`: every algorithm runs on the sites it takes.
    """

    stage: Stage
    algorithms: tuple[str, ...] = Field(description="Algorithm names, most preferred first.")
    mode: Literal["first", "all"] = "first"
    skip_sites_of: tuple[str, ...] = Field(
        (), description="Algorithms of earlier stages; what they act on is left alone here."
    )


class Rank(PlanData):
    """Where an algorithm asks to stand in a pipeline that it does not own: before another one, or last."""

    pipeline: str
    before: str | None = Field(None, description="Name of the algorithm it goes before; absent: after all others.")


class Pipeline(PlanData):
    """A named order of preferences over the stages."""

    name: str = Field(pattern=r"^[a-z][a-z0-9_-]*$")
    summary: str
    reference: str | None = Field(None, description="Paper and section it follows.")
    is_default: bool = Field(False, description="Used when the user names none; exactly one pipeline may say so.")
    training: str | None = Field(
        None, description="The pipeline whose stage `train` says how results of this one are trained; absent: this one."
    )
    stages: tuple[StagePreference, ...]

    @model_validator(mode="after")
    def _stages_in_order(self) -> "Pipeline":
        order = [STAGES.index(preference.stage) for preference in self.stages]
        if order != sorted(set(order)):
            raise ValueError(f"stages must come in the order {', '.join(STAGES)}, each at most once")
        return self
