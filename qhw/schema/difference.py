# SPDX-License-Identifier: Apache-2.0
"""One thing in which two targets differ, as data and as a sentence."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import BaseModel

from qhw.schema.arithmetic import Accumulator, Bias, Requantize
from qhw.schema.content import ABSENT, frozen
from qhw.schema.operators import Approximation
from qhw.schema.words import joined, value_words

__all__ = ["Difference", "Section", "merged"]

Section = Literal["operators", "formats", "arithmetic", "rules", "target"]
Change = Literal["added", "removed", "changed"]
OPERANDS = ("activations", "inputs", "results", "weights")
NUMBERS = re.compile(r"\w+( \[-?\d+, -?\d+\])?")
TABLES: dict[str, type[BaseModel]] = {
    "accumulator": Accumulator,
    "approximation": Approximation,
    "bias": Bias,
    "requantize": Requantize,
}
"""Fields whose tables mean something by what they leave out."""


@dataclass(frozen=True)
class Difference:
    """What one target says otherwise than another.

    Attributes:
        section: `operators`: which there are; `formats`: of their operands and results; `arithmetic`: of their
            kernels; `rules`: what else holds for an operator; `target`: what is about no operator.
        subject: What differs, as `weights`, `accumulator.bits`, `limits.kernel.max`, `fallback`.
        kinds: The operator kinds of which it holds; empty in section `target`.
        change: Whether the second target adds something, lacks it, or says something else.
        before: What the first target says; None where it is not stated.
        after: What the second one says.
        where: On which kernels of these operators, by their formats, as `int16 x int16`; empty: on all.
    """

    section: Section
    subject: str
    kinds: tuple[str, ...]
    change: Change
    before: Any
    after: Any
    where: str = ""

    def sentence(self) -> str:
        """As `adds int16 activations for MatMul`, `accumulator of Conv: unknown -> 32 bits`."""
        kinds = joined(self.kinds) if self.kinds else ""
        if self.section == "operators":
            return self._of_operators(kinds)
        name = self.subject.replace(".", " ").replace("_", " ")
        on = f" with {self.where}" if self.where else ""
        head = f"{name} of {kinds}{on}" if kinds else name
        before, after = (_told(self.subject, value) for value in (self.before, self.after))
        if self.change == "changed":
            return f"{head}: {before} -> {after}"
        if self.change == "removed":
            return f"{head}: {before} is gone"
        if self.subject in OPERANDS and NUMBERS.fullmatch(after):
            return f"adds {after} {name} for {kinds}{on}"
        return f"{head}: adds {after}"

    def _of_operators(self, kinds: str) -> str:
        if self.change == "added":
            return f"adds {kinds}"
        if self.change == "removed":
            return f"{kinds} {'is' if len(self.kinds) == 1 else 'are'} gone"
        return f"{kinds}: {self.before} -> {self.after}"


def merged(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """The same of several operators said once, in the order in which each is met first."""
    found: dict[Any, Difference] = {}
    for one in differences:
        key = (one.section, one.subject, one.change, frozen(one.before), frozen(one.after), one.where)
        known = found.get(key)
        found[key] = one if known is None else replace(known, kinds=tuple(dict.fromkeys((*known.kinds, *one.kinds))))
    return tuple(found.values())


def _told(subject: str, value: Any) -> str:
    """A value in words, with the unit that its field has."""
    if isinstance(value, dict):
        means = ABSENT[TABLES[subject]] if subject in TABLES else {}
        said = {key: held for key, held in value.items() if key not in means or held != means[key]}
        first = [key for key in ("kind", "bits", "overflow", "rounding") if key in said]
        words = [_told(key, said[key]) for key in first]
        words += [f"{key.replace('_', ' ')} {_told(key, held)}" for key, held in said.items() if key not in first]
        return ", ".join(words) or "none"
    if isinstance(value, int) and not isinstance(value, bool) and subject.endswith("bits"):
        return f"{value} bits"
    return value_words(value)
