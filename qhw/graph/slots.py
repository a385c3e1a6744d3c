# SPDX-License-Identifier: Apache-2.0
"""What formats are chosen for: tensors, single operands of one operator, weights. And what a choice is."""

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

__all__ = ["Choice", "Slot", "edge", "tensor", "weight"]


class Slot(NamedTuple):
    """Something that has one format: a tensor, an operand that is requantized, or a constant operand."""

    what: Literal["tensor", "edge", "weight"]
    name: str  # of the tensor, of the operator that reads the edge, or of the parameter
    operand: int = 0  # its position, for an edge


def tensor(name: str) -> Slot:
    """The slot of a tensor between operators."""
    return Slot("tensor", name)


def edge(operator: str, index: int) -> Slot:
    """The slot of one operand that is requantized before the operator reads it."""
    return Slot("edge", operator, index)


def weight(name: str) -> Slot:
    """The slot of a constant operand."""
    return Slot("weight", name)


@dataclass(frozen=True)
class Choice:
    """Legal kernels and formats, the chosen one first.

    Attributes:
        kernels: Operator name to kernel ids.
        formats: Slot to format ids.
        edges: Operands that are requantized.
        groups: Slot to the slot that names the scale it shares; only slots that share one.
    """

    kernels: dict[str, tuple[str, ...]]
    formats: dict[Slot, tuple[str, ...]]
    edges: frozenset[Slot]
    groups: dict[Slot, Slot] = field(default_factory=dict)
