# SPDX-License-Identifier: Apache-2.0
"""Numbers of a target that cannot hold together: limits without a value, scales without a code, widths that clash."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from qhw.schema.arithmetic import Pairwise, Ratio
from qhw.schema.base import UNKNOWN, Path, Table
from qhw.schema.formats import Format
from qhw.schema.kernels import OPERANDS, ExponentBound, Kernel
from qhw.schema.messages import shown
from qhw.schema.operators import Approximation, LimitRange, Operator
from qhw.schema.remarks import Remark
from qhw.schema.scales import Scale
from qhw.schema.spec import TargetSpec
from qhw.schema.words import joined, value_words

__all__ = ["contradictions"]

COUNTS = (
    *("kernel", "stride", "dilation", "groups", "in_channels", "out_channels", "rank", "inputs", "outputs"),
    *("height", "width", "elements", "reduced_elements", "depth_multiplier"),
)
"""Attributes that are counts, 1 or more."""
SHARED = {"input_output": ("input", "output"), "inputs": ("input", "weight"), "all": OPERANDS}


UNITS: Mapping[str, tuple[float, str]] = {
    "clock_hz": (1e5, "hertz: 200 MHz are 200e6"),
    "bandwidth_bytes_per_s": (1e6, "bytes per second: 3.2 GB/s are 3.2e9"),
    "capacity_bytes": (64, "bytes: 256 KiB are 262144"),
    "peak_ops_per_s": (1e6, "operations per second: 4 TOPS are 4e12"),
}
"""Field: below which value another unit was meant, and the unit."""


def contradictions(spec: TargetSpec) -> Iterator[Remark]:
    """Everything that two fields say against each other, or that no number satisfies."""
    for name, form in spec.formats.items():
        yield from _of_scale(name, form)
        yield from _of_fixed_data(spec, name, form)
    for name, kernel in spec.kernels.items():
        yield from _of_widths(spec, name, kernel)
        yield from _of_exponents(spec, name, kernel)
        yield from _of_groups(spec, name, kernel)
    yield from _of_requantize(spec)
    for kind, operator in spec.operators.items():
        yield from _of_limits(kind, operator)
        yield from _of_fixed_output(spec, kind, operator)
        yield from _of_shared_scale(spec, kind, operator)
        yield from _of_distances(spec, kind, operator)
    defaults = [name for name, clock in spec.clocks.items() if clock.is_default]
    if len(defaults) > 1:
        yield "warning", ("clocks", defaults[1], "is_default"), f"{defaults[0]} is the default already. Keep one."
    yield from _of_units(spec)
    yield from _of_conflicts(spec)


def _of_units(spec: TargetSpec) -> Iterator[Remark]:
    """Figures of cost that are far too small for the unit in their name."""
    tables: list[tuple[Path, Table]] = [(("clocks", name), clock) for name, clock in spec.clocks.items()]
    tables += [(("memories", name), memory) for name, memory in spec.memories.items()]
    tables += [] if spec.cost is None else [(("cost",), spec.cost)]
    for path, table in tables:
        for field, (least, unit) in UNITS.items():
            value = getattr(table, field, None)
            if isinstance(value, int | float) and value < least:
                yield "warning", (*path, field), f"{value:g} is very little; the unit is {unit}. Correct it."


def _exponents_of(form: Format) -> tuple[float, float] | None:
    """Lowest and highest e of the scales 2^e that a format may have, infinite where open; None without such scales."""
    scale = form.scale
    if not isinstance(scale, Scale) or scale.kind not in ("power_of_two", "e8m0"):
        return None
    low = scale.exponent_min if isinstance(scale.exponent_min, int) else -math.inf
    high = scale.exponent_max if isinstance(scale.exponent_max, int) else math.inf
    if isinstance(scale.min, float):
        low = max(low, math.ceil(math.log2(scale.min)))
    if isinstance(scale.max, float):
        high = min(high, math.floor(math.log2(scale.max)))
    return low, high


def _is_legal_scale(form: Format, value: float) -> bool:
    """Whether a format may have a scale, as far as the target says."""
    scale = form.scale
    if not isinstance(scale, Scale):
        return True
    if isinstance(scale.values, tuple):
        return value in scale.values
    bounds = _exponents_of(form)
    if bounds is not None:
        mantissa, exponent = math.frexp(value)
        return mantissa == 0.5 and bounds[0] <= exponent - 1 <= bounds[1]
    low, high = scale.min, scale.max
    return (not isinstance(low, float) or value >= low) and (not isinstance(high, float) or value <= high)


def _of_scale(name: str, form: Format) -> Iterator[Remark]:
    bounds = _exponents_of(form)
    if bounds is not None and bounds[0] > bounds[1]:
        text = "no power of two lies within its bounds. Widen min and max, or exponent_min and exponent_max."
        yield "error", ("formats", name, "scale"), text


def _of_fixed_data(spec: TargetSpec, name: str, form: Format) -> Iterator[Remark]:
    """Integer data on one scale beside weights whose scales are free: documents read codes so, chips need not."""
    scale, low, high, zero = form.scale, form.quant_min, form.quant_max, form.zero_point
    if form.kind != "integer" or low is None or high is None or not isinstance(zero, int):
        return
    if not (isinstance(scale, Scale) and scale.kind == "fixed" and isinstance(scale.values, tuple)):
        return
    if any(_rescales(spec, kernel, name) for kernel in spec.kernels.values()):
        text = (
            f"data beyond [{(low - zero) * scale.values[0]:g}, {(high - zero) * scale.values[0]:g}] is clipped. A chip "
            "that reads codes alone has no such scale: then state power_of_two, and same_scale where no multiplier or "
            "shift parts two tensors."
        )
        yield "info", ("formats", name, "scale"), text


def _rescales(spec: TargetSpec, kernel: Kernel, name: str) -> bool:
    """Whether a kernel reads and writes data of a format, with weights whose scale can take up that of the data."""
    if not all(isinstance(names, tuple) and name in names for names in (kernel.input, kernel.output)):
        return False
    weights = kernel.weight if isinstance(kernel.weight, tuple) else ()
    return any(getattr(spec.formats[one].scale, "kind", None) != "fixed" for one in weights)


def _reach(form: Format) -> int | None:
    """Largest magnitude of a code, its zero point taken off."""
    low, high, zero = form.quant_min, form.quant_max, form.zero_point
    if form.kind != "integer" or low is None or high is None:
        return None
    return max(high - zero, zero - low) if isinstance(zero, int) else high - low


def _product_bits(spec: TargetSpec, kernel: Kernel) -> int | None:
    """Width of the narrowest product that a kernel computes; None where codes are open."""
    if not isinstance(kernel.input, tuple) or not isinstance(kernel.weight, tuple):
        return None
    inputs, weights = ([_reach(spec.formats[name]) for name in names] for names in (kernel.input, kernel.weight))
    if None in inputs or None in weights:
        return None
    return (min(map(int, inputs)) * min(map(int, weights))).bit_length() + 1  # type: ignore[arg-type]


def _of_widths(spec: TargetSpec, name: str, kernel: Kernel) -> Iterator[Remark]:
    accumulator = spec.accumulators.get(str(kernel.accumulator))
    bias = spec.biases.get(str(kernel.bias))
    product = _product_bits(spec, kernel)
    width = accumulator.bits if accumulator is not None and accumulator.kind != "float" else None
    path: Path = ("kernels", name)
    if isinstance(width, int) and product is not None and width < product:
        text = f"{kernel.accumulator} has {width} bits, and one product of its formats needs {product}. Correct one."
        yield "warning", (*path, "accumulator"), text
    if bias is not None and isinstance(bias.bits, int):
        if isinstance(width, int) and bias.bits > width:
            text = (
                f"{kernel.bias} has {bias.bits} bits, and the accumulator it is added to {width}; what is stored wider "
                "than it is added are storage_bits."
            )
            yield "info", (*path, "bias"), text
        if product is not None and bias.scale == "input*weight" and bias.bits < product:
            text = f"{kernel.bias} has {bias.bits} bits on the scale of products, of which the largest needs {product}."
            yield "info", (*path, "bias"), text
    if accumulator is not None and isinstance(accumulator.pairwise, Pairwise):
        narrow = accumulator.pairwise.bits
        if isinstance(narrow, int) and isinstance(width, int) and narrow >= width:
            text = f"has {narrow} bits, no fewer than the accumulator's {width}. Leave pairwise out, or correct one."
            yield "warning", ("accumulators", str(kernel.accumulator), "pairwise", "bits"), text
    rule = spec.requantize.get(str(kernel.requantize))
    shift = getattr(rule, "shift", None)
    least = getattr(shift, "min", None)
    if isinstance(width, int) and isinstance(least, int) and least >= width:
        text = (
            f"{kernel.requantize} shifts right by {least} or more, and sums have {width} bits: nothing is left of them."
        )
        yield "error", (*path, "requantize"), text


def _of_groups(spec: TargetSpec, name: str, kernel: Kernel) -> Iterator[Remark]:
    """Integer weights with a scale per group of inputs: their sums have no one scale."""
    names = kernel.weight if isinstance(kernel.weight, tuple) else ()
    grouped = [one for one in names if spec.formats[one].per == "group" and _reach(spec.formats[one]) is not None]
    if not grouped:
        return
    path: Path = ("kernels", name)
    bias = spec.biases.get(str(kernel.bias))
    is_bound = bias is not None and isinstance(bias.bits, int) and bias.meets_sum
    if is_bound and len(grouped) == len(names):  # another format serves what has a bias
        text = (
            f"{kernel.bias} is in units of the sum, and with {joined(grouped)} a sum has a scale per group: nothing "
            'that has a bias is planned there. Give the bias a scale of its own (scale = "own"), or bits = "float".'
        )
        yield "warning", (*path, "bias"), text
    inputs = kernel.input if isinstance(kernel.input, tuple) else ()
    if any(_reach(spec.formats[one]) is not None for one in inputs):
        text = (
            f"with {joined(grouped)} a sum has a scale per group, and no field says how these become one: qhw verify "
            "and qhw golden cannot answer there."
        )
        yield "info", (*path, "weight"), text


def _of_requantize(spec: TargetSpec) -> Iterator[Remark]:
    for name, rule in spec.requantize.items():
        shift = rule.shift
        most, least = getattr(shift, "max", None), getattr(shift, "min", None)
        path: Path = ("requantize", name, "shift", "max")
        if rule.kind in ("fixed_point", "shift") and isinstance(most, int) and most < 0:
            yield (
                "warning",
                path,
                f"{most} only ever shifts left, and sums are wider than results. Is its sign wrong?",
            )
        ratio = rule.ratio
        if rule.kind != "shift" or not isinstance(ratio, Ratio):
            continue
        where: Path = ("requantize", name, "ratio")
        if isinstance(most, int) and isinstance(ratio.max, float) and ratio.max < 2.0**-most:
            text = (
                f"no ratio is legal: at most {ratio.max:g}, and shifts of at most {most} give {2.0**-most:g} or more."
            )
            yield "error", where, f"{text} Correct one."
        if isinstance(least, int) and isinstance(ratio.min, float) and ratio.min > 2.0**-least:
            text = f"no ratio is legal: at least {ratio.min:g}, and shifts from {least} give {2.0**-least:g} or less."
            yield "error", where, f"{text} Correct one."


def _of_distances(spec: TargetSpec, kind: str, operator: Operator) -> Iterator[Remark]:
    """Softmax in fixed point: distances between codes become fixed-point reals by 2^n times the input's scale."""
    rule = operator.approximation
    bits = rule.integer_bits if isinstance(rule, Approximation) and rule.kind == "fixed_point" else None
    if kind not in ("Softmax", "LogSoftmax") or not isinstance(bits, int):
        return
    for name in operator.kernels if isinstance(operator.kernels, tuple) else ():
        requantize = spec.requantize.get(str(spec.kernels[name].requantize))
        least = getattr(requantize.shift, "min", None) if requantize is not None else None
        if isinstance(least, int) and least >= 0:
            yield (
                "warning",
                ("kernels", name, "requantize"),
                f"{kind} multiplies by 2^{31 - bits} times the input's scale here, and shift.min = {least} allows no "
                "shift left. Give it a kernel with a requantize of its own.",
            )


