# SPDX-License-Identifier: Apache-2.0
"""DynamicQuantizer: a fake quantizer whose scales are those of the tensor that it sees, as hardware computes them."""

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.affine import scale_and_zero_point
from qhw.numerics.fake_quantizer import FakeQuantizer
from qhw.numerics.granularity import PerTensor
from qhw.numerics.grid import Grid
from qhw.numerics.qparams import QParams
from qhw.numerics.quantize import fake_quantize_broadcast, zero_point_dtype

__all__ = ["DynamicQuantizer"]


class DynamicQuantizer(FakeQuantizer):
    """Moves a tensor onto scales that cover its own values, block by block along the axis that is summed up.

    The scale and zero point that it holds stand for none in particular. With one scale per tensor the result depends on
    which samples are computed together; with blocks and rows it does not. Gradients pass as on a fixed scale.

    Args:
        qparams: On the grid, per tensor.
        grid: What is legal.
        axis: The axis that is summed up: 1, -1 for the last one, -2 for the one before; None: one scale per tensor.
        block: Elements of a block along that axis, the last one shorter where they do not divide; None: all, a row.
        reduced: How many elements are summed up, where axes from 1 on are flattened before: a tensor [n, 8, 4, 4] that
            a linear layer reads as [n, 128] has blocks of its 128 elements. None: as many as the axis has.
        name: The tensor's name, for messages.
    """

    def __init__(
        self,
        qparams: QParams,
        grid: Grid,
        *,
        axis: int | None,
        block: int | None = None,
        reduced: int | None = None,
        name: str = "tensor",
    ) -> None:
        super().__init__(qparams, name=name)
        if axis not in (None, 1, -1, -2) or not isinstance(qparams.granularity, PerTensor):
            raise RangeError(f"{name}: axis must be 1, -1, -2 or None, with qparams per tensor; got {axis}.")
        self.grid = grid
        self.axis = axis
        self.block = block
        self.reduced = reduced

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x.

        Args:
            x: float [batch, *shape].

        Returns:
            Tensor: x's dtype [batch, *shape]; x itself when not enabled.
        """
        if not self.enabled or not x.numel():
            return x
        flat = self.axis == -1 and self.reduced is not None and x.shape[-1] != self.reduced and x.dim() > 2
        if self.axis is None:
            return self._on_own_scales(x, *x.detach().float().aminmax())
        y = x.flatten(1) if flat else x
        axis = self.axis % y.dim()
        size = y.shape[axis]
        block = self.block or size
        missing = -size % block
        if missing:  # filled up with 0.0, which every range holds
            y = torch.nn.functional.pad(y, (0, 0) * (y.dim() - 1 - axis) + (0, missing))
        blocks = y.reshape(*y.shape[:axis], -1, block, *y.shape[axis + 1 :])
        low, high = blocks.detach().float().aminmax(dim=axis + 1, keepdim=True)
        found = self._on_own_scales(blocks, low, high).flatten(axis, axis + 1)
        return (found.narrow(axis, 0, size) if missing else found).reshape(x.shape)

    def _on_own_scales(self, x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """x on scales that cover ranges, which broadcast against it."""
        scale, zero_point = scale_and_zero_point(low, high, self.grid)
        zero_point = zero_point.to(zero_point_dtype(self.quant_min, self.quant_max))
        bounds = self.quant_min, self.quant_max
        return fake_quantize_broadcast(x, scale, zero_point, *bounds, self.rounding, self.elements)

    def extra_repr(self) -> str:
        blocks = "tensor" if self.axis is None else f"{self.block or 'row'} along axis {self.axis}"
        return f"{super().extra_repr()}, scales of each {blocks}"
