# SPDX-License-Identifier: Apache-2.0
"""Number formats: one fully determined grid each, `real = scale * (code - zero_point)` or `scale * element(code)`."""

import math
from collections.abc import Iterator
from typing import Annotated, Literal, cast

from pydantic import Field, StringConstraints

from qhw.schema.base import (
    UNKNOWN,
    Amount,
    Count,
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
from qhw.schema.scales import PLANNABLE_SCALES, Bits, Palette, Scale

__all__ = ["INTEGER", "STATED_KINDS", "Format", "code_bits"]

INTEGER = "integer"
"""The kind of format that needs no plugin."""
STATED_KINDS = (INTEGER, "float", "palette")
"""Kinds whose figures have fields of their own here; those of any other stand in `parameters`."""

Kind = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z][a-z0-9_]*$", max_length=64),
    Says('"integer", or a kind that a plugin brings, such as "float" or "palette"'),
]
Parameter = bool | int | float | Word | tuple[int, ...] | tuple[float, ...]
Codes = Annotated[tuple[Int64, Int64], Says("a list of two integers [lowest code, highest code]")]


def code_bits(low: int, high: int, *, signed: bool) -> int:
    """Bits of the smallest two's complement (signed) or unsigned integer that holds every code of [low, high]."""
    if signed:
        return max((-low - 1).bit_length() if low < 0 else 0, high.bit_length() if high > 0 else 0) + 1
    return max(high.bit_length(), 1)


