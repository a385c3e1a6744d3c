# SPDX-License-Identifier: Apache-2.0
"""Ratios of scales that an operator's requantization multiplies with, by kind of operator."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.legality.artefact import Encoding
from qhw.legality.site import Site
from qhw.schema import WEIGHTED_KINDS, Align, Approximation, Requantize

__all__ = ["Ratio", "operands", "preshift", "ratios"]

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
_GATHERING = ("Concat", "Relu", "Clip")


@dataclass(frozen=True, eq=False)
class Ratio:
    """One ratio.

    Attributes:
        value: float64 [] or [channels].
        tensor: Whose scale could change it first.
        span: Largest sum that it multiplies, like the value; None where that is not known.
        count: Elements of a mean that it divides by.
    """

    value: NDArray[Any]
    tensor: str
    span: NDArray[Any] | float | None
    count: int = 1


def ratios(site: Site, kernel: str, rule: Requantize, sums: NDArray[Any] | None) -> Iterator[Ratio]:
    """The ratios that an operator's kernel needs; none where a tensor has no grid or a table takes their place.

    Args:
        site: The operator.
        kernel: Its kernel.
        rule: The kernel's requantization.
        sums: Largest magnitude of the sums of an operator with weights, per output channel; None where not known.
    """
    read = operands(site)
    if read is None:
        return
    names, known, output = read
    if site.kind in WEIGHTED_KINDS:
        weight = site.weight.encoding if site.weight is not None else None
        by_channel = weight is not None and weight.axis in (None, site.operator.weight_axis)
        if weight is not None and by_channel and weight.scale.ndim <= 1 and site.weight is not None:
            product = _float32(known[0]) * np.float32(weight.scale).astype(np.float64)
            yield Ratio(site.per_channel(product / _float32(output)), site.weight.name, sums)
        return
    yield from _of_activations(site, kernel, rule, known, names, output)


def operands(site: Site) -> tuple[list[str], list[Encoding], Encoding] | None:
    """Names and grids of all that an operator reads, and the grid of its result; None where one has no single scale.

    A constant operand of an elementwise operator stands beside the activation; a weight is left out.
    """
    inputs, output = [use.encoding for use in site.inputs], site.output.encoding
    names = [use.tensor for use in site.inputs]
    if site.weight is not None and site.kind not in WEIGHTED_KINDS:
        inputs, names = [*inputs, site.weight.encoding], [*names, site.weight.name]
    known = [e for e in inputs if e is not None]
    if output is None or not known or len(known) < len(inputs):
        return None
    return None if any(e.is_dynamic or e.scale.ndim for e in (*known, output)) else (names, known, output)


def preshift(site: Site, kernel: str) -> int | None:
    """Bits by which a sum in fixed point shifts its operands left first; None where the target does not say."""
    table, formats = site.spec.preshift_bits, site.kernel(kernel).input
    listed = formats if isinstance(formats, tuple) else ()
    bits = next((n for f, n in table.items() if f in listed), None) if isinstance(table, dict) else None
    return bits if isinstance(bits, int) else None


def _of_activations(
    site: Site, kernel: str, rule: Requantize, inputs: list[Encoding], names: list[str], output: Encoding
) -> Iterator[Ratio]:
    by_table = isinstance(site.spec.approximation, Approximation) or rule.regrid in ("dequantize", "unknown")
    if site.kind in ("MatMul", "Mul") and len(inputs) == 2:
        count = int(site.operator.attributes.get("reduced_elements", 1)) if site.kind == "MatMul" else 1
        span = _span(inputs[0]) * _span(inputs[1]) * count
        yield Ratio(_float32(inputs[0]) * _float32(inputs[1]) / _float32(output), names[0], float(span))
    elif site.kind in ("Add", "Sub") and len(inputs) == 2:
        yield from _of_sum(site, kernel, rule, inputs, names, output)
    elif site.kind in _AVERAGES and not site.sums_reals(kernel):
        if rule.kind != "float32" and inputs[0].same_grid(output) and site.kind != "ReduceSum":
            return
        facts = site.operator.attributes
        count = max(1, int(facts.get("reduced_elements") or math.prod(facts.get("kernel", (1,)))))
        divided = 1 if site.kind == "ReduceSum" or site.spec.mean_count == "multiplier" else count
        value = _float32(inputs[0]) / _float32(output) / divided
        yield Ratio(value, site.output.tensor, float(_span(inputs[0]) * count), divided)
    elif site.kind in _GATHERING and not by_table:
        for name, e in zip(names, inputs, strict=True):
            if not e.same_grid(output):
                yield Ratio(_float32(e) / _float32(output), name, float(_span(e)))


def _of_sum(
    site: Site, kernel: str, rule: Requantize, inputs: list[Encoding], names: list[str], output: Encoding
) -> Iterator[Ratio]:
    """Add and Sub: each operand's own ratio; by fixed point to twice the larger scale first, and from there.

    By shifts, and in fixed point on a scale that the target demands without a pre-shift: codes are added on one of both
    scales, and the sum has one ratio.
    """
    scales = [float(_float32(e)) for e in inputs]
    bits = preshift(site, kernel)
    demands_one = site.spec.same_scale in ("inputs", "all") and site.spec.preshift_bits is None
    if rule.kind == "shift" or (rule.kind == "fixed_point" and demands_one):
        to = rule.align.to if isinstance(rule.align, Align) and rule.kind == "shift" else None
        if scales[0] == scales[1] or to in ("finer", "coarser"):
            unit = min(scales) if to == "finer" else max(scales)
            span = sum(_span(e) * scale / unit for e, scale in zip(inputs, scales, strict=True))
            yield Ratio(np.asarray(unit / _float32(output)), site.output.tensor, span)
    elif rule.kind != "fixed_point":
        for name, e in zip(names, inputs, strict=True):
            yield Ratio(_float32(e) / _float32(output), name, float(_span(e)))
    elif bits is not None:
        largest, span = max(scales), 2.0**bits * max(_span(e) for e in inputs)
        for name, scale in zip(names, scales, strict=True):
            if scale != largest:
                yield Ratio(np.asarray(scale / (2 * largest)), name, span)
        yield Ratio(np.asarray(2.0 ** (1 - bits) * largest / _float32(output)), site.output.tensor, 2 * span)


def _float32(e: Encoding) -> NDArray[np.float64]:
    return np.asarray(np.float32(e.scale), dtype=np.float64)


def _span(e: Encoding) -> int:
    """Largest magnitude of a code without its zero point."""
    zero = int(e.zero_point.flat[0])
    return max(e.quant_max - zero, zero - e.quant_min)
