# SPDX-License-Identifier: Apache-2.0
"""LearnedQuantizer: a fake quantizer whose scale, and zero point where the format leaves it free, are parameters."""

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from qhw.errors import RangeError
from qhw.numerics.fake_quantizer import FakeQuantizer
from qhw.numerics.grid import Grid, legal_scale
from qhw.numerics.learned import NO_CLIP, Clip, clipped, learned_fake_quantize
from qhw.numerics.qparams import QParams
from qhw.numerics.rounding import Rounding

__all__ = ["LearnedQuantizer", "ScaleDomain"]

ScaleDomain = Literal["linear", "log2"]

# A scale that has shrunk a thousandfold from its start quantizes nothing any more.
_SMALLEST_PART = 2.0**-10


class LearnedQuantizer(FakeQuantizer):
    """Moves a tensor onto a grid whose scale and zero point learn by gradient.

    The scale in use is always one that the format can hold: the parameter's value, moved to the nearest legal one,
    with the gradient passed straight through. It never falls below 1/1024 of its start, nor does it turn negative.

    Args:
        qparams: Where training starts.
        grid: What the format allows: kind and bounds of the scale, zero points.
        domain: What the parameter is: the scale itself, or the base-2 logarithm of its ratio to its start, in which one
            step of an optimizer changes every scale by the same ratio. Power-of-two scales are learned through the
            logarithm always.
        learn_zero_point: Whether a free zero point learns.
        gradient_scale: What the gradients of scale and zero point are multiplied by (LSQ: 1 / sqrt(N quant_max)).
        rounding: Named rule for the quotient.
        name: The tensor's name, for messages.

    Attributes:
        scale_parameter: float32 [*P]; the scale, or the logarithm of its ratio to `start_scale`: 0 at the start.
        start_scale: float32 [*P]; the scale that training starts from.
        zero_point: float32 [*P], a parameter where it learns; rounded to the nearest code where it is used.
        clip: Real bounds that x is limited to first, in place of a ReLU in front; none at the start.
        keeps_result: Whether what comes out is kept for the gradient: free where its reader keeps it.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.1, eqs. 38 to 40; Esser et al., 2020, arXiv:1902.08153 (gradient
        scale); Jain et al., 2020, arXiv:1903.08066 (logarithm; rounded to the nearest exponent here, not upwards).
    """

    scale_parameter: nn.Parameter
    start_scale: Tensor

    def __init__(
        self,
        qparams: QParams,
        grid: Grid,
        *,
        domain: ScaleDomain = "linear",
        learn_zero_point: bool = True,
        gradient_scale: float = 1.0,
        rounding: Rounding = "half_even",
        name: str = "tensor",
    ) -> None:
        self.grid = grid
        self.domain: ScaleDomain = "log2" if grid.scale_kind in ("power_of_two", "e8m0") else domain
        self.learns_scale = grid.scale_kind != "fixed"
        self.learns_zero_point = learn_zero_point and not grid.zero_points
        self.gradient_scale = gradient_scale
        self.clip: Clip = NO_CLIP
        self.keeps_result = True
        self._is_symmetric = grid.zero_point == 0
        self._is_plain = grid.scale_kind == "float32"
        self._scale_bounds = grid.scale_bounds
        super().__init__(qparams, rounding, name)

    def _hold(self, qparams: QParams) -> None:
        scale = qparams.scale.clone()
        self.register_buffer("start_scale", scale.clone())
        # The ratio, not the scale: it starts at 1 to the bit, while exp2(log2(scale)) may miss the scale by a rounding.
        parameter = torch.zeros_like(scale) if self.domain == "log2" else scale
        self.scale_parameter = nn.Parameter(parameter, requires_grad=self.learns_scale)
        zero_point = qparams.zero_point.float()
        if self.learns_zero_point:
            self.zero_point = nn.Parameter(zero_point)
        else:
            self.register_buffer("zero_point", zero_point)

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        """The legal scale in use: float32 [*P], with the gradient of the parameter."""
        bounds = self._scale_bounds if self._is_plain else None
        return cast(
            Tensor,
            _LegalScale.apply(self.scale_parameter, self.start_scale, self.grid, bounds, self.domain == "log2"),  # type: ignore[no-untyped-call]
        )

    @property
    def qparams(self) -> QParams:
        """The grid now in use: a legal scale, a whole zero point.

        Raises:
            RangeError: the parameter is not finite.
        """
        zero_point = self.zero_points().detach()
        if not bool(torch.isfinite(self.scale_parameter).all() & torch.isfinite(zero_point).all()):
            raise RangeError(
                f"{self.name}: its learned scale or zero point is NaN or infinite. Lower the learning rate."
            )
        zero_point = zero_point.round().clamp(self.quant_min, self.quant_max).to(torch.int32)
        bounds = self.quant_min, self.quant_max
        return QParams(self.scale.detach().clone(), zero_point, *bounds, self.granularity, self.elements)

    @property
    def is_at_smallest(self) -> bool:
        """Whether some scale is held at the bound below which it may not fall."""
        return bool((_wanted(self.scale_parameter, self.start_scale, self.domain == "log2")[1]).any())

    def zero_points(self) -> Tensor:
        """The zero point in use before it is rounded: float32 [*P], with the gradient of what it is made of."""
        return self.zero_point

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x, with gradients for x, scale and zero point.

        Args:
            x: float [*shape], fits the granularity. An attribute `made_of` says what it is made of, where somebody in
                front keeps that anyway (`learned_fake_quantize`); it hangs on the tensor, so that it fits no other.

        Returns:
            Tensor: x's dtype [*shape]; x itself, within the bounds of `clip`, when not enabled.

        Raises:
            RangeError: the scale does not fit the shape of x.
        """
        if not self.enabled:
            return clipped(x, self.clip)
        scale, zero_point = self._broadcast(x, self.scale, self.zero_points())
        return learned_fake_quantize(
            x,
            scale,
            None if self._is_symmetric else zero_point,
            self.quant_min,
            self.quant_max,
            self.rounding,
            self.gradient_scale,
            clip=self.clip,
            elements=self.elements,
            made_of=getattr(x, "made_of", None),
            keeps_result=self.keeps_result,
        )

    def extra_repr(self) -> str:
        learned = [
            what for what, is_on in (("scale", self.learns_scale), ("zero point", self.learns_zero_point)) if is_on
        ]
        return f"{super().extra_repr()}, learns {' and '.join(learned) or 'nothing'}"


def _wanted(parameter: Tensor, start: Tensor, is_log: bool) -> tuple[Tensor, Tensor]:
    """The scale that a parameter asks for, held above its bound; and where it is held."""
    scale = start * torch.exp2(parameter) if is_log else parameter
    smallest = start * _SMALLEST_PART
    return torch.maximum(scale, smallest), scale <= smallest


class _LegalScale(torch.autograd.Function):
    """A parameter as the nearest legal scale; the gradient passes straight through."""

    @staticmethod
    def forward(
        ctx: Any, parameter: Tensor, start: Tensor, grid: Grid, bounds: tuple[float, float] | None, is_log: bool
    ) -> Tensor:
        wanted, _ = _wanted(parameter, start, is_log)
        # The bounds of a grid that takes any float32 are float32 numbers: no wider arithmetic is needed.
        scale = wanted.clamp_(*bounds) if bounds is not None else legal_scale(wanted.double(), grid, "nearest")
        ctx.is_log = is_log
        if is_log:
            ctx.save_for_backward(scale)
        return scale

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        if not ctx.is_log:
            return grads[0], None, None, None, None
        (scale,) = ctx.saved_tensors
        return grads[0] * scale * math.log(2), None, None, None, None
