# SPDX-License-Identifier: Apache-2.0
"""Which memory carries which bytes: the nearest that holds them, and behind it the next for what does not fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from qhw.roofline.figure import Figure
from qhw.roofline.traffic import CONSTANT, Cell, Content
from qhw.schema import Clock, Memory, TargetSpec

__all__ = ["Share", "bandwidth", "shares"]

_CONTENTS: tuple[Content, ...] = ("weights", "activations", "biases", "tables")


@dataclass(frozen=True)
class Share:
    """What one memory carries of one cell: which part of its bytes, by content; and what hides the whole."""

    parts: Mapping[Content, float]
    missing: tuple[str, ...] = ()


def shares(
    target: TargetSpec, cells: Sequence[Cell]
) -> tuple[list[dict[str, Share]], tuple[str, ...], tuple[str, ...]]:
    """Per cell what each memory carries; what no memory is stated to hold; and what is refused.

    Memories are gone through in the order of the file, nearest first. All bytes of a cell pass the first memory that
    holds their kind. Where what must stay there (weights, biases and tables of the whole network, activations alive)
    exceeds its capacity, the part that does not fit passes the next memory as well, once for each time it is used.
    """
    found: list[dict[str, Share]] = [{} for _ in cells]
    if not target.memories:
        return found, ("memories",), ()
    totals = {c: Figure.sum(cell.bytes[c] for cell in _first_readers(cells, c)) for c in CONSTANT}
    refused: dict[str, None] = {}
    unplaced: dict[str, None] = {}
    for index, cell in enumerate(cells):
        needs: dict[Content, Figure] = {**totals, "activations": cell.live}
        left: dict[Content, float] = {c: 1.0 for c in _CONTENTS if _counts(needs[c])}
        for name, memory in target.memories.items():
            share, left, said = _carried(target, name, memory, needs, left)
            found[index][name] = share
            refused.update(dict.fromkeys(said))
        unplaced.update(dict.fromkeys(f"memories.*.holds: none holds {c}" for c in left if not _is_held(target, c)))
    return found, tuple(unplaced), tuple(refused)


def bandwidth(target: TargetSpec, name: str, clock: str | None) -> float | str:
    """Bytes per second of a memory under a clock preset, or the field that would say."""
    preset = target.clocks.get(clock) if clock is not None else None
    if preset is not None and isinstance(preset.bandwidth_bytes_per_s, dict):
        stated = preset.bandwidth_bytes_per_s.get(name)
        if stated is not None:
            return stated
    memory = target.memories[name]
    if clock is not None and not is_default(target, clock):
        return f"clocks.{clock}.bandwidth_bytes_per_s.{name}"  # the memory's own is that at the default clock
    for field in ("bandwidth_bytes_per_s", "ports"):
        if not isinstance(getattr(memory, field), int | float):
            return f"memories.{name}.{field}"
    assert isinstance(memory.bandwidth_bytes_per_s, float) and isinstance(memory.ports, int)
    return memory.bandwidth_bytes_per_s * memory.ports


def is_default(target: TargetSpec, clock: str) -> bool:
    """Whether a preset is the one to assume: it says so, or is the only one."""
    preset: Clock = target.clocks[clock]
    return preset.is_default is True or len(target.clocks) == 1


def _carried(
    target: TargetSpec, name: str, memory: Memory, needs: Mapping[Content, Figure], left: Mapping[Content, float]
) -> tuple[Share, dict[Content, float], list[str]]:
    """What a memory carries of what is left for it, what is left for the next, and what is refused."""
    if not isinstance(memory.holds, tuple):
        return Share({}, (f"memories.{name}.holds",)), dict(left), []
    mine = {c: part for c, part in left.items() if c in memory.holds}
    rest = {c: part for c, part in left.items() if c not in mine}
    if not mine:
        return Share({}), rest, []
    need = Figure.sum(needs[c].times(part) for c, part in mine.items())
    behind = any(_holds(other, c) for other in _behind(target, name) for c in mine)
    if not isinstance(memory.capacity_bytes, int):
        # The outermost memory takes what there is; of any other it decides what goes further.
        return Share(mine, (f"memories.{name}.capacity_bytes",) if behind else ()), rest, []
    if need.at_least <= memory.capacity_bytes:
        # What is not known may still be too much.
        return Share(mine, need.missing if behind or memory.past_capacity is not None else ()), rest, []
    if memory.past_capacity == "refuse":
        text = f"memories.{name}: {memory.capacity_bytes:,} bytes, and refuses more; {need.at_least:,.0f} are needed"
        return Share(mine, (f"memories.{name}: what does not fit is refused",)), rest, [text]
    if memory.past_capacity not in ("stream", "spill"):
        return Share(mine, (f"memories.{name}.past_capacity",)), rest, []
    over = 1 - memory.capacity_bytes / need.at_least
    further = {c: part * over for c, part in mine.items()}
    lost = [c for c in further if not any(_holds(other, c) for other in _behind(target, name))]
    missing = [f"memories: none behind {name} holds the {c} past its capacity" for c in lost]
    return Share(mine, (*need.missing, *missing)), {**rest, **further}, []


def _behind(target: TargetSpec, name: str) -> list[Memory]:
    names = list(target.memories)
    return [target.memories[other] for other in names[names.index(name) + 1 :]]


def _holds(memory: Memory, content: Content) -> bool:
    return isinstance(memory.holds, tuple) and content in memory.holds


def _is_held(target: TargetSpec, content: Content) -> bool:
    return any(not isinstance(m.holds, tuple) or content in m.holds for m in target.memories.values())


def _counts(figure: Figure) -> bool:
    return bool(figure.at_least or figure.missing)


def _first_readers(cells: Sequence[Cell], content: Content) -> list[Cell]:
    """Cells that bring constants of their own; a tensor that several share is kept once."""
    seen: set[str | None] = set()
    found = []
    for cell in cells:
        name = {"weights": cell.operator.weight, "biases": cell.operator.bias}.get(content)
        if name is None or name not in seen:
            found.append(cell)
        seen.add(name)
    return found
