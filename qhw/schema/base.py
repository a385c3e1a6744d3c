# SPDX-License-Identifier: Apache-2.0
"""What every table of a target file shares: strictness, sources, the word "unknown", the mark "recorded, not used".

A field that later code starts to read loses its mark by replacing `recorded(...)` with `used(...)`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_serializer, model_validator
from pydantic_core import PydanticCustomError

__all__ = [
    "ID",
    "UNKNOWN",
    "Amount",
    "Count",
    "Fused",
    "Id",
    "Int64",
    "OperatorKind",
    "Path",
    "Positive",
    "Problem",
    "Rounding",
    "Says",
    "Source",
    "Table",
    "Tags",
    "Unknown",
    "Word",
    "leaves",
    "recorded",
    "used",
]

Path = tuple[str | int, ...]
UNKNOWN = "unknown"
Unknown = Literal["unknown"]


@dataclass(frozen=True)
class Says:
    """How an error message names what a field may hold; it travels in `Annotated` metadata."""

    text: str


@dataclass(frozen=True)
class Problem:
    """One thing that does not hold, at a field path relative to the table that found it."""

    path: Path
    text: str


ID = re.compile(r"[a-z][a-z0-9_]*")
Id = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64),
    Says('an id such as "w8" (a lower-case letter, then lower-case letters, digits, _)'),
]
OperatorKind = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Z][A-Za-z0-9]*$", max_length=64),
    Says('an operator kind such as "Conv" (a capital, then letters and digits)'),
]
Fused = Annotated[
    tuple[OperatorKind | tuple[OperatorKind, ...], ...],
    Says('a list of operator kinds, or of chains of them, such as ["Relu", ["Add", "Relu"]]'),
]
Word = Annotated[str, StringConstraints(min_length=1, max_length=400), Says("text of 1 to 400 characters")]
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), Says("an integer")]
Count = Annotated[int, Field(ge=1, le=2**63 - 1), Says("an integer of at least 1")]
Positive = Annotated[float, Field(gt=0.0), Says("a number above 0")]
Amount = Annotated[float, Field(ge=0.0), Says("a number of at least 0")]

Rounding = Literal[
    "half_even",
    "half_away_from_zero",
    "half_to_plus_infinity",
    "floor",
    "toward_zero",
    "to_odd",
    "double",
    "double_half_to_plus_infinity",
    "selectable",
    "none",
]

Tags = Word | tuple[Word, ...]
Source = Tags | dict[str, Tags]


def used(description: str, *, recorded_values: tuple[str, ...] = (), default: Any = None) -> Any:
    """A field that something reads: the planner, or the integer executor.

    Args:
        description: What it says.
        recorded_values: Those that nothing can act on yet.
        default: Where a file does not set it.
    """
    extra: dict[str, Any] = {"recorded_values": list(recorded_values)} if recorded_values else {}
    return Field(default=default, description=description, json_schema_extra=extra or None)


def recorded(description: str, *, judged: bool | None = None) -> Any:
    """A field that is kept, and that nothing is planned or computed by; `lint` says so where a file sets it.

    Args:
        description: What it says.
        judged: It constrains quantized files: whether `qhw check` holds them to it. None: it says nothing of a file.
    """
    extra: dict[str, Any] = {"recorded": True} if judged is None else {"recorded": True, "judged": judged}
    return Field(default=None, description=description, json_schema_extra=extra)


class Table(BaseModel):
    """A frozen table: unknown fields refused, types exact, no infinities, and its own rules checked together."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    source: Source | None = Field(
        default=None,
        description="Where the claims of this table come from: a tag of `sources`, a list of tags, or a table from "
        '"*" or a field to tags. The words `memory`, `derived: ...` and `searched: ...` need no entry in `sources`.',
    )

    def rules(self) -> Iterator[Problem]:
        """The contradictions between this table's own fields; none here."""
        yield from ()

    @field_serializer("source")
    def _source_in_order(self, source: Any) -> Any:
        # The order of a file's leaves is not that of the fields; sorted, writing what was read gives the same bytes.
        return dict(sorted(source.items())) if isinstance(source, dict) else source

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        problems = tuple(self.rules())
        if problems:
            text = " ".join(f"{'.'.join(map(str, problem.path))}: {problem.text}" for problem in problems)
            raise PydanticCustomError("qhw_rules", "{text}", {"text": text, "problems": problems})
        return self

    def unknown_fields(self) -> tuple[str, ...]:
        """Dotted names of the leaves that hold "unknown": looked for and not published."""
        return tuple(".".join(map(str, path)) for path, value in leaves(self) if value == UNKNOWN)


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Every value set below a table, with its path; a list is one leaf, `source` is not a leaf."""
    if isinstance(value, BaseModel):
        for name, field in type(value).model_fields.items():
            held = getattr(value, name)
            if name != "source" and held != field.get_default(call_default_factory=True):
                yield from leaves(held, (*path, name))
    elif isinstance(value, dict):
        for key, held in value.items():
            yield from leaves(held, (*path, key))
    else:
        yield path, value
