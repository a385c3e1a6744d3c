# SPDX-License-Identifier: Apache-2.0
"""Fake-quantize whose scale and zero point learn: one autograd node with the gradients of all three."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qhw.numerics.quantize import zero_point_dtype
from qhw.numerics.rounding import Rounding, round_real

__all__ = ["learned_fake_quantize"]

# Elements worked on at a time, so that what is made on the way stays in the cache: 512 KiB in float32. 5.3 ms for
# 2^21 elements forward and backward, against 13.5 in one piece.
_PIECE = 2**17


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    rounding: Rounding = "half_even",
    gradient_scale: float = 1.0,
) -> Tensor:
    """Real numbers moved onto the grid, with gradients for x, the scale and the zero point.

        x_hat = s (c - z),  c = clamp(u, quant_min, quant_max),  u = round(x / s) + z,  z = round(zero_point)

    The gradients are those of this function with d round(y) / dy = 1 (eq. 36). With quant_min <= u <= quant_max
    called inside:

        d x_hat / dx = 1 inside, 0 outside                                          (37)
        d x_hat / ds = round(x / s) - x / s inside, c - z outside                   (38)
        d x_hat / dz = 0 inside, -s outside                                         (40)

    The forward value is bit for bit that of `fake_quantize`. Saves x and no quotient for backward. Not twice
    differentiable. Cost: some six passes over x in cache in each direction; peak memory one tensor like x.

    Args:
        x: float [*shape]; computed in float32, returned in its own dtype.
        scale: float32 > 0, [] or a shape that broadcasts against x.
        zero_point: float32, the shape of scale; rounded here to the nearest code.
        quant_min: Lowest code.
        quant_max: Highest code.
        rounding: Named rule for the quotient.
        gradient_scale: What the gradients of scale and zero point are multiplied by.

    Returns:
        Tensor: x's dtype [*shape].

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eqs. 36 to 40. Differs: inside and outside are told apart by the rounded
        code, as the derivative of the function above has it, so the end codes take the half step beyond them.
    """
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, quant_min, quant_max, rounding, gradient_scale
    )
    return result


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        quant_min: int,
        quant_max: int,
        rounding: Rounding,
        gradient_scale: float,
    ) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid = (quant_min, quant_max, rounding)
        ctx.gradient_scale = gradient_scale
        zero = _zero(zero_point, quant_min, quant_max)
        pieces = _pieces(x, scale, zero)
        if pieces is None:
            return _quantized(x.float(), scale, zero, quant_min, quant_max, rounding).to(x.dtype)
        result = torch.empty_like(x)
        for part, into in zip(pieces, torch.split(_flat(result), _PIECE), strict=True):
            _quantized(part, scale, zero, quant_min, quant_max, rounding, out=into)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        quant_min, quant_max, rounding = ctx.grid
        grad = grads[0]
        zero = _zero(zero_point, quant_min, quant_max)
        pieces = _pieces(x, scale, zero) if grad.dtype == x.dtype else None
        if pieces is None:
            result, ds, dz = _gradients(x.float(), grad.float(), scale, zero, quant_min, quant_max, rounding)
            return _scaled(result.to(x.dtype), ds, dz, ctx.gradient_scale)
        if grad.stride() != x.stride():
            grad = torch.empty_like(x).copy_(grad)
        result = torch.empty_like(x)
        by_scale, by_zero = torch.zeros_like(scale), torch.zeros_like(scale)
        others = torch.split(_flat(grad), _PIECE), torch.split(_flat(result), _PIECE)
        for part, given, into in zip(pieces, *others, strict=True):
            _, ds, dz = _gradients(part, given, scale, zero, quant_min, quant_max, rounding, out=into)
            by_scale += ds
            by_zero += dz
        return _scaled(result, by_scale, by_zero, ctx.gradient_scale)


def _scaled(by_x: Tensor, by_scale: Tensor, by_zero: Tensor, factor: float) -> tuple[Tensor | None, ...]:
    """All seven gradients."""
    if factor != 1.0:
        by_scale, by_zero = by_scale * factor, by_zero * factor
    return by_x, by_scale, by_zero, None, None, None, None


def _zero(zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The zero point as a code, in a float dtype that is exact for codes."""
    return zero_point.round().clamp(quant_min, quant_max).to(zero_point_dtype(quant_min, quant_max))


def _quantized(
    x: Tensor,
    scale: Tensor,
    zero: Tensor,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
    out: Tensor | None = None,
) -> Tensor:
    code = torch.div(x, scale, out=out)
    code = code.round_() if rounding == "half_even" else code.copy_(round_real(code, rounding))
    if zero.dtype != code.dtype:  # codes that need float64
        wide = code.to(zero.dtype).add_(zero).clamp_(quant_min, quant_max).sub_(zero)
        return code.copy_(wide).mul_(scale)
    return code.add_(zero).clamp_(quant_min, quant_max).sub_(zero).mul_(scale)


def _gradients(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    zero: Tensor,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x (into `out`), scale and zero point."""
    quotient = x / scale
    rounded = torch.round(quotient) if rounding == "half_even" else round_real(quotient, rounding).to(x.dtype)
    code = rounded.to(zero.dtype).add_(zero)
    # One pass that keeps the gradient where low < code < high.
    bounds = quant_min - 0.5, quant_max + 0.5
    if out is None or zero.dtype != x.dtype:
        inside = torch.ops.aten.hardtanh_backward(grad.to(code.dtype), code, *bounds).to(grad.dtype)
        out = inside if out is None else out.copy_(inside)
    else:
        torch.ops.aten.hardtanh_backward.grad_input(grad, code, *bounds, grad_input=out)
    error = code.clamp_(quant_min, quant_max).sub_(zero).to(x.dtype).sub_(quotient)
    clipped = grad - out
    # Inside: code - z - x / s. Outside x / s is added back. The sums are kept apart, for both are small.
    by_scale = _dot(grad, error, scale) + _dot(clipped, quotient, scale)
    by_zero = _total(clipped, scale).mul_(scale).neg_()
    return out, by_scale, by_zero


def _dot(a: Tensor, b: Tensor, scale: Tensor) -> Tensor:
    if not scale.dim():
        return torch.dot(a.reshape(-1), b.reshape(-1)) if a.is_contiguous() else (a * b).sum()
    return (a * b).sum_to_size(scale.shape)


def _total(a: Tensor, scale: Tensor) -> Tensor:
    return a.sum() if not scale.dim() else a.sum_to_size(scale.shape)


def _flat(x: Tensor) -> Tensor:
    """A dense tensor's elements in the order of its memory: a view [elements]."""
    return x.as_strided((x.numel(),), (1,))


def _pieces(x: Tensor, scale: Tensor, zero: Tensor) -> tuple[Tensor, ...] | None:
    """x in pieces that fit the cache; None where it is small, has several scales, or is not dense float32."""
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    fits = x.dtype == zero.dtype == torch.float32 and x.device.type == "cpu" and not scale.dim() and is_dense
    if torch.compiler.is_compiling() or not fits or x.numel() <= _PIECE:
        return None
    return torch.split(_flat(x), _PIECE)
