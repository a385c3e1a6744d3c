# SPDX-License-Identifier: Apache-2.0
"""Clauses on biases: whether one can be added, its width, its scale."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.legality.artefact import Constant, Encoding
from qhw.legality.finding import Finding, unknown
from qhw.legality.scales import is_power_of_two
from qhw.legality.site import Site
from qhw.schema import Bias

__all__ = ["bias_findings"]

_TOLERANCE = 1e-6
"""Relative: a float32 product of two scales may lie 2^-24 from the real one, and one of rounded factors twice that."""


def bias_findings(site: Site, kernel: str, *, derived: bool) -> Iterator[Finding]:
    """What a kernel's bias rule says about an operator's bias.

    Args:
        site: An operator with weights.
        kernel: Whose rule.
        derived: The toolchain quantizes biases by itself: only their value counts.
    """
    bias, name = site.operator.bias, site.kernel(kernel).bias
    if bias is None:
        return
    clause = f"kernels.{kernel}.bias"
    if name == "none":
        fix = "Fold it into the layer behind, or drop it."
        yield Finding(clause, "must be none: this kernel adds no bias", "a bias", fix, bias.name, distance=20)
        return
    if name is None or name == "unknown":
        yield unknown(clause, "unknown" if name else "the target does not say how a bias is added")
        return
    path, rule = f"biases.{name}", site.target.biases[name]
    channels = bias.shape[0] if bias.shape else None
    if isinstance(rule.max_channels, int) and channels is not None and channels > rule.max_channels:
        must = f"must be at most {rule.max_channels}"
        yield Finding(f"{path}.max_channels", must, f"{channels} channels", "Split the layer.", bias.name)
    if rule.bits == "float":
        return  # codes on a scale stand for reals, too
    if bias.encoding is None:
        if not derived:
            got = "real numbers"
            fix = (
                f"Store it as int{rule.bits}, at input scale times weight scale."
                if rule.scale != "own"
                else "Quantize it."
            )
            yield Finding(f"{path}.bits", f"must be quantized to {rule.bits} bits", got, fix, bias.name)
        return
    yield from _of_codes(path, rule, bias)
    yield from _of_scale(path, rule, bias, bias.encoding, site)


def _of_codes(path: str, rule: Bias, bias: Constant) -> Iterator[Finding]:
    zeros = bias.encoding.zero_point if bias.encoding is not None else np.zeros((), np.int64)
    zero = rule.zero_point or 0
    if zero == "unknown":
        yield unknown(f"{path}.zero_point")
    elif bool((zeros != zero).any()):
        got = f"zero point {int(zeros[zeros != zero].flat[0])}"
        fix = "Quantize it with that zero point." if zero else "Quantize it symmetrically."
        yield Finding(f"{path}.zero_point", f"must be {zero}", got, fix, bias.name)
    yield from _of_storage(f"{path}.storage_bits", rule, bias)
    if rule.bits is None or rule.bits == "unknown":
        yield unknown(f"{path}.bits", "unknown" if rule.bits else "the target does not say how wide a bias is")
        return
    assert isinstance(rule.bits, int)
    if bias.codes is None or bias.codes.size == 0:
        return
    if rule.signed == "unknown":
        yield unknown(f"{path}.signed")
        return
    half = 1 << (rule.bits - 1)
    low, high = (0, 2 * half - 1) if rule.signed is False else (-half, half - 1)
    wrong = (bias.codes < low) | (bias.codes > high)
    if bool(wrong.any()) and rule.out_of_range != "saturate":
        got = f"code {int(bias.codes[wrong].flat[0])} ({int(wrong.sum())} of {bias.codes.size} codes lie outside)"
        fix = "Give the weights of these channels a coarser scale."
        must = f"must be {rule.bits}, codes from {low} to {high}"
        yield Finding(f"{path}.bits", must, got, fix, bias.name)


def _of_storage(clause: str, rule: Bias, bias: Constant) -> Iterator[Finding]:
    """The stored type, where the target says which widths a bias is stored in."""
    if rule.storage_bits == "unknown":
        yield unknown(clause)
    elif rule.storage_bits is not None and bias.encoding is not None and bias.encoding.bits not in rule.storage_bits:
        widths = " or ".join(map(str, rule.storage_bits))
        fix = f"Store it in {widths} bits."
        yield Finding(clause, f"must be {widths}", bias.encoding.type or f"{bias.encoding.bits}", fix, bias.name)


def _of_scale(path: str, rule: Bias, bias: Constant, e: Encoding, site: Site) -> Iterator[Finding]:
    if rule.scale is None or rule.scale == "unknown":
        yield unknown(f"{path}.scale", "unknown" if rule.scale else "the target does not say in which units a bias is")
        return
    unit = _unit(site)
    if rule.scale == "own":
        if rule.per in (None, "tensor") and e.axis is not None and len(np.unique(e.scale)) > 1:
            yield Finding(f"{path}.per", 'must be "tensor"', f"{e.scale.size} scales", "Use one scale.", bias.name)
        if rule.align == "unknown":
            yield unknown(f"{path}.align")
        elif rule.meets_sum and unit is not None:
            yield from _of_alignment(path, rule, bias, np.atleast_1d(e.scale / unit))
        return
    if unit is None:
        return
    try:
        away = np.abs(e.scale - unit) > _TOLERANCE * unit
    except ValueError:  # as many scales as neither channels nor one
        got = f"{e.scale.size} scales"
        yield Finding(f"{path}.scale", f"must be one for each of {unit.size}", got, "Quantize it again.", bias.name)
        return
    if bool(away.any()):
        index = int(np.flatnonzero(np.atleast_1d(away))[0])
        want, got_scale = (float(np.broadcast_to(x, away.shape).flat[index]) for x in (unit, e.scale))
        got = f"scale {got_scale:.9g} where the product is {want:.9g}"
        more = f" ({int(away.sum())} of {away.size} channels)" if away.size > 1 else ""
        fix = "Quantize it again at that scale."
        yield Finding(f"{path}.scale", 'must be "input*weight"', got + more, fix, bias.name)


def _of_alignment(path: str, rule: Bias, bias: Constant, ratio: NDArray[Any]) -> Iterator[Finding]:
    """A bias that is shifted left to meet the sum: by a whole number of bits, and as far as the hardware can."""
    ratio = np.asarray(ratio, np.float32).astype(np.float64)
    exact = is_power_of_two(ratio)
    if not bool(exact.all()):
        must = "must be input scale times weight scale, shifted left"
        got = f"{float(ratio[~exact][0]):.9g} times that"
        yield Finding(f"{path}.align", must, got, "Quantize it on such a scale.", bias.name)
        return
    if rule.shift == "unknown":
        yield unknown(f"{path}.shift")
        return
    left = np.frexp(ratio)[1] - 1
    fewest, most = (0, None) if rule.shift is None else (_negative(rule.shift.max, 0), _negative(rule.shift.min, None))
    for field, bound, wrong, words, fix in (
        ("max", fewest, left < fewest if isinstance(fewest, int) else None, "at least", "Give it a coarser scale."),
        ("min", most, left > most if isinstance(most, int) else None, "at most", "Give it a finer scale."),
    ):
        clause = f"{path}.align" if rule.shift is None else f"{path}.shift.{field}"
        if bound == "unknown":
            yield unknown(clause)
        elif wrong is not None and bool(wrong.any()):
            must = f"must be shifted left by {words} {bound} bits to meet the sum"
            yield Finding(clause, must, str(int(left[wrong][0])), fix, bias.name)


def _negative(bound: int | str | None, absent: int | None) -> int | str | None:
    """Bits of a left shift, from those of a right one."""
    return -bound if isinstance(bound, int) else absent if bound is None else bound


def _unit(site: Site) -> NDArray[Any] | None:
    """Input scale times weight scale per output channel, as float32 has it; None where one is not known."""
    x = site.inputs[0].encoding if site.inputs else None
    w = site.weight.encoding if site.weight is not None else None
    if w is not None and w.axis not in (None, site.operator.weight_axis):
        return None  # scales along another axis are no scales of output channels
    if x is None or w is None or x.is_dynamic or w.is_dynamic or x.scale.ndim or w.scale.ndim > 1:
        return None
    return site.per_channel(_as_float32(x) * _as_float32(w))


def _as_float32(e: Encoding) -> NDArray[np.float64]:
    return np.asarray(np.asarray(e.scale, np.float32), np.float64)
