# SPDX-License-Identifier: Apache-2.0
"""Clauses on small floats: which bits they have, and the largest value that may occur."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qhw.legality.artefact import Encoding
from qhw.legality.finding import OTHER_TYPE, Finding, unknown
from qhw.schema import Format

__all__ = ["float_findings", "float_words"]


def float_words(spec: Format) -> str:
    """A float format in words, as `float8 e4m3`; what is not stated is left out."""
    name = "float" if spec.element_bits is None else f"float{spec.element_bits}"
    is_stated = isinstance(spec.exponent_bits, int) and isinstance(spec.mantissa_bits, int)
    return f"{name} e{spec.exponent_bits}m{spec.mantissa_bits}" if is_stated else name


def float_findings(
    path: str, spec: Format, e: Encoding, codes: NDArray[Any] | None, *, is_constant: bool
) -> Iterator[Finding]:
    """What separates a tensor from a format where one of them is a float.

    Args:
        path: Of the format, as `formats.f8`.
        spec: The format.
        e: The tensor's grid.
        codes: Stored patterns; None where they are not known.
        is_constant: Whether all values that occur are stored.
    """
    elements = e.elements
    if spec.kind != "float" or elements is None:
        words = float_words(spec) if spec.kind == "float" else str(spec.kind)
        yield Finding(f"{path}.kind", f"must be {words}", e.type, f"Quantize it to {words}.", distance=OTHER_TYPE)
        return
    bias: object = spec.exponent_bias
    if bias is None and isinstance(spec.exponent_bits, int):
        bias = 2 ** (spec.exponent_bits - 1) - 1
    for field, want, got in (
        ("exponent_bits", spec.exponent_bits, elements.exponent_bits),
        ("mantissa_bits", spec.mantissa_bits, elements.mantissa_bits),
        ("exponent_bias", bias, elements.bias),
    ):
        if want == "unknown":
            yield unknown(f"{path}.{field}")
        elif isinstance(want, int) and want != got:
            got_words = f"{got} ({e.type})"
            yield Finding(f"{path}.{field}", f"must be {want}", got_words, "Use that float.", distance=OTHER_TYPE)
            return
    yield from _of_largest(f"{path}.finite_max", spec, e, codes, is_constant)


def _of_largest(
    clause: str, spec: Format, e: Encoding, codes: NDArray[Any] | None, is_constant: bool
) -> Iterator[Finding]:
    """The largest element: of the stored ones of a constant, else of all that a quantizer can give."""
    assert e.elements is not None
    if codes is not None:
        sizes = e.elements.decode(torch.from_numpy(codes.astype(np.int64))).abs().numpy()
        none = np.isnan(sizes)
        if bool(none.any()):
            got = f"{int(none.sum())} of {sizes.size} codes that stand for no finite number"
            yield Finding(clause, "must be finite numbers", got, "Quantize it again from finite values.")
            return
        most, more = float(sizes.max(initial=0.0)), f" (the largest of {sizes.size} elements)"
    else:
        most, more = e.elements.finite_max, ""
    if spec.finite_max == "unknown":
        yield unknown(clause)
    elif isinstance(spec.finite_max, float) and most > spec.finite_max:
        if is_constant and codes is None:
            yield unknown(clause, f"elements of weights are not in the artefact; its type goes up to {most:g}")
            return
        ends = f"to {spec.finite_max:g} times its scale"
        fix = "Quantize it with a coarser scale." if is_constant else f"Clip it {ends} in front of its quantizer."
        yield Finding(clause, f"must be at most {spec.finite_max:g}", f"{most:g}{more}", fix)
