# SPDX-License-Identifier: Apache-2.0
"""Which figures a target leaves open that decide what a network costs."""

from collections.abc import Iterator

from qhw.schema.open_field import OpenField, left_open
from qhw.schema.operators import SUMMING_KINDS
from qhw.schema.spec import TargetSpec
from qhw.schema.system import Cost

__all__ = ["open_costs"]

COMMANDS = ("qhw cost",)


def open_costs(spec: TargetSpec) -> Iterator[OpenField]:
    """The figures that `qhw cost` needs and does not have; one line where the target has none at all."""
    kinds = _kinds_by_kernel(spec)
    stated = (spec.kernels[name].macs_per_cycle for name in kinds)
    if spec.cost is None and not spec.clocks and not spec.memories and all(value is None for value in stated):
        yield from left_open(
            ("cost",), None, COMMANDS, effect="qhw cost tells multiply-accumulates and bytes; no cycles, time or energy"
        )
        return
    # Their cycles follow from their multiply-accumulates, those of others from their results.
    multiplied = {
        name: found for name, mine in kinds.items() if (found := tuple(k for k in mine if k in SUMMING_KINDS))
    }
    for name, mine in multiplied.items():
        value = spec.kernels[name].macs_per_cycle
        yield from left_open(("kernels", name, "macs_per_cycle"), value, COMMANDS, kinds=mine)
    every = tuple(dict.fromkeys(kind for mine in multiplied.values() for kind in mine))
    rest = tuple(dict.fromkeys(kind for mine in kinds.values() for kind in mine if kind not in SUMMING_KINDS))
    cost = spec.cost or Cost()
    for field, mine in (("channel_multiple", every), ("elementwise_per_cycle", rest)):
        if mine:
            yield from left_open(("cost", field), getattr(cost, field), COMMANDS, kinds=mine)
    yield from _of_memories(spec)
    if not spec.clocks:
        yield from left_open(("clocks",), None, COMMANDS, effect="qhw cost tells no time and no energy")
    elif len(spec.clocks) > 1 and all(clock.is_default is not True for clock in spec.clocks.values()):
        yield from left_open(("clocks", "*", "is_default"), None, COMMANDS, effect="qhw cost needs --clock")
    for preset, clock in spec.clocks.items():
        effect = f"qhw cost tells no time at clock {preset}"
        yield from left_open(("clocks", preset, "clock_hz"), clock.clock_hz, COMMANDS, effect=effect)
    yield from left_open(("cost", "power_w"), cost.power_w, COMMANDS, effect="qhw cost tells no energy")


def _kinds_by_kernel(spec: TargetSpec) -> dict[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for kind, operator in spec.operators.items():
        for name in operator.kernels if isinstance(operator.kernels, tuple) else ():
            found[name] = (*found.get(name, ()), kind)
    return found


def _of_memories(spec: TargetSpec) -> Iterator[OpenField]:
    if not spec.memories:
        effect = "qhw cost does not know what memories bound"
        yield from left_open(("memories",), None, COMMANDS, effect=effect)
    last = next(reversed(spec.memories), None)
    for name, memory in spec.memories.items():
        needed = {"holds": "holds"}
        if not spec.clocks or not all(_by_clock(spec, preset, name) for preset in spec.clocks):
            needed |= {"bandwidth_bytes_per_s": "bounds", "ports": "bounds"}
        if name != last:
            needed["capacity_bytes"] = "passes on"
            if isinstance(memory.capacity_bytes, int):
                needed["past_capacity"] = "does with more than its capacity"
        for field, does in needed.items():
            effect = f"qhw cost does not know what memory {name} {does}"
            yield from left_open(("memories", name, field), getattr(memory, field), COMMANDS, effect=effect)


def _by_clock(spec: TargetSpec, preset: str, memory: str) -> bool:
    """Whether a clock preset states the bandwidth of a memory."""
    stated = spec.clocks[preset].bandwidth_bytes_per_s
    return isinstance(stated, dict) and memory in stated