def _of_exponents(spec: TargetSpec, name: str, kernel: Kernel) -> Iterator[Remark]:
    """Inequalities between exponents that no scales of the kernel's formats satisfy."""
    for index, bound in enumerate(kernel.exponents if isinstance(kernel.exponents, tuple) else ()):
        path: Path = ("kernels", name, "exponents", index)
        ranges = _term_ranges(spec, kernel, bound)
        if isinstance(ranges, str):
            yield "warning", path, f"{ranges} has scales that are no powers of two, which have no exponent. Remove one."
            continue
        low = sum(min(factor * one, factor * other) for factor, (one, other) in ranges)
        high = sum(max(factor * one, factor * other) for factor, (one, other) in ranges)
        if isinstance(bound.min, int) and high < bound.min:
            yield (
                "error",
                path,
                f"no scales satisfy it: the sum is at most {high:g}, and min is {bound.min}. Correct one.",
            )
        if isinstance(bound.max, int) and low > bound.max:
            yield (
                "error",
                path,
                f"no scales satisfy it: the sum is at least {low:g}, and max is {bound.max}. Correct one.",
            )


def _term_ranges(spec: TargetSpec, kernel: Kernel, bound: ExponentBound) -> list[tuple[int, tuple[float, float]]] | str:
    """Factor and bounds of the exponent of each term; or the first format that has no exponent."""
    operands = {"input": kernel.input, "input_2": kernel.weight or kernel.input, "weight": kernel.weight}
    operands |= {"output": kernel.output, "inputs_min": kernel.input, "inputs_max": kernel.input}
    found: list[tuple[int, tuple[float, float]]] = []
    for term, factor in bound.terms.items():
        names = operands.get(term)
        if not isinstance(names, tuple):
            found.append((factor, (-math.inf, math.inf)))
            continue
        each = {name: _exponents_of(spec.formats[name]) for name in names}
        bad = next((n for n, e in each.items() if e is None and spec.formats[n].scale != UNKNOWN), None)
        if bad is not None:
            return f"format {bad}"
        known = [held for held in each.values() if held is not None] or [(-math.inf, math.inf)]
        found.append((factor, (min(low for low, _ in known), max(high for _, high in known))))
    return found


