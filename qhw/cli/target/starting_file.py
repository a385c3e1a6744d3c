# SPDX-License-Identifier: Apache-2.0
"""The text of a new target file: a complete one with every section explained, or one that says what differs."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qhw.schema import TargetSpec

__all__ = ["complete_file", "differing_file"]

_COMPLETE = """\
# {name}: what this accelerator computes with. Every value below is an example: replace it by what your documents say.
# What they do not say stays out, or is "unknown" where you have looked for it; neither ever becomes a default.
# All fields: docs/target-reference.md. Check with: qhw target lint FILE
schema_version = 1
name = "{name}"
summary = "{name}: one line for qhw target list"
fallback = "host"  # where other operators run: host, refuse (whole networks only), single_partition

# As soon as a document stands here, lint asks for a source beside every claim: source = "TRM"; or "memory" for what
# nobody checked, "derived: ..." for what follows from the rest, "searched: ..." beside "unknown".
# [sources]
# TRM = "ACME NPU reference manual, revision 3, 2024"

# Formats: the grids a tensor can be on, real = scale * (code - zero_point). An id names a role, never a value.
[formats.act]
bits = 8
signed = true
zero_point = "free"  # 0 for symmetric ones, a list such as [0, 128], or "free"
per = "tensor"  # activations have one scale
scale = {{ kind = "float32" }}  # power_of_two, fixed, enumerated, ...; bounds: min, max, exponent_min, exponent_max

[formats.weights]
codes = [-127, 127]  # in place of bits and signed, where not all codes are in use
zero_point = 0
per = "out_channel"  # or tensor, or group with group_size

# Biases: how they are stored and added.
[biases.wide]
bits = 32
scale = "input*weight"  # or "own"
applied = "before_requantize"

# Accumulators: the register that sums products. Saturating ones also state products_per_step, order and bias_added.
[accumulators.sum]
bits = 32
overflow = "wrap"

# Requantization: from the accumulator to the code of the result.
[requantize.rescale]
kind = "fixed_point"  # a multiplier and a shift; or shift, float32, float64
multiplier_bits = 31
shift = {{ min = 0, max = 31 }}
rounding = "half_even"

# Kernels: one legal combination of formats each, with its own arithmetic. What depends on a width is another kernel.
[kernels.mac]
input = ["act"]
weight = ["weights"]
output = ["act"]
bias = "wide"
accumulator = "sum"
requantize = "rescale"

[kernels.elementwise]
input = ["act"]
output = ["act"]
bias = "none"
accumulator = "sum"
requantize = "rescale"

# Operators, by their ONNX names: the kernels they have (preferred first), what they take in behind them, their limits.
# kernels = [] says that the hardware does not have it.
[operators.Conv]
kernels = ["mac"]
fused = ["Relu", "Clip"]
limits = {{ kernel = {{ max = 11 }}, stride = [1, 2], groups = ["1", "channels"] }}
rounding_order = "zero_point_after"  # is the zero point added after rounding, or before it?

[operators.Gemm]
kernels = ["mac"]
fused = ["Relu", "Clip"]
rounding_order = "zero_point_after"

[operators.Add]
kernels = ["elementwise"]
same_scale = "none"  # inputs, all: tensors that must share one scale
preshift_bits = {{ act = 20 }}  # operands are shifted left by so much before they are rescaled and added
rounding_order = "zero_point_after"

[operators.MaxPool]
kernels = ["elementwise"]
same_scale = "input_output"
rounding_order = "zero_point_after"

[operators.Relu]
kernels = ["elementwise"]
rounding_order = "zero_point_after"

[operators.Clip]
kernels = ["elementwise"]
rounding_order = "zero_point_after"

[operators.GlobalAveragePool]
kernels = ["elementwise"]
rounding_order = "zero_point_after"

# Operators that only move data need no kernel.
[operators.Reshape]
same_scale = "input_output"

[operators.Flatten]
same_scale = "input_output"

# The edge of the network: are its inputs and outputs quantized?
[boundary]
inputs = "quantized"
outputs = "quantized"

# What the toolchain takes. With the names of an exporter and an executor plugin (qhw plugin list), qhw writes the file
# and runs it to compare.
[artefact]
file_format = "ONNX QDQ"
"""

_DIFFERING = """\
# {name}: what differs from {base}. All else is as there; tables merge field by field, lists replace.
# Take the mark from a line below to say it otherwise, and drop the fields that stay: what you write is yours to source.
# All fields: docs/target-reference.md. Check with: qhw target lint FILE; compare: qhw target diff
schema_version = 1
name = "{name}"
summary = "{name}: {summary}"
extends = {extends}

# sources.TRM = "ACME NPU reference manual, revision 3, 2024"
"""
_SECTIONS = {
    "formats": "Formats: the grids a tensor can be on.",
    "biases": "Biases: how they are stored and added.",
    "accumulators": "Accumulators: the register that sums products.",
    "requantize": "Requantization: from the accumulator to the code of the result.",
    "kernels": "Kernels: one legal combination of formats each, with its own arithmetic.",
    "operators": "Operators: their kernels, fusions, limits. kernels = [] takes one away.",
    "boundary": "The edge of the network.",
    "artefact": "What the toolchain takes.",
}
_BARE = re.compile(r"[A-Za-z0-9_-]+")


def complete_file(name: str) -> str:
    """A small target of its own, every section explained; lint finds no error in it."""
    return _COMPLETE.format(name=name)


def differing_file(name: str, extends: str, base: "TargetSpec") -> str:
    """A file that extends a base and shows, in comments, what of it decides; as it stands it means what the base means.

    Args:
        name: Of the new target.
        extends: The base as the file names it.
        base: The base, resolved.
    """
    head = _DIFFERING.format(name=name, base=base.name, extends=_toml(extends), summary=f"{base.name} with differences")
    return head + "".join(_commented(base))


def _commented(base: "TargetSpec") -> Iterator[str]:
    from qhw.schema import recorded_fields
    from qhw.schema.write import plain_data

    data, unread = plain_data(base), set(recorded_fields(base))
    if base.fallback is not None:
        yield f"\n# Where operators go that are not listed.\n# fallback = {_toml(base.fallback)}\n"
    for section, title in _SECTIONS.items():
        held = _read(data.get(section) or {}, (section,), unread)
        entries = held.items() if section not in ("boundary", "artefact") else [("", held)] if held else []
        lines = [
            f"# {section}{f'.{_key(entry)}' if entry else ''} = {_toml(table)}\n"
            for entry, table in entries
            if table and not (section == "operators" and "kernels" not in table)
        ]
        if lines:
            yield f"\n# {title}\n"
            yield from lines


def _read(
    table: Mapping[str, Any], path: tuple[str | int, ...], unread: Iterable[tuple[str | int, ...]]
) -> dict[str, Any]:
    """A table without its sources and without what nothing reads."""
    found: dict[str, Any] = {}
    for key, held in table.items():
        here = (*path, key)
        if key != "source" and here not in unread:
            found[key] = _read(held, here, unread) if isinstance(held, dict) else held
    return {key: held for key, held in found.items() if held != {}}


def _toml(value: Any) -> str:
    """A plain value as TOML on one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(key)} = {_toml(held)}" for key, held in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)
