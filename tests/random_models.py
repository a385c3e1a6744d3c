# SPDX-License-Identifier: Apache-2.0
"""Random small models: steps drawn one after another, each on values that suit it.

    program, x = draw(seed, Repertoire(ranks=(4, 2), steps=(conv, concat), layers=(conv, linear)))

    drawn = quantized(seed, repertoire, "google/litert-int8")

The steps stand in `random_steps`; a repertoire names those that a runtime computes in integers.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress

Function = Callable[[Tensor], Tensor]
Step = Callable[["Draft", int], bool]
"""Adds to a draft what reads the value of that index; False where the value does not suit it."""


@dataclass(frozen=True)
class Repertoire:
    """What models are drawn from.

    Attributes:
        ranks: Of the input, batch and channels counted.
        steps: One that stands twice is drawn twice as often.
        layers: Steps with weights, of which one suits every value; each model has one of them.
        clips: What may follow an operator that takes it in, by name.
    """

    ranks: tuple[int, ...]
    steps: tuple[Step, ...]
    layers: tuple[Step, ...]
    clips: Mapping[str, Function] = field(default_factory=dict)


class Program(nn.Module):
    """Steps one after another; the results that nothing reads are the outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        self.steps: list[tuple[Callable[..., Tensor], tuple[int, ...]]] = []
        self.kinds: list[str] = []

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """All outputs."""
        values = [x]
        for step, sources in self.steps:
            values.append(step(*(values[i] for i in sources)))
        used = {i for _, sources in self.steps for i in sources}
        return tuple(value for i, value in enumerate(values) if i not in used)


class Draft:
    """A program in the making, with an example of every value."""

    def __init__(self, seed: int, repertoire: Repertoire) -> None:
        self.rng = random.Random(seed)
        self.program = Program()
        self.repertoire = repertoire
        torch.manual_seed(seed)
        rank = self.rng.choice(repertoire.ranks)
        sides = [self.rng.randint(5, 9) for _ in range(rank - 2)]
        batch = self.rng.randint(2, 4) if sides else self.rng.randint(32, 64)
        self.values = [torch.randn(batch, self.rng.randint(1, 9), *sides)]
        self.hidden: set[int] = set()  # before a clip, which the operator takes in only where nothing else reads it

    @property
    def last(self) -> int:
        """Index of the newest value."""
        return len(self.values) - 1

    def shown(self) -> list[int]:
        """The values that a step may read."""
        return [i for i in range(len(self.values)) if i not in self.hidden]

    def partners(self, source: int, suits: Callable[[Tensor], bool]) -> list[int]:
        """Values that suit as further operands, others than the first if there are any."""
        found = [i for i in self.shown() if suits(self.values[i])]
        return [i for i in found if i != source] or found

    def add(self, kind: str, step: Callable[..., Tensor], *sources: int) -> None:
        """One more value."""
        if isinstance(step, nn.Module):
            self.program.layers.append(step)
        with torch.no_grad():
            found = step(*(self.values[i] for i in sources))
        self.program.steps.append((step, sources))
        self.program.kinds.append(kind)
        self.values.append(found)

    def clip(self) -> None:
        """Sometimes a clip of the newest value, which the operator takes in."""
        clips = self.repertoire.clips
        if clips and self.rng.random() < 0.6:
            kind = self.rng.choice(sorted(clips))
            self.hidden.add(self.last)
            self.add(kind, clips[kind], self.last)

    def step(self, source: int, among: Sequence[Step]) -> None:
        """One more step on a value, of those that it suits."""
        makers = list(among)
        self.rng.shuffle(makers)
        next(maker for maker in makers if maker(self, source))


def draw(seed: int, repertoire: Repertoire) -> tuple[Program, Tensor]:
    """The model of a seed, of two to six steps and what these bring along, and an example input."""
    draft = Draft(seed, repertoire)
    if draft.rng.random() < 0.3:
        draft.step(0, repertoire.steps)
    draft.step(draft.last, repertoire.layers)
    for _ in range(draft.rng.randint(1, 4)):
        shown = draft.shown()
        draft.step(draft.rng.choice((shown[-1], draft.rng.choice(shown))), repertoire.steps)
    return draft.program.eval(), draft.values[0]


@dataclass(frozen=True)
class Drawn:
    """A random model, quantized: an example input, and what it was drawn from."""

    result: QuantizedModel
    example: Tensor
    steps: tuple[str, ...]

    @property
    def hosted(self) -> tuple[str, ...]:
        """Kinds of the operators that the target leaves to the host."""
        return tuple(sorted({one.kind for one in self.result.plan.operators if one.where == "host"}))


def quantized(seed: int, repertoire: Repertoire, target: str, formats: Mapping[str, str] | None = None) -> Drawn:
    """The model of a seed, quantized by the plain pipeline.

    Args:
        seed: Of the draws.
        repertoire: What it is drawn from.
        target: Name of the target.
        formats: As in `qhw.plan`.
    """
    program, x = draw(seed, repertoire)
    graph = qhw.capture(program, x)
    plan = qhw.plan(graph, target, calibration=x, pipeline="ranges-ptq", formats=formats or {})
    result = qhw.quantize(graph, plan, calibration=x, progress=SilentProgress())
    return Drawn(result, x, tuple(program.kinds))
