# SPDX-License-Identifier: Apache-2.0
"""Fake-quantize whose scale and zero point learn: one autograd node with the gradients of all three."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qhw.numerics.elements import ElementSet
from qhw.numerics.learned_pieces import backward_in_pieces, fits_pieces, forward_in_pieces
from qhw.numerics.quantize import zero_point_dtype
from qhw.numerics.rounding import Rounding, round_real

__all__ = ["NO_CLIP", "Clip", "clipped", "learned_fake_quantize"]

Clip = tuple[float, float]
"""Real bounds that a tensor is limited to before it is quantized, as by ReLU (0, inf) or ReLU6 (0, 6)."""

NO_CLIP: Clip = (-math.inf, math.inf)


def clipped(x: Tensor, clip: Clip) -> Tensor:
    """x limited to bounds, with no gradient at them or beyond, as ReLU and hard tanh have it."""
    if clip == NO_CLIP:
        return x
    return torch.relu(x) if clip == (0.0, math.inf) else torch.nn.functional.hardtanh(x, *clip)


def learned_fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    quant_min: int,
    quant_max: int,
    rounding: Rounding = "half_even",
    gradient_scale: float = 1.0,
    *,
    clip: Clip = NO_CLIP,
    elements: ElementSet | None = None,
    made_of: tuple[Tensor, Tensor, Tensor] | None = None,
    keeps_result: bool = True,
) -> Tensor:
    """Real numbers moved onto the grid, with gradients for x, the scale and the zero point.

        x_hat = s (c - z),  c = clamp(u, quant_min, quant_max),  u = round(x / s) + z,  z = round(zero_point)

    The gradients are those of this function with d round(y) / dy = 1 (eq. 36). With quant_min <= u <= quant_max
    called inside:

        d x_hat / dx = 1 inside, 0 outside                                          (37)
        d x_hat / ds = round(x / s) - x / s inside, c - z outside                   (38)
        d x_hat / dz = 0 inside, -s outside                                         (40)

    The forward value is bit for bit that of `fake_quantize`. Saves x and x_hat, where its neighbours save them too, and
    no quotient. Not twice differentiable. Cost: four to six passes over x in cache in each direction; a clip adds one
    backwards, where it would take three passes over memory on its own.

    Args:
        x: float [*shape]; computed in float32, returned in its own dtype.
        scale: float32 > 0, [] or a shape that broadcasts against x.
        zero_point: float32, the shape of scale; rounded here to the nearest code. None: 0.
        quant_min: Lowest code.
        quant_max: Highest code.
        rounding: Named rule for the quotient.
        gradient_scale: What the gradients of scale and zero point are multiplied by.
        clip: Bounds that x is limited to first; the values and gradients are those of `clipped` in front.
        elements: What codes stand for, where they are not evenly spaced: c - z is the element nearest to x / s, and
            inside is what lies no more than half a step beyond the ends. The zero point is None then.
        made_of: u, factor and offset, float32 with the axis of channels second, where x = factor u + offset and u is
            kept for gradients by who made x: then x is not kept, but made again, where both lie alike in memory. A
            rounding of x may change which side of the grid's edge it counts on.
        keeps_result: Whether x_hat is kept for the gradient, which costs nothing where its reader keeps it; else it is
            computed again.

    Returns:
        Tensor: x's dtype [*shape].

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eqs. 36 to 40. Differs: inside and outside are told apart by the rounded
        code, as the derivative of the function above has it, so the end codes take the half step beyond them.
    """
    if elements is not None:
        of_elements: Tensor = _LearnedElements.apply(  # type: ignore[no-untyped-call]
            clipped(x, clip), scale, elements, gradient_scale
        )
        return of_elements
    if clip != NO_CLIP and not (clip[0] <= 0.0 <= clip[1] and fits_pieces(x, scale, quant_min, quant_max)):
        x, clip, made_of = clipped(x, clip), NO_CLIP, None
    if made_of is not None and made_of[0].stride() != x.stride():
        made_of = None  # pieces go by the order in memory
    source = made_of or (None, None, None)
    result: Tensor = _LearnedFakeQuantize.apply(  # type: ignore[no-untyped-call]
        x, scale, zero_point, quant_min, quant_max, rounding, gradient_scale, clip, keeps_result, *source
    )
    return result


class _LearnedFakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        quant_min: int,
        quant_max: int,
        rounding: Rounding,
        gradient_scale: float,
        clip: Clip,
        keeps_result: bool,
        *made_of: Tensor | None,
    ) -> Tensor:
        ctx.grid = (quant_min, quant_max, rounding)
        ctx.gradient_scale = gradient_scale
        ctx.clip = clip
        zero = _zero(zero_point, quant_min, quant_max)
        ctx.codes = (
            _codes_less_zero(zero, quant_min, quant_max) if fits_pieces(x, scale, quant_min, quant_max) else None
        )
        if ctx.codes is not None:
            result = forward_in_pieces(x, scale, ctx.codes, rounding, clip)
            # The layer behind saves its input, the operator before its output: neither is kept for this node alone.
            kept = result if keeps_result else None
            ctx.save_for_backward(scale, kept, *((x,) if made_of[0] is None else made_of))
            return result
        ctx.save_for_backward(x, scale, zero_point)
        code = _rounded(x.float() / scale, rounding).to(zero_point_dtype(quant_min, quant_max))
        if zero is None:
            return code.clamp_(quant_min, quant_max).float().mul_(scale).to(x.dtype)
        code.add_(zero).clamp_(quant_min, quant_max)
        return code.sub_(zero).float().mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        is_zero_wanted = ctx.needs_input_grad[2]
        if ctx.codes is not None:
            scale, result, *kept = ctx.saved_tensors
            x = kept[0] if len(kept) == 1 else _made_again(*kept)
            if result is None:
                result = forward_in_pieces(x, scale, ctx.codes, ctx.grid[2], ctx.clip)
            found = backward_in_pieces(x, grads[0], scale, result, ctx.codes, ctx.clip, is_zero_wanted)
        else:
            x, scale, zero_point = ctx.saved_tensors
            found = _backward(x, grads[0], scale, zero_point, ctx.grid, is_zero_wanted)
        by_x, by_scale, by_zero = found
        if ctx.gradient_scale != 1.0:
            by_scale = by_scale * ctx.gradient_scale
            by_zero = None if by_zero is None else by_zero * ctx.gradient_scale
        return by_x, by_scale, by_zero, *(None,) * 9


class _LearnedElements(torch.autograd.Function):
    """As `_LearnedFakeQuantize`, onto a set of elements."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, elements: ElementSet, gradient_scale: float) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.elements, ctx.gradient_scale = elements, gradient_scale
        return elements.round_to(x.float() / scale).mul_(scale).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, scale = ctx.saved_tensors
        quotient, upstream = _finite(x.float() / scale), grads[0].float()
        inside = torch.ops.aten.hardtanh_backward(upstream, quotient, *ctx.elements.edges)
        by_scale = ctx.elements.round_to(quotient).mul_(upstream).addcmul_(inside, quotient, value=-1.0)
        return inside.to(x.dtype), by_scale.sum_to_size(scale.shape) * ctx.gradient_scale, None, None


