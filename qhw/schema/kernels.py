# SPDX-License-Identifier: Apache-2.0
"""Kernels: one legal row each, operand formats together with their own arithmetic."""

from collections.abc import Iterator
from typing import Literal

from qhw.schema.base import (
    Amount,
    Count,
    Fused,
    Id,
    Int64,
    Positive,
    Problem,
    Table,
    Unknown,
    Word,
    recorded,
    used,
)

__all__ = ["OPERANDS", "ExponentBound", "Kernel"]

OPERANDS = ("input", "weight", "output")
"""Fields of a kernel that list formats."""

Term = Literal["input", "input_2", "weight", "bias", "output", "inputs_min", "inputs_max"]


class ExponentBound(Table):
    """`min <= sum of factor * exponent <= max`, where the exponent of a tensor is log2 of its scale."""

    name: Word | None = used("What the source calls the sum, as `shift_cut`.")
    terms: dict[Term, Int64] = used(
        "Factor of each tensor's exponent; `inputs_min` and `inputs_max` are the smallest and largest among all "
        "inputs. `bias` is held to it where its scale is input*weight."
    )
    min: Int64 | Unknown | None = used("Smallest sum, inclusive.")
    max: Int64 | Unknown | None = used("Largest sum, inclusive.")

    def rules(self) -> Iterator[Problem]:
        """A bound bounds something, in order."""
        if not self.terms or 0 in self.terms.values():
            yield Problem(("terms",), f"needs tensors with a factor that is not 0; got {dict(self.terms or {})}.")
        if self.min is None and self.max is None:
            yield Problem(("min",), "needs min, max, or both.")
        if isinstance(self.min, int) and isinstance(self.max, int) and self.min > self.max:
            yield Problem(("min",), f"min must not exceed max; got {self.min} and {self.max}. Swap them.")


class Kernel(Table):
    """One legal combination of operand formats. What depends on a width is another kernel."""

    input: tuple[Id, ...] | Unknown | None = used("Formats the first operand may have.")
    weight: tuple[Id, ...] | Unknown | None = used(
        "Formats of the weight; of the second operand where an operator takes two activations (MatMul, Add), and then "
        "absent means: as `input`. Absent for operators without weights."
    )
    output: tuple[Id, ...] | Unknown | None = used("Formats of the result.")
    bias: Id | Literal["none"] | Unknown | None = used('Id of the bias rule, or "none" where no bias can be added.')
    accumulator: Id | Unknown | None = used("Id of the accumulator.")
    requantize: Id | Unknown | None = used("Id of the requantization.")
    weight_abs_sum_max: Count | Literal["from_accumulator"] | Unknown | None = used(
        "Largest sum of |weight code - zero point| over one output channel, kept by the fit stage; `from_accumulator`: "
        "(2^(bits - 1) - 1) / largest |input code - zero point|."
    )
    exponents: tuple[ExponentBound, ...] | Unknown | None = used(
        "Inequalities between power-of-two scales, kept by the fit stage."
    )
    fused: Fused | Unknown | None = used(
        "Operators this kernel takes in, where it differs from the operator's own list."
    )
    macs_per_cycle: Positive | Unknown | None = used("Multiply-accumulates per clock cycle at full use.")
    simd_lanes: Count | Unknown | None = recorded("Elements one instruction or one weight word holds.")
    preference_cost: Amount | Unknown | None = used(
        "Cost of choosing this kernel over another legal one (0: native, also where none is stated): the cheapest is "
        "preferred, then the first listed."
    )

    def rules(self) -> Iterator[Problem]:
        """Lists of formats are not empty."""
        for name in OPERANDS:
            if getattr(self, name) == ():
                yield Problem(
                    (name,), "must list at least one format; got []. Remove the field where there is no such operand."
                )

    def formats(self) -> tuple[str, ...]:
        """Ids of all formats it names, each once, in order."""
        listed = (getattr(self, name) for name in OPERANDS)
        return tuple(dict.fromkeys(item for ids in listed if isinstance(ids, tuple) for item in ids))
