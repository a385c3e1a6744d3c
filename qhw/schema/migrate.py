# SPDX-License-Identifier: Apache-2.0
"""Older files brought to the current schema version, one step per version, before anything is validated.

A step takes the plain data of version n and returns that of version n + 1. It starts from a copy of all fields, so that
none is lost by forgetting it. One example file per version stays in tests/data/schema for ever.
"""

from collections.abc import Callable, Mapping
from typing import Any

from qhw.schema.base import Problem

__all__ = ["CURRENT_VERSION", "STEPS", "migrate"]

CURRENT_VERSION = 1
Step = Callable[[dict[str, Any]], dict[str, Any]]
STEPS: Mapping[int, Step] = {}


def migrate(
    data: dict[str, Any], *, steps: Mapping[int, Step] = STEPS, current: int = CURRENT_VERSION
) -> dict[str, Any] | Problem:
    """Data of any known version as data of the current one, or what is wrong with its version.

    Args:
        data: What the file says. It is not changed.
        steps: Per version n the function from version n to n + 1.
        current: The version to reach.
    """
    path = ("schema_version",)
    if "schema_version" not in data:
        return Problem(path, f"is missing. Write schema_version = {current} as the first line.")
    version = data["schema_version"]
    if isinstance(version, bool) or not isinstance(version, int):
        return Problem(path, f"must be an integer; got {type(version).__name__}. Write schema_version = {current}.")
    if version > current:
        return Problem(path, f"is {version}, newer than this qhw reads (up to {current}). Install a newer qhw.")
    if version < 1 or any(number not in steps for number in range(version, current)):
        return Problem(path, f"must be from 1 to {current}; got {version}. Write schema_version = {current}.")
    for number in range(version, current):
        data = {**steps[number](dict(data)), "schema_version": number + 1}
    return data
