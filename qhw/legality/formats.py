# SPDX-License-Identifier: Apache-2.0
"""Clauses on number formats: stored type, codes, zero point, and the scales of a tensor."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.legality.artefact import Constant, Encoding
from qhw.legality.finding import OTHER_TYPE, Finding, unknown
from qhw.legality.floats import float_findings, float_words
from qhw.legality.granularity import sharing_findings
from qhw.legality.scales import scale_findings
from qhw.schema import Format, TargetSpec

__all__ = ["Operand", "format_findings", "nearest_format", "takes_reals", "type_words"]


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor as one operator reads or writes it.

    Attributes:
        tensor: Its name.
        encoding: Its grid; None: real numbers.
        codes: Stored codes, of constants.
        out_axis: Axis of the output channels, of weights.
        in_axis: Axis of the input channels, of weights.
        is_constant: It is a constant, also where its codes are not known.
    """

    tensor: str
    encoding: Encoding | None
    codes: NDArray[Any] | None = None
    out_axis: int | None = None
    in_axis: int | None = None
    is_constant: bool = False

    @classmethod
    def of_constant(cls, constant: Constant, out_axis: int | None, in_axis: int | None) -> "Operand":
        """A weight, or the constant operand of an elementwise operator."""
        return cls(constant.name, constant.encoding, constant.codes, out_axis, in_axis, True)


def nearest_format(
    target: TargetSpec, clause: str, listed: object, operand: Operand
) -> tuple[str | None, list[Finding]]:
    """The format of those listed that a tensor is nearest to, and what separates it from that one.

    Args:
        target: The accelerator.
        clause: Where the formats are listed, as `kernels.mac.weight`.
        listed: What stands there.
        operand: The tensor.
    """
    if not isinstance(listed, tuple):
        why = (
            "the target leaves it unknown" if listed == "unknown" else "the target does not say which formats it takes"
        )
        return None, [unknown(clause, why)]
    best: tuple[tuple[int, bool], str, list[Finding]] | None = None
    for name in listed:
        spec = target.formats[name]
        found = list(format_findings(f"formats.{name}", spec, operand))
        wider = operand.encoding is not None and spec.element_bits != operand.encoding.bits
        rank = sum(one.distance for one in found), wider
        if best is None or rank < best[0]:
            best = rank, name, found
    assert best is not None  # the schema refuses an empty list
    (distance, _), name, found = best
    if distance < OTHER_TYPE:
        return name, found
    takes = ", ".join(f"{name} ({type_words(target.formats[name])})" for name in listed[:6])
    got = "real numbers" if operand.encoding is None else operand.encoding.words()
    fix = "Quantize it to one of these." if operand.encoding is None else "Quantize it again to one of these."
    return name, [Finding(clause, f"must be {takes}", got, fix, operand.tensor, distance=distance)]


def takes_reals(target: TargetSpec, listed: object) -> bool:
    """Whether one of the formats listed is a float as wide as models have them."""
    names = listed if isinstance(listed, tuple) else ()
    return any(_is_plain_float(target.formats[name]) for name in names)


def type_words(spec: Format) -> str:
    """The stored type of a format, as `int8` or `uint16`."""
    bits = spec.element_bits
    if spec.kind == "float":
        return float_words(spec)
    if spec.kind != "integer":
        return f"{spec.kind} of {bits} bits" if bits is not None else str(spec.kind)
    if bits is None:
        return "integer"
    return f"{'int' if spec.is_signed else 'uint'}{bits}"


def format_findings(path: str, spec: Format, operand: Operand) -> Iterator[Finding]:
    """What separates a tensor from one format.

    Args:
        path: Of the format, as `formats.w8`.
        spec: The format.
        operand: The tensor.
    """
    e = operand.encoding
    if e is None:
        if not _is_plain_float(spec):
            yield Finding(
                f"{path}.kind", "must be quantized", "real numbers", "Quantize it.", operand.tensor, distance=OTHER_TYPE
            )
        return
    for found in _of_grid(path, spec, operand, e):
        yield found if found.is_open else replace(found, tensor=operand.tensor)


def _is_plain_float(spec: Format) -> bool:
    return spec.kind == "float" and (spec.element_bits is None or spec.element_bits >= 16)


def _of_grid(path: str, spec: Format, operand: Operand, e: Encoding) -> Iterator[Finding]:
    if spec.kind == "unknown":
        yield unknown(f"{path}.kind")
        return
    if spec.kind == "float" or e.is_float:
        yield from float_findings(path, spec, e, operand.codes, is_constant=operand.is_constant)
        if spec.kind == "float" and e.is_float:
            yield from _of_parameters(path, spec, operand, e)
        return
    if spec.kind != "integer":
        yield Finding(
            f"{path}.kind", f"must be a {spec.kind}", e.type, f"Store it as a {spec.kind}.", distance=OTHER_TYPE
        )
        return
    if spec.is_signed is None:
        yield unknown(f"{path}.signed")
    elif e.signed is None:
        if operand.codes is not None:
            operand = replace(operand, codes=operand.codes.astype(np.int64) - e.shift_to(spec.is_signed))
        e = e.as_signed(spec.is_signed)
    yield from _of_type(path, spec, e)
    yield from _of_codes(path, spec, operand, e)
    yield from _of_parameters(path, spec, operand, e)


