# SPDX-License-Identifier: Apache-2.0
"""Why an algorithm was taken or refused, as data; sentences are rendered from it, never stored."""

from pydantic import Field

from qhw.decisions.base import Json, PlanData


class Reason(PlanData):
    """One fact that decided something.

    The fact can be looked up again: flip its value and the decision flips.
    """

    subject: str = Field(description="Field path in the target, or graph fact, or resource, that decided.")
    value: Json = Field(description="The value found there.")
    rule: str = Field(description="What follows from it, in words; {value} stands for the value.")

    def statement(self) -> str:
        """The reason in words."""
        return self.rule.replace("{value}", _word(self.value))

    def sentence(self) -> str:
        """The reason in words, with the place where the fact stands."""
        return f"{self.statement()} ({self.subject})"


class Verdict(PlanData):
    """Whether something is taken, and the facts that decided."""

    taken: bool
    reasons: tuple[Reason, ...] = ()

    def sentence(self) -> str:
        """All reasons, joined."""
        return "; ".join(reason.sentence() for reason in self.reasons)


class Site(PlanData):
    """A place where an algorithm would act, and its verdict there."""

    name: str = Field(description="A group of points, an operator, or a pattern named by its first operator.")
    verdict: Verdict
    absorbs: tuple[str, ...] = Field((), description="Operators that are gone from the graph once this site is done.")
    becomes: dict[str, str] = Field({}, description="Operators that compute another function then: name to kind.")


class Survey(PlanData):
    """An algorithm's answer for one model and target: a verdict on itself and on every site."""

    verdict: Verdict
    sites: tuple[Site, ...] = ()

    @property
    def taken(self) -> tuple[Site, ...]:
        """The sites it would act on; none when the algorithm refuses as a whole."""
        return tuple(site for site in self.sites if site.verdict.taken) if self.verdict.taken else ()


def _word(value: Json) -> str:
    if isinstance(value, list):
        return ", ".join(map(_word, value))
    if value is None or isinstance(value, bool):
        return {None: "absent", True: "true", False: "false"}[value]
    return str(value)
