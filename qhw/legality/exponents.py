# SPDX-License-Identifier: Apache-2.0
"""Inequalities between exponents of power-of-two scales."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.legality.artefact import Encoding
from qhw.legality.finding import Finding, unknown
from qhw.legality.scales import is_power_of_two
from qhw.legality.site import Site
from qhw.schema import ExponentBound

__all__ = ["exponent_findings"]


def exponent_findings(site: Site, kernel: str) -> Iterator[Finding]:
    """What a kernel's inequalities say about the scales of an operator.

    Args:
        site: The operator; a sum over a tensor without one power of two per channel is not judged.
        kernel: Its kernel.
    """
    bounds = site.kernel(kernel).exponents
    if bounds == "unknown":
        yield unknown(f"kernels.{kernel}.exponents")
    for index, bound in enumerate(bounds if isinstance(bounds, tuple) else ()):
        path = f"kernels.{kernel}.exponents.{index}"
        total = _sum(site, kernel, bound)
        if total is None:
            continue
        for field, limit in (("min", bound.min), ("max", bound.max)):
            if limit == "unknown":
                yield unknown(f"{path}.{field}")
            elif isinstance(limit, int):
                wrong = total < limit if field == "min" else total > limit
                if bool(wrong.any()):
                    name = bound.name or "the sum of exponents"
                    must = f"must keep {name} ({_formula(bound)}) at {'least' if field == 'min' else 'most'} {limit}"
                    got = str(int(np.atleast_1d(total)[np.atleast_1d(wrong)][0]))
                    yield Finding(f"{path}.{field}", must, got, _fix(bound, field == "min"), site.output.tensor)


def _sum(site: Site, kernel: str, bound: ExponentBound) -> NDArray[Any] | None:
    """The sum, one for each output channel; None where a tensor has no such exponent."""
    total: NDArray[Any] = np.zeros((), np.int64)
    for term, factor in bound.terms.items():
        exponents = _exponents(site, kernel, term)
        if exponents is None:
            return None
        total = total + factor * exponents
    return total


def _exponents(site: Site, kernel: str, term: str) -> NDArray[Any] | None:
    encodings = [use.encoding for use in site.inputs]
    inputs = [e for e in encodings if e is not None]
    if site.weight is not None and term in ("input_2", "inputs_min", "inputs_max") and site.weight.encoding is not None:
        inputs.append(site.weight.encoding)
    weight = site.weight.encoding if site.weight is not None else None
    if len(inputs) < len(encodings):
        return None
    if term in ("inputs_min", "inputs_max"):
        each = [_log2(e) for e in inputs]
        known = [x for x in each if x is not None]
        if len(known) < len(each) or not known:
            return None
        return np.asarray(
            min(int(x.min()) for x in known) if term == "inputs_min" else max(int(x.max()) for x in known)
        )
    if term == "bias":
        name = site.kernel(kernel).bias
        rule = site.target.biases.get(str(name))
        if rule is None or rule.scale != "input*weight" or weight is None or not inputs:
            return None
        first, second = _log2(inputs[0]), _log2(weight)
        return None if first is None or second is None else site.per_channel(second) + first
    held: dict[str, Encoding | None] = {
        "input": inputs[0] if inputs else None,
        "input_2": inputs[1] if len(inputs) > 1 else None,
        "weight": weight,
        "output": site.output.encoding,
    }
    found = held.get(term)
    exponents = None if found is None else _log2(found)
    return site.per_channel(exponents) if exponents is not None and term == "weight" else exponents


def _log2(e: Encoding) -> NDArray[Any] | None:
    if e.is_dynamic or e.scale.ndim > 1 or not bool(is_power_of_two(e.scale).all()):
        return None
    return np.frexp(e.scale)[1].astype(np.int64) - 1


def _formula(bound: ExponentBound) -> str:
    """As `input + weight - output`."""
    parts = []
    for term, factor in bound.terms.items():
        size = f"{abs(factor)} " if abs(factor) != 1 else ""
        parts.append(f"{'-' if factor < 0 else '+'} {size}{term}")
    return " ".join(parts).removeprefix("+ ")


def _fix(bound: ExponentBound, is_low: bool) -> str:
    raised = [term for term, factor in bound.terms.items() if (factor > 0) == is_low]
    return f"Raise the exponent of {' or '.join(raised)}." if raised else "Lower an exponent."
