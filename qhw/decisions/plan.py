# SPDX-License-Identifier: Apache-2.0
"""The plan: every decision about one model on one target, as frozen data."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from pydantic import Field, ValidationError

from qhw.decisions.base import Json, PlanData
from qhw.decisions.resources import Resources
from qhw.decisions.step import Refusal, Step
from qhw.decisions.verdict import Reason
from qhw.errors import PlanError
from qhw.graph import OperatorPlacement, QuantPoint


class Overrides(PlanData):
    """What the user asked for against the pipeline's preference."""

    pipeline: str | None = None
    prefer: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    keep_float: tuple[str, ...] = ()
    formats: dict[str, str] = Field({}, description="Point name or pattern to format id.")
    options: dict[str, dict[str, Json]] = Field({}, description="Algorithm to its options that differ from defaults.")

    @classmethod
    def of(
        cls,
        pipeline: str | None = None,
        prefer: Sequence[str] = (),
        without: Sequence[str] = (),
        keep_float: Sequence[str] = (),
        formats: Mapping[str, str] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> "Overrides":
        """Wishes as callers write them: one name alone may come as it is."""
        return cls(
            pipeline=pipeline,
            prefer=_names(prefer),
            without=_names(without),
            keep_float=_names(keep_float),
            formats=dict(formats or {}),
            options={name: dict(values) for name, values in (options or {}).items()},
        )


def _names(names: Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)


class InputShape(PlanData):
    """One input of the model, as it was captured."""

    name: str
    shape: tuple[int, ...] = Field(description="With the batch axis of the example.")
    dtype: str


class QuantPlan(PlanData):
    """Decisions and reasons for one model on one target. Edit the JSON, compare two, replay one."""

    plan_version: Literal[1] = 1
    target: str
    target_fingerprint: str = Field(description="SHA-256 of the resolved target.")
    model_fingerprint: str = Field(description="SHA-256 of the captured graph and its tensors.")
    inputs: tuple[InputShape, ...]
    pipeline: str
    resources: Resources
    overrides: Overrides
    operators: tuple[OperatorPlacement, ...]
    points: tuple[QuantPoint, ...]
    steps: tuple[Step, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[Reason, ...] = Field((), description="Facts that the target leaves open, and what depends on them.")

    def point(self, name: str) -> QuantPoint:
        """The point of that name.

        Raises:
            PlanError: there is none.
        """
        for point in self.points:
            if point.name == name:
                return point
        raise PlanError(f"plan: no point '{name}'. Points: {', '.join(p.name for p in self.points)}")

    @property
    def accelerator_macs(self) -> int:
        """MACs per sample that run on the accelerator."""
        return sum(op.macs for op in self.operators if op.where == "accelerator")

    @property
    def total_macs(self) -> int:
        """MACs per sample of the whole model."""
        return sum(op.macs for op in self.operators)

    def to_json(self) -> str:
        """The plan as JSON text, stable byte for byte."""
        return self.model_dump_json(indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "plan") -> "QuantPlan":
        """Read a plan.

        Raises:
            PlanError: the text is no plan; names the first field that is wrong.
        """
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "text"
            raise PlanError(f"{where}: {field}: {first['msg']}. Write the plan anew with 'qhw plan --out'.") from error
