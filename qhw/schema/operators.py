# SPDX-License-Identifier: Apache-2.0
"""Operators: the kernels an operator kind has, what restricts it, and what it does to scales."""

from collections.abc import Iterator
from typing import Annotated, Literal, get_args

from pydantic import Field

from qhw.schema.base import (
    Amount,
    Count,
    Fused,
    Id,
    Int64,
    Positive,
    Problem,
    Rounding,
    Says,
    Table,
    Unknown,
    Word,
    recorded,
    used,
)

__all__ = [
    "ATTRIBUTES",
    "PLANNED_LIMITS",
    "SUMMING_KINDS",
    "WEIGHTED_KINDS",
    "Approximation",
    "Attribute",
    "FixedOutput",
    "Limit",
    "LimitRange",
    "LimitValue",
    "Operator",
    "RealRange",
]

WEIGHTED_KINDS = ("Conv", "DepthwiseConv", "ConvTranspose", "Gemm")
"""Kinds that sum products of an input with weights of the model."""

SUMMING_KINDS = (*WEIGHTED_KINDS, "MatMul")
"""Kinds that sum products, of two activations, too."""

Real = Annotated[float, Says("a number")]
Attribute = Literal[
    "kernel",
    "stride",
    "dilation",
    "groups",
    "padding",
    "in_channels",
    "out_channels",
    "rank",
    "inputs",
    "outputs",
    "height",
    "width",
    "axis",
    "elements",
    "reduced_elements",
    "depth_multiplier",
    "mode",
    "slope",
    "rescale",
]
ATTRIBUTES: tuple[str, ...] = get_args(Attribute)
WORDS: dict[str, tuple[str, ...]] = {
    "groups": ("1", "channels"),
    "padding": ("same", "valid", "explicit", "zero"),
    "axis": ("channel", "height", "width", "last"),
}
PLANNED_LIMITS = tuple(name for name in ATTRIBUTES if name != "rescale")
LimitValue = Int64 | Word | tuple[Int64, ...]


class LimitRange(Table):
    """What an attribute may be, as bounds; all that are given hold together."""

    min: Real | Unknown | None = used("Smallest value, inclusive.")
    max: Real | Unknown | None = used("Largest value, inclusive.")
    multiple_of: Count | Unknown | None = used("The value is a multiple of this.")
    values: tuple[LimitValue, ...] | Unknown | None = used("The values allowed.")

    def rules(self) -> Iterator[Problem]:
        """Bounds in order."""
        if isinstance(self.min, float) and isinstance(self.max, float) and self.min > self.max:
            yield Problem(("min",), f"min must not exceed max; got {self.min:g} and {self.max:g}. Swap them.")


Limit = tuple[LimitValue, ...] | LimitRange | Literal["any"] | Unknown


class FixedOutput(Table):
    """Quantization parameters an operator's result always has in one format."""

    scale: Positive | Unknown | None = used("The scale.")
    zero_point: Int64 | Unknown | None = used("The zero point.")


class RealRange(Table):
    """Bounds of an operator's real result, inclusive."""

    min: Real | Unknown | None = used("Lowest real value.")
    max: Real | Unknown | None = used("Highest real value.")

    def rules(self) -> Iterator[Problem]:
        """Bounds in order."""
        if isinstance(self.min, float) and isinstance(self.max, float) and self.min >= self.max:
            yield Problem(("min",), f"min must be below max; got {self.min:g} and {self.max:g}. Swap them.")


class Approximation(Table):
    """What the hardware computes in place of the exact function."""

    kind: (
        Literal["table", "fixed_point", "piecewise_linear", "fraction", "hard", "rounded_parameter"] | Unknown | None
    ) = used(
        "A look-up table, integers with a fixed point (Softmax, LogSoftmax, HardSwish, Rsqrt, Resize), linear "
        "segments, a fixed fraction, a hard variant, or a parameter rounded to a grid (the slope of LeakyRelu).",
        recorded_values=("piecewise_linear", "fraction", "hard"),
    )
    segments: Count | Unknown | None = recorded("Linear segments.")
    entries: Count | Unknown | None = used("Entries of a look-up table.")
    sample_step: Count | Unknown | None = recorded(
        "Codes between two sampled entries; values between are interpolated."
    )
    quotient: Literal["division", "reciprocal"] | Unknown | None = used(
        "How a table's real y becomes a code of scale s, each step in float32: y / s; y (1 / s). Of a Softmax with "
        "exponentials e: e / sum / s; e (1 / (sum s)). Absent: division."
    )
    function: Literal["erfc"] | Unknown | None = used(
        "`erfc`: Gelu, unless it is approximated by tanh, as x / 2 erfc(-x / sqrt(2)), each step in float32. Absent: "
        "as the model has it, in float32."
    )
    outside: Literal["lowest", "highest", "refuse"] | Unknown | None = used(
        "Code where the function has no value, as Log from 0 down: the lowest, the highest, or none, and what meets "
        "one ends."
    )
    integer_bits: Count | Unknown | None = used(
        "Softmax, LogSoftmax in fixed point: bits left of the point, of 31, in scaled distances from the largest code."
    )
    sum_integer_bits: Count | Unknown | None = used(
        "Softmax, LogSoftmax in fixed point: bits left of the point, of 31, in the sum of exponentials."
    )
    multiplier_bits: Count | Unknown | None = used(
        "HardSwish in fixed point: bits of its two multipliers, and of its operands without their sign."
    )
    fraction_bits: Count | Unknown | None = used(
        "Bilinear Resize in fixed point: bits right of the point in a position between two elements."
    )
    position: Literal["float32_ratio", "float32_quotient", "exact"] | Unknown | None = used(
        "Nearest Resize: element floor(i r) in float32, r = size / new size; floor(i / q), q = new size / size; or the "
        "exact floor(i size / new size)."
    )
    constants: dict[str, Real] | Unknown | None = used(
        'Named constants: {"3x3" = 0.109375} or {denominator = 256}. Read: the denominator of a rounded parameter.'
    )


