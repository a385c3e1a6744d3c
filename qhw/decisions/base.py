# SPDX-License-Identifier: Apache-2.0
"""The base of all plan data: frozen, strict, closed to unknown fields."""

from pydantic import BaseModel, ConfigDict, JsonValue

Json = JsonValue


class PlanData(BaseModel):
    """Frozen data that round-trips through JSON exactly."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)
