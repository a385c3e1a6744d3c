# SPDX-License-Identifier: Apache-2.0
"""TargetSpec: one accelerator, as data."""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from qhw.schema.arithmetic import Accumulator, Bias, Requantize
from qhw.schema.base import Id, OperatorKind, Problem, Says, Table, Unknown, Word, used
from qhw.schema.formats import Format
from qhw.schema.kernels import Kernel
from qhw.schema.operators import Operator
from qhw.schema.references import reference_problems
from qhw.schema.system import Artefact, Boundary, Clock, Conflict, Cost, Memory, Network

__all__ = ["TargetName", "TargetSpec"]

TargetName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]*/[a-z0-9][a-z0-9._-]*$", max_length=100),
    Says('a name like "vendor/chip" (lower-case letters, digits, . _ -, one slash)'),
]
Validity = Literal["silicon", "sdk", "os", "converter", "artefact", "isa", "build"]


def _ids(model: str, plural: str) -> Any:
    return Field(default_factory=dict, description=f"{plural}, by id. See {model}.")


class TargetSpec(Table):
    """One accelerator. Only `schema_version` and `name` are required; what else is missing, `lint` names.

    An absent field means nobody looked, `"unknown"` means it was looked for and is not published; neither becomes a
    default. Every path below is dotted, as `formats.w8.bits`.
    """

    schema_version: Literal[1] = Field(description="Version of this schema: 1.")
    name: TargetName = Field(description="`vendor/chip`; also the target's path among the shipped ones.")
    summary: Word | None = used("One line a person reads in a list of targets.")
    extends: Word | None = used(
        "The target this one differs from: a target's name, or a path relative to this file that ends in .toml or "
        ".json. Tables merge field by field, lists replace. Absent once a target is resolved."
    )
    sources: dict[str, Word] = Field(
        default_factory=dict,
        description="What each source tag stands for: a document and its revision, a file, an address.",
    )
    valid_for: dict[Validity, tuple[Word, ...]] = Field(
        default_factory=dict,
        description="What this file holds for: silicon revisions, SDK, OS or converter versions, the artefact path, "
        "the instruction set, the build. Another variant is another file.",
        json_schema_extra={"recorded": True},
    )
    formats: dict[Id, Format] = _ids("Format", "Number formats")
    biases: dict[Id, Bias] = _ids("Bias", "Bias rules")
    accumulators: dict[Id, Accumulator] = _ids("Accumulator", "Accumulators")
    requantize: dict[Id, Requantize] = _ids("Requantize", "Requantizations")
    kernels: dict[Id, Kernel] = _ids("Kernel", "Kernels")
    operators: dict[OperatorKind, Operator] = Field(
        default_factory=dict, description="What the hardware has, by operator kind. See Operator."
    )
    fallback: Literal["host", "refuse", "single_partition"] | Unknown | None = used(
        "Where an operator goes that the hardware does not have: to the host; nowhere, the network is refused; to the "
        "host with everything behind it."
    )
    boundary: Boundary | None = used("What crosses the edge of the network.")
    artefact: Artefact | None = used("What the toolchain takes.")
    network: Network | None = used("Limits of a network as a whole.")
    memories: dict[Id, Memory] = _ids("Memory", "Memories")
    clocks: dict[Id, Clock] = _ids("Clock", "Clock presets")
    cost: Cost | None = used("What else decides how long a network takes.")
    conflicts: tuple[Conflict, ...] = Field(
        default=(), description="Sources that disagree, with the reading chosen. See Conflict."
    )
    lineage: tuple[TargetName, ...] = Field(
        default=(), description="Written by the loader: the targets this one was resolved from, the first base first."
    )
    inherited: dict[str, TargetName] = Field(
        default_factory=dict,
        description="Written by the loader: for every leaf that a base wrote, the base. All others are its own.",
    )

    def rules(self) -> Iterator[Problem]:
        """Every id and every source tag that is named exists."""
        yield from reference_problems(self)

    def written_by(self, path: str) -> str:
        """Name of the target whose file wrote the leaf at a dotted path."""
        return self.inherited.get(path, self.name)

    def source_of(self, path: str) -> tuple[str, ...]:
        """Tags that stand beside the leaf at a dotted path; empty where it has none.

        Example:
            >>> spec.source_of("formats.s8.scale.kind")
            ('OPS',)
        """
        here: Any = self
        parts = path.split(".")
        found: tuple[str, ...] = ()
        for index, part in enumerate(parts):
            if isinstance(here, Table) and here.source is not None:
                found = _tags_for(here.source, parts[index:]) or found
            here = (
                getattr(here, part, None)
                if isinstance(here, BaseModel)
                else here.get(part)
                if isinstance(here, dict)
                else None
            )
        return found


def _tags_for(source: Any, rest: list[str]) -> tuple[str, ...]:
    if isinstance(source, dict):
        keys = [".".join(rest[:count]) for count in range(len(rest), 0, -1)]
        source = next((source[key] for key in (*keys, "*") if key in source), ())
    return (source,) if isinstance(source, str) else tuple(source)
