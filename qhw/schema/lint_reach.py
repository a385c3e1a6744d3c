# SPDX-License-Identifier: Apache-2.0
"""Rules of a target that nothing can ever reach: listed twice, shadowed by earlier ones, about what cannot occur."""

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from qhw.schema.base import Path, leaves
from qhw.schema.content import arithmetic_content, content, frozen
from qhw.schema.kernels import OPERANDS, Kernel
from qhw.schema.kinds import TWO_ACTIVATIONS
from qhw.schema.messages import shown
from qhw.schema.operators import WEIGHTED_KINDS, Operator
from qhw.schema.read import dotted
from qhw.schema.remarks import Remark
from qhw.schema.spec import TargetSpec
from qhw.schema.words import joined

__all__ = ["is_inherited", "unreachable"]

WINDOWED = frozenset(
    {"AveragePool", "Conv", "ConvTranspose", "DepthwiseConv", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"}
)
HAVING: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("kernel", "stride", "dilation"), WINDOWED),
    "groups": frozenset({"Conv", "ConvTranspose", "DepthwiseConv", "GroupNormalization"}),
    "depth_multiplier": frozenset({"Conv", "DepthwiseConv"}),
    "slope": frozenset({"LeakyRelu", "PRelu"}),
    "mode": frozenset({"Pad", "Resize"}),
}
"""Attributes that only some kinds have."""
READ_BY: Mapping[str, frozenset[str]] = {
    "mean_count": frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"}),
    "preshift_bits": frozenset({"Add", "Sub"}),
    "whole_image": frozenset({"AveragePool"}),
}
"""Fields that only some kinds read."""


def unreachable(spec: TargetSpec) -> Iterator[Remark]:
    """Every rule that no model can ever meet, or that is said twice."""
    yield from _twice(spec)
    yield from _shadowed(spec)
    for kind, operator in spec.operators.items():
        yield from _of_weights(spec, kind, operator)
        yield from _of_fusions(kind, operator)
        for remark in (*_of_attributes(kind, operator), *_of_formats(spec, kind, operator)):
            if not is_inherited(spec, remark[1]):  # what a base wrote cannot be taken out, and serves the base
                yield remark
    yield from _of_boundary(spec)


def is_inherited(spec: TargetSpec, path: Path) -> bool:
    """Whether a base wrote all that stands at a path."""
    head = dotted(path)
    here: Any = spec
    for part in path:
        here = here[part] if isinstance(here, dict) else getattr(here, str(part))
    written = [".".join((head, *map(str, leaf))) for leaf, _ in leaves(here)]
    return bool(written) and all(name in spec.inherited or head in spec.inherited for name in written)


def _twice(spec: TargetSpec) -> Iterator[Remark]:
    lists: list[tuple[Path, Any]] = []
    for name, kernel in spec.kernels.items():
        lists += [(("kernels", name, field), getattr(kernel, field)) for field in OPERANDS]
    for kind, operator in spec.operators.items():
        here: Path = ("operators", kind)
        lists += [((*here, field), getattr(operator, field)) for field in ("kernels", "fused")]
        lists += [
            ((*here, "limits", name), limit if isinstance(limit, tuple) else getattr(limit, "values", None))
            for name, limit in operator.limits.items()
        ]
    for name, form in spec.formats.items():
        lists += [(("formats", name, field), getattr(form, field)) for field in ("zero_point", "group_size")]
    if spec.boundary is not None:
        lists += [(("boundary", f), getattr(spec.boundary, f)) for f in ("input_formats", "output_formats")]
    for path, listed in lists:
        items = [(item,) if isinstance(item, str) and path[-1] == "fused" else item for item in _items(listed)]
        for item, count in Counter(items).items():
            if count > 1:
                yield "warning", path, f"lists {_said(item)} {_times(count)}. Keep one."


def _items(listed: Any) -> tuple[Any, ...]:
    return listed if isinstance(listed, tuple) else ()


def _said(item: Any) -> str:
    if isinstance(item, tuple):
        return _said(item[0]) if len(item) == 1 else shown(list(item))
    return shown(item)


def _times(count: int) -> str:
    return "twice" if count == 2 else f"{count} times"


def _shadowed(spec: TargetSpec) -> Iterator[Remark]:
    """Kernels of an operator that an earlier one makes superfluous: the first that fits is always taken."""
    said: dict[tuple[str, str, bool], list[str]] = {}
    for kind, operator in spec.operators.items():
        names = tuple(dict.fromkeys(_items(operator.kernels)))
        for index, name in enumerate(names):
            for earlier in names[:index]:
                first, second = spec.kernels[earlier], spec.kernels[name]
                if _holds_all(spec, first, second) and not _is_wider(spec, first, second):
                    said.setdefault((name, earlier, _same_rest(spec, first, second)), []).append(kind)
                    break
    for (name, earlier, is_same), kinds in said.items():
        why = "says the same" if is_same else "takes the same formats, in as wide an accumulator"
        text = f"is never taken for {joined(kinds)}: {earlier} stands before it and {why}. Remove one, or say what "
        text += "differs."
        yield "warning", ("kernels", name), text