class Format(Table):
    """One grid. `codes` wins over `bits` and `signed`; both may stand, and then they must agree."""

    kind: Kind | Unknown = used(
        "What a code is: an integer, a small float, an index into a palette, or what an installed plugin says of its "
        "own word. Absent: integer.",
        default=INTEGER,
    )
    bits: Bits | Unknown | None = used("Width of one stored element.")
    signed: bool | Unknown | None = used("True: codes from -2^(bits-1); false: codes from 0.")
    codes: Codes | Unknown | None = used("Lowest and highest code in use, inclusive; absent: all that the bits allow.")
    code_set: tuple[Int64, ...] | Unknown | None = used(
        "All codes, ascending, where they are no full range: [-1, 1]. A real goes to the nearest; a tie to the even "
        "code, else upwards. The zero point is 0."
    )
    encoding: Literal["twos_complement", "sign_magnitude", "offset_binary"] | Unknown | None = recorded(
        "Bit pattern of a negative code."
    )
    zero_point: Int64 | tuple[Int64, ...] | Literal["free"] | Unknown | None = used(
        'The code of 0.0: one integer (fixed), a list of the integers allowed, or "free". Absent: no restriction is '
        "stated, which reads as free."
    )
    zero_point_per: Literal["tensor", "out_channel", "group"] | Unknown | None = recorded(
        "Sharing of zero points where it differs from that of scales.", judged=True
    )
    zero_point_bits: Bits | Unknown | None = recorded("Width of the register that holds a zero point.", judged=True)
    zero_point_cost: Amount | Unknown | None = recorded(
        "What a zero point that is not 0 costs at run time, as a factor on the operator's time above 1 (0: free)."
    )
    per: Literal["tensor", "out_channel", "group", "row", "block"] | Unknown | None = used(
        "How many scales a tensor has: one; one per output channel; one per group of `group_size` input channels; one "
        "per row, for activations whose scales are dynamic; one per two-dimensional block.",
        recorded_values=("block",),
    )
    group_size: Count | tuple[Count, ...] | Unknown | None = used(
        'Elements of one group for per = "group": one size, or those allowed.'
    )
    block_shape: tuple[Count, ...] | Unknown | None = recorded(
        'Shape of one block for per = "block": outputs, inputs.', judged=True
    )
    scale: Scale | Unknown | None = used("Which scales are legal. Absent: any positive float32.")
    min_real_range: Positive | Unknown | None = recorded(
        "Smallest real range (highest minus lowest value) the tool encodes.", judged=False
    )
    rounding: Rounding | Unknown | None = used(
        "Rounding of the conversion from real values to codes. Read where a result is of this format: bounds of clips "
        "and entries of tables become codes by it; absent: half to even. Not read where weights are rounded.",
        recorded_values=("to_odd", "double", "double_half_to_plus_infinity", "selectable", "none"),
    )
    packing: Literal["low_first", "high_first"] | Unknown | None = recorded(
        "Which of several codes in one byte comes first.", judged=False
    )
    preference_cost: Amount | Unknown | None = recorded(
        "Cost of choosing this format where another is legal as well, as a factor on time above 1 (0: native)."
    )
    exponent_bits: Bits | Unknown | None = used("Float formats: bits of the exponent.")
    mantissa_bits: Annotated[int, Field(ge=0, le=52), Says("an integer from 0 to 52")] | Unknown | None = used(
        "Float formats: stored bits of the mantissa."
    )
    exponent_bias: Int64 | Unknown | None = used(
        "Float formats: what is subtracted from a stored exponent. Absent: 2^(exponent_bits - 1) - 1."
    )
    finite_max: Positive | Unknown | None = used(
        "Float formats: largest finite value (E4M3: 448, on one device 240). Nothing is assumed where it is absent."
    )
    palette: Palette | Unknown | None = used("Palette formats: the look-up table.")
    parameters: dict[Id, Parameter] | Unknown | None = used(
        "What the kind of a plugin needs beyond these fields; the plugin says which names and values."
    )

    @property
    def quant_min(self) -> int | None:
        """Lowest code; None where the file does not determine it."""
        limits = self._code_range()
        return None if limits is None else limits[0]

    @property
    def quant_max(self) -> int | None:
        """Highest code; None where the file does not determine it."""
        limits = self._code_range()
        return None if limits is None else limits[1]

    @property
    def is_signed(self) -> bool | None:
        """Signedness of a stored code: as stated, else from a negative lowest code; None where it is open."""
        if isinstance(self.signed, bool):
            return self.signed
        low = self.quant_min
        return None if low is None else low < 0

    @property
    def element_bits(self) -> int | None:
        """Width of one stored element in bits: as stated, else the fewest that hold the codes."""
        if isinstance(self.bits, int):
            return self.bits
        if isinstance(self.exponent_bits, int) and isinstance(self.mantissa_bits, int):
            return 1 + self.exponent_bits + self.mantissa_bits
        if isinstance(self.palette, Palette) and self.palette.index_bits not in (None, "unknown"):
            widths = self.palette.index_bits
            return max(widths) if isinstance(widths, tuple) else int(cast(int, widths))
        if isinstance(self.code_set, tuple):
            return max(1, (len(self.code_set) - 1).bit_length())
        low, high = self.quant_min, self.quant_max
        if low is None or high is None:
            return None
        return code_bits(low, high, signed=bool(self.is_signed))

    @property
    def is_symmetric(self) -> bool:
        """True where the zero point is fixed to one code, as it is wherever codes are no range of integers."""
        return isinstance(self.zero_point, int) or not self.is_uniform

    @property
    def is_uniform(self) -> bool:
        """True where codes are all integers of a range, so that neighbours are one scale apart."""
        return self.kind in (INTEGER, UNKNOWN) and self.code_set is None

    @property
    def shared_per(self) -> str | None:
        """`per`; of palettes, whose scales follow from the palette where `per` is absent."""
        if self.kind == "palette" and self.per is None:
            return self._palette_per(getattr(self.palette, "channel_scale", None) is True)
        return self.per

    @property
    def is_dynamic(self) -> bool:
        """True where scales are computed from live data at run time."""
        return isinstance(self.scale, Scale) and self.scale.dynamic is True

    @property
    def unplannable_reason(self) -> str | None:
        """Why no tensor can be put on this grid yet: `field: value, rule`; None where it can."""
        reason = self._open_numbers()
        if reason is not None:
            return reason
        shared = ("tensor", "group", "row") if self.is_dynamic else ("tensor", "out_channel", "group")
        if self.per not in shared and self.kind != "palette":
            said = "absent" if self.per is None else f'"{self.per}"'
            wanted = '"tensor", "group" or "row"' if self.is_dynamic else '"tensor", "out_channel" or "group"'
            return f"per: {said}; a grid {'with scale.dynamic ' if self.is_dynamic else ''}needs {wanted}"
        if self.per == "group" and not isinstance(self.group_size, int | tuple):
            return 'group_size: per = "group" needs a size'
        if self.zero_point == "unknown":
            return "zero_point: unknown"
        if self.scale == "unknown":
            return "scale: unknown"
        return self._open_scale()

    def _open_numbers(self) -> str | None:
        """What does not say which numbers the codes stand for; None where all is known."""
        if self.kind == UNKNOWN:
            return "kind: unknown"
        if self.kind == INTEGER and self.quant_min is None:
            if self.code_set is not None:
                return "code_set: unknown"
            return "codes: neither codes nor bits with signed are known"
        if isinstance(self.code_set, tuple) and not (self.code_set[0] <= 0 <= self.code_set[-1] and self.code_set[1:]):
            return f"code_set: {list(self.code_set)}; needs two codes or more, 0 among or between them"
        if self.kind == "float":
            for name in ("exponent_bits", "mantissa_bits", "finite_max"):
                if getattr(self, name) in (None, UNKNOWN):
                    return f'{name}: {"absent" if getattr(self, name) is None else UNKNOWN}; kind = "float" needs it'
            if self.exponent_bias == UNKNOWN:
                return "exponent_bias: unknown"
            if self.signed is False:
                return "signed: false; floats without a sign are recorded, not used yet"
        if self.kind == "palette":
            return self._open_palette()
        if not self.is_uniform and self.zero_point not in (None, 0):
            return f"zero_point: {self.zero_point}; codes that are no range of integers have zero point 0"
        return None

    def _open_palette(self) -> str | None:
        if not isinstance(self.palette, Palette):
            return f'palette: {"absent" if self.palette is None else UNKNOWN}; kind = "palette" needs it'
        for name in ("index_bits", "entry"):
            if getattr(self.palette, name) in (None, UNKNOWN, ()):
                said = "unknown" if getattr(self.palette, name) == UNKNOWN else "absent"
                return f'palette.{name}: {said}; kind = "palette" needs it'
        if self.palette.entry == "uint8":
            return 'palette.entry: "uint8" is recorded, not used yet'
        for name in ("vector", "group_channels", "channel_scale"):
            if getattr(self.palette, name) == UNKNOWN:
                return f"palette.{name}: unknown"
        if self.palette.vector not in (None, 1):
            return f"palette.vector: {self.palette.vector}; tables of vectors are recorded, not used yet"
        return None

    def _open_scale(self) -> str | None:
        if isinstance(self.scale, Scale):
            if self.scale.kind == "e8m0" and self.is_uniform and self.zero_point != 0:
                said = "absent" if self.zero_point is None else f'"{self.zero_point}"'
                return f'zero_point: {said}; scale.kind = "e8m0" needs 0'
            if self.scale.kind not in PLANNABLE_SCALES:
                return f'scale.kind: "{self.scale.kind}" is recorded, not used yet'
            if self.scale.kind in ("fixed", "enumerated") and not isinstance(self.scale.values, tuple):
                return f'scale.values: kind = "{self.scale.kind}" needs its values'
            if (
                self.scale.inner_bits is not None
                or self.scale.inner_group_size is not None
                or self.scale.outer is not None
            ):
                return "scale: two-level scales are recorded, not used yet"
        return None

    @property
    def is_plannable(self) -> bool:
        """True where a tensor can be put on this grid."""
        return self.unplannable_reason is None

    def _code_range(self) -> tuple[int, int] | None:
        if isinstance(self.codes, tuple):
            return self.codes
        if self.kind == INTEGER and isinstance(self.code_set, tuple) and self.code_set:
            return self.code_set[0], self.code_set[-1]
        if self.codes == "unknown" or self.code_set is not None or self.kind != INTEGER:
            return None
        if isinstance(self.bits, int) and isinstance(self.signed, bool):
            return (-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1) if self.signed else (0, 2**self.bits - 1)
        return None

    def rules(self) -> Iterator[Problem]:
        """Codes fit the bits and the sign, the zero point is a code, and fields belong to their kind."""
        yield from self._code_rules()
        yield from self._zero_point_rules()
        if self.group_size is not None and self.per not in ("group", "unknown", None):
            yield Problem(("group_size",), f'needs per = "group"; per is "{self.per}". Remove it, or change per.')
        if self.block_shape is not None and self.per not in ("block", "unknown", None):
            yield Problem(("block_shape",), f'needs per = "block"; per is "{self.per}". Remove it, or change per.')
        if self.group_size == () or self.block_shape == ():
            yield Problem(
                ("group_size" if self.group_size == () else "block_shape",), "must list at least one size; got []."
            )
        for name in ("exponent_bits", "mantissa_bits", "exponent_bias", "finite_max"):
            if getattr(self, name) is not None and self.kind in (INTEGER, "palette"):
                yield Problem((name,), f'needs kind = "float"; kind is "{self.kind}". Remove it, or change kind.')
        if self.palette is not None and self.kind in (INTEGER, "float"):
            yield Problem(("palette",), f'needs kind = "palette"; kind is "{self.kind}". Remove it, or change kind.')
        if self.parameters is not None and self.kind in STATED_KINDS:
            yield Problem(("parameters",), f'kind = "{self.kind}" takes none. Remove them, or name a plugin\'s kind.')
        is_scaled = getattr(self.palette, "channel_scale", None)
        if self.per is not None and isinstance(is_scaled, bool) and self.per != self._palette_per(is_scaled):
            text = f'is "{self.per}", and palette.channel_scale is {str(is_scaled).lower()}. Leave one of them out.'
            yield Problem(("per",), text)
        yield from self._float_rules()
        for name in ("codes", "code_set"):
            if getattr(self, name) is not None and self.kind == "float":
                yield Problem((name,), 'a float format has no integer codes. Remove it, or use kind = "integer".')

    @staticmethod
    def _palette_per(is_scaled: bool) -> str:
        return "out_channel" if is_scaled else "tensor"

    def _float_rules(self) -> Iterator[Problem]:
        """The width is that of the fields, and the largest value is one of the format's."""
        exponent, mantissa = self.exponent_bits, self.mantissa_bits
        if self.kind != "float" or not (isinstance(exponent, int) and isinstance(mantissa, int)):
            return
        wide = exponent + mantissa + (self.signed is not False)
        if isinstance(self.bits, int) and self.bits != wide:
            text = f"must be {wide}: a sign, {exponent} and {mantissa} bits; got {self.bits}. Correct one of them."
            yield Problem(("bits",), text)
        if not isinstance(self.finite_max, float) or exponent > 11:
            return
        stated = self.exponent_bias if isinstance(self.exponent_bias, int) else None
        bias = 2 ** (exponent - 1) - 1 if stated is None else stated
        top = 2**exponent - 1 - bias
        unit = max(math.frexp(self.finite_max)[1] - 1, 1 - bias) - mantissa
        scaled = math.ldexp(self.finite_max, -unit) if abs(unit) < 1000 else 0.5
        if not scaled.is_integer() or math.frexp(self.finite_max)[1] - 1 > top:
            what = f"{exponent} exponent bits (bias {bias}) and {mantissa} mantissa bits"
            text = f"{self.finite_max:g} is no value of {what}. State the largest finite value there is."
            yield Problem(("finite_max",), text)

    def _code_rules(self) -> Iterator[Problem]:
        if isinstance(self.code_set, tuple):
            if self.codes is not None:
                yield Problem(("code_set",), "stands beside codes; a format has one of the two. Remove one.")
            if not self.code_set or list(self.code_set) != sorted(set(self.code_set)):
                yield Problem(("code_set",), f"must be ascending, each code once; got {list(self.code_set)}.")
                return
            yield from self._fit(self.code_set[0], self.code_set[-1], "code_set")
        if isinstance(self.codes, tuple):
            low, high = self.codes
            if low >= high:
                yield Problem(("codes",), f"the lower code must be below the upper; got [{low}, {high}]. Swap them.")
                return
            yield from self._fit(low, high, "codes")

    def _fit(self, low: int, high: int, field: str) -> Iterator[Problem]:
        if self.signed is False and low < 0:
            yield Problem(
                (field,), f"lower code {low} is negative, and signed is false. Use signed = true, or start at 0."
            )
            return
        if not isinstance(self.bits, int) or (self.bits == 1 and (low, high) == (-1, 1)):
            return  # one bit may stand for the two values -1 and +1
        signed = self.signed if isinstance(self.signed, bool) else low < 0
        least = -(2 ** (self.bits - 1)) if signed else 0
        most = 2 ** (self.bits - 1) - 1 if signed else 2**self.bits - 1
        kind = "signed" if signed else "unsigned"
        wider = next((w for w in (2, 4, 8, 16, 32, 64) if w >= code_bits(low, high, signed=signed)), 64)
        if high > most:
            hint = f"[{max(low, least) if max(low, least) < most else least}, {most}]"
            yield Problem(
                (field,),
                f"upper code {high} does not fit {self.bits} bits ({kind}: at most {most}). "
                f"Use {hint}, or bits = {wider}.",
            )
        elif low < least:
            yield Problem(
                (field,),
                f"lower code {low} does not fit {self.bits} bits ({kind}: at least {least}). "
                f"Use [{least}, {min(high, most)}], or bits = {wider}.",
            )

    def _zero_point_rules(self) -> Iterator[Problem]:
        allowed = (self.zero_point,) if isinstance(self.zero_point, int) else self.zero_point
        limits = self._code_range()
        if not isinstance(allowed, tuple):
            return
        if not allowed:
            yield Problem(("zero_point",), 'must list at least one integer; got []. Use "free" for no restriction.')
        if limits is None or limits[0] >= limits[1]:
            return
        for value in allowed:
            if not limits[0] <= value <= limits[1]:
                yield Problem(
                    ("zero_point",),
                    f"{value} is not a code of this format ({limits[0]} to {limits[1]}). Use one, or widen codes.",
                )
