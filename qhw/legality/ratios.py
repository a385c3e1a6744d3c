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
from qhw.schema import WEIGHTED_KINDS, Approximation, Requantize

__all__ = ["Ratio", "ratios"]

_AVERAGES = ("AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum")
_GATHERING = ("Concat", "Relu", "Clip")


@dataclass(frozen=True, eq=False)
class Ratio:
    """One ratio.

    Attributes:
        value: float64 [] or [channels].
        tensor: Whose scale could change it first.
        span: Largest sum that it multiplies, like the value; None where that is not known.
    """

    value: NDArray[Any]
    tensor: str
    span: NDArray[Any] | float | None


def ratios(site: Site, kernel: str, rule: Requantize, sums: NDArray[Any] | None) -> Iterator[Ratio]:
    """The ratios that an operator's kernel needs; none where a tensor has no grid or a table takes their place.

    Args:
        site: The operator.
        kernel: Its kernel.
        rule: The kernel's requantization.
        sums: Largest magnitude of the sums of an operator with weights, per output channel; None where not known.
    """
    inputs = [use.encoding for use in site.inputs]
    output = site.output.encoding
    if output is None or None in inputs or any(e.is_dynamic for e in (*inputs, output) if e is not None):
        return
    known = [e for e in inputs if e is not None]
    names = [use.tensor for use in site.inputs]
    if any(e.scale.ndim for e in (*known, output)) or not known:
        return
    if site.kind in WEIGHTED_KINDS:
        weight = site.weight.encoding if site.weight is not None else None
        by_channel = weight is not None and weight.axis in (None, site.operator.weight_axis)
        if weight is not None and by_channel and weight.scale.ndim <= 1 and site.weight is not None:
            product = _float32(known[0]) * np.float32(weight.scale).astype(np.float64)
            yield Ratio(site.per_channel(product / _float32(output)), site.weight.name, sums)
        return
    if site.weight is not None:  # a constant operand of an elementwise operator stands beside the activation
        if site.weight.encoding is None or site.weight.encoding.scale.ndim:
            return
        known, names = [*known, site.weight.encoding], [*names, site.weight.name]
    yield from _of_activations(site, kernel, rule, known, names, output)


def _of_activations(
    site: Site, kernel: str, rule: Requantize, inputs: list[Encoding], names: list[str], output: Encoding
) -> Iterator[Ratio]:
    by_table = isinstance(site.spec.approximation, Approximation) or rule.regrid in ("dequantize", "unknown")
    if site.kind in ("MatMul", "Mul") and len(inputs) == 2:
        count = int(site.operator.attributes.get("reduced_elements", 1)) if site.kind == "MatMul" else 1
        span = _span(inputs[0]) * _span(inputs[1]) * count
        yield Ratio(_float32(inputs[0]) * _float32(inputs[1]) / _float32(output), names[0], float(span))
    elif site.kind in ("Add", "Sub") and len(inputs) == 2:
        yield from _operands(site, kernel, rule, inputs, names, output)
    elif site.kind in _AVERAGES and not site.sums_reals(kernel):
        if rule.kind != "float32" and inputs[0].same_grid(output) and site.kind != "ReduceSum":
            return
        facts = site.operator.attributes
        count = max(1, int(facts.get("reduced_elements") or math.prod(facts.get("kernel", (1,)))))
        divided = 1 if site.kind == "ReduceSum" or site.spec.mean_count == "multiplier" else count
        value = _float32(inputs[0]) / _float32(output) / divided
        yield Ratio(value, site.output.tensor, float(_span(inputs[0]) * count))
    elif site.kind in _GATHERING and not by_table:
        for name, e in zip(names, inputs, strict=True):
            if not e.same_grid(output):
                yield Ratio(_float32(e) / _float32(output), name, float(_span(e)))


def _operands(
    site: Site, kernel: str, rule: Requantize, inputs: list[Encoding], names: list[str], output: Encoding
) -> Iterator[Ratio]:
    """Add and Sub: each operand's own ratio; by fixed point to twice the larger scale first, and from there."""
    if rule.kind != "fixed_point":
        for name, e in zip(names, inputs, strict=True):
            yield Ratio(_float32(e) / _float32(output), name, float(_span(e)))
        return
    table, formats = site.spec.preshift_bits, site.kernel(kernel).input
    listed = formats if isinstance(formats, tuple) else ()
    bits = next((n for f, n in table.items() if f in listed), None) if isinstance(table, dict) else None
    if not isinstance(bits, int):
        return
    largest = max(float(_float32(e)) for e in inputs)
    span = 2.0**bits * max(_span(e) for e in inputs)
    for name, e in zip(names, inputs, strict=True):
        if float(_float32(e)) != largest:
            yield Ratio(_float32(e) / (2 * largest), name, span)
    yield Ratio(np.asarray(2.0 ** (1 - bits) * largest / _float32(output)), site.output.tensor, 2 * span)


def _float32(e: Encoding) -> NDArray[np.float64]:
    return np.asarray(np.float32(e.scale), dtype=np.float64)


def _span(e: Encoding) -> int:
    """Largest magnitude of a code without its zero point."""
    zero = int(e.zero_point.flat[0])
    return max(e.quant_max - zero, zero - e.quant_min)