def _holds_all(spec: TargetSpec, first: Kernel, second: Kernel) -> bool:
    """Whether every combination of formats of the second kernel is one of the first."""
    for field in OPERANDS:
        one, other = getattr(first, field), getattr(second, field)
        if not isinstance(one, tuple) or not isinstance(other, tuple):
            if one != other:
                return False
            continue
        known = {frozen(content(spec.formats[name])) for name in one}
        if not {frozen(content(spec.formats[name])) for name in other} <= known:
            return False
    # A kernel without a bias leaves operators that have one to the next.
    return first.bias == second.bias or first.bias != "none"


def _is_wider(spec: TargetSpec, first: Kernel, second: Kernel) -> bool:
    """Whether the second kernel's sums may have room where those of the first do not, as far as is known."""
    one, other = (spec.accumulators.get(str(kernel.accumulator)) for kernel in (first, second))
    if one is None or other is None:
        return (one is None) != (other is None)
    if isinstance(one.bits, int) and isinstance(other.bits, int):
        return other.bits > one.bits
    return one.bits != other.bits


def _same_rest(spec: TargetSpec, first: Kernel, second: Kernel) -> bool:
    one, other = (frozen(arithmetic_content(spec, kernel)) for kernel in (first, second))
    return bool(one == other)


def _of_weights(spec: TargetSpec, kind: str, operator: Operator) -> Iterator[Remark]:
    if kind not in WEIGHTED_KINDS:
        return
    without = [name for name in _items(operator.kernels) if spec.kernels[name].weight is None]
    if without:
        text = (
            f"is never taken for {kind}, which has weights: it lists no weight formats. State weight, or take it out."
        )
        whole = len(without) == len(dict.fromkeys(_items(operator.kernels)))
        yield from (("error" if whole else "warning", ("kernels", name, "weight"), text) for name in without)


def _of_fusions(kind: str, operator: Operator) -> Iterator[Remark]:
    for item in _items(operator.fused):
        chain = (item,) if isinstance(item, str) else item
        path: Path = ("operators", kind, "fused")
        if not chain:
            yield "warning", path, "lists a chain of no operators. Remove it."
        two = [one for one in chain if one in TWO_ACTIVATIONS]
        if two:
            text = f"{_said(chain)} is never taken yet: {two[0]} reads two tensors, and only chains along one are"
            yield "info", path, f"{text} followed."
        if "Dropout" in chain:
            yield "info", path, f"{_said(chain)} is never met: a Dropout does nothing at inference."


def _of_attributes(kind: str, operator: Operator) -> Iterator[Remark]:
    for name in operator.limits:
        if name in HAVING and kind not in HAVING[name]:
            text = f"holds for nothing: a {kind} has no {name}. Remove it, or put it where it belongs."
            yield "warning", ("operators", kind, "limits", name), text
    for field, kinds in READ_BY.items():
        if getattr(operator, field) is not None and kind not in kinds:
            yield (
                "warning",
                ("operators", kind, field),
                f"holds for nothing: only {joined(sorted(kinds))} read it. Remove it.",
            )


def _of_formats(spec: TargetSpec, kind: str, operator: Operator) -> Iterator[Remark]:
    """Rules per format, of formats that none of the operator's kernels has there."""
    rows = [spec.kernels[name] for name in _items(operator.kernels)]
    if not rows:
        return
    for field, operands in (("fixed_output", ("output",)), ("preshift_bits", ("input", "weight"))):
        table = getattr(operator, field)
        lists = [getattr(row, operand) for row in rows for operand in operands]
        if any(listed == "unknown" for listed in lists):
            continue
        there = {name for listed in lists for name in _items(listed)}
        for name in table if isinstance(table, dict) else ():
            if name not in there:
                what = "gives" if field == "fixed_output" else "takes"
                text = f"holds for nothing: no kernel of {kind} {what} {name}. Remove it, or list the format there."
                yield "warning", ("operators", kind, field, name), text


def _of_boundary(spec: TargetSpec) -> Iterator[Remark]:
    if spec.boundary is None or not spec.kernels:
        return
    used = [spec.kernels[name] for operator in spec.operators.values() for name in _items(operator.kernels)]
    for field, operands in (("input_formats", ("input", "weight")), ("output_formats", ("output",))):
        lists = [getattr(kernel, operand) for kernel in used for operand in operands]
        there = {name for listed in lists for name in _items(listed)}
        for name in _items(getattr(spec.boundary, field)):
            if name not in there and used:
                what = "takes" if field == "input_formats" else "gives"
                yield (
                    "warning",
                    ("boundary", field),
                    f"{name} is met nowhere: no kernel {what} it. Remove it, or list it there.",
                )
