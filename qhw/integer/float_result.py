# SPDX-License-Identifier: Apache-2.0
"""Operators whose result is float whatever the kernel (`operators.*.output = "float"`): codes in, float32 out."""

from collections.abc import Sequence

from torch import Tensor

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.integer.codes import Codes
from qhw.integer.products import Lowered
from qhw.integer.site import Site

__all__ = ["in_float", "is_float_result", "lower_float_result"]

FLOAT = "float"


def is_float_result(site: Site) -> bool:
    """Whether the target says that the operator gives float."""
    return site.spec.output == FLOAT and site.output is None


def lower_float_result(site: Site) -> Lowered:
    """The operator's own function in float32 of its operand's reals, with what is computed along.

    Not an exact form: no target says how it computes in float, so that it stands with what the host runs.

    Raises:
        IntegerError: it has more than one operand, or none.
    """
    if len(site.inputs) != 1 or len(site.members) > 1:
        raise IntegerError(f"{site.operator.kind} of several operands with a float result cannot be executed yet")
    function, qparams = site.function(), site.inputs[0]

    def run(values: Sequence[Tensor]) -> Tensor:
        return function(Codes(values[0], qparams).reals().contiguous())

    return Lowered(run, facts={"rule": FLOAT})


def in_float(result: QuantizedModel) -> tuple[str, ...]:
    """Operators that run in float32, in execution order: those of the host, and those that give float."""
    rows = result.target.operators
    return tuple(
        one.name for one in result.plan.operators if one.where == "host" or _gives_float(rows.get(one.listed_as))
    )


def _gives_float(row: object) -> bool:
    return getattr(row, "output", None) == FLOAT
