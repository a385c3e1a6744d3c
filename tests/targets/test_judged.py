# SPDX-License-Identifier: Apache-2.0
"""For every shipped target: one operator made from its own kernel by hand rules is judged legal, and illegal once one
thing of it is broken, with the clause.

Scales are powers of two, which every kind of scale but an enumerated one holds. They are chosen so that shifts, ratios
and exponents, computed here, lie within the bounds of the file.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qhw.legality import Artefact, ArtefactOperator, CheckReport, Constant, Encoding, Use, judge
from qhw.schema import Format, Kernel, LimitRange, Scale, TargetSpec, load_target_file

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"
FILES = sorted(ROOT.glob("*/*.toml"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]
CHANNELS = 64


def is_usable(spec: Format) -> bool:
    """Whether a tensor can be put on a format by the rules of this file."""
    return (
        spec.kind == "integer"
        and spec.code_set is None
        and spec.quant_min is not None
        and spec.element_bits is not None
        and spec.element_bits > 1
        and spec.per in ("tensor", "out_channel", None)
    )


def first(target: TargetSpec, listed: object) -> str | None:
    names = listed if isinstance(listed, tuple) else ()
    return next((name for name in names if is_usable(target.formats[name])), None)


def chosen(target: TargetSpec) -> tuple[str, str] | None:
    """An operator with weights and a kernel of it whose formats are all integers that the file determines."""
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


def encoding(spec: Format, exponent: int, axis: int | None = None) -> Encoding:
    """A grid of a format with scale 2^exponent, and the first legal zero point."""
    low, high, bits = spec.quant_min, spec.quant_max, spec.element_bits
    assert low is not None and high is not None and bits is not None
    rule = spec.zero_point
    zero = rule if isinstance(rule, int) else rule[0] if isinstance(rule, tuple) else max(0, low)
    shape = (CHANNELS,) if axis is not None and spec.per == "out_channel" else ()
    return Encoding(
        np.full(shape, 2.0**exponent), np.full(shape, zero, np.int64), low, high, bits, bool(spec.is_signed),
        axis if shape else None, type=f"{'int' if spec.is_signed else 'uint'}{bits}",
    )  # fmt: skip


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
    inner = 16 if kind == "Gemm" else size_within(spec.limits.get("in_channels"), 16)
    shape = (CHANNELS, inner) if kind == "Gemm" else (CHANNELS, inner, 1, 1)
    weight = encoding(w, exponents[1], 0)
    one = min(int(weight.zero_point.flat[0]) + 1, weight.quant_max)
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
    return [one for one in found if (one.element_bits, one.is_signed) == (e.bits, e.signed)]


Break = tuple[str, ArtefactOperator, Callable[[str], bool]]


def breaks(target: TargetSpec, operator: ArtefactOperator) -> Iterator[Break]:
    """One thing broken at a time: what, the operator, and which clauses may name it."""
    x, weight = operator.inputs[0], operator.weight
    assert x.encoding is not None and weight is not None and weight.encoding is not None and weight.codes is not None
    strange = replace(x.encoding, bits=37, signed=True, quant_min=-(2**36), quant_max=2**36 - 1, type="int37")
    yield "a type of 37 bits", replace(operator, inputs=(replace(x, encoding=strange),)), _is_of_input
    formats = same_type(target, operator.kind, "weight", weight.encoding)
    highest = max(one.quant_max for one in formats if one.quant_max is not None)
    codes = np.where(np.arange(weight.codes.size).reshape(weight.codes.shape) == 5, highest + 1, weight.codes)
    yield "a code too high", replace(operator, weight=replace(weight, codes=codes)), _is_of_codes
    formats = same_type(target, operator.kind, "input", x.encoding)
    if all(isinstance(one.zero_point, int) for one in formats):
        moved = replace(x.encoding, zero_point=x.encoding.zero_point + 3)
        yield "a zero point", replace(operator, inputs=(replace(x, encoding=moved),)), _ends("zero_point")
    scales = [one.scale for one in formats]
    if all(isinstance(scale, Scale) and scale.kind == "power_of_two" for scale in scales):
        odd = replace(x.encoding, scale=x.encoding.scale * 1.25)
        yield "a scale that is no power of two", replace(operator, inputs=(replace(x, encoding=odd),)), _ends("kind")
    real = replace(operator, output=replace(operator.output, encoding=None))
    if target.boundary is not None and target.boundary.outputs == "quantized" and _gives_codes(target, operator.kind):
        yield "a result in real numbers", real, _ends("output")


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
    own = clause.startswith("formats.") and clause.endswith((".codes", ".bits"))
    return own or clause.startswith("accumulators.") or clause.endswith("weight_abs_sum_max")


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_an_operator_of_its_own_kernel_is_legal_and_each_broken_thing_is_named(file: Path) -> None:
    target = load_target_file(file, find_base=lambda name: ROOT / f"{name}.toml")
    picked = chosen(target)
    if picked is None:
        pytest.skip("no kernel of Gemm or Conv has integer formats that the file determines")
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


def test_most_targets_have_such_an_operator() -> None:
    """A target whose weights are floats, palettes or groups alone has none; it is judged in tests of its own."""
    targets = [load_target_file(file, find_base=lambda name: ROOT / f"{name}.toml") for file in FILES]
    without = [target.name for target in targets if chosen(target) is None]
    assert len(without) <= len(targets) // 5, without


def small_float(spec: Format) -> Encoding | None:
    """A grid of a small float format with one scale of 2^-6; None for any other format."""
    if spec.kind != "float" or spec.element_bits != 8 or spec.per != "tensor":
        return None
    name = f"float8e{spec.exponent_bits}m{spec.mantissa_bits}fn"
    scale, zero = np.asarray(2.0**-6), np.zeros((), np.int64)
    return Encoding(scale, zero, 0, 0, 8, True, type=name, is_float=True)


@pytest.mark.parametrize("name", ["intel/gaudi3", "nvidia/tensorrt-fp8"])
def test_a_kernel_of_small_floats_takes_these_and_no_integers(name: str) -> None:
    """e4m3 in and e4m3 weights, real numbers out; int8 in their place, or the other float, is illegal."""
    target = load_target_file(ROOT / f"{name}.toml", find_base=lambda base: ROOT / f"{base}.toml")
    row = target.kernels["mac"]
    assert isinstance(row.input, tuple) and isinstance(row.weight, tuple)
    grids = [e for names in (row.input, row.weight) for f in names if (e := small_float(target.formats[f])) is not None]
    x, w = grids[0], grids[-1]
    facts = {"in_channels": 16, "out_channels": CHANNELS, "reduced_elements": 16, "rank": 2, "inputs": 1}
    weight = Constant("w", (CHANNELS, 16), w)
    layer = ArtefactOperator(
        "layer", "Gemm", "Gemm", (Use("x", x),), Use("y"), weight, weight_axis=0, input_axis=1, attributes=facts
    )
    assert [one.message for one in report(target, layer).violations] == []
    integer = Encoding(x.scale, x.zero_point, -128, 127, 8, True, type="int8")
    broken = report(target, replace(layer, inputs=(Use("x", integer),)))
    assert {one.clause for one in broken.violations} == {"kernels.mac.input"}
    other = replace(w, type="float8e5m2")
    broken = report(target, replace(layer, weight=replace(weight, encoding=other)))
    assert {one.clause for one in broken.violations} == {"kernels.mac.weight"}