def _of_limits(kind: str, operator: Operator) -> Iterator[Remark]:
    for name, limit in operator.limits.items():
        held = LimitRange(values=limit) if isinstance(limit, tuple) else limit
        if not isinstance(held, LimitRange):
            continue
        path: Path = ("operators", kind, "limits", name)
        if isinstance(held.values, tuple):
            bad = [value for value in held.values if not _may_be(name, held, value)]
            if bad and len(bad) == len(held.values):
                yield "error", path, f"no value satisfies it, so no {kind} runs: {_why(name, held)}. Correct it."
            elif bad:
                yield "warning", path, f"{value_words(bad)} can never be: {_why(name, held)}. Take it out."
        elif not _any_integer(name, held):
            yield "error", path, f"no value satisfies it, so no {kind} runs: {_why(name, held)}. Correct it."


def _may_be(name: str, limit: LimitRange, value: Any) -> bool:
    """Whether an attribute can have a listed value, the other bounds kept."""
    numbers = value if isinstance(value, tuple) else (value,)
    return all(not isinstance(n, int) or (_within(limit, n) and not (name in COUNTS and n < 1)) for n in numbers)


def _within(limit: LimitRange, number: int) -> bool:
    return (
        (not isinstance(limit.min, float) or number >= limit.min)
        and (not isinstance(limit.max, float) or number <= limit.max)
        and (not isinstance(limit.multiple_of, int) or number % limit.multiple_of == 0)
    )


