# SPDX-License-Identifier: Apache-2.0
"""Golden vectors as C: constant arrays in stdint types, and the numbers of each operator as macros."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TextIO

import numpy as np

from qhw.vectors.arrays import ArrayStore

__all__ = ["write_header"]

_PER_LINE = 16
_INT64_MIN = -(2**63)
_HEAD = """\
/* Golden vectors of qhw {qhw}: {samples} sample(s) on {target}. Values are those of vectors.npz; manifest.json says
 * what they mean. Arrays are flat, in C order; the first axis runs over the samples where there is one per sample. */
#ifndef QHW_GOLDEN_VECTORS_H
#define QHW_GOLDEN_VECTORS_H

#include <stdint.h>

/* Define GOLDEN_ARRAY before including this file to place the arrays elsewhere, or to align them otherwise. */
#ifndef GOLDEN_ARRAY
#if defined(__GNUC__)
#define GOLDEN_ARRAY __attribute__((aligned(16), unused)) static const
#elif defined(_MSC_VER)
#define GOLDEN_ARRAY __declspec(align(16)) static const
#else
#define GOLDEN_ARRAY static const
#endif
#endif

#define GOLDEN_SAMPLES {samples}
"""


def write_header(file: TextIO, manifest: Mapping[str, Any], store: ArrayStore, limit: int) -> list[str]:
    """Write the header.

    Multipliers, shifts and bounds are written for every operator. Its arrays are written all or none: operators come in
    execution order, and those whose arrays would exceed the limit are left out.

    Args:
        file: Where.
        manifest: Its `operators`, `samples`, `qhw` and `target`.
        store: The arrays.
        limit: Bytes of array elements, all arrays together.

    Returns:
        list: Operators whose arrays were left out.
    """
    names, left_out, spent = _Names(), [], 0
    target = _comment(manifest["target"]["name"])
    file.write(_HEAD.format(qhw=manifest["qhw"], samples=manifest["samples"], target=target))
    for entry in manifest["operators"]:
        prefix = names.unique(f"golden_{entry['name']}")
        file.write(f"\n/* {_comment(_title(entry))} */\n")
        for name, value in _numbers(entry):
            file.write(f"#define {names.unique(f'{prefix}_{name}').upper()} ({value})\n")
        for name, kind, values in _lists(entry):
            _array(file, kind, names.unique(f"{prefix}_{name}"), len(values), [values])
        keys = [one["key"] for one in entry["arrays"]]
        size = sum(store.num_bytes(key) for key in keys)
        if spent + size > limit:
            left_out.append(entry["name"])
            file.write(f"/* its {len(keys)} arrays, {size} bytes, exceed --header-limit: vectors.npz has them */\n")
            continue
        spent += size
        for key in keys:
            dtype, shape = store.dtype(key), store.shape(key)
            file.write(f"/* {_comment(key)}: {' x '.join(map(str, shape))} */\n")
            name = names.unique(f"{prefix}_{key[len(entry['name']) + 1 :]}")
            blocks = (np.frombuffer(block, np.dtype(dtype).newbyteorder("<")).tolist() for block in store.blocks(key))
            _array(file, dtype, name, int(np.prod(shape)), blocks)
    file.write("\n#endif /* QHW_GOLDEN_VECTORS_H */\n")
    return left_out


class _Names:
    """Valid C identifiers, each given once; macros are their upper case, so case does not tell two apart."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def unique(self, text: str) -> str:
        base = re.sub(r"[^0-9A-Za-z]+", "_", text).strip("_")
        name, count = base, 1
        while name.lower() in self._taken:
            count += 1
            name = f"{base}_{count}"
        self._taken.add(name.lower())
        return name


def _title(entry: Mapping[str, Any]) -> str:
    kernel = f", kernel {entry['kernel']}" if entry["kernel"] else ""
    return f"{entry['name']}: {' + '.join((entry['kind'], *entry['fused']))}{kernel}, {entry['rule']}"


def _comment(text: str) -> str:
    """Text that neither ends a comment nor opens another."""
    return re.sub(r"[^ -~]", "_", text).replace("*/", "*_/").replace("/*", "/_*")


def _numbers(entry: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    parts = [*((f"input_{i}", one) for i, one in enumerate(entry["inputs"])), ("output", entry["output"])]
    for name, one in parts:
        if isinstance(one.get("zero_point"), int):
            yield f"{name}_zero_point", one["zero_point"]
    if "clamp" in entry:
        yield from zip(("clamp_min", "clamp_max"), entry["clamp"], strict=True)
    yield from ((name, value) for name, value in entry["facts"].items() if type(value) is int)


def _lists(entry: Mapping[str, Any]) -> Iterator[tuple[str, str, Sequence[int]]]:
    """Multipliers and shifts, and float factors as bit patterns."""
    found = {name: entry[name] for name in ("requantize", "requantize.0", "requantize.1") if name in entry}
    found |= {
        f"requantize.{i}": one["requantize"]
        for i, one in enumerate(entry.get("regridding", ()))
        if one and "requantize" in one
    }
    found |= {
        f"input.{i}.requantize": one["before"]["requantize"]
        for i, one in enumerate(entry["inputs"])
        if "requantize" in one.get("before", {})
    }
    found |= {name: value for name, value in entry["facts"].items() if isinstance(value, dict)}
    for name, values in found.items():
        if "multiplier" in values:
            yield f"{name}_multiplier", "int32", values["multiplier"]
        if "shift" in values:
            yield f"{name}_shift", "int8", values["shift"]
        if "bits" in values:
            width = "32" if "float32" in values else "64"
            yield f"{name}_float{width}_bits", f"uint{width}", values["bits"]


def _array(file: TextIO, dtype: str, name: str, length: int, blocks: Any) -> None:
    file.write(f"GOLDEN_ARRAY {dtype}_t {name}[{max(length, 1)}] = {{\n")
    for block in blocks:
        for start in range(0, len(block), _PER_LINE):
            file.write(f"  {', '.join(map(_literal, block[start : start + _PER_LINE]))},\n")
    file.write("};\n" if length else "  0\n};\n")


def _literal(value: int) -> str:
    if value == _INT64_MIN:  # C reads -9223372036854775808 as the negative of a number that is too large
        return f"({value + 1} - 1)"
    return str(value)
