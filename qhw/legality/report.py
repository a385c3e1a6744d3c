# SPDX-License-Identifier: Apache-2.0
"""What was judged, as frozen data: operators, violations, clauses that cannot be judged."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

from qhw.wording import counted

__all__ = ["CheckReport", "OperatorReport", "Unjudged", "Unread", "Violation"]

Status = Literal["legal", "illegal", "host", "unjudged", "passed"]


@dataclass(frozen=True)
class Violation:
    """A clause of the target that an operator breaks.

    Attributes:
        node: Name of the operator in the artefact; of the tensor where the artefact has no operators; empty for the
            network as a whole.
        kind: Kind of the operator.
        tensor: The tensor in question; None where it is the operator itself.
        clause: Dotted field path of the target, as `formats.w8.zero_point`.
        must: What the clause asks for.
        got: What the artefact has.
        fix: What to do.
    """

    node: str
    kind: str
    tensor: str | None
    clause: str
    must: str
    got: str
    fix: str

    @property
    def message(self) -> str:
        """All of it in one line."""
        where = self.node if self.tensor in (None, self.node) else f"{self.node}: {self.tensor}"
        start = f"{where}: {self.clause} " if where else f"{self.clause} "
        return f"{start}{self.must}; got {self.got}. {self.fix}"


@dataclass(frozen=True)
class Unjudged:
    """A clause that decides, and that the target or the artefact leaves open.

    Attributes:
        clause: Dotted field path.
        why: What is missing.
        nodes: Operators that depend on it.
    """

    clause: str
    why: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Unread:
    """What the target states of files, and no check looks at.

    Attributes:
        clause: Dotted field path.
        value: What stands there.
    """

    clause: str
    value: str


@dataclass(frozen=True)
class OperatorReport:
    """How one operator was judged.

    Attributes:
        name: As in the artefact.
        kind: qhw's kind; `Unknown` where it has none.
        type: The artefact's own word.
        status: `legal`; `illegal`; `host`: it runs there, legally; `unjudged`: what decides is open; `passed`: it is
            computed along with another operator, or is another view of a tensor.
        kernel: The kernel it was held to; None where there is none.
        reason: Why it has that status, where that is not legal.
    """

    name: str
    kind: str
    type: str
    status: Status
    kernel: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class CheckReport:
    """A quantized model held against a target.

    Attributes:
        artefact: The file.
        form: What it is, as `ONNX QDQ`.
        target: Name of the target.
        operators: All operators, in execution order; empty where the artefact holds encodings alone.
        tensors: Tensors that were judged by themselves, where the artefact holds encodings alone.
        violations: What is broken.
        unjudged: What cannot be judged.
        remarks: What could not be read of the file.
        unread: What the target states of such files and was not looked at.
    """

    artefact: str
    form: str
    target: str
    operators: tuple[OperatorReport, ...]
    tensors: int
    violations: tuple[Violation, ...]
    unjudged: tuple[Unjudged, ...]
    remarks: tuple[str, ...] = ()
    unread: tuple[Unread, ...] = ()

    @property
    def is_legal(self) -> bool:
        """Whether nothing is broken; clauses that cannot be judged are no violations."""
        return not self.violations

    @property
    def is_judged(self) -> bool:
        """Whether anything was held to a kernel of the target; of a float model nothing can be."""
        is_held = any(one.kernel is not None or one.status in ("legal", "illegal") for one in self.operators)
        return bool(is_held or self.violations or self.tensors)

    def count(self, status: Status) -> int:
        """How many operators have a status."""
        return sum(one.status == status for one in self.operators)

    @property
    def summary(self) -> str:
        """One line of figures."""
        clauses = counted(len(self.unjudged), "clause")
        open_words = f"cannot judge: {clauses}" if self.unjudged else "nothing left open"
        if not self.operators:
            judged = f"{counted(self.tensors, 'tensor')} judged, {counted(len(self.violations), 'violation')}"
            return f"{judged}; {open_words}"
        total = sum(self.count(status) for status in ("legal", "illegal", "unjudged"))
        return (
            f"{counted(total, 'operator')} judged: {self.count('legal')} legal, {self.count('illegal')} illegal, "
            f"{self.count('unjudged')} cannot be judged; {self.count('host')} on the host; {open_words}"
        )

    def to_json(self) -> str:
        """All of it as JSON text; the same report gives the same bytes."""
        counts = {status: self.count(status) for status in ("legal", "illegal", "host", "unjudged")}
        data = {
            "is_legal": self.is_legal,
            "is_judged": self.is_judged,
            "summary": self.summary,
            "counts": counts,
            **asdict(self),
        }
        return json.dumps(data, indent=1, ensure_ascii=False) + "\n"
