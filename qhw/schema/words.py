# SPDX-License-Identifier: Apache-2.0
"""Formats, accumulators and plain values in a few words, without the ids of a file."""

from collections.abc import Iterable
from typing import Any

from qhw.schema.arithmetic import Accumulator
from qhw.schema.formats import Format
from qhw.schema.scales import Palette, Scale

__all__ = [
    "accumulator_words",
    "format_words",
    "joined",
    "number_words",
    "scale_words",
    "sharing_words",
    "value_words",
    "zero_point_words",
]


def number_words(form: Format) -> str:
    """The numbers of a format: `int8`, `int8 [-127, 127]`, `uint4`, `e4m3`, `palette of 4 bits`, `unknown codes`."""
    if form.kind == "float":
        return _float_words(form)
    if form.kind == "palette":
        bits = form.palette.index_bits if isinstance(form.palette, Palette) else form.bits
        return f"palette of {value_words(bits)} bits" if bits not in (None, "unknown") else "palette"
    if form.kind != "integer":
        return f"{form.kind} numbers"
    if isinstance(form.code_set, tuple):
        many = len(form.code_set) > 4
        return f"{len(form.code_set)} listed codes" if many else f"codes {value_words(form.code_set)}"
    low, high, bits = form.quant_min, form.quant_max, form.element_bits
    if low is None or high is None or bits is None:
        return f"{form.bits} bits, codes unknown" if isinstance(form.bits, int) else "unknown codes"
    signed = bool(form.is_signed)
    whole = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    return f"{'int' if signed else 'uint'}{bits}" + ("" if (low, high) == whole else f" [{low}, {high}]")


def _float_words(form: Format) -> str:
    exponent, mantissa = form.exponent_bits, form.mantissa_bits
    if isinstance(exponent, int) and isinstance(mantissa, int):
        name = {(8, 23): "float32", (5, 10): "float16", (8, 7): "bfloat16"}.get(
            (exponent, mantissa), f"e{exponent}m{mantissa}"
        )
    else:
        name = f"float{form.bits}" if isinstance(form.bits, int) else "float"
    return f"{name} up to {form.finite_max:g}" if isinstance(form.finite_max, float) else name


def zero_point_words(form: Format) -> str:
    """As `zero point 0`, `free zero point`, `zero point 0 or 128`."""
    zero = form.zero_point
    if zero is None or zero == "free":
        return "free zero point"
    return f"zero point {' or '.join(map(str, zero)) if isinstance(zero, tuple) else zero}"


def sharing_words(form: Format) -> str:
    """How many scales there are: `per tensor`, `per out channel`, `per group of 32`."""
    if form.per is None:
        return "sharing not stated"
    sizes = form.group_size if form.per == "group" else form.block_shape if form.per == "block" else None
    many = "" if sizes is None else f" of {' or '.join(map(str, sizes)) if isinstance(sizes, tuple) else sizes}"
    return f"per {form.per.replace('_', ' ')}{many}"


def scale_words(form: Format) -> str:
    """Which scales are legal: `any scale`, `power-of-two scale`, `scale 0.0078125`, `one of 3 scales`."""
    scale = form.scale
    if not isinstance(scale, Scale):
        return "any scale" if scale is None else "scale unknown"
    if scale.kind == "fixed" and isinstance(scale.values, tuple):
        words = f"scale {value_words(scale.values[0])}"
    elif scale.kind == "enumerated" and isinstance(scale.values, tuple):
        words = f"scale {' or '.join(map(value_words, scale.values))}"
    else:
        words = {"float32": "any scale"}.get(scale.kind, f"{scale.kind.replace('_', '-')} scale")
    exponents = [value for value in (scale.exponent_min, scale.exponent_max) if isinstance(value, int)]
    if len(exponents) == 2:
        words += f" from 2^{exponents[0]} to 2^{exponents[1]}"
    bounds = [(word, value) for word, value in (("from", scale.min), ("to", scale.max)) if isinstance(value, float)]
    return " ".join([words, *(f"{word} {value:.9g}" for word, value in bounds)])


def format_words(form: Format) -> str:
    """As `int8 [-127, 127], zero point 0, per out channel, power-of-two scale`."""
    words = [number_words(form), zero_point_words(form), sharing_words(form), scale_words(form)]
    if form.kind in ("float", "palette") and form.zero_point is None:
        words.pop(1)
    return ", ".join(word for word in words if word != "any scale")


def accumulator_words(entry: Accumulator | str | None) -> str:
    """As `32 bits, wrap`; `unknown` or `not stated` where nobody says."""
    if not isinstance(entry, Accumulator):
        return value_words(entry)
    kind = "float, " if entry.kind == "float" else ""
    width = f"{entry.bits} bits" if isinstance(entry.bits, int) else value_words(entry.bits)
    overflow = f", {entry.overflow}" if entry.overflow not in (None, "unknown") else ""
    return f"{kind}{width}{overflow}"


def value_words(value: Any) -> str:
    """A plain value as people write it; `not stated` for None."""
    if value is None:
        return "not stated"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, dict):
        return "; ".join(f"{key} {value_words(held)}" for key, held in value.items())
    if isinstance(value, list | tuple):
        items = [f"[{value_words(item)}]" if isinstance(item, list | tuple) else value_words(item) for item in value]
        return ", ".join(items) or "none"
    return str(value)


def joined(words: Iterable[str], last: str = "and") -> str:
    """As `a, b and c`."""
    listed = list(words)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} {last} {listed[-1]}"