def _any_integer(name: str, limit: LimitRange) -> bool:
    """Whether an integer lies within the bounds; attributes that may be no integers have one anyway."""
    if name not in COUNTS:
        return True
    low = math.ceil(limit.min) if isinstance(limit.min, float) else 1
    step = limit.multiple_of if isinstance(limit.multiple_of, int) else 1
    first = -(-max(low, 1) // step) * step
    return not isinstance(limit.max, float) or first <= limit.max


def _why(name: str, limit: LimitRange) -> str:
    stated = {key: getattr(limit, key) for key in ("min", "max", "multiple_of", "values")}
    words = [f"{key} {value_words(value)}" for key, value in stated.items() if value is not None]
    counted = [f"a {name} is 1 or more"] if name in COUNTS else []
    return ", ".join([*(word.replace("_", " ") for word in words), *counted])


def _of_fixed_output(spec: TargetSpec, kind: str, operator: Operator) -> Iterator[Remark]:
    rows = operator.kernels if isinstance(operator.kernels, tuple) else ()
    given = {name for row in rows for name in spec.kernels[row].output or () if spec.kernels[row].output != UNKNOWN}
    for name, fixed in operator.fixed_output.items() if isinstance(operator.fixed_output, dict) else ():
        if name not in given:
            continue  # said, where it can be reached at all, by what looks for the unreachable
        form = spec.formats[name]
        path: Path = ("operators", kind, "fixed_output", name)
        if isinstance(fixed.scale, float) and not _is_legal_scale(form, fixed.scale):
            yield "error", (*path, "scale"), f"{fixed.scale:g} is no legal scale of format {name}. Correct one of them."
        zero = form.zero_point
        allowed = (zero,) if isinstance(zero, int) else zero
        if isinstance(fixed.zero_point, int) and isinstance(allowed, tuple) and fixed.zero_point not in allowed:
            text = (
                f"{fixed.zero_point} is no zero point of format {name}, which has {value_words(allowed)}. Correct one."
            )
            yield "error", (*path, "zero_point"), text


def _of_shared_scale(spec: TargetSpec, kind: str, operator: Operator) -> Iterator[Remark]:
    operands = SHARED.get(str(operator.same_scale), ())
    for name in operator.kernels if isinstance(operator.kernels, tuple) and operands else ():
        lists = [getattr(spec.kernels[name], operand) for operand in operands]
        known = [set(listed) for listed in lists if isinstance(listed, tuple)]
        if len(known) > 1 and not set.intersection(*known):
            text = f"{kind} puts its tensors on one scale (same_scale), and no format stands in all of its lists."
            yield "warning", ("kernels", name), f"{text} Correct one of them."


def _of_conflicts(spec: TargetSpec) -> Iterator[Remark]:
    """Readings that are said to be chosen, and are not what the field says."""
    for index, conflict in enumerate(spec.conflicts):
        here: Any = spec
        for part in str(conflict.field).split("."):
            here = here.get(part) if isinstance(here, dict) else getattr(here, part, None)
        scalar = isinstance(here, bool | int | float | str)
        if conflict.chosen is None or not scalar or isinstance(conflict.chosen, tuple):
            continue
        if here != conflict.chosen:
            text = (
                f"chooses {shown(conflict.chosen)} for {conflict.field}, which says {shown(here)}. Correct one of them."
            )
            yield "warning", ("conflicts", index, "chosen"), text
