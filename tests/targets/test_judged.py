# SPDX-License-Identifier: Apache-2.0
"""For every shipped target: one operator made from its own kernel by hand rules is judged legal, and illegal once one
thing of it is broken, with the clause.

Scales are powers of two, which every kind of scale but an enumerated one holds. They are chosen so that shifts, ratios
and exponents, computed here, lie within the bounds of the file. Small floats are of the type that ONNX has for them, or
OCP; a format of 16-bit floats is met by real numbers.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qhw.legality import Artefact, ArtefactOperator, CheckReport, Constant, Encoding, Use, judge
from qhw.numerics import FloatElements
from qhw.schema import Format, Kernel, LimitRange, Scale, TargetSpec, load_target_file

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"
FILES = sorted(ROOT.glob("*/*.toml"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]
CHANNELS = 64
LARGEST = {(4, 3): 448.0, (5, 2): 57344.0, (3, 2): 28.0, (2, 3): 7.5, (2, 1): 6.0}
"""Largest finite value of the stored type, by bits of exponent and mantissa (OCP; ONNX's float8e4m3fn, float8e5m2)."""


def is_usable(spec: Format) -> bool:
    """Whether a tensor can be put on a format by the rules of this file."""
    if spec.kind == "float":
        return is_real(spec) or (bits_of(spec) in LARGEST and spec.per in ("tensor", "out_channel", "group"))
    return (
        spec.kind == "integer"
        and spec.code_set is None
        and spec.quant_min is not None
        and spec.element_bits is not None
        and spec.element_bits > 1
        and spec.per in ("tensor", "out_channel", "group", None)
    )


def is_real(spec: Format) -> bool:
    return spec.kind == "float" and spec.element_bits == 16


def bits_of(spec: Format) -> tuple[Any, Any]:
    return spec.exponent_bits, spec.mantissa_bits


def group_of(spec: Format) -> int | None:
    """The first group size that a format allows."""
    return spec.group_size[0] if isinstance(spec.group_size, tuple) else spec.group_size  # type: ignore[return-value]


def first(target: TargetSpec, listed: object) -> str | None:
    names = listed if isinstance(listed, tuple) else ()
    return next((name for name in names if is_usable(target.formats[name])), None)


def chosen(target: TargetSpec) -> tuple[str, str] | None:
    """An operator with weights and a kernel of it whose formats the file determines."""
    for kind in ("Gemm", "Conv"):
        spec = target.operators.get(kind)
        for name in spec.kernels if spec is not None and isinstance(spec.kernels, tuple) else ():
            row = target.kernels[name]
            if all(first(target, getattr(row, field)) for field in ("input", "weight", "output")):
                return kind, name
    return None


def exponents_of(spec: Format) -> list[int]:
    """Exponents of scales that a format may have, near -6 first; of an enumerated scale those that are powers of 2."""
    scale = spec.scale if isinstance(spec.scale, Scale) else Scale()
    found = []
    for e in sorted(range(-20, 4), key=lambda e: abs(e + 6)):
        bounds = ((scale.exponent_min, scale.exponent_max, e), (scale.min, scale.max, 2.0**e))
        legal = all(
            (not isinstance(low, int | float) or value >= low) and (not isinstance(high, int | float) or value <= high)
            for low, high, value in bounds
        )
        if legal and (not isinstance(scale.values, tuple) or 2.0**e in scale.values):
            found.append(e)
    return found


def suits(target: TargetSpec, row: Kernel, x: int, w: int, y: int) -> bool:
    """Whether shift, ratio and exponents of 2^x, 2^w and 2^y lie within the kernel's bounds."""
    rule = target.requantize.get(str(row.requantize))
    total = x + w - y
    if (
        rule is not None
        and rule.shift is not None
        and rule.shift != "unknown"
        and rule.kind in ("shift", "fixed_point")
    ):
        right = -total if rule.kind == "shift" else -total - 1  # 2^e = 0.5 * 2^(e + 1)
        low, high = rule.shift.min, rule.shift.max
        if (isinstance(low, int) and right < low) or (isinstance(high, int) and right > high):
            return False
    if rule is not None and rule.ratio is not None and rule.ratio != "unknown":
        low, high = rule.ratio.min, rule.ratio.max
        if (isinstance(low, float) and 2.0**total < low) or (isinstance(high, float) and 2.0**total > high):
            return False
    terms = {"input": x, "weight": w, "output": y, "bias": x + w, "inputs_min": min(x, w), "inputs_max": max(x, w)}
    for bound in row.exponents if isinstance(row.exponents, tuple) else ():
        if any(term not in terms for term in bound.terms):
            continue
        value = sum(factor * terms[term] for term, factor in bound.terms.items())
        if (isinstance(bound.min, int) and value < bound.min) or (isinstance(bound.max, int) and value > bound.max):
            return False
    return True


def encoding(spec: Format, exponent: int, inner: int | None = None) -> Encoding | None:
    """A grid of a format with scale 2^exponent, and the first legal zero point; None for real numbers.

    Args:
        spec: The format.
        exponent: Of all scales.
        inner: Inputs of a weight [CHANNELS, inner, ...], which has as many scales as the format; None: an activation.
    """
    if is_real(spec):
        return None
    size = group_of(spec)
    shape: tuple[int, ...] = () if inner is None or spec.per == "tensor" else (CHANNELS,)
    if inner is not None and spec.per == "group":
        assert size is not None
        shape = (CHANNELS, inner // size)
    axis = None if not shape else 1 if spec.per == "group" else 0
    scale = np.full(shape, 2.0**exponent)
    block = size if axis == 1 else None
    if inner is None and spec.is_dynamic and spec.per == "group":
        axis, block = 1, size
    if spec.kind == "float":
        exponent_bits, mantissa_bits = bits_of(spec)
        elements = FloatElements(exponent_bits, mantissa_bits, LARGEST[exponent_bits, mantissa_bits])
        name, zeros = f"float e{exponent_bits}m{mantissa_bits}", np.zeros(shape, np.int64)
        if inner is None and not spec.is_dynamic:  # a clip in front of the quantizer
            elements = replace(elements, finite_max=spec.finite_max)
        return Encoding(scale, zeros, 0, 0, elements.bits, True, axis, block, name, elements, spec.is_dynamic)
    low, high, bits = spec.quant_min, spec.quant_max, spec.element_bits
    assert low is not None and high is not None and bits is not None
    rule = spec.zero_point
    zero = rule if isinstance(rule, int) else rule[0] if isinstance(rule, tuple) else max(0, low)
    name = f"{'int' if spec.is_signed else 'uint'}{bits}"
    zeros = np.full(shape, zero, np.int64)
    return Encoding(scale, zeros, low, high, bits, bool(spec.is_signed), axis, block, name, is_dynamic=spec.is_dynamic)


def size_within(limit: object, wanted: int) -> int:
    """A size that a limit allows, the wanted one if it does."""
    if isinstance(limit, LimitRange):
        step = limit.multiple_of if isinstance(limit.multiple_of, int) else 1
        if isinstance(limit.max, float):
            wanted = min(wanted, int(limit.max) // step * step)
        return max(wanted // step * step, step)
    return next((value for value in limit if isinstance(value, int)), wanted) if isinstance(limit, tuple) else wanted


def legal_operator(target: TargetSpec, kind: str, kernel: str) -> ArtefactOperator:
    """The operator, on grids of the kernel's first usable formats."""
    row, spec = target.kernels[kernel], target.operators[kind]
    x, w, y = (target.formats[str(first(target, getattr(row, field)))] for field in ("input", "weight", "output"))
    choices = product(exponents_of(x), exponents_of(w), exponents_of(y))
    exponents = next(three for three in choices if suits(target, row, *three))
    group = group_of(w)
    wanted = 16 if group is None else 4 * group
    inner = wanted if kind == "Gemm" else size_within(spec.limits.get("in_channels"), wanted)
    shape = (CHANNELS, inner) if kind == "Gemm" else (CHANNELS, inner, 1, 1)
    weight = encoding(w, exponents[1], inner)
    assert weight is not None
    one = 1 if weight.is_float else min(int(weight.zero_point.flat[0]) + 1, weight.quant_max)
    facts: dict[str, Any] = {"in_channels": inner, "out_channels": CHANNELS, "rank": len(shape), "inputs": 1}
    if kind == "Conv":
        kernel_size = size_within(spec.limits.get("kernel"), 1)
        shape = (CHANNELS, inner, kernel_size, kernel_size)
        facts |= {"kernel": [kernel_size] * 2, "stride": [1, 1], "dilation": [1, 1], "groups": 1, "padding": [0, 0]}
        facts |= {"spatial": [8, 8], "height": 8, "width": 8}
    else:
        facts |= {"reduced_elements": inner}
    return ArtefactOperator(
        name="layer",
        kind=kind,
        type=kind,
        inputs=(Use("x", encoding(x, exponents[0])),),
        output=Use("y", encoding(y, exponents[2])),
        weight=Constant("w", shape, weight, np.full(shape, one)),
        weight_axis=0,
        input_axis=1,
        attributes=facts,
    )


def report(target: TargetSpec, operator: ArtefactOperator) -> CheckReport:
    artefact = Artefact("by hand", (operator,), inputs=frozenset({"x"}), outputs=frozenset({"y"}))
    return judge(artefact, target, "by hand")


def same_type(target: TargetSpec, kind: str, field: str, e: Encoding) -> list[Format]:
    """All formats of one stored type that any kernel of an operator takes there."""
    kernels = target.operators[kind].kernels
    lists = [getattr(target.kernels[name], field) for name in kernels or ()]
    names = {name for listed in lists if isinstance(listed, tuple) for name in listed}
    found = [target.formats[name] for name in names]
    if e.elements is not None:
        wanted = e.elements.exponent_bits, e.elements.mantissa_bits
        return [one for one in found if one.kind == "float" and bits_of(one) == wanted]
    return [one for one in found if (one.element_bits, one.is_signed) == (e.bits, e.signed) and one.kind == "integer"]


Break = tuple[str, ArtefactOperator, Callable[[str], bool]]


def breaks(target: TargetSpec, operator: ArtefactOperator) -> Iterator[Break]:
    """One thing broken at a time: what, the operator, and which clauses may name it."""
    (x,) = operator.inputs
    strange = Encoding(np.asarray(0.5), np.zeros((), np.int64), -(2**36), 2**36 - 1, 37, True, type="int37")
    yield "a type of 37 bits", replace(operator, inputs=(replace(x, encoding=strange),)), _is_of_input
    yield from _of_weights(target, operator)
    if x.encoding is not None and not x.encoding.is_dynamic:
        yield from _of_input(target, operator, x, x.encoding)
    real = replace(operator, output=replace(operator.output, encoding=None))
    if target.boundary is not None and target.boundary.outputs == "quantized" and _gives_codes(target, operator.kind):
        yield "a result in real numbers", real, _ends("output")


def _of_weights(target: TargetSpec, operator: ArtefactOperator) -> Iterator[Break]:
    weight = operator.weight
    assert weight is not None and weight.encoding is not None and weight.codes is not None
    e = weight.encoding
    formats = same_type(target, operator.kind, "weight", e)

    def with_weight(**changes: Any) -> ArtefactOperator:
        return replace(operator, weight=replace(weight, **changes))

    if e.elements is not None:
        # The pattern behind that of the largest finite value: a larger one, infinity or none; -0 where there is none.
        finite = max(one.finite_max for one in formats if isinstance(one.finite_max, float))
        highest = int(e.elements.encode(torch.tensor(finite)))
    else:
        highest = max(one.quant_max for one in formats if one.quant_max is not None)
    if e.elements is None or highest + 1 < 2 ** (e.bits - 1):
        codes = np.where(np.arange(weight.codes.size).reshape(weight.codes.shape) == 5, highest + 1, weight.codes)
        yield "a code too high", with_weight(codes=codes), _is_of_codes
    if e.elements is not None:
        other = FloatElements(e.elements.exponent_bits + 1, e.elements.mantissa_bits, e.elements.finite_max)
        wide = replace(e, elements=other, type="float of another layout", bits=other.bits)
        yield "another float", with_weight(encoding=wide), _ends("weight")
    sizes = {size for one in formats for size in _all(one.group_size)}
    if e.block_size is not None and e.block_size * 4 not in sizes:
        wider = replace(e, scale=e.scale[:, ::4], zero_point=e.zero_point[:, ::4], block_size=e.block_size * 4)
        yield "groups of another size", with_weight(encoding=wider), _ends("group_size")
    if all(one.per == "tensor" for one in formats):
        many = replace(e, scale=np.full(CHANNELS, e.scale), zero_point=np.full(CHANNELS, e.zero_point), axis=0)
        yield "a scale for each channel", with_weight(encoding=many), _ends("per")
    kinds = {one.scale.kind for one in formats if isinstance(one.scale, Scale)}
    if len(kinds) == 1 and kinds <= {"power_of_two", "e8m0", "float16"} and all(one.scale for one in formats):
        word = "float16" if kinds == {"float16"} else "power of two"
        yield f"a scale that is no {word}", with_weight(encoding=replace(e, scale=e.scale * (4 / 3))), _ends("kind")


def _all(sizes: object) -> tuple[int, ...]:
    return sizes if isinstance(sizes, tuple) else (sizes,) if isinstance(sizes, int) else ()


def _of_input(target: TargetSpec, operator: ArtefactOperator, x: Use, e: Encoding) -> Iterator[Break]:
    formats = same_type(target, operator.kind, "input", e)
    if all(isinstance(one.zero_point, int) for one in formats):
        moved = replace(e, zero_point=e.zero_point + 3)
        yield "a zero point", replace(operator, inputs=(replace(x, encoding=moved),)), _ends("zero_point")
    scales = [one.scale for one in formats]
    if all(isinstance(scale, Scale) and scale.kind == "power_of_two" for scale in scales):
        odd = replace(e, scale=e.scale * 1.25)
        yield "a scale that is no power of two", replace(operator, inputs=(replace(x, encoding=odd),)), _ends("kind")
    if e.elements is not None and all(one.finite_max == e.elements.finite_max for one in formats):
        largest = LARGEST[e.elements.exponent_bits, e.elements.mantissa_bits]
        if largest > e.elements.finite_max:
            wide = replace(e, elements=replace(e.elements, finite_max=largest))
            yield "no clip", replace(operator, inputs=(replace(x, encoding=wide),)), _ends("finite_max")


def _gives_codes(target: TargetSpec, kind: str) -> bool:
    """Whether no kernel of an operator may give real numbers."""
    rows = [target.kernels[name] for name in target.operators[kind].kernels or ()]
    named = [target.formats[name] for row in rows for name in (row.output if isinstance(row.output, tuple) else ())]
    is_stated = all(isinstance(row.output, tuple) for row in rows)
    return is_stated and all(one.kind == "integer" for one in named) and target.operators[kind].output != "float"


def _ends(word: str) -> Callable[[str], bool]:
    return lambda clause: clause.endswith(word)


def _is_of_input(clause: str) -> bool:
    return (clause.startswith("kernels.") and clause.endswith(".input")) or clause == "boundary.input_formats"


def _is_of_codes(clause: str) -> bool:
    """The format's codes; a sum that overflows by the code that is too high may be named beside them."""
    own = clause.startswith("formats.") and clause.endswith((".codes", ".bits", ".finite_max"))
    return own or clause.startswith("accumulators.") or clause.endswith("weight_abs_sum_max")


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_an_operator_of_its_own_kernel_is_legal_and_each_broken_thing_is_named(file: Path) -> None:
    target = load_target_file(file, find_base=lambda name: ROOT / f"{name}.toml")
    picked = chosen(target)
    assert picked is not None, "no kernel of Gemm or Conv has formats that the file determines"
    operator = legal_operator(target, *picked)
    judged = report(target, operator)
    assert [one.message for one in judged.violations] == []
    assert [one.status for one in judged.operators] == ["legal"]
    tried = 0
    for what, broken, is_right in breaks(target, operator):
        clauses = [one.clause for one in report(target, broken).violations]
        assert clauses, what
        assert all(is_right(clause) for clause in clauses), (what, clauses)
        tried += 1
    assert tried >= 2
