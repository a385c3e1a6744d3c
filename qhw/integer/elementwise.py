# SPDX-License-Identifier: Apache-2.0
"""Sums and products of two operands, element by element."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qhw.errors import IntegerError
from qhw.integer.arithmetic import clamped, code_bounds, fixed_point, rescaler, rounding_of
from qhw.integer.codes import carrier
from qhw.integer.operands import two_operands
from qhw.integer.pair_table import by_table
from qhw.integer.products import Fact, Lowered, Run
from qhw.integer.shift_sum import register_of, shift_add
from qhw.integer.site import Site, unknown
from qhw.numerics import QParams, fma_float32, round_real

__all__ = ["lower_add", "lower_mul"]

_SUMS = ("float32", "fixed_point", "shift")


def lower_add(site: Site) -> Lowered:
    """Add or Sub.

    float32, zero point before rounding (as onnxruntime on x86):
        round(fma(A, sa/sy, fma(B, sb/sy, zy - fma(sa/sy, za, sb/sy zb)))), B the operand that is broadcast
    float32, after:  round((A - za) sa/sy + (B - zb) sb/sy) + zy
    fixed point with a pre-shift of n bits (as LiteRT):  with t = 2 max(sa, sb),
        rescale(rescale((A - za) 2^n, sa/t) + rescale((B - zb) 2^n, sb/t), t / (2^n sy)) + zy
    fixed point on one scale that `same_scale` demands, no pre-shift stated:  rescale((A - za) + (B - zb), s/sy) + zy

    Raises:
        IntegerError: the target leaves open what decides.
    """
    operands, out = two_operands(site), site.result
    a, b = operands.a, operands.b
    path, rule = site.requantize
    limits, kept = code_bounds(site), carrier(out)
    sign = -1 if site.operator.kind == "Sub" else 1
    if rule.kind == "float32":
        run, facts = _float32_add(site, a, b, out, sign)
        return Lowered(operands.bound(by_table(run, a, b)), facts=facts)
    if rule.kind is None or rule.kind == "unknown":
        raise unknown(f"{path}.kind", rule.kind, _SUMS)
    if rule.kind not in _SUMS:
        raise IntegerError(
            f'{path}.kind = "{rule.kind}" cannot be executed for {site.operator.kind}; kinds that can: '
            f"{', '.join(_SUMS)}"
        )
    rescales_operands = rule.kind == "fixed_point" and not _is_on_one_scale(site, a, b)
    add, facts = (_fixed_point_add if rescales_operands else shift_add)(site, a, b, out, sign)
    return Lowered(operands.bound(by_table(lambda values: clamped(add(values), limits, kept), a, b)), facts=facts)


def _float32_add(site: Site, a: QParams, b: QParams, out: QParams, sign: int) -> tuple[Run, dict[str, Fact]]:
    first, second = a.scale / out.scale, sign * b.scale / out.scale
    za, zb, zy = (q.zero_point.float() for q in (a, b, out))
    rounding, limits, kept = rounding_of(site), code_bounds(site), carrier(out)
    facts: dict[str, Fact] = {"factor.0": first, "factor.1": second, "rounding": rounding, "clamp": limits}
    if site.adds_zero_point_first:
        factors, zeros = (first, second), (za, zb)
        last, inner = (1, 0) if _is_first_broadcast(site) else (0, 1)
        constant = zy - fma_float32(factors[last], zeros[last], factors[inner] * zeros[inner])

        def before(values: Sequence[Tensor]) -> Tensor:
            total = fma_float32(values[inner].float(), factors[inner], constant)
            total = fma_float32(values[last].float(), factors[last], total)
            return clamped(round_real(total, rounding), limits, kept)

        return before, {**facts, "rule": "add_fused_float32", "constant": constant, "order": (inner, last)}

    def after(values: Sequence[Tensor]) -> Tensor:
        total = (values[0].float() - za) * first + (values[1].float() - zb) * second
        return clamped(round_real(total, rounding) + zy, limits, kept)

    return after, {**facts, "rule": "add_float32", "zero_point": int(out.zero_point)}


def _is_on_one_scale(site: Site, a: QParams, b: QParams) -> bool:
    """Whether operands are added as they are, because the target demands one scale and states no pre-shift."""
    demanded = site.spec.same_scale in ("inputs", "all") and site.spec.preshift_bits is None
    return demanded and torch.equal(a.scale, b.scale)


def _fixed_point_add(site: Site, a: QParams, b: QParams, out: QParams, sign: int) -> tuple[Run, dict[str, Fact]]:
    table = site.spec.preshift_bits
    where = f"{site.path}.preshift_bits"
    if not isinstance(table, dict):
        raise unknown(where, table)
    formats = site.kernel.input if site.kernel is not None and isinstance(site.kernel.input, tuple) else ()
    bits = next((n for name, n in table.items() if name in formats), None)
    if not isinstance(bits, int):
        raise unknown(where, bits)
    twice = 2 * torch.maximum(a.scale, b.scale).double()
    first, second = (fixed_point(site, q.scale.double() / twice) for q in (a, b))
    last = fixed_point(site, twice / (2**bits * out.scale.double()), int(out.zero_point))
    za, zb = int(a.zero_point), int(b.zero_point)

    def add(values: Sequence[Tensor]) -> Tensor:
        left = first((values[0].long() - za) << bits)
        right = second((values[1].long() - zb) << bits)
        return last(left + sign * right)

    facts: dict[str, Fact] = {"rule": "add_fixed_point", "left_shift": bits, "sign": sign, "clamp": code_bounds(site)}
    return add, {**facts, "requantize.0": first, "requantize.1": second, "requantize": last}


def lower_mul(site: Site) -> Lowered:
    """Mul: the product of centred codes is the accumulator, of the width that the kernel names, if it names one.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    operands, out = two_operands(site), site.result
    a, b = operands.a, operands.b
    zeros = a.zero_point, b.zero_point
    named = site.kernel is not None and site.kernel.accumulator is not None
    register, width = register_of(site, *_product_ends(a, b)) if named else (None, {})

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        x, y = (v.long() - z for v, z in zip(values, zeros, strict=True))
        return x * y if register is None else register(x * y)

    def ratio(product: torch.dtype, quotient: torch.dtype) -> Tensor:
        return (a.scale.to(product) * b.scale.to(product)).to(quotient) / out.scale.to(quotient)

    rescale, limits, kept = rescaler(site, ratio, int(out.zero_point)), code_bounds(site), carrier(out)
    facts: dict[str, Fact] = {"rule": "product", "requantize": rescale, "clamp": limits, **width}

    def run(values: Sequence[Tensor]) -> Tensor:
        return rescale.codes(accumulate(values), limits, kept)

    return Lowered(operands.bound(by_table(run, a, b)), operands.bound(accumulate), facts)


def _product_ends(a: QParams, b: QParams) -> tuple[int, int]:
    """Lowest and highest product of centred codes."""
    ends = [(q.quant_min - int(q.zero_point), q.quant_max - int(q.zero_point)) for q in (a, b)]
    products = [x * y for x in ends[0] for y in ends[1]]
    return min(products), max(products)


def _is_first_broadcast(site: Site) -> bool:
    """Whether the first operand is repeated along the second.

    Raises:
        IntegerError: each is repeated along the other: then their order depends on the layout in memory.
    """
    shapes = [tuple(node.meta["shape"]) for node in site.node.args[:2] if isinstance(node, fx.Node)]
    rank = max(map(len, shapes))
    first, second = ((*[1] * (rank - len(shape)), *shape) for shape in shapes)
    if first == second or all(m >= n for m, n in zip(first, second, strict=True)):
        return False
    if any(m > n for m, n in zip(first, second, strict=True)):
        raise IntegerError(
            f"{site.operator.kind} of operands that are each broadcast along the other cannot be executed exactly: "
            "the order of its float32 sum is not known"
        )
    return True
