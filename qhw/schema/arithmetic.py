# SPDX-License-Identifier: Apache-2.0
"""What a kernel computes between its operands and its result: bias, accumulator, requantization."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qhw.schema.base import Count, Int64, Positive, Problem, Rounding, Says, Table, Unknown, recorded, used

__all__ = ["Accumulator", "Align", "Bias", "Pairwise", "Ratio", "Requantize", "Shift", "Stage"]

Width = Annotated[int, Field(ge=1, le=128), Says("an integer from 1 to 128")]
ShiftCount = Annotated[int, Field(ge=-128, le=128), Says("an integer from -128 to 128")]
Overflow = Literal["wrap", "saturate", "exact"]


class Shift(Table):
    """Bounds of a right shift, inclusive; negative shifts left."""

    min: ShiftCount | Unknown | None = used("Smallest right shift.")
    max: ShiftCount | Unknown | None = used("Largest right shift.")

    def rules(self) -> Iterator[Problem]:
        """Bounds in order."""
        if isinstance(self.min, int) and isinstance(self.max, int) and self.min > self.max:
            yield Problem(("min",), f"min must not exceed max; got {self.min} and {self.max}. Swap them.")


class Bias(Table):
    """How a bias is stored and added."""

    bits: Width | Literal["float"] | Unknown | None = used('Width of one bias, or "float" where it is not quantized.')
    signed: bool | Unknown | None = used("False: codes from 0. Absent: two's complement.")
    scale: Literal["input*weight", "own"] | Unknown | None = used(
        "Whether the bias is in units of input scale times weight scale, or has a scale of its own."
    )
    zero_point: Int64 | Unknown | None = used("The code of 0.0. Absent: 0.")
    per: Literal["tensor", "out_channel"] | Unknown | None = used(
        "Sharing of a bias scale of its own. Absent: one for the tensor."
    )
    applied: Literal["before_requantize", "after_multiplier"] | Unknown | None = used(
        "Added to the accumulator, or to the product with the multiplier of the requantization, before its shift; on "
        "the scale input*weight it is multiplied, too. A `shift` has no multiplier, and leaves no choice."
    )
    align: Literal["shift"] | Unknown | None = used(
        "How a bias of its own scale meets what it is added to: shifted left, so that its scale is that of the sum "
        "times a power of two."
    )
    shift: Shift | Unknown | None = used(
        "Legal right shifts of a bias on its way there; left by 7 alone is { min = -7, max = -7 }. One that needs a "
        "longer one does not fit. Absent: any shift left."
    )
    max_channels: Count | Unknown | None = used("Most output channels an operator with a bias may have.")
    required: bool | Unknown | None = used("True: an operator without a bias gets one of zeros.")
    storage_bits: tuple[Width, ...] | Unknown | None = recorded(
        "Widths of the stored integers where wider than `bits`. Not planned by: a matter of the artefact.",
        judged=True,
    )
    out_of_range: Literal["saturate", "wrap", "refuse", "enlarge_scale"] | Unknown | None = used(
        "What the tool does with a bias that does not fit, where no step has made it fit: clamp it, or give its "
        "weights a coarser scale; `wrap` and `refuse` are an error. Absent: as `enlarge_scale`."
    )
    rounding: Rounding | Unknown | None = recorded(
        "Rounding of the offline conversion from real values to codes. Not read: biases are rounded half to "
        "even, which differs in ties alone."
    )

    @property
    def meets_sum(self) -> bool:
        """Whether its scale follows from that of the sum: it is the same, or a shift brings one to the other."""
        return self.scale != "own" or (self.align == "shift" and self.applied != "after_multiplier")

    def rules(self) -> Iterator[Problem]:
        """A bias is shifted left, and only one of a scale of its own."""
        if self.shift is not None and (self.scale != "own" or self.align != "shift"):
            yield Problem(("shift",), 'needs scale = "own" and align = "shift". Remove it, or state both.')
        if isinstance(self.shift, Shift) and isinstance(self.shift.max, int) and self.shift.max > 0:
            yield Problem(("shift", "max"), f"must be at most 0, as a bias is shifted left; got {self.shift.max}.")


class Pairwise(Table):
    """A narrower sum inside the accumulation, as of two products that are added before they are widened."""

    bits: Width | Unknown | None = used("Width of the intermediate sum.")
    overflow: Overflow | Unknown | None = used("What happens past its range.")
    operands: Literal["centred", "stored", "unsigned"] | Unknown | None = used(
        "What is multiplied: codes minus zero points; codes as they are stored; input codes counted from the lowest of "
        "their width, as unsigned ones, and weights as stored. What zero points add is taken off in the end, exactly."
    )


class Accumulator(Table):
    """The register that sums products."""

    kind: Literal["integer", "float"] | Unknown | None = used("What is summed: integers, or floats. Absent: integers.")
    bits: Width | Literal["per_layer"] | Unknown | None = used(
        'Width of the sum, or "per_layer" where hardware is generated with the width each layer needs.',
        recorded_values=("per_layer",),
    )
    signed: bool | Unknown | None = recorded(
        "True: two's complement; absent: signed. Not read: no hardware described so far sums without a sign."
    )
    overflow: Overflow | Unknown | None = used(
        'What happens past the range; "exact": it cannot happen. A sum that saturates and may not fit depends on '
        "`products_per_step`, `order` and `bias_added`."
    )
    products_per_step: Count | Literal["all"] | Unknown | None = used(
        'Neighbouring products that are summed exactly before the accumulator saturates; "all": it saturates behind '
        "the last one. The last step may be shorter."
    )
    order: Literal["channel_fastest", "kernel_fastest"] | Unknown | None = used(
        "Which index of a sum of products runs fastest: all input channels of a kernel position before the next, or "
        "all kernel positions of a channel; each from the first on, positions row by row."
    )
    bias_added: Literal["first", "last"] | Unknown | None = used(
        "Whether the bias is in the accumulator before the first product, or is added behind the last one."
    )
    pairwise: Pairwise | Unknown | None = used(
        "An intermediate sum, of two neighbouring products, that is narrower than the accumulator."
    )
    mantissa_bits: Width | Unknown | None = recorded(
        "Float accumulators: bits of mantissa really kept. Not read: sums in float have no exact form."
    )
    promotion_interval: Count | Unknown | None = recorded(
        "Products summed before the partial sum moves into a wider accumulator. Not read: sums in float have no exact "
        "form."
    )


class Ratio(Table):
    """Bounds of a ratio of real scales, inclusive."""

    min: Positive | Unknown | None = used("Smallest ratio.")
    max: Positive | Unknown | None = used("Largest ratio.")

    def rules(self) -> Iterator[Problem]:
        """Bounds in order."""
        if isinstance(self.min, float) and isinstance(self.max, float) and self.min > self.max:
            yield Problem(("min",), f"min must not exceed max; got {self.min} and {self.max}. Swap them.")


class Align(Table):
    """How a sum brings operands on two power-of-two scales to one."""

    to: Literal["finer", "coarser"] | Unknown | None = used(
        "The scale that both get: the finer one, for which the operand on the coarser one is shifted left; or the "
        "coarser one, for which the operand on the finer one is shifted right and rounded."
    )
    rounding: Rounding | Unknown | None = used(
        "Rounding of that right shift.",
        recorded_values=("to_odd", "double", "double_half_to_plus_infinity", "selectable", "none"),
    )
    shift: Shift | Unknown | None = used("Legal right shifts of an operand.")


class Stage(Table):
    """One step of a requantization."""

    operation: Literal["multiply", "shift", "activation", "add_zero_point"] | Unknown | None = used(
        "What the step does: `multiply` by the multiplier, over 2^multiplier_bits; `shift` right; `add_zero_point` in "
        "units of what is still to be shifted out.",
        recorded_values=("activation",),
    )
    rounding: Rounding | Unknown | None = used(
        "How its result is rounded to an integer.",
        recorded_values=("to_odd", "double", "double_half_to_plus_infinity", "selectable", "none"),
    )


class Requantize(Table):
    """From the accumulator to the output code."""

    kind: Literal["float32", "float64", "fixed_point", "shift", "thresholds", "none"] | Unknown | None = used(
        "By a float factor, an integer multiplier and a shift, a shift alone, comparisons with thresholds, or not.",
        recorded_values=("thresholds", "none"),
    )
    rounding: Rounding | Unknown | None = used(
        "Rounding of the whole step, by exact name. `double`: a rounding doubling high multiply, then a rounding "
        "shift, ties away from zero (gemmlowp); `selectable`: a run-time register, see `selectable`.",
        recorded_values=("to_odd", "selectable", "none"),
    )
    selectable: tuple[Rounding, ...] | Unknown | None = recorded(
        "The roundings a run-time register can select. Not read: which one a compiler sets is no fact of the hardware."
    )
    stages: tuple[Stage, ...] | Unknown | None = used(
        "Every step that rounds, in order, where one rule does not name them: of kinds `fixed_point` and `shift`."
    )
    multiplier_bits: Width | Unknown | None = used("Bits of the integer multiplier's significand.")
    shift: Shift | Unknown | None = used(
        "Legal right shifts. A bound that is left open decides wherever an operator shifts its way: `max` right, `min` "
        "left."
    )
    align: Align | Unknown | None = used("Of kind `shift`: how a sum brings operands of two scales to one.")
    shift_per: Literal["tensor", "out_channel"] | Unknown | None = recorded(
        "Sharing of the shift where it differs from `per`. Not planned by: multipliers and shifts are chosen channel "
        "by channel.",
        judged=True,
    )
    out_of_range: Literal["saturate", "wrap", "zero_scale", "refuse"] | Unknown | None = used(
        "What happens to a multiplier or shift out of range; `zero_scale`: the result is silently scaled by 0. Absent: "
        "refused.",
        recorded_values=("wrap",),
    )
    per: Literal["tensor", "out_channel"] | Unknown | None = used(
        "Sharing of the multiplier. `tensor`: weights have one scale, too."
    )
    regrid: Literal["ratio", "dequantize"] | Unknown | None = used(
        "How an operand gets onto another grid than its tensor's: by this requantization with the ratio of both "
        "scales, or dequantized to float32 and quantized again. Absent: ratio."
    )
    ratio: Ratio | Unknown | None = used(
        "Bounds of input scale times weight scale over output scale, kept by the fit stage."
    )

    def rules(self) -> Iterator[Problem]:
        """Fields belong to their kind."""
        if self.multiplier_bits is not None and self.kind in ("float64", "shift", "thresholds", "none"):
            yield Problem(("multiplier_bits",), f'kind = "{self.kind}" has no multiplier. Remove it, or change kind.')
        if self.align is not None and self.kind not in (None, "unknown", "shift"):
            yield Problem(("align",), f'only kind = "shift" aligns by shifts; got "{self.kind}". Remove it.')
        if self.selectable is not None and self.rounding not in ("selectable", "unknown"):
            yield Problem(("selectable",), 'needs rounding = "selectable". Change rounding, or remove it.')
