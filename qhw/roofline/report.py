# SPDX-License-Identifier: Apache-2.0
"""The report of an estimate: one line per operator, and the totals."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qhw.roofline.figure import Figure

__all__ = ["CostReport", "OperatorCost"]


@dataclass(frozen=True)
class OperatorCost:
    """One operator on the accelerator, with what is fused to it, for one sample.

    Attributes:
        name: The operator.
        kind: Its kind.
        kernel: The kernel it runs in; None where it only moves data.
        macs: Multiply-accumulates of the model.
        compute: Cycles of arithmetic, channels rounded up.
        traffic: Memory -> bytes that pass it.
        memory: Memory -> cycles that these bytes take.
        cycles: The largest of compute and memories, which overlap.
    """

    name: str
    kind: str
    kernel: str | None
    macs: int
    compute: Figure
    traffic: Mapping[str, Figure]
    memory: Mapping[str, Figure]
    cycles: Figure

    @property
    def bound_by(self) -> str | None:
        """`compute`, or the memory that is slower; None where some figure is not known: it may be the largest."""
        parts = {"compute": self.compute, **self.memory}
        if self.cycles.missing:
            return None
        return max(parts, key=lambda name: parts[name].at_least)

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "name": self.name,
            "kind": self.kind,
            "kernel": self.kernel,
            "macs": self.macs,
            "compute_cycles": self.compute.to_data(),
            "memory_bytes": {name: figure.to_data() for name, figure in self.traffic.items()},
            "memory_cycles": {name: figure.to_data() for name, figure in self.memory.items()},
            "cycles": self.cycles.to_data(),
            "bound_by": self.bound_by,
        }


@dataclass(frozen=True)
class CostReport:
    """What one sample costs on the accelerator, operators one after the other.

    Attributes:
        target: Name of the target.
        clock: The clock preset assumed; None where the target has none to assume.
        operators: Those that cost something, in execution order.
        host: Operators on the host, of which nothing is known and which no total counts.
        refused: What does not fit into a memory whose target says that it is then refused.
        cycles: Clock cycles.
        seconds: Time.
        joules: Energy: the power that the target states times the time. No lower bound: it is power at the peak.
    """

    target: str
    clock: str | None
    operators: tuple[OperatorCost, ...]
    host: tuple[str, ...]
    refused: tuple[str, ...]
    cycles: Figure
    seconds: Figure
    joules: Figure

    @property
    def bounds(self) -> dict[str, int]:
        """What bounds the operators -> how many; `unknown` for those of which nobody can tell."""
        found: dict[str, int] = {}
        for operator in self.operators:
            name = operator.bound_by or "unknown"
            found[name] = found.get(name, 0) + 1
        return found

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "schema_version": 1,
            "target": self.target,
            "clock": self.clock,
            "cycles": self.cycles.to_data(),
            "seconds": self.seconds.to_data(),
            "joules": self.joules.to_data(),
            "bounds": self.bounds,
            "host": list(self.host),
            "refused": list(self.refused),
            "operators": [operator.to_data() for operator in self.operators],
        }