def _of_parameters(path: str, spec: Format, operand: Operand, e: Encoding) -> Iterator[Finding]:
    """Scales and zero points, of integers and of small floats."""
    if e.is_dynamic:
        if not spec.is_dynamic:
            fix = "Quantize it statically, with calibration data."
            yield Finding(f"{path}.scale", "must be fixed when the model is compiled", e.words(), fix)
        yield from sharing_findings(path, spec, e, operand.out_axis, operand.in_axis)
        return
    if spec.is_dynamic and not operand.is_constant:
        fix = "Leave its scale to the run time."
        yield Finding(f"{path}.scale.dynamic", "must be computed at run time", e.words(), fix, distance=20)
        return
    yield from _of_zero_point(path, spec, e)
    yield from sharing_findings(path, spec, e, operand.out_axis, operand.in_axis)
    yield from scale_findings(f"{path}.scale", spec.scale, e.scale)


def _of_type(path: str, spec: Format, e: Encoding) -> Iterator[Finding]:
    bits = spec.element_bits
    if bits is None:
        yield unknown(f"{path}.bits")
        return
    if spec.is_signed is not None and e.signed != spec.is_signed:
        must = f"must be {'true' if spec.is_signed else 'false'}"
        yield Finding(f"{path}.signed", must, e.type, f"Use {type_words(spec)}.", distance=OTHER_TYPE)
    if e.bits < bits:
        yield Finding(f"{path}.bits", f"must be {bits}", e.type, f"Use {type_words(spec)}.", distance=OTHER_TYPE)


def _of_codes(path: str, spec: Format, operand: Operand, e: Encoding) -> Iterator[Finding]:
    """Codes within the format's: the stored ones of a constant, those that can occur of an activation."""
    codes = operand.codes
    if isinstance(spec.code_set, tuple):
        if codes is None:
            return
        wrong = ~np.isin(codes, np.asarray(spec.code_set))
        if bool(wrong.any()):
            must = f"must be one of {', '.join(map(str, spec.code_set[:8]))}"
            yield Finding(f"{path}.code_set", must, _outside(codes, wrong), "Round weights to these codes.")
        return
    low, high = spec.quant_min, spec.quant_max
    if low is None or high is None:
        if e.bits == spec.element_bits:
            yield unknown(f"{path}.codes")
        return
    clause = f"{path}.codes" if isinstance(spec.codes, tuple) else f"{path}.bits"
    far = OTHER_TYPE if spec.element_bits is not None and e.bits > spec.element_bits else 1
    must = f"must lie in [{low}, {high}]"
    if codes is not None:
        wrong = (codes < low) | (codes > high)
        if bool(wrong.any()):
            yield Finding(
                clause, must, _outside(codes, wrong), "Clip the codes, or choose a coarser scale.", distance=far
            )
    elif operand.is_constant and far == 1 and (e.quant_min < low or e.quant_max > high):
        yield unknown(clause, f"codes of weights are not in the artefact; its grid has {e.quant_min} to {e.quant_max}")
    elif e.quant_min < low or e.quant_max > high:
        got = f"codes from {e.quant_min} to {e.quant_max}"
        fix = "Clip the tensor to these codes in front of its quantizer."
        yield Finding(clause, must, got, fix, distance=far)


def _outside(codes: NDArray[Any], wrong: NDArray[np.bool_]) -> str:
    count = int(wrong.sum())
    return f"code {int(codes[wrong].flat[0])} ({count} of {codes.size} codes lie outside)"


def _of_zero_point(path: str, spec: Format, e: Encoding) -> Iterator[Finding]:
    rule, clause = spec.zero_point, f"{path}.zero_point"
    zeros = np.atleast_1d(e.zero_point)
    if rule == "unknown":
        yield unknown(clause)
    elif isinstance(rule, int | tuple):
        allowed = (rule,) if isinstance(rule, int) else rule
        wrong = ~np.isin(zeros, allowed)
        if bool(wrong.any()):
            must = f"must be {' or '.join(map(str, allowed))}"
            got = f"zero point {int(zeros[wrong][0])}"
            more = f" ({int(wrong.sum())} of {zeros.size} zero points)" if zeros.size > 1 else ""
            symmetric = allowed == (0,)
            fix = "Quantize it symmetrically." if symmetric else "Quantize it with that zero point."
            yield Finding(clause, must, got + more, fix, distance=10)
    width = spec.zero_point_bits
    if isinstance(width, int) and bool((np.abs(zeros) >= 2.0**width).any()):
        got = f"zero point {int(zeros[np.abs(zeros) >= 2.0**width][0])}"
        yield Finding(f"{path}.zero_point_bits", f"must fit {width} bits", got, "Quantize it with a smaller one.")
    if spec.zero_point_per == "tensor" and len(np.unique(zeros)) > 1:
        yield Finding(
            f"{path}.zero_point_per",
            'must be "tensor"',
            f"{zeros.size} zero points",
            "Give all channels one zero point.",
        )
