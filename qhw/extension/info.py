# SPDX-License-Identifier: Apache-2.0
"""What every plugin says of itself, and the API it was written for. Light: a plugin of targets alone needs no torch."""

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["API_VERSION", "PluginInfo"]

API_VERSION = 1


class PluginInfo(BaseModel):
    """What a plugin says about itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    api: int = Field(description="The plugin API it was written for; this qhw speaks 1.")
    summary: str = Field(min_length=1, pattern=r"^[^\r\n]*$", description="One line for 'qhw plugin list'.")
