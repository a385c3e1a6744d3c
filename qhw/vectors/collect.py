# SPDX-License-Identifier: Apache-2.0
"""Golden vectors, one operator at a time: what it read, summed and wrote, and the numbers that it computed with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.graph import SUMMING_KINDS, WEIGHTED_KINDS
from qhw.integer.accumulate import wrapped
from qhw.integer.arithmetic import Requantization
from qhw.integer.codes import Codes, is_one_grid
from qhw.integer.model import Executed
from qhw.integer.movement import Regridding, regridded
from qhw.integer.products import product_bounds
from qhw.integer.saturating import is_plain_sum
from qhw.integer.site import Constant, PointIndex, Site
from qhw.numerics import PerAxis, QParams

__all__ = ["Array", "VectorReader", "Vectors", "grid"]

Array = NDArray[Any]

_DTYPES = (np.int8, np.uint8, np.int16, np.uint16, np.int32, np.int64)


@dataclass(frozen=True)
class Vectors:
    """One operator's vectors for one sample.

    Attributes:
        entry: The operator as the manifest has it: plain data; each array stands as its key.
        constants: Arrays that are the same for every sample: weights, bias, table, by key.
        values: Arrays of this sample, by key.
    """

    entry: dict[str, Any]
    constants: Mapping[str, Array]
    values: Mapping[str, Array]


class VectorReader:
    """Makes vectors of operators that an `IntegerModel` ran.

    Args:
        result: The quantized model.
    """

    def __init__(self, result: QuantizedModel) -> None:
        self._graph = result.float_graph
        self._points = PointIndex(result.plan)

    def __call__(self, run: Executed) -> Vectors:
        """The vectors of one run.

        Raises:
            IntegerError: codes are moved in a way that depends on them, or sums are no plain ones.
        """
        return _Collected(run, self._sources(run.site)).vectors()

    def _sources(self, site: Site) -> list[str | None]:
        points = [self._points.source(self._graph, name) for name in site.operator.inputs]
        return [None if point is None else point.tensor for point in points]


class _Collected:
    def __init__(self, run: Executed, sources: list[str | None]) -> None:
        self._run, self._site, self._sources = run, run.site, sources
        self._facts = dict(run.form.facts)
        self._constants: dict[str, Array] = {}
        self._values: dict[str, Array] = {}

    def vectors(self) -> Vectors:
        site = self._site
        operator = site.operator
        entry = {
            "name": site.name,
            "kind": operator.kind,
            "fused": [member.kind for member in site.members[1:] if member.kind != "Dropout"],
            "kernel": None if site.kernel is None else site.kernel_name,
            "target_entry": site.path,
            "rule": self._facts.pop("rule", None),
            "attributes": _plain(dict(operator.attributes)),
            "inputs": [self._input(index) for index in range(len(self._run.operands))],
            "weight": self._constant("weight", site.weight, operator.weight_axis),
            "bias": self._constant("bias", site.bias, 0),
            "accumulator": self._accumulator(),
            "output": self._output(),
        }
        if entry["rule"] == "move":
            self._facts.update(self._moves())
        if entry["rule"] == "join" and site.output is not None:
            moves = [regridded(site, q, site.output) for q in site.inputs]
            entry["regridding"] = [self._regridding(f"input.{i}.table", move) for i, move in enumerate(moves)]
        for name in ("requantize", "requantize.0", "requantize.1"):
            if isinstance(found := self._facts.pop(name, None), Requantization):
                entry[name] = requantization(found)
        if (clamp := self._facts.pop("clamp", None)) is not None:
            entry["clamp"] = _plain(clamp)
        entry["facts"] = {name: self._fact(name, value) for name, value in self._facts.items()}
        entry["arrays"] = self._parts()
        return Vectors(entry, self._constants, self._values)

    def _parts(self) -> list[dict[str, Any]]:
        """All arrays in the order of a computation: what is read, what with, sums, what is written."""
        read = [key for key in self._values if key.startswith(self._key("input."))]
        keys = [*read, *self._constants, *(key for key in self._values if key not in read)]
        start = len(self._key(""))
        return [{"part": key[start:], "key": key, "per_sample": key in self._values} for key in keys]

    def _key(self, part: str) -> str:
        return f"{self._site.name}/{part}"

    def _input(self, index: int) -> dict[str, Any]:
        codes, given = self._run.operands[index], self._run.given[index]
        key = self._key(f"input.{index}")
        self._values[key] = codes_array(codes)
        entry: dict[str, Any] = {
            "tensor": self._site.operator.inputs[index],
            "source": self._sources[index],
            "array": key,
        }
        entry |= grid(codes.qparams) | {"shape": list(codes.values.shape)}
        if given is not None and not is_one_grid(given.qparams, codes.qparams):
            before, move = f"{key}.before", regridded(self._site, given.qparams, codes.qparams)
            self._values[before] = codes_array(given)
            entry["before"] = {
                "array": before,
                **grid(given.qparams),
                **(self._regridding(f"input.{index}.table", move) or {}),
            }
        return entry

    def _constant(self, part: str, constant: Constant | None, axis: int | None) -> dict[str, Any] | None:
        if constant is None:
            return None
        q = constant.qparams
        self._constants[self._key(part)] = constant.codes.numpy().astype(code_type(q.quant_min, q.quant_max))
        return {"array": self._key(part), **grid(q), "shape": list(constant.codes.shape), "out_axis": axis}

    def _accumulator(self) -> dict[str, Any] | None:
        form, site = self._run.form, self._site
        if form.accumulate is None:
            return None
        if site.operator.kind in SUMMING_KINDS and not is_plain_sum(site):
            raise IntegerError(
                f"{site.name}: its golden vectors cannot be written yet: its sums depend on their order, or its bias "
                "is not added as stored."
            )
        total = form.accumulate([operand.values for operand in self._run.operands]).round().long()
        lowest, highest = self._reach()
        dtype = np.int32 if max(highest, -lowest - 1) < 2**31 else np.int64
        entry: dict[str, Any] = {"lowest": lowest, "highest": highest, "entry": None, "bits": None, "overflow": None}
        bits = None
        try:
            path, spec = site.accumulator
        except IntegerError:
            pass
        else:
            bits = spec.bits if isinstance(spec.bits, int) else None
            entry |= {"entry": path, "bits": bits, "overflow": spec.overflow}
        if site.bias is not None:
            shape = [-1, *[1] * len(site.operator.attributes.get("kernel", ()))]
            before = total - site.bias.codes.long().reshape(shape)
            # Where the width is exceeded at all, sums wrap: what stood there before the bias had wrapped, too.
            self._values[self._key("accumulator.before_bias")] = array(
                before if bits is None else wrapped(before, bits), dtype
            )
            entry["before_bias"] = self._key("accumulator.before_bias")
        self._values[self._key("accumulator")] = array(total, dtype)
        return entry | {"array": self._key("accumulator"), "dtype": dtype.__name__, "shape": list(total.shape)}

    def _reach(self) -> tuple[int, int]:
        """Lowest and highest accumulator that any input gives."""
        site = self._site
        if site.operator.kind in WEIGHTED_KINDS:
            bounds = product_bounds(site)
            return int(bounds.lowest.min()), int(bounds.highest.max())
        reach = 1
        for q in (*site.inputs, *([] if site.weight is None else [site.weight.qparams])):
            reach *= max(q.quant_max - int(q.zero_point), int(q.zero_point) - q.quant_min)
        count = self._facts.get("count", site.operator.attributes.get("reduced_elements", 1))
        reach *= int(count) if isinstance(count, int) else 1
        return -reach, reach

    def _output(self) -> dict[str, Any]:
        result, key = self._run.result, self._key("output")
        tensor = self._site.members[-1].name
        if not isinstance(result, Codes):
            return {"tensor": tensor, "array": None, "dtype": "float32", "shape": list(result.shape)}
        self._values[key] = codes_array(result)
        return {"tensor": tensor, "array": key, **grid(result.qparams), "shape": list(result.values.shape)}

    def _moves(self) -> dict[str, Any]:
        """Where each output element comes from, as flat positions in the input of one sample; -1 for the fill code."""
        source = self._run.operands[0].values
        far = 2**40  # further than any code
        found = self._run.form.run([torch.arange(source.numel()).reshape(source.shape) + far])
        filled = found < far // 2
        index = (found - far).masked_fill(filled, -1)
        self._constants[self._key("index")] = array(index, np.int32 if source.numel() < 2**31 else np.int64)
        taken = torch.where(filled, found, source.flatten().long()[index.clamp(min=0)])
        assert isinstance(self._run.result, Codes)
        if not torch.equal(taken, self._run.result.values.long()):
            raise IntegerError(f"{self._site.name}: {self._site.operator.kind} is no fixed movement of codes.")
        fill = int(found[filled][0]) if bool(filled.any()) else None
        node = self._site.node
        return {"index": {"array": self._key("index")}, "fill": fill, "arguments": _plain(list(node.args[1:]))}

    def _fact(self, name: str, value: Any) -> Any:
        if name == "table":
            assert self._site.output is not None
            return self._table("table", value, self._site.output)
        if isinstance(value, Tensor) and not value.is_floating_point():
            self._constants[self._key(name)] = array(value, np.int32)
            return {"array": self._key(name)}
        return factors(value) if isinstance(value, Tensor) else _plain(value)

    def _table(self, part: str, values: Tensor, q: QParams) -> dict[str, Any]:
        self._constants[self._key(part)] = array(values, code_type(q.quant_min, q.quant_max))
        return {"array": self._key(part)}

    def _regridding(self, part: str, move: Regridding) -> dict[str, Any] | None:
        """How codes change their grid; None where they do not."""
        if move.table is not None:
            return {"table": self._table(part, move.table, move.wanted), "first": move.source.quant_min}
        if move.requantize is None:
            return None
        return {"requantize": requantization(move.requantize), "clamp": [move.wanted.quant_min, move.wanted.quant_max]}


def array(values: Tensor, dtype: type) -> Array:
    """Whole numbers in an integer dtype, C order."""
    return np.ascontiguousarray(values.long().numpy().astype(dtype))


def codes_array(codes: Codes) -> Array:
    """Codes in the smallest integer dtype of their grid."""
    return array(codes.values, code_type(codes.qparams.quant_min, codes.qparams.quant_max))


def code_type(low: int, high: int) -> type:
    """Smallest of int8, uint8, int16, uint16, int32, int64 that holds every code."""
    return next(dtype for dtype in _DTYPES if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max)


def grid(q: QParams) -> dict[str, Any]:
    """Scale, zero point, code bounds and dtype as plain data; a number per tensor, a list per channel."""
    return {
        "dtype": code_type(q.quant_min, q.quant_max).__name__,
        "scale": q.scale.double().tolist(),
        "zero_point": q.zero_point.tolist(),
        "axis": q.granularity.axis if isinstance(q.granularity, PerAxis) else None,
        "quant_min": q.quant_min,
        "quant_max": q.quant_max,
    }


def requantization(r: Requantization) -> dict[str, Any]:
    """As plain data: factors as hexadecimal floats, multipliers and shifts as integers."""
    found: dict[str, Any] = {"kind": r.kind, "rounding": r.rounding, "zero_point": r.zero_point}
    if r.factor is not None:
        return found | factors(r.factor) | {"zero_point_before": r.before}
    assert r.shift is not None
    if r.multiplier is not None:
        found |= {"multiplier": r.multiplier.flatten().tolist(), "multiplier_bits": r.bits}
    if r.steps:
        found["steps"] = [list(step) for step in r.steps]
    shift = {"shift": r.shift.flatten().tolist(), "shape": list(r.shift.shape)}
    return found | shift | {"zero_point_before": r.before}


def factors(values: Tensor) -> dict[str, Any]:
    """float32 or float64 numbers, exact, and as bit patterns; `shape` broadcasts against accumulators."""
    flat = np.atleast_1d(values.numpy()).flatten()
    return {
        flat.dtype.name: [value.hex() for value in flat.tolist()],
        "bits": flat.view(f"uint{8 * flat.itemsize}").tolist(),
        "shape": list(values.shape),
    }


def _plain(value: Any) -> Any:
    """As JSON has it; what it has not, in words."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)
