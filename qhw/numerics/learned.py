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
_MOST_CODES = 2**12
_SMALL = 2**12  # elements up to which plain tensors are as fast


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

    The forward value is bit for bit that of `fake_quantize`. Saves x and x_hat, which its neighbours save too, and no
    quotient. Not twice differentiable. Cost: four to six passes over x in cache in each direction.

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
        ctx.grid = (quant_min, quant_max, rounding)
        ctx.gradient_scale = gradient_scale
        ctx.is_in_pieces = _fits_pieces(x, scale, quant_min, quant_max)
        if ctx.is_in_pieces:
            result = _forward_in_pieces(x, scale, zero_point, quant_min, quant_max, rounding)
            # The layer behind saves its input, the ReLU before its output: neither is kept for this node alone.
            ctx.save_for_backward(x, scale, zero_point, result)
            return result
        ctx.save_for_backward(x, scale, zero_point)
        zero = _zero(zero_point, quant_min, quant_max)
        code = _rounded(x.float() / scale, rounding).to(zero.dtype).add_(zero).clamp_(quant_min, quant_max)
        return code.sub_(zero).float().mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_in_pieces:
            x, scale, zero_point, result = ctx.saved_tensors
            found = _backward_in_pieces(x, grads[0], scale, zero_point, result, *ctx.grid[:2])
        else:
            x, scale, zero_point = ctx.saved_tensors
            found = _backward(x, grads[0], scale, zero_point, *ctx.grid)
        by_x, by_scale, by_zero = found
        if ctx.gradient_scale != 1.0:
            by_scale, by_zero = by_scale * ctx.gradient_scale, by_zero * ctx.gradient_scale
        return by_x, by_scale, by_zero, None, None, None, None


def _zero(zero_point: Tensor, quant_min: int, quant_max: int) -> Tensor:
    """The zero point as a code, in a float dtype that is exact for codes."""
    return zero_point.round().clamp(quant_min, quant_max).to(zero_point_dtype(quant_min, quant_max))


def _rounded(quotient: Tensor, rounding: Rounding) -> Tensor:
    """A quotient rounded in place, or in a new tensor."""
    return quotient.round_() if rounding == "half_even" else round_real(quotient, rounding)


def _backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    quant_min: int,
    quant_max: int,
    rounding: Rounding,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to x, scale and zero point, as the equations stand."""
    zero = _zero(zero_point, quant_min, quant_max)
    quotient = x.float() / scale
    code = _rounded(quotient.clone(), rounding).to(zero.dtype).add_(zero)
    # One pass that keeps the gradient where low < code < high.
    inside = torch.ops.aten.hardtanh_backward(grad.to(code.dtype), code, quant_min - 0.5, quant_max + 0.5)
    clipped = grad.to(code.dtype) - inside
    error = code.clamp_(quant_min, quant_max).sub_(zero).sub_(quotient)
    by_scale = (grad * error).sum_to_size(scale.shape) + (clipped * quotient).sum_to_size(scale.shape)
    by_zero = clipped.sum_to_size(scale.shape) * -scale
    return inside.to(x.dtype), by_scale.float(), by_zero.float()


def _fits_pieces(x: Tensor, scale: Tensor, quant_min: int, quant_max: int) -> bool:
    """Whether x is large, has one scale, and lies densely in memory, so that plain numbers and pieces serve."""
    is_dense = x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))
    is_plain = x.dtype == torch.float32 and x.device.type == "cpu" and quant_max - quant_min < _MOST_CODES
    return is_dense and is_plain and not scale.dim() and x.numel() > _SMALL and not torch.compiler.is_compiling()


def _forward_in_pieces(
    x: Tensor, scale: Tensor, zero_point: Tensor, quant_min: int, quant_max: int, rounding: Rounding
) -> Tensor:
    zero = int(_zero(zero_point, quant_min, quant_max))
    result = torch.empty_like(x)
    for part, into in zip(_pieces(x), _pieces(result), strict=True):
        torch.div(part, scale, out=into)
        if rounding != "half_even":
            into.copy_(round_real(into, rounding))
        else:
            into.round_()
        # Bounds without the zero point stand for code and zero point: all are whole numbers below 2^24.
        into.clamp_(quant_min - zero, quant_max - zero).mul_(scale)
    return result


def _backward_in_pieces(
    x: Tensor, grad: Tensor, scale: Tensor, zero_point: Tensor, y: Tensor, quant_min: int, quant_max: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The same gradients from x and y = x_hat, no quotient formed:

        s d x_hat / ds = y - x inside, y outside;  summed up:  sum grad y - sum_inside grad x

    The difference of the sums costs few bits at 12 bits a code or less. What lies outside is told by x itself: one that
    is a float32 rounding away from the tie at the edge may count on either side.
    """
    zero = int(_zero(zero_point, quant_min, quant_max))
    step = float(scale)
    low, high = step * (quant_min - zero - 0.5), step * (quant_max - zero + 0.5)
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    by_x = torch.empty_like(x)
    by_scale, by_zero = 0.0, 0.0
    for part, value, given, into in zip(_pieces(x), _pieces(y), _pieces(grad), _pieces(by_x), strict=True):
        torch.ops.aten.hardtanh_backward.grad_input(given, part, low, high, grad_input=into)
        by_scale += float(torch.dot(given, value)) - float(torch.dot(into, part))
        by_zero += float(given.sum()) - float(into.sum())
    return by_x, torch.full_like(scale, by_scale / step), torch.full_like(scale, -step * by_zero)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """A dense tensor's elements in the order of its memory, in pieces that fit the cache."""
    pieces: tuple[Tensor, ...] = torch.split(x.as_strided((x.numel(),), (1,)), _PIECE)
    return pieces