class Operator(Table):
    """An operator kind as this hardware has it. Kinds are named as ONNX names them, plus `DepthwiseConv`."""

    kernels: tuple[Id, ...] | Unknown | None = used(
        "Ids of its kernels, preferred first. An empty list: this hardware does not have it. Absent: it only moves "
        "data, and takes any format (then `same_scale` says so)."
    )
    limits: dict[Attribute, Limit] = Field(
        default_factory=dict,
        description='Per attribute a list of allowed values, a table {min, max, multiple_of, values}, or "any". An '
        'integer holds for every spatial dimension, a list [h, w] for both together; groups know the words "1" and '
        '"channels", padding "valid" (none), "same" (as TFLite has it, in equal parts), "explicit" and "zero" (any, of '
        'zeros), axis "channel", "height", "width" and "last", and mode the words of ONNX and of torch. `rank`, '
        "`elements` (of one sample) and `outputs` are the result's; `height` and `width` the last two axes of the "
        "first operand; `reduced_elements` are behind one element of the result. Not read: `rescale`, a ratio of "
        "scales that is known behind calibration alone, where `requantize.*.ratio` is kept.",
        json_schema_extra={"recorded_keys": [name for name in ATTRIBUTES if name not in PLANNED_LIMITS]},
    )
    fused: Fused | Unknown | None = used(
        'Operator kinds it takes in behind it, each a kind or a chain of kinds: ["Relu", ["Add", "Relu"]].'
    )
    same_scale: Literal["none", "input_output", "inputs", "all", "aligned"] | Unknown | None = used(
        "Which tensors carry one common scale and zero point: none; input and output; all inputs; all inputs and the "
        "output; `aligned`: one format for all inputs and the output, each with its own scale.",
    )
    fixed_output: dict[Id, FixedOutput] | Unknown | None = used(
        "Per output format the parameters the result always has."
    )
    range: RealRange | Unknown | None = used("Real bounds the result's range is clipped to.")
    rounding: Rounding | Unknown | None = used(
        "Rounding of its own, where it differs from its kernels'.", recorded_values=("to_odd", "selectable", "none")
    )
    rounding_order: Literal["zero_point_after", "zero_point_before"] | Unknown | None = used(
        "Whether the zero point is added after rounding or before it."
    )
    ratio: Literal["float32", "float64", "float32_product"] | Unknown | None = used(
        "Precision in which input scales over output scale become the ratio behind a `fixed_point` or `float64` "
        "requantization: every step in float32; all in float64; `float32_product`: the product of input scales in "
        "float32, the division in float64. Absent: float64."
    )
    mean_count: Literal["ratio", "multiplier"] | Unknown | None = used(
        "Where a mean's count n divides: the ratio of scales; or its `fixed_point` multiplier m, also where input and "
        "output share a scale: floor(m * 2^k / n) and a shift k longer, 2^k the largest power of two up to n that the "
        "legal shifts leave room for. Absent: ratio."
    )
    whole_image: Literal["GlobalAveragePool"] | Unknown | None = used(
        "Operator kind as which a window that covers the whole image is computed, where that kind's arithmetic differs."
    )
    preshift_bits: dict[Id, Count] | Unknown | None = used(
        "Per input format the bits operands are shifted left by before they are rescaled and added. Absent where "
        "`same_scale` is inputs or all: they are added as they are, and the sum is rescaled once."
    )
    approximation: Approximation | Unknown | None = used("What is computed in place of the exact function.")
    output: Literal["integer", "float"] | Unknown | None = used(
        "`float`: the result is float whatever the kernel says; in float32 it is the operator's own function."
    )
    parameters: Literal["integer", "float"] | Unknown | None = used("`float`: its weights are not quantized.")
    may_change_precision: bool | Unknown | None = used(
        "False: inputs, weights and output have formats of one width (`bits`)."
    )
    weight_axis: Annotated[int, Field(ge=-8, le=7), Says("an integer from -8 to 7")] | Unknown | None = recorded(
        "Axis of the artefact's weight tensor that keeps one scale per index. Not read: the planner has one scale per "
        "output channel whatever the layout, and an exporter knows the layout of what it writes."
    )
    weight_layout: Word | None = recorded(
        "Layout of the artefact's weight tensor, as `1HWC`; `weight_axis` counts in it. Not read: a matter of the "
        "artefact, whose exporter knows it.",
        judged=False,
    )
    weight_scales: Literal["out_channels", "out_channels/groups"] | Unknown | None = used(
        "How many weight scales a grouped operator carries. A grouped transposed convolution gets out_channels/groups "
        "of them, any other out_channels; where the other number is asked for, its weights have one scale."
    )
    preference_cost: Amount | Unknown | None = recorded(
        "Cost of running it here over the host (0: none). Not read: nothing says what the host costs, so that what can "
        "run here does."
    )

    def rules(self) -> Iterator[Problem]:
        """Limits allow something, in words their attribute knows."""
        for name, limit in self.limits.items():
            values = limit.values if isinstance(limit, LimitRange) else limit
            if values == ():
                yield Problem(("limits", name), 'must allow at least one value; got []. Use "any" for no limit.')
            known = WORDS.get(name, ())
            for value in values if isinstance(values, tuple) else ():
                if isinstance(value, str) and name != "mode" and value not in known:
                    allowed = " or ".join(f'"{word}"' for word in known)
                    yield Problem(
                        ("limits", name),
                        f'must list integers{" or " + allowed if allowed else ""}; got "{value}".',
                    )
