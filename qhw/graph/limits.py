# SPDX-License-Identifier: Apache-2.0
"""Whether an operator keeps within the structural limits that a target states."""

import math
from collections.abc import Mapping
from typing import Any

from qhw.graph.operator import Operator
from qhw.schema import LimitRange
from qhw.schema.operators import PLANNED_LIMITS, Attribute, Limit

__all__ = ["violated_limit"]

_SAME_WORD: Mapping[str, str] = {
    "bilinear": "linear",
    "trilinear": "linear",
    "bicubic": "cubic",
    "replicate": "edge",
    "circular": "wrap",
}
"""torch's words for modes -> ONNX's."""


def violated_limit(operator: Operator, limits: Mapping[Attribute, Limit]) -> tuple[str, str] | None:
    """The first limit that an operator breaks: attribute name, and what was found there; None where all hold.

    A limit on an attribute that this operator does not have, one that is only recorded, an unknown one and "any"
    restrict nothing.
    """
    for attribute, limit in limits.items():
        found = _fact(operator, attribute)
        if found is None or attribute not in PLANNED_LIMITS or limit in ("any", "unknown"):
            continue
        if not _holds(operator, attribute, found, limit):
            return attribute, str(found)
    return None


def _fact(operator: Operator, attribute: str) -> Any:
    """What an operator has for an attribute; None where it has none."""
    facts = operator.attributes
    if attribute == "depth_multiplier":
        is_depthwise = operator.kind == "DepthwiseConv" and facts.get("in_channels")
        return facts["out_channels"] // facts["in_channels"] if is_depthwise else None
    if attribute == "reduced_elements" and operator.kind in ("Conv", "DepthwiseConv"):
        if "kernel" not in facts:  # its weight is computed at run time
            return None
        return math.prod(facts["kernel"]) * facts["in_channels"] // facts["groups"]
    if attribute == "padding" and operator.kind == "Conv" and isinstance(facts.get("padding"), str):
        return _in_numbers(facts) if facts["padding"] == "same" else [0] * len(facts["kernel"])
    if attribute == "axis":
        return facts.get("axis", facts.get("axes"))
    return facts.get(attribute)


def _in_numbers(facts: Mapping[str, Any]) -> list[int]:
    """What padding "same" adds at most on one side of each dimension; torch has it for strides of 1 alone."""
    return [-(-(taps - 1) * gap // 2) for taps, gap in zip(facts["kernel"], facts["dilation"], strict=True)]


def _holds(operator: Operator, attribute: str, found: Any, limit: Limit) -> bool:
    sizes = found if isinstance(found, list) else [found]
    if not isinstance(limit, LimitRange):
        return isinstance(limit, tuple) and _listed(operator, attribute, sizes, limit)
    low, high, multiple = limit.min, limit.max, limit.multiple_of
    if any(isinstance(size, str) for size in sizes):  # a mode has no size
        return not isinstance(limit.values, tuple) or _listed(operator, attribute, sizes, limit.values)
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
    elif attribute == "padding":
        if any(_is_padded(operator, word, sizes) for word in values if isinstance(word, str)):
            return True
    elif attribute == "axis":
        values |= _axes(operator, values)
    elif attribute == "mode":
        values |= {_SAME_WORD.get(word, word) for word in values if isinstance(word, str)}
        sizes = [_SAME_WORD.get(size, size) for size in sizes]
    return tuple(sizes) in values or all(size in values for size in sizes)


def _is_padded(operator: Operator, word: str, sizes: list[int]) -> bool:
    """Whether a word holds for an operator's padding.

    `valid`: there is none. `same`: what TFLite and ONNX mean by it, as much on both sides (or none), so that the
    result has ceil(size / stride) elements. `explicit`: any. `zero`: any, of zeros.
    """
    facts = operator.attributes
    if word == "explicit":
        return True
    if word == "zero":
        # A maximum pools over what is there, as if -inf surrounded it.
        if operator.kind in ("MaxPool", "GlobalMaxPool"):
            return not any(sizes)
        return facts.get("mode", "constant") == "constant" and not facts.get("value")
    if word == "valid":
        return not any(sizes)
    if isinstance(facts.get("padding"), str) and facts["padding"] == "same":
        return True
    if not {"spatial", "kernel", "stride"} <= set(facts) or len(sizes) != len(facts["kernel"]):
        return False
    gaps = facts.get("dilation", [1] * len(sizes))
    rows = zip(facts["spatial"], facts["kernel"], facts["stride"], gaps, sizes, strict=True)
    return all(_total_same(size, taps, stride, gap) == 2 * pad for size, taps, stride, gap, pad in rows)


def _total_same(size: int, taps: int, stride: int, gap: int) -> int:
    """How much "same" adds on both sides of one dimension together."""
    return max((-(-size // stride) - 1) * stride + (taps - 1) * gap + 1 - size, 0)


def _axes(operator: Operator, values: set[Any]) -> set[int]:
    """Axes, counted from the front, that words and negative integers stand for."""
    facts = operator.attributes
    rank = int(facts["axis_rank"] if "axis_rank" in facts else facts["rank"])
    words = {"channel": 1, "height": rank - 2 if rank > 3 else None, "width": rank - 1 if rank > 2 else None}
    found = {words.get(value) for value in values if isinstance(value, str)}
    found |= {rank - 1} if "last" in values else set()
    found |= {rank + value for value in values if isinstance(value, int) and value < 0}
    return {axis for axis in found if axis is not None}
