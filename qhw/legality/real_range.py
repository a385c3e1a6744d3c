# SPDX-License-Identifier: Apache-2.0
"""Real bounds that a target clips the range of a result to, against the grid that the result is given."""

from collections.abc import Iterator

from qhw.legality.artefact import Encoding
from qhw.legality.finding import Finding, unknown
from qhw.legality.site import Site
from qhw.schema import Format, RealRange, Scale

__all__ = ["range_findings"]

_STEP = 1.000001
"""A step of the grid, and what float32 adds to it."""


def range_findings(site: Site, format_name: str | None) -> Iterator[Finding]:
    """Whether the grid of a result reaches past its operator's bounds by more than a step.

    A step, since bounds are rounded to codes. Of scales that are powers of two the smallest that covers a bound may
    reach further.

    Args:
        site: The operator.
        format_name: The format of its result; None where there is none.
    """
    stated, e, clause = site.spec.range, site.output.encoding, f"{site.path}.range"
    if stated is None or format_name is None or e is None or e.is_dynamic or e.is_float or e.scale.ndim or site.chain:
        return
    if not isinstance(stated, RealRange):
        yield unknown(clause)
        return
    spec = site.target.formats[format_name]
    e = e.as_signed(spec.is_signed) if spec.is_signed is not None else e
    for field, bound, end in _ends(stated, e):
        past = bound - end if field == "min" else end - bound
        is_smallest = _is_power_of_two(spec) and abs(end) / 2 < abs(bound)
        if past > float(e.scale) * _STEP and not is_smallest:
            must = f"must be at {'least' if field == 'min' else 'most'} {bound:g}, but for one step"
            fix = "Quantize it within these bounds."
            yield Finding(f"{clause}.{field}", must, f"codes for {end:.6g}", fix, site.output.tensor)


def _ends(stated: RealRange, e: Encoding) -> Iterator[tuple[str, float, float]]:
    """Field, bound and the grid's own end; of a symmetric grid, whose ends are one, the wider bound alone."""
    scale, zero = float(e.scale), int(e.zero_point.flat[0])
    lowest, highest = (e.quant_min - zero) * scale, (e.quant_max - zero) * scale
    low, high = stated.min, stated.max
    if not e.signed or zero != 0:
        if isinstance(low, float):
            yield "min", low, lowest
        if isinstance(high, float):
            yield "max", high, highest
    elif isinstance(low, float) and isinstance(high, float):
        yield ("max", high, highest) if abs(high) >= abs(low) else ("min", low, -highest)


def _is_power_of_two(spec: Format) -> bool:
    return isinstance(spec.scale, Scale) and spec.scale.kind == "power_of_two"
