# SPDX-License-Identifier: Apache-2.0
"""Which scales a number format may have, and the palettes that stand where codes have no scale."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from qhw.schema.base import Count, Positive, Problem, Says, Table, Unknown, recorded, used

__all__ = ["PLANNABLE_SCALES", "Bits", "Palette", "Scale"]

Bits = Annotated[int, Field(ge=1, le=64), Says("an integer from 1 to 64")]
Exponent = Annotated[int, Field(ge=-149, le=127), Says("an integer from -149 to 127 (float32 holds 2^-149 to 2^127)")]
PLANNABLE_SCALES = ("float32", "float16", "bfloat16", "e4m3", "power_of_two", "e8m0", "fixed", "enumerated")


class Scale(Table):
    """Which scales a format may have. Every positive float32 where a bound is absent."""

    kind: (
        Literal[
            "float32",
            "float16",
            "bfloat16",
            "power_of_two",
            "fixed",
            "enumerated",
            "fixed_point",
            "e8m0",
            "e4m3",
        ]
        | Unknown
    ) = used(
        "How the hardware holds a scale: any float, a power of two, one fixed value, one of a few values, an integer "
        "multiplier, or the 8-bit floats of block formats. Absent: float32. A range gets the smallest that covers it; "
        "under e8m0 the one of OCP's blocks, 2^(floor(log2(max)) - floor(log2(highest element))).",
        recorded_values=("fixed_point",),
        default="float32",
    )
    min: Positive | Unknown | None = used("Smallest scale, inclusive.")
    max: Positive | Unknown | None = used("Largest scale, inclusive.")
    values: tuple[Positive, ...] | Unknown | None = used(
        'The scales there are: exactly one for kind = "fixed", all of them for kind = "enumerated".'
    )
    exponent_min: Exponent | Unknown | None = used("Smallest e of scale = 2^e, for kind = power_of_two or e8m0.")
    exponent_max: Exponent | Unknown | None = used("Largest e of scale = 2^e, for kind = power_of_two or e8m0.")
    rounding: Literal["nearest", "up", "down"] | Unknown | None = recorded(
        "How a wanted scale is moved onto a scale the hardware has."
    )
    quantity: Literal["step", "threshold"] | Unknown | None = recorded(
        "What the kind restricts: the step itself, or the threshold (largest real value) that the step follows from."
    )
    dynamic: bool | Unknown | None = used(
        "True: scales of activations are computed from live data at run time, per tensor, row or group along the axis "
        "that is summed up. Weights are constant: their scales are set as others are."
    )
    outer: Literal["float32", "float16", "bfloat16"] | Unknown | None = recorded(
        "Two-level scales: type of the outer scale that multiplies this one."
    )
    outer_per: Literal["tensor", "out_channel"] | Unknown | None = recorded(
        "Two-level scales: sharing of the outer one."
    )
    inner_bits: Bits | Unknown | None = recorded("Two-level scales: bits of an integer inner scale, one per group.")
    inner_group_size: Count | Unknown | None = recorded("Nested blocks: elements that share one inner scale.")

    def rules(self) -> Iterator[Problem]:
        """Bounds in order, and only fields that belong to the kind."""
        for low, high in (("min", "max"), ("exponent_min", "exponent_max")):
            least, most = getattr(self, low), getattr(self, high)
            if isinstance(least, int | float) and isinstance(most, int | float) and least > most:
                yield Problem((low,), f"{low} must not exceed {high}; got {least} and {most}. Swap them.")
        for name in ("exponent_min", "exponent_max"):
            if getattr(self, name) is not None and self.kind not in ("power_of_two", "e8m0", "unknown"):
                yield Problem((name,), f'needs kind = "power_of_two" or "e8m0"; kind is "{self.kind}". Remove it.')
        if self.values is not None and self.kind not in ("fixed", "enumerated", "unknown"):
            yield Problem(("values",), f'needs kind = "fixed" or "enumerated"; kind is "{self.kind}". Remove it.')
        if isinstance(self.values, tuple) and (
            not self.values
            or (self.kind == "fixed" and len(self.values) != 1)
            or len(set(self.values)) < len(self.values)
        ):
            wanted = "exactly one value" if self.kind == "fixed" else "one value or more, each once"
            yield Problem(("values",), f'kind = "{self.kind}" needs {wanted}; got {list(self.values)}.')
        if isinstance(self.values, tuple):
            for value in self.values:
                if (isinstance(self.min, float) and value < self.min) or (
                    isinstance(self.max, float) and value > self.max
                ):
                    yield Problem(("values",), f"{value} lies outside [min, max]. Drop it, or widen min and max.")


class Palette(Table):
    """Weights stored as indexes into a look-up table of values."""

    index_bits: Bits | tuple[Bits, ...] | Unknown | None = used(
        "Bits of one index, or the list of widths allowed, of which the widest is taken."
    )
    entry: Literal["float32", "float16", "bfloat16", "int8", "uint8"] | Unknown | None = used(
        "Type of one entry of the look-up table.", recorded_values=("uint8",)
    )
    vector: Count | Unknown | None = used(
        "Values one index stands for. Absent: one. Tables of vectors cannot be planned yet."
    )
    group_channels: Count | Unknown | None = used("Output channels that share one look-up table. Absent: all.")
    channel_scale: bool | Unknown | None = used(
        "True: every output channel multiplies its entries by a scale of its own. Absent: false."
    )
