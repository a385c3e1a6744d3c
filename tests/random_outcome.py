# SPDX-License-Identifier: Apache-2.0
"""What random models gave beside a runtime: codes that differ, and codes that mutants of our arithmetic change.

A mutant is computed operator by operator, on the true codes of its operands, so that what it changes is its own.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer import Difference, Site
from qhw.integer.model import Executed

FORMS = importlib.import_module("qhw.integer.lower")._FORMS

Patch = tuple[str, Any]
"""What is replaced, below qhw.integer, and by what: a function of the original."""


def unchanged(site: Site) -> Site:
    """The operator as it is."""
    return site


@dataclass(frozen=True)
class Mutant:
    """Our arithmetic with one clause changed.

    Attributes:
        kinds: Of operators whose codes it must change.
        patches: Of the code.
        change: Of what the target says of an operator.
    """

    kinds: tuple[str, ...]
    patches: tuple[Patch, ...] = ()
    change: Callable[[Site], Site] = unchanged


@dataclass
class Outcome:
    """What cases gave.

    Attributes:
        cases: Run and compared.
        codes: Compared, by operator kind.
        differing: Of them.
        islands: Cases that do not count, by what the runtime or the target runs in float.
        steps: What the cases that count were drawn from, each as often as it was drawn.
        mutants: Codes that each mutant changes, by mutant and operator kind, up to the case that told it apart.
    """

    cases: int = 0
    codes: Counter[str] = field(default_factory=Counter)
    differing: Counter[str] = field(default_factory=Counter)
    islands: Counter[tuple[str, ...]] = field(default_factory=Counter)
    steps: Counter[str] = field(default_factory=Counter)
    mutants: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.cases} cases, {self.codes.total():,} codes, {self.differing.total()} differ"]
        lines += [f"  {kind}: {n:,} codes, {self.differing[kind]} differ" for kind, n in sorted(self.codes.items())]
        lines += [f"  drawn: {', '.join(f'{kind} {n}' for kind, n in sorted(self.steps.items()))}"]
        lines += [f"not counted: {n} cases with {', '.join(found)} in float" for found, n in self.islands.items()]
        lines += [f"mutant {mutant}, {kind}: {n:,}" for (mutant, kind), n in sorted(self.mutants.items()) if n]
        return "\n".join(lines)

    def add(self, compared: Iterable[Difference], kinds: Mapping[str, str], steps: Iterable[str]) -> None:
        """One case: how each tensor differs, the kind of what made it, and what the model was drawn from."""
        self.cases += 1
        self.steps.update(steps)
        for one in compared:
            kind = kinds.get(one.tensor, "input")
            self.codes[kind] += one.codes
            self.differing[kind] += one.differing

    def add_mutants(self, mutants: Mapping[str, Mutant], run: Sequence[Executed]) -> None:
        """Count the codes that mutants change, of the operators that have not told them apart before."""
        for name, mutant in mutants.items():
            wanted = [
                one for one in run
                if one.site.operator.kind in mutant.kinds and not self.mutants[name, one.site.operator.kind]
            ]  # fmt: skip
            if not wanted:
                continue
            with pytest.MonkeyPatch.context() as patch, torch.no_grad():
                for place, change in mutant.patches:
                    module, _, attribute = place.rpartition(".")
                    owner: Any = Site if module == "Site" else importlib.import_module(f"qhw.integer.{module}")
                    patch.setattr(owner, attribute, change(getattr(owner, attribute)))
                for one in wanted:
                    kind = one.site.operator.kind
                    try:
                        form = FORMS[kind](mutant.change(one.site))
                    except IntegerError:  # no integer form on these grids, as a mean by a double rounding on one grid
                        continue
                    codes = form.run([operand.values for operand in one.operands])
                    assert not isinstance(one.result, Tensor)
                    self.mutants[name, kind] += int((codes != one.result.values).sum())

    def check(self, mutants: Iterable[tuple[str, tuple[str, ...]]], islands: float = 0.05) -> None:
        """Nothing differs, every mutant does on some of the kinds beside it, and few cases do not count."""
        print(self)
        assert self.differing.total() == 0, str(self)
        assert self.islands.total() <= islands * self.cases, str(self)
        for mutant, kinds in mutants:
            found = sum(self.mutants[mutant, kind] for kind in kinds)
            assert found > 0, f"these codes do not tell '{mutant}' apart in {', '.join(kinds)}\n{self}"


def always(value: Any) -> Callable[[Any], Callable[..., Any]]:
    """A patch: the value, whatever is asked."""
    return lambda original: lambda *arguments: value


def opposite(original: Any) -> Any:
    """A patch of a property or function that answers yes or no."""
    if isinstance(original, property):
        assert original.fget is not None
        read = original.fget
        return property(lambda self: not read(self))
    return lambda *arguments: not original(*arguments)


@dataclass(frozen=True)
class Rule:
    """A requantization by no rule that the integer room knows, so that none of its short cuts is taken."""

    run: Callable[[Tensor], Tensor]
    kind: str = "mutant"
    rounding: str = "mutant"
    factor: None = None
    multiplier: None = None
    shift: None = None
    bits: None = None
    zero_point: int = 0
    before: bool = False

    def __call__(self, acc: Tensor) -> Tensor:
        return self.run(acc)

    def codes(self, acc: Tensor, limits: tuple[int, int], dtype: torch.dtype) -> Tensor:
        """Clamped, as carried."""
        return self.run(acc).clamp(*limits).to(dtype)
