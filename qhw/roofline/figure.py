# SPDX-License-Identifier: Apache-2.0
"""A figure that knows what it lacks: a value, or a lower bound and the fields that would make it one."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Figure"]


@dataclass(frozen=True)
class Figure:
    """A quantity of at least `at_least`, and exactly that where nothing is missing.

    Sums and maxima of figures lack what any of their parts lacks, so that no unknown part counts as nothing.

    Attributes:
        at_least: What the known facts alone give; 0 where they give nothing.
        missing: Fields of the target, or facts in words, without which the value is not known.
    """

    at_least: float
    missing: tuple[str, ...] = ()

    @property
    def value(self) -> float | None:
        """The figure; None where something is missing."""
        return None if self.missing else self.at_least

    def times(self, factor: float) -> "Figure":
        """This figure times a known number that is not negative."""
        return Figure(self.at_least * factor, self.missing)

    @staticmethod
    def sum(parts: "Iterable[Figure]") -> "Figure":
        """All parts together."""
        listed = tuple(parts)
        return Figure(sum(part.at_least for part in listed), _missing(listed))

    @staticmethod
    def largest(parts: "Iterable[Figure]") -> "Figure":
        """The largest part; not known where any is not, since that one may be larger still."""
        listed = tuple(parts)
        return Figure(max((part.at_least for part in listed), default=0.0), _missing(listed))

    def to_data(self) -> dict[str, object]:
        """As JSON data: `value` is null where something is missing, `at_least` null where nothing is known."""
        low = self.at_least if self.at_least or not self.missing else None
        return {"value": self.value, "at_least": low, "missing": list(self.missing)}


def _missing(parts: tuple[Figure, ...]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(field for part in parts for field in part.missing))
