# SPDX-License-Identifier: Apache-2.0
"""One thing that a clause of the target says about one operator of an artefact: broken, or left open."""

from dataclasses import dataclass

__all__ = ["OTHER_TYPE", "Finding", "unknown"]

OTHER_TYPE = 100
"""Distance of another stored type: so far that a kernel for the type at hand is always nearer."""


@dataclass(frozen=True)
class Finding:
    """A clause that does not hold, or that cannot be judged.

    Attributes:
        clause: Dotted field path of the target, as `formats.w8.zero_point`.
        must: What the clause asks for, as a predicate: `must be 0`. Of an open clause: why it cannot be judged.
        got: What the artefact has.
        fix: What to do.
        tensor: Whose; None for the operator's own.
        is_open: The target, or the artefact, does not say what would decide.
        distance: How far the artefact is from this clause, to tell the nearest kernel.
    """

    clause: str
    must: str
    got: str = ""
    fix: str = ""
    tensor: str | None = None
    is_open: bool = False
    distance: int = 1


def unknown(clause: str, why: str = "the target leaves it unknown") -> Finding:
    """A clause that cannot be judged."""
    return Finding(clause, why, is_open=True, distance=0)
