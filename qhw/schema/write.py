# SPDX-License-Identifier: Apache-2.0
"""A resolved target as JSON, and the JSON Schema of target files."""

import json
from typing import Any

from qhw.schema.spec import TargetSpec

__all__ = ["plain_data", "target_json_schema", "to_json"]


def plain_data(spec: TargetSpec) -> dict[str, Any]:
    """The fields a target sets, as dictionaries, lists and scalars."""
    return spec.model_dump(mode="json", exclude_unset=True, exclude_none=True)


def to_json(spec: TargetSpec) -> str:
    """A target as JSON text: loading it gives an equal target, and writing that gives the same bytes."""
    return json.dumps(plain_data(spec), indent=2, ensure_ascii=False) + "\n"


def target_json_schema() -> dict[str, Any]:
    """JSON Schema of a target file, for editors; `"recorded": true` marks fields that nothing reads yet."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TargetSpec.model_json_schema()}
