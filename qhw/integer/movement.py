# SPDX-License-Identifier: Apache-2.0
"""Operators that move codes, and those that put several tensors on one grid."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.arithmetic import Requantization, code_bounds, rescaler
from qhw.integer.codes import carrier, every_code, is_one_grid
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site, unknown
from qhw.numerics import QParams, quantize
from qhw.schema import Approximation

__all__ = ["Regridding", "lower_concat", "lower_movement", "onto_result", "regridded"]


def onto_result(site: Site) -> Site:
    """An operator that only moves or compares codes, its operands on the grid of its result.

    They get there before it runs, by the requantization of its kernel. A move or a maximum of codes commutes with that,
    since it keeps the order of codes.

    Raises:
        IntegerError: an operand has a format of its own, and the result another one.
    """
    out = site.output
    if out is None or all(is_one_grid(q, out) for q in site.inputs):
        return site
    if any(not is_one_grid(*grids) for grids in zip(site.sources, site.inputs, strict=True)):
        raise IntegerError(f"{site.operator.kind} of an operand in a format of its own needs its result in that format")
    return replace(site, inputs=(out,) * len(site.inputs))


def lower_movement(site: Site) -> Lowered:
    """Transpose, Slice, Pad and the like: the same codes elsewhere; padding is the code of its value.

    Raises:
        IntegerError: arguments are computed, or the value that is padded with depends on the grid that is padded.
    """
    x = site.inputs[0]
    if site.operator.kind == "Expand" and (sizes := _spread_to(site)) is not None:
        return Lowered(lambda values: values[0].expand(sizes), facts={"rule": "move"})
    function = site.function()
    if len(site.node.all_input_nodes) > 1:
        raise IntegerError(f"{site.operator.kind} with computed arguments cannot be executed exactly yet")
    if site.operator.kind == "Pad" and site.operator.attributes["mode"] == "constant":
        code, pads = _padding_code(site, x), list(site.operator.attributes["padding"])
        return Lowered(lambda values: torch.nn.functional.pad(values[0], pads, value=code), facts={"rule": "move"})
    return Lowered(lambda values: function(values[0]), facts={"rule": "move"})


def _spread_to(site: Site) -> list[int] | None:
    """Sizes to spread to, -1 for an axis that keeps its size, as that of the batch; None where another is computed."""
    source, result, given = site.input_shape, tuple(site.node.meta["shape"]), site.node.args[1]
    if not isinstance(given, list | tuple):  # as another tensor
        return None
    kept = (None,) * (len(result) - len(source)) + source
    sizes = [-1 if size == was else wanted for size, was, wanted in zip(result, kept, given, strict=True)]
    return sizes if all(isinstance(size, int) for size in sizes) else None


def _padding_code(site: Site, x: QParams) -> int:
    """Code of the value that is padded with, on the grid of the result."""
    value, source = float(site.operator.attributes["value"]), site.sources[0]
    found = _code(value, x)
    if int(regridded(site, source, x)(torch.tensor([_code(value, source)]).to(carrier(source)))) != found:
        raise IntegerError(
            f"Pad with {value:g} between two grids: its code is {found} or another, by the grid that is padded, which "
            "no target states"
        )
    return found


def _code(value: float, q: QParams) -> int:
    return int(((torch.tensor(value) / q.scale).round() + q.zero_point).clamp(q.quant_min, q.quant_max))


def lower_concat(site: Site) -> Lowered:
    """Concat: each operand on the output's grid, then side by side.

    Raises:
        IntegerError: the target leaves open how operands get there.
    """
    moves = [regridded(site, x, site.result) for x in site.inputs]
    axis, is_stack = int(site.operator.attributes["axis"]), bool(site.operator.attributes.get("stacked"))
    join: Any = torch.stack if is_stack else torch.cat
    limits = code_bounds(site)
    facts: dict[str, Fact] = {"rule": "join", "axis": axis, "stacked": is_stack, "clamp": limits}
    return Lowered(
        lambda values: join([move(value).clamp(*limits) for move, value in zip(moves, values, strict=True)], axis),
        facts=facts,
    )


@dataclass(frozen=True)
class Regridding:
    """Codes of one grid as codes of another.

    Attributes:
        source: The grid that codes come from.
        wanted: The grid that they get.
        requantize: Of centred codes; None where both grids are one, and where a table says it.
        table: Code of every code, from the lowest on; None where it is not the target's way.
    """

    source: QParams
    wanted: QParams
    requantize: Requantization | None
    table: Tensor | None = None

    def __call__(self, codes: Tensor) -> Tensor:
        """Codes on the wanted grid, as carried."""
        if self.table is not None:
            return self.table[codes.long() - self.source.quant_min]
        if self.requantize is None:
            return codes
        centred = codes - self.source.zero_point.to(codes.dtype)
        limits = self.wanted.quant_min, self.wanted.quant_max
        return self.requantize.codes(centred, limits, carrier(self.wanted))


def regridded(site: Site, source: QParams, wanted: QParams) -> Regridding:
    """From one grid to another by the requantization of the operator that reads the codes.

    Where the target computes that operator by tables, or says so: dequantize every code, and quantize it on the other
    grid.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    if is_one_grid(source, wanted):
        return Regridding(source, wanted, None)
    rule = site.spec.approximation
    is_table = isinstance(rule, Approximation) and rule.kind == "table"
    if not is_table and site.requantize[1].regrid == "unknown":
        raise unknown(f"{site.requantize[0]}.regrid", "unknown")
    if is_table or site.requantize[1].regrid == "dequantize":
        entries = quantize(every_code(source).reals(), wanted, name=site.name)
        return Regridding(source, wanted, None, entries.to(carrier(wanted)))
    rescale = rescaler(site, lambda _, kind: source.scale.to(kind) / wanted.scale.to(kind), int(wanted.zero_point))
    return Regridding(source, wanted, rescale)
