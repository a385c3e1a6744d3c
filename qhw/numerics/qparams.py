# SPDX-License-Identifier: Apache-2.0
"""QParams: scale, zero point, code bounds and granularity of one quantized tensor, checked once."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.elements import ElementSet, moved
from qhw.numerics.granularity import Granularity, PerAxis, PerGroup, PerTensor, parameter_shape

_ELEMENTS = "elements."
_KINDS = {"per_tensor": PerTensor, "per_axis": PerAxis, "per_group": PerGroup}


@dataclass(frozen=True, eq=False)
class QParams:
    """What turns codes into reals: real = scale * (q - zero_point), or scale * element(q) where elements are given.

    Equal when all fields are equal; not hashable, since it holds tensors. Treat the tensors as read-only.

    Args:
        scale: float32 [*P] > 0 and finite. P is () per tensor, (channels,) per axis, the tensor's shape with the
            blocked axis shortened per group (`granularity.parameter_shape`).
        zero_point: int32 [*P] in [quant_min, quant_max].
        quant_min: Lowest integer code, inclusive.
        quant_max: Highest integer code, inclusive; exceeds quant_min.
        granularity: Which elements share a scale.
        elements: What codes stand for at scale 1, where they are not evenly spaced; every zero point is 0 then.

    Raises:
        RangeError: a field breaks what is said above.
    """

    scale: Tensor
    zero_point: Tensor
    quant_min: int
    quant_max: int
    granularity: Granularity
    elements: ElementSet | None = None

    def __post_init__(self) -> None:
        if self.quant_min >= self.quant_max:
            raise RangeError(
                f"qparams: quant_min must be below quant_max; got {self.quant_min} and {self.quant_max}. "
                "Swap or widen them."
            )
        if self.scale.dtype != torch.float32 or self.zero_point.dtype != torch.int32:
            raise RangeError(
                "qparams: scale must be float32 and zero_point int32; "
                f"got {self.scale.dtype} and {self.zero_point.dtype}. Convert them."
            )
        self._check_shapes()
        if self.elements is not None and bool(self.zero_point.any()):
            raise RangeError("qparams: codes with elements need zero_point 0. Set it to zeros.")
        if not bool((torch.isfinite(self.scale) & (self.scale > 0)).all()):
            bad = self.scale[~(torch.isfinite(self.scale) & (self.scale > 0))].flatten()[0].item()
            raise RangeError(f"qparams: scale must be positive and finite; got {bad}. Take it from qparams_from_range.")
        # int64: bounds of a 40-bit grid would wrap in a comparison with int32.
        zero_point = self.zero_point.long()
        outside = (zero_point < self.quant_min) | (zero_point > self.quant_max)
        if bool(outside.any()):
            bad = zero_point[outside].flatten()[0].item()
            raise RangeError(
                f"qparams: zero_point must lie in [{self.quant_min}, {self.quant_max}]; got {bad}. "
                "Clamp it, or widen the range."
            )

    def _check_shapes(self) -> None:
        shape = tuple(self.scale.shape)
        if shape != tuple(self.zero_point.shape):
            raise RangeError(
                f"qparams: zero_point must have the scale's shape {shape}; got {tuple(self.zero_point.shape)}. "
                "Expand it."
            )
        rank = len(shape)
        fits = {
            PerTensor: rank == 0,
            PerAxis: rank == 1,
            PerGroup: isinstance(self.granularity, PerGroup) and rank > self.granularity.axis,
        }
        if not fits[type(self.granularity)]:
            wanted = {PerTensor: "()", PerAxis: "(channels,)", PerGroup: "of the tensor's rank"}[type(self.granularity)]
            raise RangeError(
                f"qparams: scale must have shape {wanted} for {self.granularity}; got {shape}. "
                "Reshape it, or change the granularity."
            )

    @property
    def bits(self) -> int:
        """Width of one code: the smallest signed or unsigned integer that holds [quant_min, quant_max]."""
        if self.elements is not None:
            return self.elements.bits
        if self.quant_min >= 0:
            return self.quant_max.bit_length()
        return max((-self.quant_min - 1).bit_length(), max(self.quant_max, 0).bit_length()) + 1

    @property
    def signed(self) -> bool:
        """Whether some real is negative."""
        return self.quant_min < 0 if self.elements is None else self.elements.lowest < 0

    @property
    def is_symmetric(self) -> bool:
        """Whether every zero point is 0, so that the zero-point cross terms vanish."""
        return not bool(self.zero_point.any())

    def check_fits(self, shape: tuple[int, ...], name: str = "tensor") -> None:
        """Refuse a tensor whose shape the scale does not match.

        Raises:
            RangeError: the scale's shape is not `parameter_shape(granularity, shape)`.
        """
        wanted = parameter_shape(self.granularity, shape, name)
        if tuple(self.scale.shape) != wanted:
            raise RangeError(
                f"{name}: scale must have shape {wanted} for {self.granularity}; got {tuple(self.scale.shape)}. "
                "Compute it for this tensor, or use PerTensor."
            )

    def to(self, device: torch.device | str) -> "QParams":
        """The same qparams with their tensors on a device."""
        return QParams(
            self.scale.to(device),
            self.zero_point.to(device),
            self.quant_min,
            self.quant_max,
            self.granularity,
            None if self.elements is None else moved(self.elements, device),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QParams):
            return NotImplemented
        mine = (self.quant_min, self.quant_max, self.granularity, self.elements)
        theirs = (other.quant_min, other.quant_max, other.granularity, other.elements)
        return (
            mine == theirs and torch.equal(self.scale, other.scale) and torch.equal(self.zero_point, other.zero_point)
        )

    __hash__ = None  # type: ignore[assignment]

    def as_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for safetensors and a JSON header for the rest; `from_dict` is the inverse.

        Returns:
            tuple: {"scale": ..., "zero_point": ...} and {"quant_min": ..., "quant_max": ..., "granularity": {...}};
            with elements also their tensors as "elements.NAME", and {"has_elements": True}.
        """
        kind = next(kind for kind, cls in _KINDS.items() if isinstance(self.granularity, cls))
        tensors = {"scale": self.scale, "zero_point": self.zero_point}
        granularity = {"kind": kind, **vars(self.granularity)}
        header = {"quant_min": self.quant_min, "quant_max": self.quant_max, "granularity": granularity}
        if self.elements is not None:
            header["has_elements"] = True
            tensors |= {f"{_ELEMENTS}{name}": tensor for name, tensor in self.elements.tensors().items()}
        return tensors, header

    @classmethod
    def from_dict(
        cls, tensors: dict[str, Tensor], header: dict[str, Any], elements: ElementSet | None = None
    ) -> "QParams":
        """The qparams that `as_dict` took apart.

        Args:
            tensors: As written.
            header: As written.
            elements: The set that the tensor's format names, where it names one; its tensors are read.

        Raises:
            RangeError: a key is missing, the granularity is unknown, or the values break the rules of QParams.
        """
        try:
            fields = dict(header["granularity"])
            granularity = _KINDS[fields.pop("kind")](**fields)
            bounds = int(header["quant_min"]), int(header["quant_max"])
            if bool(header.get("has_elements")) != (elements is not None):
                raise ValueError("its codes stand for other numbers than its format says")
            if elements is not None:
                names = (name for name in tensors if name.startswith(_ELEMENTS))
                elements = elements.with_tensors({name.removeprefix(_ELEMENTS): tensors[name] for name in names})
            return cls(tensors["scale"], tensors["zero_point"], *bounds, granularity, elements)
        except (KeyError, TypeError, ValueError) as error:
            raise RangeError(f"qparams: saved form is damaged ({error!r}); got {header}. Write it again.") from error
