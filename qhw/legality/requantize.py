# SPDX-License-Identifier: Apache-2.0
"""Clauses on requantization: multipliers, shifts and ratios that the hardware can hold."""

from collections.abc import Iterator

import numpy as np
import torch

from qhw.legality.accumulators import largest_sums
from qhw.legality.alignment import alignment_findings
from qhw.legality.finding import Finding, unknown
from qhw.legality.ratios import Ratio, ratios
from qhw.legality.scales import is_power_of_two
from qhw.legality.site import Site
from qhw.numerics import LegalRatios, legal_ratios
from qhw.schema import SUMMING_KINDS, Requantize

__all__ = ["requantize_findings"]


def requantize_findings(site: Site, kernel: str) -> Iterator[Finding]:
    """What a kernel's requantization says about the scales of an operator."""
    name = site.kernel(kernel).requantize
    if name is None or name == "unknown":
        if site.kind in SUMMING_KINDS and site.output.encoding is not None and not site.sums_reals(kernel):
            why = "unknown" if name else "the target does not say how results are requantized"
            yield unknown(f"kernels.{kernel}.requantize", why)
        return
    path, rule = f"requantize.{name}", site.target.requantize[name]
    yield from alignment_findings(site, kernel, path, rule)
    found = list(ratios(site, kernel, rule, largest_sums(site)))
    if not found:
        return
    yield from _open_fields(path, rule)
    legal = legal_ratios(path, rule)
    for ratio in found:
        if legal is not None:
            yield from _of_ratio(legal, rule, ratio)
        if rule.kind == "shift":
            exact = is_power_of_two(ratio.value)
            if not bool(exact.all()):
                got = f"a ratio of {float(np.atleast_1d(ratio.value)[np.atleast_1d(~exact)][0]):.9g}"
                fix = "Put all scales on powers of two."
                if not bool(is_power_of_two(np.asarray(ratio.count))):
                    fix = f"A mean of {ratio.count} needs one scale for operand and result here, or the host."
                yield Finding(f"{path}.kind", 'must be "shift": a power of two', got, fix, ratio.tensor)
        if rule.per == "tensor" and len(np.unique(np.float32(ratio.value))) > 1:
            got = f"{len(np.unique(np.float32(ratio.value)))} ratios"
            fix = "Quantize the weights with one scale per tensor."
            yield Finding(f"{path}.per", 'must be "tensor": one ratio for all channels', got, fix, ratio.tensor)
        yield from _shared_shift(path, rule, ratio)


def _open_fields(path: str, rule: Requantize) -> Iterator[Finding]:
    if rule.kind == "unknown":
        yield unknown(f"{path}.kind")
    for field in ("shift", "ratio", "multiplier_bits"):
        value = getattr(rule, field)
        if value == "unknown":
            yield unknown(f"{path}.{field}")
        elif field != "multiplier_bits" and value is not None:
            for bound in ("min", "max"):
                if getattr(value, bound) == "unknown":
                    yield unknown(f"{path}.{field}.{bound}")


def _of_ratio(legal: LegalRatios, rule: Requantize, ratio: Ratio) -> Iterator[Finding]:
    value = np.atleast_1d(ratio.value).astype(np.float64)
    holds = legal.is_legal(torch.from_numpy(value.copy())).numpy()
    if legal.zero_is_defined and ratio.span is not None:
        # What is always 0 may have a multiplier of 0; a quarter of a code, for some kernels round twice.
        holds = holds | ((value < legal.low) & (value * np.broadcast_to(ratio.span, value.shape) < 0.25))
    if bool(holds.all()):
        return
    worst = float(value[~holds][0])
    is_low = worst < legal.low or worst <= 0
    clause, bound = (legal.low_field, legal.low) if is_low else (legal.high_field, legal.high)
    must = f"must allow a ratio of scales {'from' if is_low else 'up to'} {bound:.6g}"
    words = f"shift {_shift_of(worst, rule)}, ratio {worst:.6g}" if "shift" in clause else f"ratio {worst:.6g}"
    more = f" ({int((~holds).sum())} of {value.size} channels)" if value.size > 1 else ""
    fix = "Coarsen the weights' scale or an input's." if is_low else "Coarsen the output's scale."
    yield Finding(clause, must, words + more, fix, ratio.tensor)


def _shared_shift(path: str, rule: Requantize, ratio: Ratio) -> Iterator[Finding]:
    if rule.shift_per != "tensor" or rule.kind != "shift":
        return
    shifts = {_shift_of(float(value), rule) for value in np.atleast_1d(ratio.value) if value > 0}
    if len(shifts) > 1:
        fix = "Give all channels one scale."
        yield Finding(f"{path}.shift_per", 'must be "tensor"', f"shifts {sorted(shifts)}", fix, ratio.tensor)


def _shift_of(ratio: float, rule: Requantize) -> int:
    """The right shift that a ratio needs."""
    mantissa, exponent = np.frexp(ratio)
    is_exact = mantissa == 0.5 and rule.kind == "shift"
    return int(-exponent) + (1 if is_exact else 0)
