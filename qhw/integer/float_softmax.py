# SPDX-License-Identifier: Apache-2.0
"""Softmax by a table of real exponentials, one per distance from the largest code, summed in float32."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.approximation import approximation_of
from qhw.integer.arithmetic import clamped, code_bounds
from qhw.integer.codes import carrier
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site
from qhw.integer.tables import LARGEST_TABLE, quotient_of, rounding_of_codes
from qhw.numerics import round_real

__all__ = ["lower_float_softmax"]


def lower_float_softmax(site: Site) -> Lowered:
    """Softmax: e = exp(-d sx), d from the largest code, summed in the order of the axis.

        division     round(e / sum / sy) + zy
        reciprocal   round(e (1 / (sum sy))) + zy

    Every operation is rounded to float32.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    rule = approximation_of(site, "table")
    x, out, axis = site.inputs[0], site.result, int(site.operator.attributes["axis"])
    size = x.quant_max - x.quant_min + 1
    if size > LARGEST_TABLE:
        raise IntegerError(f"{site.path}: a table for {size} codes cannot be executed yet")
    quotient, rounding = quotient_of(site, rule), rounding_of_codes(site)
    # Through float64: correctly rounded, which torch's vectors in float32 are not.
    exponentials = torch.exp((torch.arange(size).float() * -x.scale).double()).float()
    limits, kept = code_bounds(site), carrier(out)

    def run(values: Sequence[Tensor]) -> Tensor:
        codes = values[0].long()
        e = exponentials[codes.amax(axis, keepdim=True) - codes]
        total = torch.zeros_like(e.select(axis, 0))
        for part in e.unbind(axis):
            total = total + part
        total = total.unsqueeze(axis)
        real = e * (1 / (total * out.scale)) if quotient == "reciprocal" else e / total / out.scale
        return clamped(round_real(real, rounding) + out.zero_point.float(), limits, kept)

    facts: dict[str, Fact] = {
        "rule": "softmax_float32", "axis": axis, "exponentials": exponentials, "quotient": quotient,
        "rounding": rounding, "clamp": limits,
    }  # fmt: skip
    return Lowered(run, facts=facts)
