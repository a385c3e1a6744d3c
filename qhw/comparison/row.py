# SPDX-License-Identifier: Apache-2.0
"""The matrix: one row per target, as data."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from qhw.decisions import QuantPlan, Reason
from qhw.engine import Score
from qhw.graph import VIEW_KINDS, QuantPoint
from qhw.roofline import CostReport
from qhw.schema import TargetSpec

__all__ = ["Comparison", "Headroom", "HostOperator", "Row"]

Ended = Literal["load", "plan", "quantize"]
_WISHES = ("pipeline", "--", "QHW_BLOCK", "resources")  # subjects of reasons that tell of the user, not of the target


@dataclass(frozen=True)
class Headroom:
    """What is left of the accumulators.

    Attributes:
        bits: Bits left in the tightest accumulator whose width is known, negative where some input overflows it; None
            where no width is known.
        overflowing: Operators whose sums, or sums of two products, some input makes overflow.
        unknown: Operators whose accumulator's width the target does not state.
    """

    bits: int | None
    overflowing: tuple[str, ...]
    unknown: tuple[str, ...]


@dataclass(frozen=True)
class HostOperator:
    """An operator that the accelerator does not run, and why."""

    name: str
    kind: str
    reason: str


@dataclass(frozen=True)
class Row:
    """One target.

    What was not reached is None: `ended` says how far it came, `reason` why no further.

    Attributes:
        target: Its name.
        spec: The resolved target.
        plan: Every decision, with reasons.
        cost: Estimated cycles, time and energy.
        simulated: Score of the simulation, with its paired agreement with the float model.
        bytes: Of all parameters, as the target stores them.
        headroom: Of the accumulators.
        seconds: How long this row took.
        ended: The step that failed.
        reason: Why, in one line.
    """

    target: str
    spec: TargetSpec | None = None
    plan: QuantPlan | None = None
    cost: CostReport | None = None
    simulated: Score | None = None
    bytes: int | None = None
    headroom: Headroom | None = None
    seconds: float = 0.0
    ended: Ended | None = None
    reason: str | None = None

    @property
    def host(self) -> tuple[HostOperator, ...]:
        """Operators on the host, but those that only show a tensor otherwise."""
        operators = () if self.plan is None else self.plan.operators
        return tuple(
            HostOperator(op.name, op.kind, f"{op.reason} ({op.subject})")
            for op in operators
            if op.where == "host" and op.kind not in VIEW_KINDS
        )

    @property
    def operators(self) -> int:
        """Operators that compute or move something, those that are folded away left out."""
        operators = () if self.plan is None else self.plan.operators
        return sum(op.where != "folded" and op.kind not in VIEW_KINDS for op in operators)

    @property
    def weights(self) -> Mapping[str, int]:
        """Format -> weights that have it, the most frequent first."""
        return self._formats("weight")

    @property
    def activations(self) -> Mapping[str, int]:
        """Format -> tensors that have it, the most frequent first."""
        return self._formats("activation", "input", "edge")

    @property
    def algorithms(self) -> tuple[str, ...]:
        """Names of the algorithms that run, in order."""
        return () if self.plan is None else tuple(step.algorithm for step in self.plan.steps)

    @property
    def refusals(self) -> Mapping[str, tuple[Reason, ...]]:
        """Algorithm -> why not, of those that the target or the model rules out; wishes and preferences are none."""
        found = {}
        for refusal in () if self.plan is None else self.plan.refused:
            reasons = tuple(r for r in refusal.verdict.reasons if not r.subject.startswith(_WISHES))
            if reasons:
                found[refusal.algorithm] = reasons
        return found

    def _formats(self, *roles: str) -> Mapping[str, int]:
        points: Iterable[QuantPoint] = () if self.plan is None else self.plan.points
        return dict(Counter(point.format for point in points if point.role in roles).most_common())

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        if self.plan is None:
            return {"target": self.target, "seconds": self.seconds, "ended": self.ended, "reason": self.reason}
        host = self.host
        return {
            "target": self.target,
            "seconds": self.seconds,
            "ended": self.ended,
            "reason": self.reason,
            "simulated": None if self.simulated is None else asdict(self.simulated),
            "bytes": self.bytes,
            "accelerator_macs": self.plan.accelerator_macs,
            "total_macs": self.plan.total_macs,
            "operators": self.operators,
            "host": [asdict(operator) for operator in host],
            "headroom": None if self.headroom is None else asdict(self.headroom),
            "cost": None if self.cost is None else self.cost.to_data(),
            "decided": {
                "weights": dict(self.weights),
                "activations": dict(self.activations),
                "algorithms": [
                    {"stage": step.stage, "algorithm": step.algorithm, "why": step.verdict.sentence()}
                    for step in self.plan.steps
                ],
                "refused": {name: [r.sentence() for r in reasons] for name, reasons in self.refusals.items()},
                "unknown": [note.subject for note in self.plan.notes],
            },
        }


@dataclass(frozen=True)
class Comparison:
    """One model on many targets, in the order asked for.

    Attributes:
        rows: One per target.
        float_score: Of the float model, run once; None without labelled samples.
        float_bytes: Of its parameters.
        samples: Calibration samples; None where nobody counted.
    """

    rows: tuple[Row, ...]
    float_score: Score | None
    float_bytes: int
    samples: int | None = None

    def row(self, target: str) -> Row:
        """The row of a target."""
        return next(row for row in self.rows if row.target == target)

    def to_data(self) -> dict[str, Any]:
        """As JSON data."""
        return {
            "schema_version": 1,
            "float": None if self.float_score is None else asdict(self.float_score),
            "float_bytes": self.float_bytes,
            "calibration_samples": self.samples,
            "units": {"macs, cost": "per sample", "seconds": "that the row took", "headroom.bits": "bits left"},
            "targets": [row.to_data() for row in self.rows],
        }
