# SPDX-License-Identifier: Apache-2.0
"""One operator of an artefact under one row of the target: what the families of clauses look at."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.graph import Operator as GraphOperator
from qhw.graph.cell import TWO_OPERANDS
from qhw.legality.artefact import ArtefactOperator, Constant, Use
from qhw.legality.formats import Operand
from qhw.schema import Kernel, TargetSpec
from qhw.schema import Operator as OperatorSpec

__all__ = ["Site", "graph_operator"]


@dataclass(frozen=True, eq=False)
class Site:
    """An operator that the accelerator runs, with all that its kernel computes along.

    Attributes:
        target: The accelerator.
        operator: As the artefact has it.
        path: Field path of the target's row for it, as `operators.Conv`.
        spec: That row.
        output: What the last operator of its chain writes; no grid: it leaves as real numbers.
        chain: Kinds of the operators computed along behind it.
        leaves_in_float: Its result may be real numbers.
    """

    target: TargetSpec
    operator: ArtefactOperator
    path: str
    spec: OperatorSpec
    output: Use
    chain: tuple[str, ...] = ()
    leaves_in_float: bool = False

    @property
    def kind(self) -> str:
        """The operator's kind."""
        return self.operator.kind

    @property
    def inputs(self) -> tuple[Use, ...]:
        """What it reads, on grids as they reach it."""
        return self.operator.inputs

    @property
    def weight(self) -> Constant | None:
        """The constant operand."""
        return self.operator.weight

    def kernel(self, name: str) -> Kernel:
        """A kernel of the target."""
        return self.target.kernels[name]

    def sums_reals(self, name: str) -> bool:
        """Whether a kernel sums floats, whose result needs a quantizer and no multiplier."""
        found = self.target.accumulators.get(str(self.kernel(name).accumulator))
        return found is not None and found.kind == "float"

    def operands(self, kernel: str) -> list[tuple[str, object, Operand]]:
        """Field, formats listed there, and tensor, of everything that a kernel has formats for."""
        row, two = self.kernel(kernel), self.kind in TWO_OPERANDS
        first_is_constant = two and self.operator.attributes.get("weight_operand") == 0
        found: list[tuple[str, object, Operand]] = []
        for index, use in enumerate(self.inputs):
            position = index + 1 if first_is_constant else index
            field = "weight" if two and position == 1 and isinstance(row.weight, tuple) else "input"
            found.append((field, getattr(row, field), Operand(use.tensor, use.encoding)))
        if self.weight is not None:
            constant = Operand.of_constant(self.weight, self.operator.weight_axis, self.operator.input_axis)
            field = "input" if two and (first_is_constant or not isinstance(row.weight, tuple)) else "weight"
            if self.weight.encoding is not None or not two:
                found.append((field, getattr(row, field), constant))
        if not (self.leaves_in_float and self.output.encoding is None):
            found.append(("output", row.output, Operand(self.output.tensor, self.output.encoding)))
        return found

    def weight_rows(self, order: str | None = None) -> NDArray[np.int64] | None:
        """Weight codes without their zero point, one row per output channel; None where the codes are not known.

        Args:
            order: `channel_fastest` or `kernel_fastest`; absent: as they are stored.
        """
        weight, axis = self.weight, self.operator.weight_axis
        if weight is None or weight.codes is None or weight.encoding is None or axis is None or weight.codes.size == 0:
            return None
        if weight.encoding.is_float:
            return None
        codes = weight.codes.astype(np.int64)
        if weight.encoding.zero_point.any():
            codes -= weight.encoding.spread(weight.encoding.zero_point, codes.shape)
        rows = np.moveaxis(codes, axis, 0)
        if order is not None and self.operator.input_axis is not None and codes.ndim > 2:
            inner = self.operator.input_axis + (1 if self.operator.input_axis < axis else 0)
            rows = np.moveaxis(rows, inner, -1 if order == "channel_fastest" else 1)
        if self.kind == "ConvTranspose" and axis == 1:  # [in, out / groups, ...]: each group has its own rows
            groups = int(self.operator.attributes.get("groups", 1))
            if rows.shape[1] % groups == 0:
                rows = rows.reshape(rows.shape[0], groups, rows.shape[1] // groups, -1).swapaxes(0, 1)
                return rows.reshape(rows.shape[0] * rows.shape[1], -1)
        return rows.reshape(rows.shape[0], -1)

    def per_channel(self, values: NDArray[Any]) -> NDArray[Any]:
        """One value per output channel from one per weight scale, or from one for all."""
        channels = int(self.operator.attributes.get("out_channels", values.size))
        if values.ndim == 0 or values.size == channels or channels % values.size:
            return values
        return np.tile(values, channels // values.size)  # grouped and transposed: groups share the scales


def graph_operator(operator: ArtefactOperator) -> GraphOperator:
    """The same as the planner's rules read operators: limits, ties, sums."""
    return GraphOperator(
        name=operator.name,
        kind=operator.kind,
        node=operator.name,
        inputs=tuple(use.tensor for use in operator.inputs),
        weight=None if operator.weight is None else operator.weight.name,
        bias=None if operator.bias is None else operator.bias.name,
        weight_axis=operator.weight_axis,
        attributes=operator.attributes,
    )
