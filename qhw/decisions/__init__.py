# SPDX-License-Identifier: Apache-2.0
"""What was decided: frozen data. No decision is made here. (`qhw.plan` is the call that makes one.)"""

from qhw.decisions.base import Json
from qhw.decisions.pipeline import Pipeline, Rank, StagePreference
from qhw.decisions.plan import InputShape, Overrides, QuantPlan
from qhw.decisions.resources import Resources
from qhw.decisions.stages import STAGES, Stage
from qhw.decisions.step import Refusal, Step, StepReport
from qhw.decisions.verdict import Reason, Site, Survey, Verdict
from qhw.wording import counted, listed

__all__ = [
    "STAGES",
    "InputShape",
    "Json",
    "Overrides",
    "Pipeline",
    "QuantPlan",
    "Rank",
    "Reason",
    "Refusal",
    "Resources",
    "Site",
    "Stage",
    "StagePreference",
    "Step",
    "StepReport",
    "Survey",
    "Verdict",
    "counted",
    "listed",
]
