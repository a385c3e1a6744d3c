# SPDX-License-Identifier: Apache-2.0
"""What is at hand for quantizing: data, labels. Algorithms read it in `survey`."""

from pydantic import Field

from qhw.decisions.base import PlanData


class Resources(PlanData):
    """What the caller gave beside the model and the target."""

    calibration: bool = Field(False, description="Calibration inputs are given.")
    labels: bool = Field(False, description="Labels come with them.")
