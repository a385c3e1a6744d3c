# SPDX-License-Identifier: Apache-2.0
"""Which fields decide the integer result of an operator, or its cost, and are left open; and who needs them."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

from qhw.schema.arithmetic import Accumulator, Align, Pairwise, Requantize, Shift
from qhw.schema.base import UNKNOWN, Path, Table, leaves
from qhw.schema.kernels import Kernel
from qhw.schema.marks import recorded_fields
from qhw.schema.open_costs import open_costs
from qhw.schema.open_field import OpenField, left_open
from qhw.schema.operators import SUMMING_KINDS, WEIGHTED_KINDS, Approximation, Operator
from qhw.schema.spec import TargetSpec

__all__ = ["FUNCTION_KINDS", "has_integer_form", "open_fields"]

EXACT = ("qhw verify", "qhw golden")
SUMS = (*EXACT, "qhw accumulators")
WEIGHTED = frozenset(WEIGHTED_KINDS)
MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})
ADDITIONS = frozenset({"Add", "Sub"})
RESCALED = WEIGHTED | MEANS | ADDITIONS | {"MatMul", "Mul", "ReduceSum"}
"""Kinds whose result is an accumulator, requantized."""
REGRIDDED = frozenset({"Abs", "Clip", "Concat", "LeakyRelu", "Relu"})
"""Kinds that requantize where input and output are on two grids."""
FUNCTION_KINDS = frozenset(
    {"Elu", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Log", "LogSoftmax", "Mish", "Neg", "Pow", "Resize", "Rsqrt"}
) | {"Sigmoid", "Silu", "Softmax", "Softplus", "Sqrt", "Tanh"}
"""Kinds of which the target must say what is computed in place of the function."""
_SOFTMAX = {"integer_bits": "", "sum_integer_bits": ""}
_IN_FIXED_POINT: Mapping[str, Mapping[str, str]] = {
    "HardSwish": {"multiplier_bits": ""},
    "LogSoftmax": _SOFTMAX,
    "Resize": {"fraction_bits": "where it is bilinear", "position": "where it is nearest"},
    "Softmax": _SOFTMAX,
}
"""What an approximation in fixed point must state, and on what operators."""
_OUTSIDE = {"outside": "where operands have codes without a value"}
_BY_TABLE: Mapping[str, Mapping[str, str]] = {"Log": _OUTSIDE, "Pow": _OUTSIDE, "Rsqrt": _OUTSIDE, "Sqrt": _OUTSIDE}


def open_fields(spec: TargetSpec) -> tuple[OpenField, ...]:
    """The fields that a target leaves open and that some command needs, each once, in the order of its operators.

    Only operators with kernels count: the others move codes, or are left to the host.
    """
    found: dict[Path, OpenField] = {}
    for kind, operator in spec.operators.items():
        for name in operator.kernels if isinstance(operator.kernels, tuple) else ():
            for one in _of_kernel(spec, kind, operator, name):
                known = found.get(one.path, one)
                kinds = tuple(dict.fromkeys((*known.kinds, kind)))
                where = known.where if known.where == one.where else ""
                found[one.path] = replace(known, kinds=kinds, where=where)
    for one in (*_of_target(spec), *open_costs(spec)):
        found[one.path] = one
    return tuple(found.values())


def has_integer_form(spec: TargetSpec, kernel: Kernel) -> bool:
    """Whether a kernel reads integers, as far as the target says; of small floats and palettes nothing is exact."""
    read = [listed for listed in (kernel.input, kernel.weight) if isinstance(listed, tuple)]
    return all(any(spec.formats[name].kind in ("integer", UNKNOWN) for name in listed) for listed in read)


def _open(path: Path, value: object, commands: tuple[str, ...] = EXACT, where: str = "") -> Iterator[OpenField]:
    return left_open(path, value, commands, where=where)


def _unknown(path: Path, table: Table, handled: tuple[str, ...] = (), where: str = "") -> Iterator[OpenField]:
    """Fields of a table that something reads and that are unknown; most have a meaning where they are absent."""
    unread = tuple(recorded_fields(table))
    for leaf, value in leaves(table):
        is_read = not any(leaf[: len(recorded)] == recorded for recorded in unread)
        if value == UNKNOWN and is_read and leaf[0] not in handled:
            yield from _open((*path, *leaf), value, where=where)


def _of_kernel(spec: TargetSpec, kind: str, operator: Operator, name: str) -> Iterator[OpenField]:
    kernel = spec.kernels[name]
    if not has_integer_form(spec, kernel):
        return
    if kind in SUMMING_KINDS:
        yield from _of_sum(spec, kernel, name, SUMS if kind in WEIGHTED else EXACT)
    if kind in WEIGHTED:
        yield from _of_bias(spec, kernel, name)
    rule = operator.approximation
    if kind in FUNCTION_KINDS:
        path: Path = ("operators", kind, "approximation")
        if not isinstance(rule, Approximation):
            yield from _open(path, rule)
            return
        needed = {"fixed_point": _IN_FIXED_POINT, "table": _BY_TABLE}.get(str(rule.kind), {}).get(kind, {})
        yield from _open((*path, "kind"), rule.kind)
        yield from _unknown(path, rule, ("kind", *needed))
        for field, at in needed.items():
            yield from _open((*path, field), getattr(rule, field), where=at)
    elif rule is None and kind in RESCALED | REGRIDDED:
        where = "where input and output have two scales" if kind in REGRIDDED else ""
        yield from _of_requantize(spec, kernel, name, kind, operator, where)


def _of_sum(spec: TargetSpec, kernel: Kernel, name: str, commands: tuple[str, ...]) -> Iterator[OpenField]:
    if kernel.accumulator is None or kernel.accumulator == UNKNOWN:
        yield from _open(("kernels", name, "accumulator"), kernel.accumulator, commands)
        return
    path: Path = ("accumulators", kernel.accumulator)
    entry = spec.accumulators[kernel.accumulator]
    yield from _open((*path, "bits"), entry.bits, commands)
    beyond = "where a sum may not fit"
    yield from _open((*path, "overflow"), entry.overflow, where=beyond)
    handled = ("bits", "overflow", "pairwise", "products_per_step", "order", "bias_added")
    yield from _unknown(path, entry, handled)
    if entry.overflow == "saturate":
        yield from _open((*path, "products_per_step"), entry.products_per_step, where=beyond)
        yield from _open((*path, "bias_added"), entry.bias_added, where=beyond)
        if entry.products_per_step != "all":
            yield from _open((*path, "order"), entry.order, where=beyond)
    yield from _of_pairs((*path, "pairwise"), entry)


def _of_pairs(path: Path, entry: Accumulator) -> Iterator[OpenField]:
    pairs = entry.pairwise
    if not isinstance(pairs, Pairwise):
        if pairs == UNKNOWN:
            yield from _open(path, pairs)
        return
    beyond = "where two products may not fit"
    yield from _open((*path, "bits"), pairs.bits)
    yield from _open((*path, "overflow"), pairs.overflow, where=beyond)
    yield from _open((*path, "operands"), pairs.operands, where=beyond)
    if entry.overflow != "saturate":
        yield from _open((*path[:-1], "order"), entry.order, where=beyond)


def _of_bias(spec: TargetSpec, kernel: Kernel, name: str) -> Iterator[OpenField]:
    with_bias = "where they have a bias"
    if kernel.bias is None or kernel.bias == UNKNOWN:
        yield from _open(("kernels", name, "bias"), kernel.bias, SUMS, with_bias)
    elif kernel.bias != "none":
        path: Path = ("biases", kernel.bias)
        entry = spec.biases[kernel.bias]
        yield from _open((*path, "bits"), entry.bits, SUMS, with_bias)
        yield from _unknown(path, entry, ("bits", "align", "applied"), with_bias)
        rule = spec.requantize.get(str(kernel.requantize))
        if entry.applied == UNKNOWN or rule is None or rule.kind != "shift":
            yield from _open((*path, "applied"), entry.applied, where=with_bias)
        if entry.scale == "own":
            yield from _open((*path, "align"), entry.align, where="where the bias has another scale than the sum")


def _of_requantize(
    spec: TargetSpec, kernel: Kernel, name: str, kind: str, operator: Operator, where: str
) -> Iterator[OpenField]:
    formats = kernel.output if isinstance(kernel.output, tuple) else ()
    if any(spec.formats[one].zero_point != 0 for one in formats):
        order: Path = ("operators", kind, "rounding_order")
        yield from _open(order, operator.rounding_order, where="where a zero point is not 0")
    if kernel.requantize is None or kernel.requantize == UNKNOWN:
        yield from _open(("kernels", name, "requantize"), kernel.requantize, where=where)
        return
    path: Path = ("requantize", kernel.requantize)
    entry = spec.requantize[kernel.requantize]
    yield from _open((*path, "kind"), entry.kind, where=where)
    yield from _unknown(path, entry, ("kind", "rounding", "multiplier_bits", "shift", "align"), where)
    yield from _of_rounding(path, entry, kind, operator, where)
    if entry.kind == "fixed_point":
        yield from _open((*path, "multiplier_bits"), entry.multiplier_bits, where=where)
    if entry.kind in ("fixed_point", "shift"):
        yield from _of_shift((*path, "shift"), entry.shift)
    if kind in ADDITIONS and (entry.kind == "shift" or (entry.kind == "fixed_point" and _adds_as_they_are(operator))):
        yield from _of_register(spec, kernel, name)
    if kind in ADDITIONS and entry.kind == "shift":
        yield from _of_align((*path, "align"), operator, entry.align)
    yield from _of_operator(kernel, kind, operator, entry)


def _of_rounding(path: Path, entry: Requantize, kind: str, operator: Operator, where: str) -> Iterator[OpenField]:
    if operator.rounding == UNKNOWN:
        yield from _open(("operators", kind, "rounding"), operator.rounding, where=where)
    elif operator.rounding is None and entry.stages is None:
        yield from _open((*path, "rounding"), entry.rounding, where=where)


def _of_shift(path: Path, shift: Shift | str | None) -> Iterator[OpenField]:
    if not isinstance(shift, Shift):
        yield from _open(path, shift)
        return
    yield from _open((*path, "min"), shift.min, where="where they shift left")
    yield from _open((*path, "max"), shift.max, where="where they shift right")


def _of_register(spec: TargetSpec, kernel: Kernel, name: str) -> Iterator[OpenField]:
    """Of a single sum: nothing happens on the way."""
    if kernel.accumulator is None or kernel.accumulator == UNKNOWN:
        yield from _open(("kernels", name, "accumulator"), kernel.accumulator)
        return
    path: Path = ("accumulators", kernel.accumulator)
    entry = spec.accumulators[kernel.accumulator]
    yield from _open((*path, "bits"), entry.bits)
    yield from _open((*path, "overflow"), entry.overflow, where="where a sum may not fit")


def _of_align(path: Path, operator: Operator, align: Align | str | None) -> Iterator[OpenField]:
    if operator.same_scale in ("inputs", "all"):
        return
    where = "where operands have two scales"
    if not isinstance(align, Align):
        yield from _open(path, align, where=where)
        return
    yield from _open((*path, "to"), align.to, where=where)
    end = "max" if align.to == "coarser" else "min"
    if align.to == "coarser":
        yield from _open((*path, "rounding"), align.rounding, where=where)
    if isinstance(align.shift, Shift):
        yield from _open((*path, "shift", end), getattr(align.shift, end), where=where)
    else:
        yield from _open((*path, "shift"), align.shift, where=where)


def _adds_as_they_are(operator: Operator) -> bool:
    """Operands on one scale need no pre-shift; one that is stated, or unknown, decides all the same."""
    return operator.preshift_bits is None and operator.same_scale in ("inputs", "all")


def _of_operator(kernel: Kernel, kind: str, operator: Operator, entry: Requantize) -> Iterator[OpenField]:
    path: Path = ("operators", kind)
    if entry.kind in ("fixed_point", "float64") and operator.ratio == UNKNOWN:
        yield from _open((*path, "ratio"), operator.ratio)
    if kind in MEANS and operator.mean_count == UNKNOWN:
        yield from _open((*path, "mean_count"), operator.mean_count)
    if kind in ADDITIONS and entry.kind == "fixed_point" and not _adds_as_they_are(operator):
        stated = operator.preshift_bits
        inputs = kernel.input if isinstance(kernel.input, tuple) else ()
        is_open = not isinstance(stated, dict) or not set(stated) & set(inputs)
        if is_open:
            yield from _open((*path, "preshift_bits"), None if isinstance(stated, dict) else stated)


def _of_target(spec: TargetSpec) -> Iterator[OpenField]:
    """What is not about an operator: who takes the artefact, and who runs it."""
    artefact = spec.artefact
    exporter, executor = (None, None) if artefact is None else (artefact.exporter, artefact.executor)
    effect = "qhw quantize writes a portable artefact, not the toolchain's own"
    yield from left_open(("artefact", "exporter"), exporter, ("qhw quantize",), effect=effect)
    effect = "qhw verify cannot run the artefact, and compares with the simulation alone"
    yield from left_open(("artefact", "executor"), executor, ("qhw verify",), effect=effect)
