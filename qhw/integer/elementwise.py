# SPDX-License-Identifier: Apache-2.0
"""Sums and products of two activations, element by element."""

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from qhw.errors import IntegerError
from qhw.integer.arithmetic import clamped, code_bounds, fixed_point, rescaler, rounding_of
from qhw.integer.codes import carrier
from qhw.integer.pair_table import by_table
from qhw.integer.products import Fact, Lowered, Run
from qhw.integer.site import Site, unknown
from qhw.numerics import QParams, fma_float32, round_real

__all__ = ["lower_add", "lower_mul"]


def lower_add(site: Site) -> Lowered:
    """Add or Sub.

    float32, zero point before rounding (as onnxruntime on x86):
        round(fma(A, sa/sy, fma(B, sb/sy, zy - fma(sa/sy, za, sb/sy zb)))), B the operand that is broadcast
    float32, after:  round((A - za) sa/sy + (B - zb) sb/sy) + zy
    fixed point with a pre-shift of n bits (as LiteRT):  with t = 2 max(sa, sb),
        rescale(rescale((A - za) 2^n, sa/t) + rescale((B - zb) 2^n, sb/t), t / (2^n sy)) + zy

    Raises:
        IntegerError: the target leaves open what decides.
    """
    a, b, out = _operands(site)
    path, rule = site.requantize
    limits, kept = code_bounds(site), carrier(out)
    sign = -1 if site.operator.kind == "Sub" else 1
    if rule.kind == "float32":
        run, facts = _float32_add(site, a, b, out, sign)
        return Lowered(by_table(run, a, b), facts=facts)
    if rule.kind == "fixed_point":
        add, facts = _fixed_point_add(site, a, b, out, sign)
        return Lowered(by_table(lambda values: clamped(add(values), limits, kept), a, b), facts=facts)
    if rule.kind is None or rule.kind == "unknown":
        raise unknown(f"{path}.kind", rule.kind)
    raise IntegerError(f'{path}.kind = "{rule.kind}" cannot be executed for {site.operator.kind} yet')


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


def _fixed_point_add(site: Site, a: QParams, b: QParams, out: QParams, sign: int) -> tuple[Run, dict[str, Fact]]:
    if site.adds_zero_point_first:
        raise IntegerError(f'{site.path}.rounding_order = "zero_point_before" needs requantize kind float32')
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
    """Mul: the product of centred codes is the accumulator.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    a, b, out = _operands(site)
    zeros = a.zero_point, b.zero_point

    def accumulate(values: Sequence[Tensor]) -> Tensor:
        x, y = (v.long() - z for v, z in zip(values, zeros, strict=True))
        return x * y

    def ratio(product: torch.dtype, quotient: torch.dtype) -> Tensor:
        return (a.scale.to(product) * b.scale.to(product)).to(quotient) / out.scale.to(quotient)

    rescale = rescaler(site, ratio, int(out.zero_point))
    limits, kept = code_bounds(site), carrier(out)
    facts: dict[str, Fact] = {"rule": "product", "requantize": rescale, "clamp": limits}
    return Lowered(by_table(lambda values: rescale.codes(accumulate(values), limits, kept), a, b), accumulate, facts)


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


def _operands(site: Site) -> tuple[QParams, QParams, QParams]:
    if len(site.inputs) != 2 or site.weight is not None:
        raise IntegerError(f"{site.operator.kind} with a constant cannot be executed exactly yet")
    return site.inputs[0], site.inputs[1], site.result