def _finite(quotient: Tensor) -> Tensor:
    """Infinite quotients, as masks have, at the ends of float32: they count 0 times themselves. NaN stays NaN."""
    largest = torch.finfo(quotient.dtype).max
    return quotient.clamp_(-largest, largest)


def _made_again(u: Tensor, factor: Tensor, offset: Tensor) -> Tensor:
    """factor u + offset, along axis 1, laid out like u."""
    shape = (1, -1, *[1] * (u.dim() - 2))
    return torch.addcmul(offset.reshape(shape), u, factor.reshape(shape))


def _zero(zero_point: Tensor | None, quant_min: int, quant_max: int) -> Tensor | None:
    """The zero point as a code, in a float dtype that is exact for codes; None: 0."""
    if zero_point is None:
        return None
    return zero_point.round().clamp(quant_min, quant_max).to(zero_point_dtype(quant_min, quant_max))


def _codes_less_zero(zero: Tensor | None, quant_min: int, quant_max: int) -> tuple[int, int] | None:
    """Lowest and highest code less the zero point; None where that is no number."""
    whole = 0.0 if zero is None else float(zero)
    return None if whole != whole else (quant_min - int(whole), quant_max - int(whole))


def _rounded(quotient: Tensor, rounding: Rounding) -> Tensor:
    """A quotient rounded in place, or in a new tensor."""
    return quotient.round_() if rounding == "half_even" else round_real(quotient, rounding)


def _backward(
    x: Tensor,
    grad: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: tuple[int, int, Rounding],
    is_zero_wanted: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients with respect to x, scale and zero point, as the equations stand."""
    quant_min, quant_max, rounding = grid
    zero = _zero(zero_point, quant_min, quant_max)
    quotient = _finite(x.float() / scale)
    code = round_real(quotient, rounding).to(zero_point_dtype(quant_min, quant_max))
    if zero is not None:
        code.add_(zero)
    upstream = grad.to(code.dtype)
    # One pass that keeps the gradient where low < code < high.
    inside = torch.ops.aten.hardtanh_backward(upstream, code, quant_min - 0.5, quant_max + 0.5)
    code.clamp_(quant_min, quant_max)
    if zero is not None:
        code.sub_(zero)
    # grad (c - z) - inside x / s: the error inside, the code outside
    by_scale = code.mul_(upstream).addcmul_(inside, quotient.to(code.dtype), value=-1.0).sum_to_size(scale.shape)
    by_zero = (upstream - inside).sum_to_size(scale.shape) * -scale if is_zero_wanted else None
    return inside.to(x.dtype), by_scale.float(), None if by_zero is None else by_zero.float()
