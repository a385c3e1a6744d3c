# SPDX-License-Identifier: Apache-2.0
"""Recomputes golden vectors from manifest.json and vectors.npz, in plain int64; needs Python 3.10 and numpy.

    python check.py                          every layer from its own inputs
    python check.py --output my_device.npz   arrays of another implementation, by the keys of vectors.npz

Prints the first layer that differs. Exit status: 0 nothing differs, 1 something does, 2 cannot be checked.
"""

import argparse
import hashlib
import itertools
import json
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from qhw.vectors.check_arithmetic import (
    Array,
    Entry,
    Found,
    Unusable,
    away,
    divide,
    floats,
    fma,
    held,
    logarithm,
    multiply,
    reciprocal,
    requantize,
    whole,
    wrap,
    zeros,
)


class Differs(Exception):
    """A layer and how it differs."""


# Sums of products.


def strided(tap: tuple[int, ...], dilation: list[int], count: Any, stride: list[int]) -> Any:
    """Index of the elements that one tap meets, on the last axes."""
    facts = zip(tap, dilation, count, stride, strict=True)
    return (Ellipsis, *(slice(t * d, t * d + (n - 1) * s + 1, s) for t, d, n, s in facts))


def convolve(x: Array, w: Array, out: list[int], facts: Entry) -> Array:
    """x [n, in, *size], w [out, in / groups, *kernel] -> [n, out, *out]: tap by tap."""
    kernel, stride, dilation, groups = facts["kernel"], facts["stride"], facts["dilation"], facts["groups"]
    rank = len(kernel)
    before = facts["padding"]
    if before == "valid":
        before = [0] * rank
    elif before == "same":  # the odd one comes after
        before = [d * (k - 1) // 2 for k, d in zip(kernel, dilation, strict=True)]
    reach = [(o - 1) * s + d * (k - 1) + 1 for o, s, d, k in zip(out, stride, dilation, kernel, strict=True)]
    edges = [(p, max(n - size - p, 0)) for p, n, size in zip(before, reach, x.shape[2:], strict=True)]
    x = np.pad(x, [(0, 0), (0, 0), *edges])
    n, c_in, c_out = x.shape[0], w.shape[1], w.shape[0] // groups
    total = np.zeros((n, groups, c_out, int(np.prod(out))), np.int64)
    for tap in itertools.product(*map(range, kernel)):
        window = strided(tap, dilation, out, stride)
        inside = x[window].reshape(n, groups, c_in, -1)
        total += w[(slice(None), slice(None), *tap)].reshape(groups, c_out, c_in) @ inside
    return total.reshape([n, groups * c_out, *list(out)])


def spread(x: Array, w: Array, out: list[int], facts: Entry) -> Array:
    """Transposed: x [n, in, *size], w [in, out / groups, *kernel]: every input spreads its taps."""
    stride, dilation, groups = facts["stride"], facts["dilation"], facts["groups"]
    kernel, padding, size = facts["kernel"], facts["padding"], x.shape[2:]
    full = [max((i - 1) * s + d * (k - 1) + 1, p + o)
            for i, s, d, k, p, o in zip(size, stride, dilation, kernel, padding, out, strict=True)]  # fmt: skip
    n, c_in, c_out = x.shape[0], w.shape[0] // groups, w.shape[1]
    total = np.zeros([n, groups, c_out, *full], np.int64)
    flat = x.reshape(n, groups, c_in, -1)
    for tap in itertools.product(*map(range, kernel)):
        window = strided(tap, dilation, size, stride)
        part = w[(slice(None), slice(None), *tap)].reshape(groups, c_in, c_out).swapaxes(1, 2)
        total[window] += (part @ flat).reshape([n, groups, c_out, *list(size)])
    cut: Any = (Ellipsis, *(slice(p, p + o) for p, o in zip(padding, out, strict=True)))
    return total.reshape([n, groups * c_out, *full])[cut]


def centred(codes: Array, q: Entry) -> Array:
    """Codes minus zero point."""
    zero = np.array(q["zero_point"], np.int64)
    if zero.ndim:
        zero = zero.reshape([-1 if axis == q["axis"] else 1 for axis in range(codes.ndim)])
    return codes.astype(np.int64) - zero


def sum_of_products(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array | None:
    acc, facts = op["accumulator"], op["attributes"]
    if op["kind"] == "MatMul":
        total = xs[0] @ xs[1]
    else:
        w = centred(constants["weight"], op["weight"])
        if op["kind"] == "Gemm":
            total = xs[0] @ (w.T if op["weight"]["out_axis"] == 0 else w)
        else:
            rank = len(facts["kernel"])
            has_batch = xs[0].ndim == rank + 2
            x = xs[0] if has_batch else xs[0][None]
            run = spread if op["kind"] == "ConvTranspose" else convolve
            total = run(x, w, op["output"]["shape"][-rank:], facts)
            total = total if has_batch else total[0]
    bits = acc["bits"] if acc["overflow"] == "wrap" else None
    if "bias" in constants:
        found["accumulator.before_bias"] = wrap(total, bits) if bits else total
        total = total + constants["bias"].astype(np.int64).reshape([-1] + [1] * len(facts.get("kernel", [])))
    found["accumulator"] = wrap(total, bits) if bits else total
    return requantize(found["accumulator"], op["requantize"]) if "requantize" in op else None


# Other operators: operands minus zero point, arrays to fill, constants -> codes before the clamp.


def sums(op: Entry, x: Array) -> Array:
    facts, axes = op["attributes"], op["facts"]["axes"]
    if axes:
        return x.sum(axis=tuple(axes), keepdims=bool(facts.get("keepdim", False)))
    return pooled(x, facts, op["output"]["shape"], np.add, 0)


def pooled(x: Array, facts: Entry, shape: list[int], join: Callable[[Array, Array], Array], edge: int) -> Array:
    kernel, stride, padding = facts["kernel"], facts["stride"], facts["padding"]
    rank = len(kernel)
    dilation, out, size = facts.get("dilation", [1] * rank), shape[-rank:], x.shape[-rank:]
    after = [max((o - 1) * s + d * (k - 1) + 1 - n - p, 0)
             for o, s, d, k, n, p in zip(out, stride, dilation, kernel, size, padding, strict=True)]  # fmt: skip
    x = np.pad(x, [(0, 0)] * (x.ndim - rank) + list(zip(padding, after, strict=True)), constant_values=edge)
    found = np.full(list(x.shape[:-rank]) + list(out), edge, x.dtype)
    for tap in itertools.product(*map(range, kernel)):
        window = strided(tap, dilation, out, stride)
        found = join(found, x[window])
    return found


def sum_rule(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    found["accumulator"] = sums(op, xs[0])
    return requantize(found["accumulator"], op["requantize"])


def quotient(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts = op["facts"]
    found["accumulator"] = sums(op, xs[0])
    divisor = constants["divisor"].astype(np.int64) if "divisor" in constants else np.array(facts["divisor"])
    return divide(found["accumulator"] + facts["offset"] * divisor, divisor, facts["rounding"]) + facts["zero_point"]


def real_average(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    """Dequantized, summed window by window in float32, row by row, divided by the count and by the output's scale."""
    facts, out = op["attributes"], op["output"]
    reals = xs[0].astype(np.float32) * np.float32(op["inputs"][0]["scale"])
    count = constants["divisor"].astype(np.float32) if "divisor" in constants else np.float32(op["facts"]["divisor"])
    total = pooled(reals, facts, out["shape"], np.add, 0)
    return whole(
        total / count / np.float32(out["scale"]) + np.float32(out["zero_point"]),
        op["facts"].get("rounding", "half_even"),
    )


def product(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    found["accumulator"] = held(xs[0] * xs[1], op["facts"])
    return requantize(found["accumulator"], op["requantize"])


def add_float32(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts = op["facts"]
    a, b = (x.astype(np.float32) * floats(facts[name]) for x, name in zip(xs, ("factor.0", "factor.1"), strict=True))
    return whole(a + b, facts["rounding"]) + facts["zero_point"]


def add_fused_float32(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts = op["facts"]
    codes = [(x + one["zero_point"]).astype(np.float32) for x, one in zip(xs, op["inputs"], strict=True)]
    total = floats(facts["constant"])
    for operand in facts["order"]:
        total = fma(codes[operand], floats(facts[f"factor.{operand}"]), total)
    return whole(total, facts["rounding"])


def add_fixed_point(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts = op["facts"]
    a, b = (
        requantize(x << facts["left_shift"], op[name])
        for x, name in zip(xs, ("requantize.0", "requantize.1"), strict=True)
    )
    return requantize(held(a + facts["sign"] * b, facts), op["requantize"])


def extremum(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts, x = op["attributes"], xs[0] + op["inputs"][0]["zero_point"]
    if op["kind"] in ("Max", "Min"):
        both = xs[1] + op["inputs"][1]["zero_point"]
        return np.maximum(x, both) if op["kind"] == "Max" else np.minimum(x, both)
    if op["kind"] == "MaxPool":
        return pooled(x, facts, op["output"]["shape"], np.maximum, -(2**62))
    join = np.min if op["kind"] == "ReduceMin" else np.max
    axes = facts.get("axes") or list(range(x.ndim - len(facts["kernel"]), x.ndim))
    return join(x, axis=tuple(axes), keepdims=bool(facts.get("keepdim", False)))


def table(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    return constants["table"][xs[0] + op["inputs"][0]["zero_point"] - op["facts"]["first"]]


def clamp(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    if "requantize" in op:
        return requantize(xs[0], op["requantize"])
    return xs[0] + op["inputs"][0]["zero_point"]


def move(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    index, fill = constants["index"], op["facts"]["fill"]
    codes = (xs[0] + op["inputs"][0]["zero_point"]).ravel()[np.maximum(index, 0)]
    return codes if fill is None else np.where(index < 0, fill, codes)


def regrid(x: Array, source: Entry, how: Entry | None, codes: Array | None) -> Array:
    """Codes minus zero point of one grid as codes of another."""
    if how is None:
        return x + source["zero_point"]
    if codes is not None:
        return codes[x + source["zero_point"] - how["first"]]
    return np.clip(requantize(x, how["requantize"]), *how["clamp"])


def join(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    pairs = zip(xs, op["inputs"], op["regridding"], strict=True)
    parts = [regrid(x, one, r, constants.get(f"input.{i}.table")) for i, (x, one, r) in enumerate(pairs)]
    facts = op["facts"]
    return np.stack(parts, facts["axis"]) if facts["stacked"] else np.concatenate(parts, facts["axis"])


# Softmax and Resize.


def exponentials(op: Entry, x: Array, constants: Found) -> tuple[Array, Array, Array]:
    """Distances to the largest code, their exponentials and the sum of these."""
    facts = op["facts"]
    distance = x.max(facts["axis"], keepdims=True) - x
    e = constants["exponentials"].astype(np.int64)[distance]
    return distance, e, away(e, facts["sum_integer_bits"]).sum(facts["axis"], keepdims=True)


def softmax_fixed_point(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts = op["facts"]
    _, e, total = exponentials(op, xs[0], constants)
    n = zeros(total)
    shift = facts["sum_integer_bits"] - n + 31 - facts["bits"]
    return away(multiply(e, reciprocal((total << n) - 2**31)), shift) + op["output"]["quant_min"]


def log_softmax_fixed_point(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    facts = op["facts"]
    distance, _, total = exponentials(op, xs[0], constants)
    log = logarithm(total, facts["sum_integer_bits"], facts["integer_bits"])
    least = np.maximum(facts["least"] - 1, requantize(log - 2**31, op["requantize"]))
    codes = away(constants["scaled"].astype(np.int64)[distance] - log, facts["shift"]) + facts["zero_point"]
    return np.where(-distance > least, codes, op["output"]["quant_min"])


def softmax_float32(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    """Exponentials summed in float32 along the axis, one after another."""
    facts, scale = op["facts"], np.float32(op["output"]["scale"])
    axis = facts["axis"]
    e = floats(facts["exponentials"])[xs[0].max(axis, keepdims=True) - xs[0]]
    total = np.take(np.zeros_like(e), [0], axis)
    for index in range(e.shape[axis]):
        total = total + np.take(e, [index], axis)
    inverse = facts["quotient"] == "reciprocal"
    real = e * (np.float32(1) / (total * scale)) if inverse else e / total / scale
    return whole(real, facts["rounding"]) + op["output"]["zero_point"]


def interpolate(op: Entry, xs: list[Array], found: Found, constants: Found) -> Array:
    """Four codes each, weighted by their distances in whole numbers."""
    facts, one = op["facts"], 1 << op["facts"]["fraction_bits"]
    x = xs[0] + facts["offset"]
    for name, axis in (("row", -2), ("column", -1)):
        lower, upper, part = (constants[f"{name}.{end}"].astype(np.int64) for end in ("lower", "upper", "fraction"))
        part = part.reshape(-1, *[1] * (-1 - axis))
        x = np.take(x, lower, axis) * (one - part) + np.take(x, upper, axis) * part
    return divide(x, np.array(one * one), facts["rounding"]) + facts["zero_point"]


Rule = Callable[[Entry, list[Array], Found, Found], "Array | None"]
_NAMED: tuple[Rule, ...] = (
    *(sum_of_products, quotient, real_average, product, add_float32, add_fused_float32, add_fixed_point),
    *(extremum, table, clamp, move, join, interpolate),
    *(softmax_fixed_point, log_softmax_fixed_point, softmax_float32),
)
RULES = {"sum": sum_rule, **{rule.__name__: rule for rule in _NAMED}}


# Layer by layer.


class Vectors:
    """manifest.json and vectors.npz."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.manifest: Entry = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            self.npz = np.load(folder / "vectors.npz", allow_pickle=False)
            version, self.samples = self.manifest["schema_version"], int(self.manifest["samples"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise Unusable(f"{folder}: no golden vectors: {error}") from error
        if version != 1:
            raise Unusable(f"{folder}: schema_version must be 1; got {version}. Use the check.py beside it.")

    def get(self, op: Entry, key: str) -> Array:
        """An array that is as it was written."""
        try:
            array = self.npz[key]
        except (KeyError, ValueError, OSError, zipfile.BadZipFile, zlib.error) as error:
            raise Differs(f"{op['name']}: {key} cannot be read: {error}") from error
        facts = self.manifest["arrays"][key]
        if [str(array.dtype), list(array.shape)] != [facts["dtype"], facts["shape"]]:
            raise Differs(f"{op['name']}: {key} is {array.dtype} {array.shape}, and was {facts}")
        return array

    def is_changed(self, key: str, array: Array) -> bool:
        """Whether the SHA-256 differs from the one in the manifest."""
        data = np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        return bool(hashlib.sha256(data).hexdigest() != self.manifest["arrays"][key]["sha256"])


def compare(op: Entry, key: str, wanted: Array, got: Array, names: tuple[str, str]) -> None:
    """Raise where two arrays differ."""
    if wanted.shape != got.shape:
        raise Differs(f"{op['name']} ({op['kind']}): {key} has shape {got.shape}; must have {wanted.shape}")
    bad = np.argwhere(wanted != got)
    if len(bad):
        where = tuple(int(i) for i in bad[0])
        raise Differs(
            f"{op['name']} ({op['kind']}): {key} differs in {len(bad)} of {wanted.size}, first at {list(where)}: "
            f"{names[0]} {int(wanted[where])}, {names[1]} {int(got[where])}"
        )


def with_constant(op: Entry, xs: list[Array], constants: Found) -> tuple[Entry, list[Array]]:
    """Sums and products: the operand that is a constant in its place among the others."""
    place = op["attributes"].get("weight_operand")
    if op["kind"] not in ("Add", "Sub", "Mul") or place is None:
        return op, xs
    inputs = list(op["inputs"])
    inputs.insert(place, op["weight"])
    return {**op, "inputs": inputs}, [*xs[:place], centred(constants["weight"], op["weight"]), *xs[place:]]


def recompute(op: Entry, vectors: Vectors) -> None:
    """One layer from its own inputs, sample by sample."""
    keys = {one["part"]: one["key"] for one in op["arrays"]}
    constants = {one["part"]: vectors.get(op, one["key"]) for one in op["arrays"] if not one["per_sample"]}
    stored = {one["part"]: vectors.get(op, one["key"]) for one in op["arrays"] if one["per_sample"]}
    pieces = {part: np.split(array, vectors.samples) for part, array in stored.items()}
    made: dict[str, list[Array]] = {}
    for sample in range(vectors.samples):
        found: Found = {}
        for index, one in enumerate(op["inputs"]):
            if "before" in one:
                before = centred(pieces[f"input.{index}.before"][sample], one["before"])
                codes = constants.get(f"input.{index}.table")
                found[f"input.{index}"] = regrid(before, one["before"], one["before"], codes)
        xs = [centred(pieces[f"input.{index}"][sample], one) for index, one in enumerate(op["inputs"])]
        full, xs = with_constant(op, xs, constants)
        codes = RULES[op["rule"]](full, xs, found, constants) if op["rule"] in RULES else None
        if codes is not None and "output" in pieces:
            found["output"] = np.clip(codes, *op["clamp"]) if "clamp" in op else codes
        for part, array in found.items():
            made.setdefault(part, []).append(array)
    for part, arrays in made.items():
        compare(op, keys[part], np.concatenate(arrays), stored[part], ("recomputed", "stored"))
    changed = [keys[part] for part, array in {**constants, **stored}.items() if vectors.is_changed(keys[part], array)]
    if changed:
        raise Differs(f"{op['name']} ({op['kind']}): {changed[0]} was changed since it was written (SHA-256)")


def check_files(vectors: Vectors) -> None:
    """The C header and other files beside the arrays, as far as they are still there; arrays are told one by one."""
    for name, digest in vectors.manifest["files"].items():
        path = vectors.folder / name
        if name != "vectors.npz" and path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() != digest:
            raise Differs(f"{name} was changed since it was written (SHA-256)")


def check_vectors(vectors: Vectors) -> str:
    operators = vectors.manifest["operators"]
    for one in vectors.manifest["inputs"]:
        name = {"name": f"model input {one['tensor']}", "kind": "Input"}
        if vectors.is_changed(one["array"], vectors.get(name, one["array"])):
            raise Differs(f"{name['name']}: {one['array']} was changed since it was written (SHA-256)")
    for op in operators:
        recompute(op, vectors)
    check_files(vectors)
    other = [op["name"] for op in operators if op["rule"] not in RULES]
    rest = f"; not recomputed, unchanged by SHA-256: {', '.join(other)}" if other else ""
    return f"{len(operators) - len(other)} layers recomputed, {vectors.samples} sample(s): nothing differs{rest}"


def check_output(vectors: Vectors, path: Path) -> str:
    """Arrays of another implementation beside the vectors."""
    try:
        theirs = np.load(path, allow_pickle=False)
        names = set(theirs.files)
        compared = 0
        for op in vectors.manifest["operators"]:
            for key in (one["key"] for one in op["arrays"]):
                if key not in names:
                    continue
                wanted, got = vectors.get(op, key), theirs[key]
                if got.dtype.kind not in "iu":
                    raise Differs(f"{op['name']} ({op['kind']}): {key} must hold integers; got {got.dtype}")
                if got.size == wanted.size and got.ndim == 1:
                    got = got.reshape(wanted.shape)
                compare(op, key, wanted, got, ("expected", "got"))
                compared += 1
                names.discard(key)
    except (OSError, ValueError, AttributeError, zipfile.BadZipFile) as error:
        raise Unusable(f"{path}: cannot be read: {error}") from error
    if not compared:
        some = ", ".join(list(vectors.npz.files)[:3])
        raise Unusable(f"{path}: has no array of these vectors. Name them as in vectors.npz: {some}, ...")
    rest = f"; not in the vectors: {', '.join(sorted(names)[:5])}" if names else ""
    return f"{compared} arrays compared: nothing differs{rest}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--folder", type=Path, default=Path(__file__).resolve().parent, help="default: beside this file"
    )
    parser.add_argument("--output", type=Path, metavar="NPZ", help="arrays of another implementation, keys as there")
    args = parser.parse_args()
    try:
        vectors = Vectors(args.folder)
        print(check_vectors(vectors) if args.output is None else check_output(vectors, args.output))
    except Differs as error:
        print(f"DIFFERS {error}")
        return 1
    except Unusable as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
