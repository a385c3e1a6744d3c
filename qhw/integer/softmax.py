# SPDX-License-Identifier: Apache-2.0
"""Softmax and LogSoftmax: exponentials from a table of distances to the largest code, then sums along an axis."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.approximation import approximation_of, stated_bits
from qhw.integer.arithmetic import Requantization, clamped, code_bounds, fixed_point
from qhw.integer.codes import carrier
from qhw.integer.fixed_point import (
    HIGHEST,
    exp_of_negative,
    headroom,
    logarithm,
    multiply,
    reciprocal_of_one_plus,
    rounded_right,
)
from qhw.integer.float_softmax import lower_float_softmax
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site
from qhw.integer.tables import LARGEST_TABLE
from qhw.numerics import QParams

__all__ = ["lower_log_softmax", "lower_softmax"]

_MOST_INTEGER_BITS = 5  # gemmlowp's exponential has no more
_MOST_SUM_BITS = 20


def lower_softmax(site: Site) -> Lowered:
    """Softmax: in fixed point, or by a table of real exponentials.

    In fixed point, of n = 31 - `integer_bits` fractional bits, with D = 2^n sx as a multiplier:

        e = exp(round(d D)), d = code - largest code, 0 where d lies below -floor((2^integer_bits - 1) 2^n / 2^shift(D))
        y = round(e (1 / sum(round(e / 2^sum_integer_bits)))) + lowest code

    The result's grid is 2^-bits from the lowest code on.

    Raises:
        IntegerError: the target leaves open what decides, or the result is on another grid.
    """
    if approximation_of(site, "fixed_point", "table").kind == "table":
        return lower_float_softmax(site)
    shared, out = _FixedPoint.of(site), site.result
    bits = _bits(out)
    if float(out.scale) != 2.0**-bits or int(out.zero_point) != out.quant_min:
        raise IntegerError(f"{site.path} in fixed point needs a result of scale 2^-{bits} from its lowest code on")
    limits, kept = code_bounds(site), carrier(out)

    def run(values: Sequence[Tensor]) -> Tensor:
        distance = shared.distance(values[0])
        total, e = shared.total(distance), shared.exponentials[distance]
        zeros = headroom(total)
        scale = reciprocal_of_one_plus((total << zeros) - HIGHEST - 1)
        shift = shared.sum_bits - zeros + 31 - bits
        if bool((shift > 31).any()):
            raise IntegerError(
                f"{site.name}: a sum of exponentials reaches {2 ** (bits + 1)}, and there {site.path} in fixed point "
                "ends. Shorten the axis, or keep the operator in float."
            )
        return clamped(rounded_right(multiply(e, scale), shift) + out.quant_min, limits, kept)

    facts: dict[str, Fact] = {
        "rule": "softmax_fixed_point", "axis": shared.axis, "sum_integer_bits": shared.sum_bits, "bits": bits,
        "exponentials": shared.exponentials, "clamp": limits,
    }  # fmt: skip
    return Lowered(run, facts=facts)


def lower_log_softmax(site: Site) -> Lowered:
    """LogSoftmax in fixed point: round(d D) as for Softmax, minus ln(sum(e)), rounded to the result's scale.

    The result's grid is a power of two whose zero point is its highest code. A distance where the difference could
    leave 32 bits has the lowest code.

    Raises:
        IntegerError: the target leaves open what decides, or the result is on another grid.
    """
    approximation_of(site, "fixed_point")
    shared, out = _FixedPoint.of(site), site.result
    mantissa, exponent = math.frexp(float(out.scale))
    right = 30 - shared.integer_bits + exponent  # from 31 - integer_bits fractional bits to 1 / scale
    if mantissa != 0.5 or int(out.zero_point) != out.quant_max or right < 0:
        raise IntegerError(
            f"{site.path} in fixed point needs a result of scale 2^-k whose zero point is its highest code"
        )
    limits, kept = code_bounds(site), carrier(out)
    back, scaled = shared.back, shared.scaled

    def run(values: Sequence[Tensor]) -> Tensor:
        distance = shared.distance(values[0])
        log = logarithm(shared.total(distance), shared.sum_bits, shared.integer_bits)
        least = torch.maximum(torch.tensor(shared.least - 1), back(log - HIGHEST - 1))
        codes = rounded_right(scaled[distance] - log, right) + out.quant_max
        return clamped(torch.where(-distance > least, codes, out.quant_min), limits, kept)

    facts: dict[str, Fact] = {
        "rule": "log_softmax_fixed_point", "axis": shared.axis, "sum_integer_bits": shared.sum_bits,
        "integer_bits": shared.integer_bits, "shift": right, "least": shared.least, "zero_point": out.quant_max,
        "exponentials": shared.exponentials, "scaled": scaled, "requantize": back, "clamp": limits,
    }  # fmt: skip
    return Lowered(run, facts=facts)


class _FixedPoint:
    """What both have in common.

    Attributes:
        axis: Along which values are summed.
        integer_bits: Of scaled distances.
        sum_bits: Integer bits of the sum of exponentials.
        least: Lowest distance, 0 or less, that is not skipped.
        scaled: int64 [codes], distance 0 first: distances with `integer_bits` integer bits.
        exponentials: int64 [codes], without integer bits; 0 where they are skipped.
        back: From scaled distances to codes.
    """

    def __init__(self, site: Site, integer_bits: int, sum_bits: int) -> None:
        x = site.inputs[0]
        self.axis = int(site.operator.attributes["axis"])
        self.integer_bits, self.sum_bits = integer_bits, sum_bits
        codes = torch.arange(x.quant_max - x.quant_min + 1)
        forth = fixed_point(site, (x.scale.double() * 2.0 ** (31 - integer_bits)).clamp(max=float(HIGHEST)))
        assert forth.shift is not None and forth.multiplier is not None
        left = -int(forth.shift)
        if left < 0:
            raise IntegerError(f"{site.path} in fixed point needs an input scale of 2^-{31 - integer_bits} or more")
        self.least = -math.floor(math.ldexp((1 << integer_bits) - 1, 31 - integer_bits - left))
        legal = codes <= -self.least
        self.scaled = forth(-codes.masked_fill(~legal, 0))
        self.exponentials = exp_of_negative(self.scaled, integer_bits).masked_fill(~legal, 0)
        self._summands = rounded_right(self.exponentials, sum_bits)
        self.back: Requantization = fixed_point(
            site, torch.tensor(math.ldexp(1.0, 31 - left), dtype=torch.float64) / forth.multiplier.double()
        )

    @classmethod
    def of(cls, site: Site) -> "_FixedPoint":
        """As the target says.

        Raises:
            IntegerError: it leaves open what decides, or sums may overflow.
        """
        rule = approximation_of(site, "fixed_point")
        x = site.inputs[0]
        size = x.quant_max - x.quant_min + 1
        if size > LARGEST_TABLE:
            raise IntegerError(f"{site.path}: a table for {size} codes cannot be executed yet")
        integer_bits = stated_bits(site, rule, "integer_bits", _MOST_INTEGER_BITS)
        sum_bits = stated_bits(site, rule, "sum_integer_bits", _MOST_SUM_BITS)
        elements = site.input_shape[int(site.operator.attributes["axis"])]
        if elements >= 2**sum_bits:
            raise IntegerError(f"{site.path}: a sum of {elements} exponentials leaves {sum_bits} integer bits")
        return cls(site, integer_bits, sum_bits)

    def distance(self, codes: Tensor) -> Tensor:
        """int64: how far below the largest code along the axis."""
        whole = codes.long()
        return whole.amax(self.axis, keepdim=True) - whole

    def total(self, distance: Tensor) -> Tensor:
        """Sums of exponentials along the axis, with `sum_bits` integer bits."""
        return self._summands[distance].sum(self.axis, keepdim=True)


def _bits(grid: QParams) -> int:
    return (grid.quant_max - grid.quant_min).bit_length()
