# SPDX-License-Identifier: Apache-2.0
"""OpenField: a field that decides something and that a target leaves open."""

from collections.abc import Iterator
from dataclasses import dataclass

from qhw.schema.base import UNKNOWN, Path
from qhw.schema.words import joined

__all__ = ["OpenField", "left_open"]


@dataclass(frozen=True)
class OpenField:
    """A field that decides something and is absent or unknown.

    Attributes:
        path: Where it would stand.
        value: `absent`: nobody looked. `unknown`: looked for, not published.
        kinds: Operator kinds whose result it decides; empty where it is about the whole target.
        commands: What cannot answer because of it.
        where: On what operators it decides, in words; empty: on all of these kinds.
        effect: What follows, in words, where more is to be said than that the commands cannot answer.
    """

    path: Path
    value: str
    kinds: tuple[str, ...]
    commands: tuple[str, ...]
    where: str = ""
    effect: str = ""

    def sentence(self) -> str:
        """As `absent: qhw verify and qhw golden cannot answer for Conv and Gemm`."""
        if self.effect:
            return f"{self.value}: {self.effect}"
        about = f" for {joined(self.kinds)}" if self.kinds else ""
        return f"{self.value}: {joined(self.commands)} cannot answer{about}{f', {self.where}' if self.where else ''}"


def left_open(
    path: Path,
    value: object,
    commands: tuple[str, ...],
    *,
    kinds: tuple[str, ...] = (),
    where: str = "",
    effect: str = "",
) -> Iterator[OpenField]:
    """The field, where its value is absent or unknown; the rest as in `OpenField`."""
    if value is None or value == UNKNOWN:
        yield OpenField(path, "absent" if value is None else UNKNOWN, kinds, commands, where, effect)
