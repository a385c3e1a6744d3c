# SPDX-License-Identifier: Apache-2.0
"""Which fields a target sets that nothing is planned or computed by, and which of them `qhw check` reads."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from qhw.schema.base import Path, Table

__all__ = ["judged_mark", "marks_of", "recorded_fields"]


def marks_of(field: FieldInfo) -> tuple[bool, tuple[str, ...], tuple[str, ...]]:
    """Whether a field is only recorded, else which of its values and which of its keys are."""
    extra = field.json_schema_extra
    marks: dict[str, Any] = dict(extra) if isinstance(extra, dict) else {}
    return (
        bool(marks.get("recorded")),
        tuple(marks.get("recorded_values", ())),
        tuple(marks.get("recorded_keys", ())),
    )


def judged_mark(field: FieldInfo) -> bool | None:
    """Whether `qhw check` holds files to a recorded field; None where it says nothing of a file."""
    extra = field.json_schema_extra
    return extra.get("judged") if isinstance(extra, dict) else None  # type: ignore[return-value]


def recorded_fields(table: Table, judged: bool | None = None) -> Iterator[Path]:
    """Paths of all fields a table sets, at any depth, that are checked and kept but not used yet.

    Args:
        table: A target, or a part of one.
        judged: Only those with this mark; None: all.
    """
    for path, mark in _below(table, ()):
        if judged is None or mark is judged:
            yield path


def _below(value: Any, path: Path) -> Iterator[tuple[Path, bool | None]]:
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            held = getattr(value, name)
            if name == "source" or held == field.get_default(call_default_factory=True):
                continue
            is_recorded, values, keys = marks_of(field)
            here = (*path, name)
            if is_recorded or (isinstance(held, str) and held in values):
                yield here, judged_mark(field)
            elif isinstance(held, dict):
                yield from (((*here, key), None) for key in held if key in keys)
                yield from _below({key: item for key, item in held.items() if key not in keys}, here)
            else:
                yield from _below(held, here)
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from _below(held, (*path, key))
