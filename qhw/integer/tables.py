# SPDX-License-Identifier: Apache-2.0
"""Functions of one operand, by a table with an entry for every code."""

from typing import Any

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.arithmetic import clamped, code_bounds
from qhw.integer.codes import carrier
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site
from qhw.numerics import quantize

__all__ = ["lower_clip", "lower_table"]

_LARGEST = 2**16


def lower_table(site: Site) -> Lowered:
    """A function evaluated once for every input code: dequantize, compute in float32, quantize.

    Raises:
        IntegerError: the target computes something else than a table, or the input has too many codes for one.
    """
    rule = site.spec.approximation
    if rule is None or rule == "unknown" or rule.kind != "table":
        raise IntegerError(f"{site.path}.approximation must be a table to be executed exactly")
    x, out = site.inputs[0], site.output
    if out is None:
        raise IntegerError(f"{site.operator.kind} with a float result cannot be executed exactly yet")
    size = x.quant_max - x.quant_min + 1
    if size > _LARGEST or isinstance(rule.sample_step, int):
        raise IntegerError(f"{site.path}: a table of {size} codes or with interpolation cannot be executed yet")
    target: Any = site.node.target
    codes = torch.arange(x.quant_min, x.quant_max + 1)
    reals = (codes - x.zero_point).float() * x.scale
    values: Tensor = target(reals, *site.node.args[1:], **site.node.kwargs)
    table = clamped(quantize(values, out, name=site.name).long(), code_bounds(site), carrier(out))
    facts: dict[str, Fact] = {"rule": "table", "first": x.quant_min, "table": table}
    return Lowered(lambda operands: table[operands[0].long() - x.quant_min], facts=facts)


def lower_clip(site: Site) -> Lowered:
    """Relu or Clip on its own, input and output on one grid: a clamp of codes.

    Raises:
        IntegerError: the grids differ.
    """
    x, out = site.inputs[0], site.output
    if out is None or (float(x.scale), int(x.zero_point)) != (float(out.scale), int(out.zero_point)):
        raise IntegerError(f"{site.operator.kind} between two grids cannot be executed exactly yet")
    facts = site.operator.attributes
    bounds = [facts.get("minimum"), facts.get("maximum")]
    low, high = code_bounds(site)
    limits = [None if b is None else int((torch.tensor(b) / out.scale).round()) + int(out.zero_point) for b in bounds]
    low = low if limits[0] is None else min(max(low, limits[0]), high)
    high = high if limits[1] is None else max(min(high, limits[1]), low)
    return Lowered(lambda values: values[0].clamp(low, high), facts={"rule": "clamp", "clamp": (low, high)})
