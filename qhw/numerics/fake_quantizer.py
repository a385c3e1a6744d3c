# SPDX-License-Identifier: Apache-2.0
"""FakeQuantizer: fake-quantize as a module, with a switch that lets the float through."""

from typing import cast

from torch import Tensor, nn

from qhw.errors import RangeError
from qhw.numerics.elements import ElementSet
from qhw.numerics.granularity import expand, parameter_shape
from qhw.numerics.qparams import QParams
from qhw.numerics.quantize import fake_quantize_broadcast, zero_point_dtype
from qhw.numerics.rounding import Rounding


class FakeQuantizer(nn.Module):
    """Moves a tensor onto a grid in the forward pass; the gradient passes straight through inside the grid.

    Scale, zero point and the tensors of elements are buffers, so they follow `.to(device)`, `deepcopy` and
    `state_dict`. Code bounds, granularity and rounding belong to the format and are fixed at construction.

    Args:
        qparams: The grid and its scale.
        rounding: Named rule for the quotient.
        name: The tensor's name, for messages.

    Attributes:
        enabled: False returns the input itself: the float model, one point at a time.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, qparams: QParams, rounding: Rounding = "half_even", name: str = "tensor") -> None:
        super().__init__()
        self.quant_min = qparams.quant_min
        self.quant_max = qparams.quant_max
        self.granularity = qparams.granularity
        self.rounding = rounding
        self.name = name
        self.enabled = True
        self._elements = qparams.elements
        self._element_tensors = () if qparams.elements is None else tuple(qparams.elements.tensors())
        for key in self._element_tensors:
            self.register_buffer(f"elements_{key}", cast(ElementSet, qparams.elements).tensors()[key].clone())
        self._hold(qparams)

    @property
    def elements(self) -> ElementSet | None:
        """What codes stand for, where they are not evenly spaced; on the buffers as they are now."""
        if self._elements is None or not self._element_tensors:
            return self._elements
        return self._elements.with_tensors({key: getattr(self, f"elements_{key}") for key in self._element_tensors})

    def _hold(self, qparams: QParams) -> None:
        # Clones: the caller's qparams are read-only data, a buffer may be loaded into.
        self.register_buffer("scale", qparams.scale.clone())
        self.register_buffer("zero_point", qparams.zero_point.clone())

    @property
    def qparams(self) -> QParams:
        """The grid now in use; copies of the buffers, checked.

        Raises:
            RangeError: a state dict put an illegal scale or zero point into the buffers.
        """
        return QParams(
            self.scale.detach().clone(),
            self.zero_point.clone(),
            self.quant_min,
            self.quant_max,
            self.granularity,
            self.elements,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Fake-quantized x.

        Args:
            x: float [*shape], fits the granularity.

        Returns:
            Tensor: x's dtype [*shape]; x itself when not enabled.

        Raises:
            RangeError: the scale does not fit the shape of x.
        """
        if not self.enabled:
            return x
        dtype = zero_point_dtype(self.quant_min, self.quant_max)
        scale, zero_point = self._broadcast(x, self.scale, self.zero_point.to(dtype))
        bounds = self.quant_min, self.quant_max
        return fake_quantize_broadcast(x, scale, zero_point, *bounds, self.rounding, self.elements)

    def _broadcast(self, x: Tensor, scale: Tensor, zero_point: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point in shapes that broadcast against x."""
        shape = tuple(x.shape)
        wanted = parameter_shape(self.granularity, shape, self.name)
        if tuple(scale.shape) != wanted:
            raise RangeError(
                f"{self.name}: scale must have shape {wanted} for {self.granularity}; got {tuple(scale.shape)}. "
                "Compute it for this tensor, or use PerTensor."
            )
        return expand(scale, self.granularity, shape), expand(zero_point, self.granularity, shape)

    def extra_repr(self) -> str:
        codes = f"[{self.quant_min}, {self.quant_max}], {self.granularity}, {self.rounding}"
        codes += "" if self._elements is None else f", {self._elements}"
        return codes if self.enabled else f"{codes}, enabled=False"
