# SPDX-License-Identifier: Apache-2.0
"""Functions of one operand: clamps, lines, and tables with an entry for every code."""

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.arithmetic import Requantization, clamped, code_bounds, rescaler
from qhw.integer.codes import carrier, every_code
from qhw.integer.movement import regridded
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site
from qhw.numerics import quantize

__all__ = ["lower_clip", "lower_slopes", "lower_table"]

_LARGEST = 2**16


def lower_table(site: Site) -> Lowered:
    """A function evaluated once for every input code: dequantize, compute in float32, quantize.

    Entries are rounded as the output's format says, half to even where it says nothing.

    Raises:
        IntegerError: the target computes something else than a table, or the input has too many codes for one.
    """
    rule = site.spec.approximation
    if rule is None or rule == "unknown" or rule.kind != "table":
        raise IntegerError(f"{site.path}.approximation must be a table to be executed exactly")
    x, out = site.inputs[0], site.result
    size = x.quant_max - x.quant_min + 1
    entries = rule.entries if isinstance(rule.entries, int) else size
    if size > _LARGEST or isinstance(rule.sample_step, int) or entries < size:
        raise IntegerError(
            f"{site.path}: a table of {entries} entries for {size} codes or with interpolation cannot be executed yet"
        )
    values = site.function()(every_code(x).reals())
    table = clamped(quantize(values, out, site.code_rounding, site.name).long(), code_bounds(site), carrier(out))
    facts: dict[str, Fact] = {"rule": "table", "first": x.quant_min, "table": table}
    return Lowered(lambda operands: table[operands[0].long() - x.quant_min], facts=facts)


def lower_clip(site: Site) -> Lowered:
    """Relu or Clip on its own: a clamp of codes, behind a requantization where input and output are on two grids.

    Raises:
        IntegerError: the target leaves open how codes get to the other grid.
    """
    x, out = site.inputs[0], site.result
    move, limits, kept = regridded(site, x, out), code_bounds(site), carrier(out)
    facts: dict[str, Fact] = {"rule": "clamp", "clamp": limits}
    if move.requantize is None:
        return Lowered(lambda values: values[0].clamp(*limits), facts=facts)
    scaled, zero_point = move.requantize, x.zero_point
    return Lowered(
        lambda values: scaled.codes(values[0] - zero_point.to(values[0].dtype), limits, kept),
        facts={**facts, "requantize": scaled},
    )


def lower_slopes(site: Site) -> Lowered:
    """LeakyRelu or Abs: as its table where the target has one, else each side of 0 by a requantization of its own.

        round((q - zx) sx/sy) + zy where q >= zx, else round((q - zx) sx slope/sy) + zy

    Abs rescales -(q - zx) there. Evaluated once for every code.

    Raises:
        IntegerError: the target leaves open what decides, or the slope is negative.
    """
    if site.spec.approximation is not None:
        return lower_table(site)
    x, out = site.inputs[0], site.output
    size = x.quant_max - x.quant_min + 1
    if out is None or size > _LARGEST:
        raise IntegerError(f"{site.operator.kind} with a float result or of {size} codes cannot be executed yet")
    slope = 1.0 if site.operator.kind == "Abs" else float(site.operator.attributes["slope"])
    if slope <= 0:
        raise IntegerError(f"{site.operator.kind} with slope {slope:g} cannot be executed exactly yet")

    def side(factor: float) -> Requantization:
        def ratio(product: torch.dtype, quotient: torch.dtype) -> Tensor:
            scaled = x.scale.to(product) * torch.tensor(factor, dtype=torch.float32).to(product)
            return scaled.to(quotient) / out.scale.to(quotient)

        return rescaler(site, ratio, int(out.zero_point))

    above, below = side(1.0), side(slope)
    codes = every_code(x).centred().long()
    negative = -codes if site.operator.kind == "Abs" else codes
    values = torch.where(codes >= 0, above(codes), below(negative))
    table = clamped(values, code_bounds(site), carrier(out))
    facts: dict[str, Fact] = {"rule": "table", "first": x.quant_min, "table": table}
    return Lowered(lambda operands: table[operands[0].long() - x.quant_min], facts=facts)
