# SPDX-License-Identifier: Apache-2.0
"""FakeQuantizer: fake-quantize as a module, with a switch that lets the float through."""

from torch import Tensor, nn

from qhw.errors import RangeError
from qhw.numerics.granularity import expand, parameter_shape
from qhw.numerics.qparams import QParams
from qhw.numerics.quantize import fake_quantize_broadcast, zero_point_dtype
from qhw.numerics.rounding import Rounding


class FakeQuantizer(nn.Module):
    """Moves a tensor onto a grid in the forward pass; the gradient passes straight through inside the grid.

    Scale and zero point are buffers, so they follow `.to(device)`, `deepcopy` and `state_dict`. Code bounds,
    granularity and rounding belong to the format and are fixed at construction.

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
        self._hold(qparams)

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
            self.scale.detach().clone(), self.zero_point.clone(), self.quant_min, self.quant_max, self.granularity
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
        return fake_quantize_broadcast(x, scale, zero_point, self.quant_min, self.quant_max, self.rounding)

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
        return codes if self.enabled else f"{codes}, enabled=False"
