# SPDX-License-Identifier: Apache-2.0
"""Averages and maxima: over windows, over the image, over axes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.arithmetic import clamped, code_bounds, rescaler, rounding_of
from qhw.integer.codes import carrier, is_one_grid, reach
from qhw.integer.exact import exact_dtype
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site, unknown
from qhw.integer.stages import order_decides
from qhw.numerics import Rounding

__all__ = ["divisor_of", "lower_average", "lower_extremum", "lower_maximum", "window_edges"]


def lower_maximum(site: Site) -> Lowered:
    """MaxPool, ReduceMax, ReduceMin: codes in the order of their reals, on the grid of the result."""
    limits = code_bounds(site)
    function = site.function()
    return Lowered(lambda values: function(values[0]).clamp(*limits), facts={"rule": "extremum", "clamp": limits})


def lower_extremum(site: Site) -> Lowered:
    """Max or Min of two tensors: codes in the order of their reals, on the grid of the result.

    Raises:
        IntegerError: an operand is a constant.
    """
    if len(site.inputs) != 2:
        raise IntegerError(f"{site.operator.kind} with a constant cannot be executed exactly yet")
    limits = code_bounds(site)
    target: Any = site.node.target
    facts: dict[str, Fact] = {"rule": "extremum", "clamp": limits}
    return Lowered(lambda values: target(values[0], values[1]).clamp(*limits), facts=facts)


def lower_average(site: Site) -> Lowered:
    """AveragePool, GlobalAveragePool, ReduceMean, ReduceSum: the sum of centred codes is the accumulator.

    On one grid the sum is divided by the count; else the scales and the count make one multiplier, and so they do on
    one grid where the target divides the multiplier. Zeros that a window pads with are codes of 0.0.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    x, out = site.inputs[0], site.result
    count, axes, total = _sum_of(site)
    dtype = exact_dtype(reach(x) * max(count, 1) * 2)
    zero, limits, kept = x.zero_point.to(dtype), code_bounds(site), carrier(out)

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        return total(values[0].to(dtype) - zero)

    sums: dict[str, Fact] = {"axes": axes, "count": count, "clamp": limits}
    divisor = 1 if site.operator.kind == "ReduceSum" else divisor_of(site, count)
    folded = _folded_count(site, divisor)
    if _divides(site) and folded is None:
        # Rounding codes rather than centred codes differs at ties of rules that look at the sign.
        rule = rounding_of(site)
        before = order_decides(rule, int(x.zero_point)) and site.adds_zero_point_first
        offset = int(x.zero_point) if before else 0
        rest = int(x.zero_point) - offset

        def divided(values: Sequence[Tensor]) -> Tensor:
            codes = divide(accumulate(values).long() + offset * divisor, divisor, rule) + rest
            return clamped(codes, limits, kept)

        return Lowered(
            divided,
            accumulate,
            {**sums, "rule": "quotient", "divisor": divisor, "offset": offset, "rounding": rule, "zero_point": rest},
        )

    def ratio(_: torch.dtype, kind: torch.dtype) -> Tensor:
        return x.scale.to(kind) / (out.scale.to(kind) * (divisor if folded is None else 1))

    rescale = rescaler(site, ratio, int(out.zero_point), folded)
    facts = {**sums, "rule": "sum", "requantize": rescale}
    return Lowered(lambda values: rescale.codes(accumulate(values), limits, kept), accumulate, facts)


def _folded_count(site: Site, divisor: int | Tensor) -> int | None:
    """The count that divides the multiplier; None where it divides the ratio."""
    how = site.spec.mean_count
    if how == "unknown":
        raise unknown(f"{site.path}.mean_count", how)
    if how != "multiplier" or site.operator.kind == "ReduceSum":
        return None
    if isinstance(divisor, Tensor):
        raise IntegerError(f'{site.path}.mean_count = "multiplier" needs windows of one count')
    return divisor


