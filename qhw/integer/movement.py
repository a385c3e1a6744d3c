# SPDX-License-Identifier: Apache-2.0
"""Operators that move codes, and those that put several tensors on one grid."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qhw.errors import IntegerError
from qhw.integer.arithmetic import clamped, rescaler
from qhw.integer.codes import carrier
from qhw.integer.products import Lowered
from qhw.integer.site import Site
from qhw.numerics import QParams

__all__ = ["lower_concat", "lower_movement", "regridded"]


def lower_movement(site: Site) -> Lowered:
    """Transpose, Slice, Pad and the like: the same codes elsewhere; padding is the code of its value.

    Raises:
        IntegerError: input and output are on two grids, or the padding is no constant.
    """
    x, out = site.inputs[0], site.output or site.inputs[0]
    if not is_one_grid(x, out):
        raise IntegerError(f"{site.operator.kind} between two grids cannot be executed exactly yet")
    target: Any = site.node.target
    rest, kwargs = list(site.node.args[1:]), dict(site.node.kwargs)
    if any(isinstance(argument, fx.Node) for argument in rest):
        raise IntegerError(f"{site.operator.kind} with computed arguments cannot be executed exactly yet")
    if site.operator.kind == "Pad" and site.operator.attributes["mode"] == "constant":
        value = torch.tensor(float(site.operator.attributes["value"])) / x.scale
        code = int((value.round() + x.zero_point).clamp(x.quant_min, x.quant_max))
        pads = list(site.operator.attributes["padding"])
        return Lowered(lambda values: torch.nn.functional.pad(values[0], pads, value=code))
    return Lowered(lambda values: target(values[0], *rest, **kwargs))


def lower_concat(site: Site) -> Lowered:
    """Concat: each operand on the output's grid, then side by side.

    Raises:
        IntegerError: the target leaves open how operands get there.
    """
    out = site.output
    if out is None:
        raise IntegerError("Concat with a float result cannot be executed exactly yet")
    moves = [regridded(site, x, out) for x in site.inputs]
    axis, is_stack = int(site.operator.attributes["axis"]), bool(site.operator.attributes.get("stacked"))
    join: Any = torch.stack if is_stack else torch.cat
    return Lowered(
        lambda values: join([move(value) for move, value in zip(moves, values, strict=True)], axis),
    )


def regridded(site: Site, source: QParams, wanted: QParams) -> Callable[[Tensor], Tensor]:
    """Codes of one grid as codes of another, by the requantization of the operator that reads them."""
    if is_one_grid(source, wanted):
        return lambda codes: codes
    zero = source.zero_point
    rescale = rescaler(site, lambda kind: source.scale.to(kind) / wanted.scale.to(kind), int(wanted.zero_point))
    limits, kept = (wanted.quant_min, wanted.quant_max), carrier(wanted)
    return lambda codes: clamped(rescale(codes - zero.to(codes.dtype)), limits, kept)


def is_one_grid(a: QParams, b: QParams) -> bool:
    """Whether codes of one mean the same on the other."""
    return (float(a.scale), int(a.zero_point), a.quant_min, a.quant_max) == (
        float(b.scale), int(b.zero_point), b.quant_min, b.quant_max,
    )  # fmt: skip
