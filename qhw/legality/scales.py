# SPDX-License-Identifier: Apache-2.0
"""Clauses on scales: of their kind, within bounds, and no number that is none."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.legality.finding import Finding, unknown
from qhw.schema import Scale

__all__ = ["is_power_of_two", "scale_findings"]

Numbers = NDArray[Any]


def scale_findings(path: str, spec: Scale | str | None, scale: Numbers) -> Iterator[Finding]:
    """What a format's clauses on scales say about the scales of one tensor.

    Args:
        path: Of the clause, as `formats.w8.scale`.
        spec: What the target says.
        scale: float64, any shape; finite.
    """
    if not bool((scale > 0).all()):
        fix = "Give the dead channel the scale of a neighbour, or the smallest legal one."
        yield _broken(path, "must be above 0", scale, scale > 0, fix)
        return
    if spec is None:
        return
    if not isinstance(spec, Scale):
        yield unknown(path)
        return
    yield from _kind_findings(path, spec, scale)
    yield from _bound_findings(path, spec, scale)
    if spec.outer not in (None, "unknown") or spec.inner_bits is not None:
        yield unknown(f"{path}.outer", "this form holds one level of scales, and the target has two")


def is_power_of_two(scale: Numbers) -> NDArray[np.bool_]:
    """Which scales are 2^e, exactly."""
    return np.asarray(np.frexp(scale)[0] == 0.5)


def _kind_findings(path: str, spec: Scale, scale: Numbers) -> Iterator[Finding]:
    kind = spec.kind
    if kind in ("fixed", "enumerated"):
        if not isinstance(spec.values, tuple):
            yield unknown(f"{path}.values")
            return
        allowed = np.asarray(spec.values, np.float32)
        legal = np.isin(np.float32(scale), allowed)
        listed = ", ".join(f"{value:.9g}" for value in spec.values[:6])
        must = f"must be {listed}" if len(spec.values) == 1 else f"must be one of {listed}"
        if not bool(legal.all()):
            yield _broken(f"{path}.values", must, scale, legal, "Quantize again on a scale that the hardware has.")
        return
    rule = _RULES.get(kind)
    if rule is not None:
        must, holds = rule
        legal = holds(scale)
        if not bool(legal.all()):
            is_power = kind in ("power_of_two", "e8m0")
            fix = f"Round it up to the next {'power of two' if is_power else kind}, and quantize again."
            yield _broken(f"{path}.kind", must, scale, legal, fix)
    elif kind != "float32":
        yield unknown(f"{path}.kind", "unknown" if kind == "unknown" else f'scales of kind "{kind}" are not judged yet')


def _bound_findings(path: str, spec: Scale, scale: Numbers) -> Iterator[Finding]:
    bounds: list[tuple[str, Any, Callable[[Numbers, float], Any], str]] = [
        ("min", spec.min, np.greater_equal, "at least"),
        ("max", spec.max, np.less_equal, "at most"),
    ]
    for field, bound, holds, words in bounds:
        if bound == "unknown":
            yield unknown(f"{path}.{field}")
        elif isinstance(bound, float):
            # A bound that float32 cannot hold is met by the float32 next to it.
            legal = holds(scale.astype(np.float32), float(np.float32(bound)))
            if not bool(legal.all()):
                fix = "Choose a coarser scale." if field == "min" else "Choose a finer scale, and let values saturate."
                yield _broken(f"{path}.{field}", f"must be {words} {bound:.9g}", scale, legal, fix)
    for field, bound, holds, words in (
        ("exponent_min", spec.exponent_min, np.greater_equal, "at least"),
        ("exponent_max", spec.exponent_max, np.less_equal, "at most"),
    ):
        if bound == "unknown":
            yield unknown(f"{path}.{field}")
        elif isinstance(bound, int):
            legal = holds(scale, 2.0**bound)
            if not bool(legal.all()):
                fix = "Choose a coarser scale." if "min" in field else "Choose a finer scale, and let values saturate."
                yield _broken(f"{path}.{field}", f"must be {words} 2^{bound}", scale, legal, fix)


def _broken(clause: str, must: str, scale: Numbers, legal: Any, fix: str) -> Finding:
    wrong = scale[~legal]
    got = f"scale {_figure(float(wrong.flat[0]))}"
    if scale.size > 1:
        got += f" ({wrong.size} of {scale.size} scales, the first of index {int(np.flatnonzero(~legal)[0])})"
    return Finding(clause, must, got, fix)


def _figure(scale: float) -> str:
    mantissa, exponent = np.frexp(scale)
    return f"2^{int(exponent) - 1}" if mantissa == 0.5 and not 1e-4 < scale < 1e4 else f"{scale:.9g}"


def _holds_float16(scale: Numbers) -> NDArray[np.bool_]:
    with np.errstate(over="ignore", under="ignore"):
        return np.asarray(scale.astype(np.float16).astype(np.float64) == np.float32(scale).astype(np.float64))


def _holds_bfloat16(scale: Numbers) -> NDArray[np.bool_]:
    return np.asarray(np.atleast_1d(np.float32(scale)).view(np.uint32).reshape(scale.shape) & 0xFFFF == 0)


def _holds_e4m3(scale: Numbers) -> NDArray[np.bool_]:
    """Four bits of exponent, three of mantissa: multiples of 2^-9, at most 448."""
    mantissa, exponent = np.frexp(scale)
    step = np.exp2(np.maximum(exponent - 4, -9))
    return np.asarray((scale % step == 0) & (scale <= 448) & (mantissa > 0))


_RULES: dict[str, tuple[str, Callable[[Numbers], NDArray[np.bool_]]]] = {
    "power_of_two": ("must be a power of two", is_power_of_two),
    "e8m0": ("must be a power of two (E8M0)", is_power_of_two),
    "float16": ("must be a float16", _holds_float16),
    "bfloat16": ("must be a bfloat16", _holds_bfloat16),
    "e4m3": ("must be a float of 4 exponent and 3 mantissa bits", _holds_e4m3),
}