def divide(total: Tensor, count: int | Tensor, rule: Rounding) -> Tensor:
    """round(total / count) by a named rule, exact: int64 [*shape] -> int64 [*shape]; count > 0, broadcasts."""
    floor = torch.div(total, count, rounding_mode="floor")
    twice = 2 * (total - floor * count)
    if rule == "floor":
        return floor
    if rule == "toward_zero":
        return floor + ((total < 0) & (twice > 0)).long()
    if rule == "half_to_plus_infinity":
        return floor + (twice >= count).long()
    is_tie_up = floor % 2 == 1 if rule == "half_even" else total >= 0
    return floor + ((twice > count) | ((twice == count) & is_tie_up)).long()


def _divides(site: Site) -> bool:
    """Whether a mean on one grid is a quotient of integers: not where the target multiplies by a float32 ratio."""
    is_quotient = is_one_grid(site.inputs[0], site.result) and site.operator.kind != "ReduceSum"
    return is_quotient and site.requantize[1].kind != "float32"


def _sum_of(site: Site) -> tuple[int, tuple[int, ...], Callable[[Tensor], Tensor]]:
    """How many elements each output sums; the axes, none for windows; and the sum."""
    operator, facts = site.operator, site.operator.attributes
    if operator.kind == "AveragePool":
        return _window_sum(site)
    axes = facts.get("axes")
    spatial = len(facts.get("kernel", ()))
    shape = site.input_shape
    if axes is None:
        axes = list(range(len(shape) - spatial, len(shape)))
    axes = [axis % len(shape) for axis in axes]
    count = 1
    for axis in axes:
        count *= shape[axis]
    keep = bool(facts.get("keepdim", False))

    def total(x: Tensor) -> Tensor:
        found = 1
        for axis in axes:
            found *= x.shape[axis]
        if found != count:  # an axis that is reduced is the batch
            raise IntegerError(
                f"{site.name}: sums {found} values of a batch; captured with {count}. Run batches of that size."
            )
        return x.sum(axes, keepdim=keep)

    return count, tuple(axes), total


def _window_sum(site: Site) -> tuple[int, tuple[int, ...], Callable[[Tensor], Tensor]]:
    facts = site.operator.attributes
    kernel, stride = facts["kernel"], facts["stride"]
    edges = window_edges(site)
    dims = len(kernel)
    count = 1
    for size in kernel:
        count *= size
    pool: Any = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]

    def total(x: Tensor) -> Tensor:
        channels = x.shape[-dims - 1]
        ones = x.new_ones((channels, 1, *kernel))
        return pool(F.pad(x, edges), ones, None, stride, 0, 1, channels)  # type: ignore[no-any-return]

    return count, (), total


def _windows(site: Site) -> list[tuple[int, int, int, int, int, int]]:
    """Per dimension: size, outputs, kernel, stride, zeros before, zeros behind as far as windows reach."""
    facts = site.operator.attributes
    kernel, stride, padding = facts["kernel"], facts["stride"], facts["padding"]
    sizes, outputs = (shape[-len(kernel) :] for shape in (site.input_shape, tuple(site.node.meta["shape"])))
    return [
        (n, m, k, s, p, max(p, (m - 1) * s + k - n - p))
        for n, m, k, s, p in zip(sizes, outputs, kernel, stride, padding, strict=True)
    ]


def window_edges(site: Site) -> list[int]:
    """Zeros around the operand of a pool, as `torch.nn.functional.pad` takes them: as far as windows reach."""
    return [edge for *_, before, after in reversed(_windows(site)) for edge in (before, after)]


def divisor_of(site: Site, count: int) -> int | Tensor:
    """What a sum is divided by: one count, or int64 [*spatial] where windows at the border hold fewer elements.

    A window that reaches past the padding counts what lies within it; a divisor that the operator names takes the place
    of all counts.
    """
    facts = site.operator.attributes
    if site.operator.kind != "AveragePool":
        return count
    if facts.get("divisor"):
        return int(facts["divisor"])
    counts = torch.ones((), dtype=torch.int64)
    for size, outputs, kernel, stride, padding, _ in _windows(site):
        start = torch.arange(outputs) * stride - padding
        end = (start + kernel).clamp(max=size + padding)
        if not facts.get("count_include_pad", True):
            start, end = start.clamp(min=0), end.clamp(max=size)
        counts = counts[..., None] * (end - start)
    return count if bool((counts == count).all()) else counts
