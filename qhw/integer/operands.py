# SPDX-License-Identifier: Apache-2.0
"""The two operands of a sum, a product or an extremum: activations, or one of them a constant."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.codes import carrier
from qhw.integer.site import Site
from qhw.numerics import QParams

__all__ = ["Operands", "two_operands"]

Run = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True)
class Operands:
    """Two operands in the order in which the operator reads them.

    Attributes:
        a: Grid of the first.
        b: Grid of the second.
        constant: Which of them is a constant, and its codes as carried; None where neither is.
    """

    a: QParams
    b: QParams
    constant: tuple[int, Tensor] | None = None

    def bound(self, run: Run) -> Run:
        """A function of both as one of those that are activations."""
        if self.constant is None:
            return run
        index, codes = self.constant
        if index == 0:
            return lambda values: run((codes, values[0]))
        return lambda values: run((values[0], codes))


def two_operands(site: Site) -> Operands:
    """The operands of an operator that has two.

    Raises:
        IntegerError: one of them is not quantized.
    """
    index = site.operator.attributes.get("weight_operand")
    if site.operator.weight is None and len(site.inputs) == 2:
        return Operands(*site.inputs)
    if site.weight is None or index is None or len(site.inputs) != 1:
        raise IntegerError(f"{site.operator.kind} with an operand that is not quantized cannot be executed exactly")
    held = index, site.weight.codes.to(carrier(site.weight.qparams))
    read, own = site.inputs[0], site.weight.qparams
    return Operands(own, read, held) if index == 0 else Operands(read, own, held)
