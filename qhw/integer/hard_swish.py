# SPDX-License-Identifier: Apache-2.0
"""HardSwish by a product of two narrow integers, and Rsqrt by a fixed-point inverse square root: code by code."""

from dataclasses import replace

import torch
from torch import Tensor

from qhw.errors import IntegerError, RangeError
from qhw.integer.approximation import approximation_of, stated_bits
from qhw.integer.arithmetic import fixed_point
from qhw.integer.codes import every_code
from qhw.integer.fixed_point import half_up, inverse_square_root, rounded_right
from qhw.integer.products import Lowered
from qhw.integer.site import Site
from qhw.integer.tables import lower_table, table_of
from qhw.numerics import fixed_point_multiplier

__all__ = ["lower_hard_swish", "lower_rsqrt"]

_FIRST_BITS = 31  # of multipliers, before they are rounded to their width
_INVERSE_BITS = 20  # that 1 / sqrt(code) is shifted left by


def lower_hard_swish(site: Site) -> Lowered:
    """HardSwish, x min(max(x + 3, 0), 6) / 6: by its table, or in fixed point with b = `multiplier_bits`.

        v = (q - zx) 2^(b - code bits),  s = sx / 2^(b - code bits)
        t = round(v multiplier(s / sy)),  r = (clamp(round(v multiplier(s 2^b / 3))) + 2^b) >> 1
        y = round((t r >> b, toward zero) / 2^shift) + zy

    Both products round half up, the last shift away from zero; ratios are float32, their multipliers rounded to 31 bits
    and then to b; r has its saturating left shift behind its product but for one bit, as TFLite.

    Raises:
        IntegerError: the target leaves open what decides, or the scales leave what the shifts can do.
    """
    rule = approximation_of(site, "fixed_point", "table")
    if rule.kind == "table":
        return lower_table(site)
    bits = stated_bits(site, rule, "multiplier_bits", _FIRST_BITS)
    x, out = site.inputs[0], site.result
    before = bits - (x.quant_max - x.quant_min).bit_length()
    if before < 0:
        raise IntegerError(f"{site.path}.approximation.multiplier_bits = {bits} is too narrow for the codes it reads")
    fine = x.scale / 2**before
    multiplier, shift = _multiplier(site, fine / out.scale, bits)
    if not 0 <= shift <= bits:
        raise IntegerError(
            f"{site.path} in fixed point needs an output scale of 1 to {2**bits} times its input scale / {2**before}; "
            f"got {float(out.scale):.6g} and {float(x.scale):.6g}. Change a scale"
        )
    gate, gate_shift = _multiplier(site, fine / torch.tensor(3 / 2**bits, dtype=torch.float32), bits)
    values = every_code(x).centred().long() << before
    scaled = half_up(values * multiplier, bits)
    relu = (_gated(values, gate, gate_shift, bits) + 2**bits) >> 1
    product = torch.div(relu * scaled, 2**bits, rounding_mode="trunc")
    return table_of(site, rounded_right(product, shift) + out.zero_point, torch.zeros(len(values), dtype=torch.bool))


def _multiplier(site: Site, ratio: Tensor, bits: int) -> tuple[int, int]:
    """Multiplier of `bits` bits and right shift next to a ratio, by way of 31 bits."""
    try:
        multiplier, shift = fixed_point_multiplier(ratio.double(), bits=_FIRST_BITS)
    except RangeError as error:
        raise IntegerError(f"{site.path} in fixed point: {error}") from error
    dropped = _FIRST_BITS - bits
    narrow = half_up(multiplier, dropped) if dropped else multiplier
    return min(int(narrow), 2**bits - 1), int(shift)


def _gated(values: Tensor, multiplier: int, right: int, bits: int) -> Tensor:
    """values * multiplier / 2^(bits + right), saturating at `bits` bits and a sign."""
    ends = -(2**bits), 2**bits - 1
    left = max(-right, 0)
    if left:
        values = (values << (left - 1)).clamp(*ends)
    product = half_up(values * multiplier, bits)
    return (product << 1).clamp(*ends) if left else rounded_right(product, right)


def lower_rsqrt(site: Site) -> Lowered:
    """Rsqrt: by its table, or round(m (1 / sqrt(q - zx))) + zy in fixed point, m next to 1 / (sqrt(sx) sy).

    The highest code where q = zx; below it the function has no value.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    if approximation_of(site, "fixed_point", "table").kind == "table":
        return lower_table(site)
    x, out = site.inputs[0], site.result
    values = every_code(x).centred().long()
    unit = fixed_point(site, 1 / (x.scale.sqrt() * out.scale).double())
    assert unit.shift is not None
    unit = replace(unit, shift=unit.shift + _INVERSE_BITS)
    multiplier, right = inverse_square_root(values.clamp(min=1))
    inverse = replace(unit, multiplier=multiplier, shift=right - _INVERSE_BITS)
    codes = (unit(inverse(torch.ones_like(values))) + out.zero_point).masked_fill(values == 0, out.quant_max)
    return table_of(site, codes, values < 0)
