# SPDX-License-Identifier: Apache-2.0
"""What a table says, as plain data without ids and sources: equal contents mean the same."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from qhw.schema.arithmetic import Accumulator, Bias, Requantize
from qhw.schema.formats import Format
from qhw.schema.kernels import OPERANDS, Kernel
from qhw.schema.operators import Approximation, LimitRange, Operator
from qhw.schema.spec import TargetSpec
from qhw.schema.words import number_words, scale_words, sharing_words, zero_point_words

__all__ = ["ABSENT", "arithmetic_content", "changed_leaves", "content", "format_parts", "frozen", "limit_content"]

Content = Any

ABSENT: Mapping[type[BaseModel], Mapping[str, Any]] = {
    Accumulator: {"kind": "integer", "signed": True},
    Approximation: {"quotient": "division"},
    Bias: {"out_of_range": "enlarge_scale"},
    Operator: {"ratio": "float64", "mean_count": "ratio"},
    Requantize: {"regrid": "ratio", "out_of_range": "refuse"},
}
"""What a field means where it is absent, as its description says."""

NUMBER_FIELDS = ("exponent_bits", "mantissa_bits", "exponent_bias", "finite_max", "palette", "parameters")
"""What decides the numbers of a format that is no range of integers."""

ARITHMETIC = {"bias": "biases", "accumulator": "accumulators", "requantize": "requantize"}
"""Fields of a kernel that name an entry, and the section that it stands in."""


def content(value: Any) -> Content:
    """Plain data of a table, its sources left out, and what is absent stated where its absence means something."""
    if isinstance(value, Format):
        return {name: part for name, (part, _) in format_parts(value).items()}
    if isinstance(value, BaseModel):
        means = ABSENT.get(type(value), {})
        held = {name: getattr(value, name) for name in type(value).model_fields if name != "source"}
        stated = {name: means.get(name) if item is None else content(item) for name, item in held.items()}
        return {name: item for name, item in stated.items() if item is not None}
    if isinstance(value, dict):
        return {key: content(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [content(item) for item in value]
    return float(value) if isinstance(value, float) else value


def arithmetic_content(spec: TargetSpec, kernel: Kernel) -> Content:
    """Everything a kernel says beside its formats, ids resolved."""
    held = {name: item for name, item in content(kernel).items() if name not in OPERANDS}
    for name, section in ARITHMETIC.items():
        table = getattr(spec, section)
        if held.get(name) in table:
            held[name] = content(table[held[name]])
    return held


def format_parts(form: Format) -> dict[str, tuple[Content, str]]:
    """The four things that make a grid, and what else a format says: content and words of each."""
    number = [form.kind, form.quant_min, form.quant_max, form.element_bits, form.is_signed]
    if form.quant_min is None or form.code_set is not None:
        number += [content(getattr(form, name)) for name in ("bits", "signed", "codes", "code_set")]
        number += [content(getattr(form, name)) for name in NUMBER_FIELDS]
    zero = "free" if form.zero_point is None else content(form.zero_point)
    if isinstance(zero, list):
        zero = sorted(zero)
    scale = {"kind": "float32"} if form.scale is None else content(form.scale)
    shared = [form.per, content(form.group_size), content(form.block_shape)]
    told = {
        *("kind", "bits", "signed", "codes", "code_set", "zero_point", "per", "group_size", "block_shape", "scale"),
        *NUMBER_FIELDS,
        "source",
    }
    rest = {name: content(getattr(form, name)) for name in type(form).model_fields if name not in told}
    rest = {name: item for name, item in rest.items() if item is not None}
    return {
        "number": (number, number_words(form)),
        "zero point": (zero, zero_point_words(form)),
        "sharing": (shared, sharing_words(form)),
        "scale": (scale, scale_words(form)),
        "rest": (rest, ", ".join(f"{name} {item}" for name, item in rest.items())),
    }


def limit_content(limit: Any) -> Content:
    """A limit however it is spelled: a list is a table of values, "any" is no limit, the order of values no matter."""
    if limit == "any":
        return None
    held = content(LimitRange(values=limit) if isinstance(limit, tuple) else limit)
    if isinstance(held, dict) and isinstance(held.get("values"), list):
        held["values"] = sorted(held["values"], key=lambda value: (isinstance(value, str), str(value)))
    return held


def frozen(value: Content) -> Any:
    """The same content as something that can be a key."""
    if isinstance(value, dict):
        return ("table", *sorted((str(key), frozen(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", *map(frozen, value))
    return (type(value).__name__, str(value))


def changed_leaves(path: str, before: Content, after: Content) -> Iterator[tuple[str, Any, Any]]:
    """Every place where two contents differ, its dotted path first; a table that only one has is one place."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys((*before, *after)):
            yield from changed_leaves(f"{path}.{key}" if path else str(key), before.get(key), after.get(key))
    elif frozen(before) != frozen(after):
        yield path, before, after
