# SPDX-License-Identifier: Apache-2.0
"""A cell: an operator that the accelerator runs, what its kernel computes along, and the formats it may have."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from qhw.graph.operator import Operator
from qhw.schema import Kernel
from qhw.schema import Operator as OperatorSpec

__all__ = ["TWO_OPERANDS", "Cell", "listed", "reads_input_row"]

TWO_OPERANDS = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min", "MatMul"})
"""Kinds whose kernels list the second operand under `weight`, and mean `input` where they do not."""


@dataclass(frozen=True)
class Cell:
    """An operator that the accelerator runs.

    Attributes:
        operator: The operator whose kernel it is.
        spec: The target's row for it.
        path: Field path of that row.
        members: Names of the operators computed along, this one first; without what is folded away.
        inputs: Tensors it reads that may be quantized.
        output: The tensor it writes, under its name once the plan has run.
        kernels: Kernel ids by their rows, preferred first; empty for an operator that only moves data.
        activations: Formats that an activation can have here.
        held: Formats that each kernel takes for the constant operand, by kernel id.
        gives_float: Whether its result is float.
        at_edge: Formats of its result in place of its kernels', where it leaves the network here; None: theirs.
        rows: The kernels, and those that could hold it but for the rules on its scales and its width.
    """

    operator: Operator
    spec: OperatorSpec
    path: str
    members: tuple[str, ...]
    inputs: tuple[str, ...]
    output: str
    kernels: Mapping[str, Kernel]
    activations: frozenset[str]
    held: Mapping[str, tuple[str, ...]]
    gives_float: bool = False
    at_edge: tuple[str, ...] | None = None
    rows: Mapping[str, Kernel] = field(default_factory=dict)

    @property
    def weight(self) -> str | None:
        """Name of its constant operand, where that is quantized."""
        return self.operator.weight if self.kernels and self.spec.parameters != "float" else None

    @property
    def keeps_precision(self) -> bool:
        """Whether all that it reads and gives has one width."""
        return self.spec.may_change_precision is False and bool(self.kernels)

    @property
    def same_scale(self) -> str:
        """Which of its tensors share a scale. An operator without kernels only moves data, so that all of them do."""
        return str(self.spec.same_scale) if self.kernels else "all"

    @property
    def tied(self) -> tuple[int, ...]:
        """Places on one scale: those of its operands in order, then that of its result, behind all operands."""
        return self._places(self.same_scale)

    @property
    def alike(self) -> tuple[int, ...]:
        """Places in one format: those on one scale, or aligned ones, which keep scales of their own."""
        return self._places("all" if self.same_scale == "aligned" else self.same_scale)

    def _places(self, rule: str) -> tuple[int, ...]:
        operands = tuple(range(len(self.inputs)))
        result = () if self.gives_float else (len(operands),)
        places = {"all": operands + result, "inputs": operands, "input_output": operands[:1] + result}
        return places.get(rule, ())

    def operand_formats(self, kernel: str, index: int) -> tuple[str, ...]:
        """Format ids that a kernel allows for one operand that is an activation."""
        row = self.kernels[kernel]
        position = index + 1 if self.operator.attributes.get("weight_operand") == 0 else index
        second = position == 1 and self.operator.kind in TWO_OPERANDS
        return listed(row.weight if second and isinstance(row.weight, tuple) else row.input, self.activations)

    def weight_formats(self, kernel: str) -> tuple[str, ...]:
        """Format ids that a kernel allows for the constant operand."""
        return self.held.get(kernel, ())

    def output_formats(self, kernel: str) -> tuple[str, ...]:
        """Format ids that a kernel allows for the result."""
        if self.gives_float:
            return ()
        return listed(self.kernels[kernel].output if self.at_edge is None else self.at_edge, self.activations)

    def activation_formats(self) -> tuple[str, ...]:
        """Format ids that any of its kernels allows for any activation."""
        found: list[str] = []
        for kernel in self.kernels:
            for index in range(len(self.inputs)):
                found.extend(self.operand_formats(kernel, index))
            found.extend(self.output_formats(kernel))
        return tuple(dict.fromkeys(found))


def listed(formats: object, usable: Collection[str]) -> tuple[str, ...]:
    """Those of a list of formats that can be had; none where the list is absent or unknown."""
    return tuple(name for name in formats if name in usable) if isinstance(formats, tuple) else ()


def reads_input_row(operator: Operator, row: Kernel) -> bool:
    """Whether a kernel's `input` lists the formats of an operator's constant operand."""
    two = operator.kind in TWO_OPERANDS
    return two and (not isinstance(row.weight, tuple) or operator.attributes.get("weight_operand") == 0)
