# SPDX-License-Identifier: Apache-2.0
"""Whether an operator keeps within the structural limits that a target states."""

from collections.abc import Mapping
from typing import Any

from qhw.graph.operator import Operator
from qhw.schema import LimitRange
from qhw.schema.operators import PLANNED_LIMITS, Attribute, Limit

__all__ = ["violated_limit"]


def violated_limit(operator: Operator, limits: Mapping[Attribute, Limit]) -> tuple[str, str] | None:
    """The first limit that an operator breaks: attribute name, and what was found there; None where all hold.

    A limit on an attribute that this operator does not have, one that is only recorded, an unknown one and "any"
    restrict nothing.
    """
    for attribute, limit in limits.items():
        found = operator.attributes.get(attribute)
        if found is None or attribute not in PLANNED_LIMITS or limit in ("any", "unknown"):
            continue
        if not _holds(operator, attribute, found, limit):
            return attribute, str(found)
    return None


def _holds(operator: Operator, attribute: str, found: Any, limit: Limit) -> bool:
    sizes = found if isinstance(found, list) else [found]
    if not isinstance(limit, LimitRange):
        return isinstance(limit, tuple) and _listed(operator, attribute, sizes, limit)
    low, high, multiple = limit.min, limit.max, limit.multiple_of
    return (
        (not isinstance(low, float) or all(size >= low for size in sizes))
        and (not isinstance(high, float) or all(size <= high for size in sizes))
        and (not isinstance(multiple, int) or all(size % multiple == 0 for size in sizes))
        and (not isinstance(limit.values, tuple) or _listed(operator, attribute, sizes, limit.values))
    )


def _listed(operator: Operator, attribute: str, sizes: list[Any], allowed: tuple[Any, ...]) -> bool:
    """An integer holds for every dimension, a tuple for all together, a word for what it names."""
    values = set(allowed)
    if attribute == "groups":
        values |= {1} if "1" in values else set()
        values |= {operator.attributes["in_channels"]} if "channels" in values else set()
    return tuple(sizes) in values or all(size in values for size in sizes)
