# SPDX-License-Identifier: Apache-2.0
"""Operators on numbers that are no integers: they have no integer form, and say so."""

from collections.abc import Iterator

from qhw.errors import IntegerError
from qhw.graph import Graph
from qhw.integer.site import PointIndex, Site
from qhw.numerics import QParams

__all__ = ["check_static", "check_uniform", "has_elements"]


def check_uniform(site: Site) -> None:
    """Refuse an operator that reads, holds or writes codes which are no range of integers.

    Raises:
        IntegerError: says which of its tensors, and what its codes stand for.
    """
    for what, qparams in _tensors(site):
        if qparams is not None and qparams.elements is not None:
            raise IntegerError(f"{site.operator.kind} has no integer form: its {what} is in {qparams.elements.words}")


def check_static(site: Site, graph: Graph, points: PointIndex) -> None:
    """Refuse an operator that reads or writes a tensor whose scales are computed at run time.

    Raises:
        IntegerError: says which of its tensors.
    """
    read = [points.read(graph, site.operator, index) for index in range(len(site.operator.inputs))]
    written = points.written.get(site.members[-1].name)
    for what, point in (*(("input", point) for point in read), ("result", written)):
        if point is not None and point.is_dynamic:
            raise IntegerError(
                f"{site.operator.kind} has no integer form: scales of its {what} are computed at run time "
                f"(formats.{point.format}.scale.dynamic)"
            )


def has_elements(site: Site) -> bool:
    """Whether some tensor of an operator has codes that are no range of integers."""
    return any(qparams is not None and qparams.elements is not None for _, qparams in _tensors(site))


def _tensors(site: Site) -> Iterator[tuple[str, QParams | None]]:
    yield from (("input", qparams) for qparams in (*site.sources, *site.inputs))
    yield "weight", None if site.weight is None else site.weight.qparams
    yield "result", site.output
