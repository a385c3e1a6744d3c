# SPDX-License-Identifier: Apache-2.0
"""Which figures a target leaves open that decide what a network costs."""

from collections.abc import Iterator

from qhw.schema.base import UNKNOWN, Path
from qhw.schema.open_field import OpenField
from qhw.schema.operators import WEIGHTED_KINDS
from qhw.schema.spec import TargetSpec

__all__ = ["open_costs"]

COMMANDS = ("qhw cost",)
MULTIPLIED = frozenset(WEIGHTED_KINDS) | {"MatMul"}
"""Kinds whose cycles follow from their multiply-accumulates; those of others from their results."""


def open_costs(spec: TargetSpec) -> Iterator[OpenField]:
    """The figures that `qhw cost` needs and does not have; one line where the target has none at all."""
    kinds = _kinds_by_kernel(spec)
    stated = (spec.kernels[name].macs_per_cycle for name in kinds)
    if spec.cost is None and not spec.clocks and not spec.memories and all(value is None for value in stated):
        yield _left(("cost",), None, effect="qhw cost tells multiply-accumulates and bytes; no cycles, time or energy")
        return
    multiplied = {name: found for name, mine in kinds.items() if (found := tuple(k for k in mine if k in MULTIPLIED))}
    for name, mine in multiplied.items():
        yield from _open(("kernels", name, "macs_per_cycle"), spec.kernels[name].macs_per_cycle, mine)
    every = tuple(dict.fromkeys(kind for mine in multiplied.values() for kind in mine))
    rest = tuple(dict.fromkeys(kind for mine in kinds.values() for kind in mine if kind not in MULTIPLIED))
    cost = spec.cost
    if every:
        yield from _open(("cost", "channel_multiple"), cost.channel_multiple if cost else None, every)
    if rest:
        yield from _open(("cost", "elementwise_per_cycle"), cost.elementwise_per_cycle if cost else None, rest)
    yield from _of_memories(spec)
    if not spec.clocks:
        yield _left(("clocks",), None, effect="qhw cost tells no time and no energy")
    elif len(spec.clocks) > 1 and all(clock.is_default is not True for clock in spec.clocks.values()):
        yield _left(("clocks", "*", "is_default"), None, effect="qhw cost needs --clock")
    for preset, clock in spec.clocks.items():
        yield from _effect(("clocks", preset, "clock_hz"), clock.clock_hz, f"qhw cost tells no time at clock {preset}")
    yield from _effect(("cost", "power_w"), cost.power_w if cost else None, "qhw cost tells no energy")


def _kinds_by_kernel(spec: TargetSpec) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for kind, operator in spec.operators.items():
        for name in operator.kernels if isinstance(operator.kernels, tuple) else ():
            found[name] = (*found.get(name, ()), kind)
    return found


def _of_memories(spec: TargetSpec) -> Iterator[OpenField]:
    if not spec.memories:
        yield _left(("memories",), None, effect="qhw cost does not know what memories bound")
    last = next(reversed(spec.memories), None)
    for name, memory in spec.memories.items():
        what = f"qhw cost does not know what memory {name}"
        yield from _effect(("memories", name, "holds"), memory.holds, f"{what} holds")
        given = all(_by_clock(spec, preset, name) for preset in spec.clocks) and bool(spec.clocks)
        for field in () if given else ("bandwidth_bytes_per_s", "ports"):
            yield from _effect(("memories", name, field), getattr(memory, field), f"{what} bounds")
        if name != last:
            yield from _effect(("memories", name, "capacity_bytes"), memory.capacity_bytes, f"{what} passes on")
            if isinstance(memory.capacity_bytes, int):
                effect = f"{what} does with more than its capacity"
                yield from _effect(("memories", name, "past_capacity"), memory.past_capacity, effect)


def _by_clock(spec: TargetSpec, preset: str, memory: str) -> bool:
    """Whether a clock preset states the bandwidth of a memory."""
    stated = spec.clocks[preset].bandwidth_bytes_per_s
    return isinstance(stated, dict) and memory in stated


def _open(path: Path, value: object, kinds: tuple[str, ...]) -> Iterator[OpenField]:
    if value is None or value == UNKNOWN:
        yield _left(path, value, kinds)


def _effect(path: Path, value: object, effect: str) -> Iterator[OpenField]:
    if value is None or value == UNKNOWN:
        yield _left(path, value, effect=effect)


def _left(path: Path, value: object, kinds: tuple[str, ...] = (), effect: str = "") -> OpenField:
    return OpenField(path, "absent" if value is None else UNKNOWN, kinds, COMMANDS, effect=effect)
