# SPDX-License-Identifier: Apache-2.0
"""Clauses on sums of two operands: how they get onto one scale, and by how much they may be shifted there."""

from collections.abc import Iterator

import numpy as np

from qhw.legality.finding import Finding, unknown
from qhw.legality.ratios import operands, preshift
from qhw.legality.scales import is_power_of_two
from qhw.legality.site import Site
from qhw.schema import Align, Requantize, Shift

__all__ = ["alignment_findings"]


def alignment_findings(site: Site, kernel: str, path: str, rule: Requantize) -> Iterator[Finding]:
    """What a requantization says about the scales of the operands of an Add or Sub, beside their ratio to the result.

    Args:
        site: The operator.
        kernel: Its kernel.
        path: Field path of the requantization.
        rule: The requantization.
    """
    read = operands(site)
    if site.kind not in ("Add", "Sub") or read is None or len(read[1]) != 2:
        return
    names, grids, _ = read
    a, b = (float(np.float32(e.scale)) for e in grids)
    if rule.kind == "shift" and a != b:
        moved = names[int(a < b)] if _goes_to_finer(rule) else names[int(a > b)]
        yield from _of_shift(path, rule, a, b, moved)
    if rule.kind == "fixed_point" and preshift(site, kernel) is None:
        table = site.spec.preshift_bits
        if table is not None or site.spec.same_scale not in ("inputs", "all"):
            missing = "the target does not say how far operands are shifted left before the sum"
            why = () if table == "unknown" else (missing,)
            yield unknown(f"{site.path}.preshift_bits", *why)


def _goes_to_finer(rule: Requantize) -> bool:
    return isinstance(rule.align, Align) and rule.align.to == "finer"


def _of_shift(path: str, rule: Requantize, a: float, b: float, moved: str) -> Iterator[Finding]:
    """Two scales that shifts bring to one."""
    if not bool(is_power_of_two(np.asarray(a / b))):
        got, fix = f"scales {a:.9g} and {b:.9g}", "Put both scales on powers of two."
        yield Finding(f"{path}.kind", 'must be "shift": operands a power of two apart', got, fix, moved)
        return
    align = rule.align
    if not isinstance(align, Align):
        yield unknown(f"{path}.align", *(() if align else ("the target does not say how operands meet",)))
        return
    if align.to is None or align.to == "unknown":
        yield unknown(f"{path}.align.to", *(() if align.to else ("the target does not say which scale both get",)))
        return
    if align.shift == "unknown":
        yield unknown(f"{path}.align.shift")
    if not isinstance(align.shift, Shift):
        return
    apart = int(abs(np.log2(a / b)))
    right = -apart if align.to == "finer" else apart
    fix = "Bring the operands' scales closer together."
    got = f"scales 2^{apart} apart, a right shift of {right}"
    low, high = align.shift.min, align.shift.max
    if isinstance(low, int) and right < low:
        yield Finding(f"{path}.align.shift.min", f"must be at least {low}", got, fix, moved)
    elif isinstance(high, int) and right > high:
        yield Finding(f"{path}.align.shift.max", f"must be at most {high}", got, fix, moved)
    elif (low if right < 0 else high) == "unknown":
        yield unknown(f"{path}.align.shift.{'min' if right < 0 else 'max'}")
