# SPDX-License-Identifier: Apache-2.0
"""Operators on numbers that are no integers: they have no integer form, and say so."""

from collections.abc import Iterator

from qhw.errors import IntegerError
from qhw.integer.site import Site
from qhw.numerics import QParams

__all__ = ["check_uniform", "has_elements"]


def check_uniform(site: Site) -> None:
    """Refuse an operator that reads, holds or writes codes which are no range of integers.

    Raises:
        IntegerError: says which of its tensors, and what its codes stand for.
    """
    for what, qparams in _tensors(site):
        if qparams is not None and qparams.elements is not None:
            raise IntegerError(f"{site.operator.kind} has no integer form: its {what} is in {qparams.elements.words}")


def has_elements(site: Site) -> bool:
    """Whether some tensor of an operator has codes that are no range of integers."""
    return any(qparams is not None and qparams.elements is not None for _, qparams in _tensors(site))


def _tensors(site: Site) -> Iterator[tuple[str, QParams | None]]:
    yield from (("input", qparams) for qparams in (*site.sources, *site.inputs))
    yield "weight", None if site.weight is None else site.weight.qparams
    yield "result", site.output
