# SPDX-License-Identifier: Apache-2.0
"""Functions of one operand: clamps, lines, and tables with an entry for every code."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.approximation import approximation_of
from qhw.integer.arithmetic import Requantization, clamped, code_bounds, rescaler
from qhw.integer.codes import carrier, every_code
from qhw.integer.movement import regridded
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site, unknown
from qhw.numerics import ROUNDING_RULES, Rounding, round_real
from qhw.schema import Approximation

__all__ = ["LARGEST_TABLE", "lower_clip", "lower_slopes", "lower_table", "quotient_of", "rounding_of_codes", "table_of"]

LARGEST_TABLE = 2**16
_OF_THE_LIBRARY = ("Exp", "Log", "Sqrt", "Rsqrt", "Tanh", "Elu")


def lower_table(site: Site) -> Lowered:
    """A function evaluated once for every input code: dequantize, compute in float32, to codes of the result.

    Functions of the C library are correctly rounded, which torch's vectors are not. Entries are rounded as the operator
    says, else as the output's format does, else half to even.

    Raises:
        IntegerError: the target computes something else than a table, leaves open what decides, or the input has too
            many codes for one.
    """
    rule = approximation_of(site, "table")
    x, out = site.inputs[0], site.result
    size = x.quant_max - x.quant_min + 1
    entries = rule.entries if isinstance(rule.entries, int) else size
    if size > LARGEST_TABLE or isinstance(rule.sample_step, int) or entries < size:
        raise IntegerError(
            f"{site.path}: a table of {entries} entries for {size} codes or with interpolation cannot be executed yet"
        )
    reals = _function(site, rule)(every_code(x).reals())
    scaled = reals * (1 / out.scale) if quotient_of(site, rule) == "reciprocal" else reals / out.scale
    codes = round_real(scaled, rounding_of_codes(site)) + out.zero_point
    return table_of(site, codes, torch.isnan(reals) | ((site.operator.kind == "Log") & (every_code(x).centred() <= 0)))


def table_of(site: Site, codes: Tensor, is_outside: Tensor) -> Lowered:
    """A look-up of codes, those outside of the function's domain as the target says.

    Args:
        site: The operator.
        codes: Whole numbers [codes of the input], before the clamp.
        is_outside: bool, likewise: where the function has no value.

    Raises:
        IntegerError: the target does not say what stands there.
    """
    x, out, limits = site.inputs[0], site.result, code_bounds(site)
    is_refused = torch.zeros_like(is_outside)
    if bool(is_outside.any()):
        code = _outside(site)
        codes = codes.masked_fill(is_outside, out.quant_max if code == "highest" else out.quant_min)
        is_refused = is_outside & (code == "refuse")
    table = clamped(codes.double().clamp(out.quant_min, out.quant_max), limits, carrier(out))

    def run(operands: Sequence[Tensor]) -> Tensor:
        index = operands[0].long() - x.quant_min
        if refuses and bool(is_refused[index].any()):
            bad = int(operands[0][is_refused[index]].flatten()[0])
            raise IntegerError(
                f"{site.name}: {site.operator.kind} has no value at code {bad}, and {site.path}.approximation.outside "
                "refuses it. Give its operand a range that the function covers."
            )
        return table[index]

    refuses = bool(is_refused.any())
    return Lowered(run, facts={"rule": "table", "first": x.quant_min, "table": table})


def _outside(site: Site) -> str:
    rule = site.spec.approximation
    found = rule.outside if isinstance(rule, Approximation) else None
    if found is None or found == "unknown":
        raise unknown(f"{site.path}.approximation.outside", found)
    return found


def _function(site: Site, rule: Approximation) -> Callable[[Tensor], Tensor]:
    """What is evaluated.

    Raises:
        IntegerError: the target says that it is unknown, or names a form that the operator has not.
    """
    if rule.function is None:
        own = site.function()
        return (lambda x: own(x.double()).float()) if site.operator.kind in _OF_THE_LIBRARY else own
    where = f"{site.path}.approximation.function"
    if rule.function == "unknown":
        raise unknown(where, rule.function)
    if site.operator.kind != "Gelu":
        raise IntegerError(f'{where} = "{rule.function}" is no form of {site.operator.kind}')
    return site.function() if site.operator.attributes["approximate"] == "tanh" else _gelu_by_erfc


def _gelu_by_erfc(x: Tensor) -> Tensor:
    root = torch.tensor(-(0.5**0.5), dtype=torch.float32)
    return 0.5 * x * torch.erfc((x * root).double()).float()


def quotient_of(site: Site, rule: Approximation) -> str:
    """How a table's real becomes a code; a division where the target states nothing.

    Raises:
        IntegerError: the target says that it is unknown.
    """
    where = f"{site.path}.approximation.quotient"
    if rule.quotient == "unknown":
        raise unknown(where, rule.quotient)
    return rule.quotient or "division"


def rounding_of_codes(site: Site) -> Rounding:
    """How reals become codes of the result: as the operator says, else as its format does.

    Raises:
        IntegerError: the target names no single rounding.
    """
    own = site.spec.rounding
    if own is None:
        return site.code_rounding
    if own not in ROUNDING_RULES:
        raise IntegerError(f'{site.path}.rounding = "{own}" names no single rounding')
    return own  # type: ignore[return-value]


def lower_clip(site: Site) -> Lowered:
    """Relu or Clip on its own: a clamp of codes, behind a requantization where input and output are on two grids.

    Raises:
        IntegerError: the target leaves open how codes get to the other grid.
    """
    x, out = site.inputs[0], site.result
    move, limits, kept = regridded(site, x, out), code_bounds(site), carrier(out)
    facts: dict[str, Fact] = {"rule": "clamp", "clamp": limits}
    if move.table is not None:
        table = move.table.clamp(*limits)
        facts = {"rule": "table", "first": x.quant_min, "table": table}
        return Lowered(lambda values: table[values[0].long() - x.quant_min], facts=facts)
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
    rule = site.spec.approximation
    # A parameter on a grid is in the graph already; what is computed with it is the operator's own function.
    if rule is not None and not (isinstance(rule, Approximation) and rule.kind == "rounded_parameter"):
        return lower_table(site)
    x, out = site.inputs[0], site.output
    size = x.quant_max - x.quant_min + 1
    if out is None or size > LARGEST_TABLE:
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
    return table_of(site, values, torch.zeros(size, dtype=torch.bool))
