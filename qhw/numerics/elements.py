# SPDX-License-Identifier: Apache-2.0
"""Element sets: what the codes of a number format stand for at scale 1, where they are not evenly spaced."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qhw.errors import RangeError

__all__ = ["ElementSet", "ListedElements", "moved"]


class ElementSet(ABC):
    """The reals that codes stand for at scale 1: real = scale * element.

    Two sets that stand for the same are equal. What a set needs beyond plain values, a look-up table for one, it gives
    as tensors, so that modules keep it as buffers and result folders as tensors.
    """

    @property
    @abstractmethod
    def bits(self) -> int:
        """Width of one stored code."""

    @property
    @abstractmethod
    def lowest(self) -> float:
        """The lowest element, at most 0."""

    @property
    @abstractmethod
    def highest(self) -> float:
        """The highest element, above 0."""

    @property
    @abstractmethod
    def edges(self) -> tuple[float, float]:
        """Reals past which rounding is clipping: half a step below the lowest element and above the highest."""

    @property
    @abstractmethod
    def words(self) -> str:
        """What the numbers are, in a few words, as `4-bit floats`; for messages."""

    @property
    def code_bounds(self) -> tuple[int, int]:
        """Lowest and highest code; 0 lies between them."""
        return 0, 2**self.bits - 1

    @property
    def beside_bits(self) -> int:
        """Bits that are stored once for the tensor, beside its codes and scales: a look-up table."""
        return 0

    @property
    def is_absolute(self) -> bool:
        """Whether elements are the reals themselves, so that the scale is 1 where a format states none."""
        return False

    @property
    def has_zero(self) -> bool:
        """Whether 0.0 is an element."""
        return True

    @property
    def highest_exponent(self) -> int:
        """Exponent of the largest power of two that is not above the highest element."""
        return math.frexp(self.highest)[1] - 1

    @abstractmethod
    def round_to(self, x: Tensor) -> Tensor:
        """The nearest element of each real; the end of the set for what lies beyond; NaN stays.

        Args:
            x: float32 or float64 [*shape]; laid out as the tensor that is quantized where the set differs within it.

        Returns:
            Tensor: x's dtype [*shape], new.
        """

    @abstractmethod
    def encode(self, elements: Tensor) -> Tensor:
        """Stored codes.

        Args:
            elements: float32 [*shape], each an element of the set.

        Returns:
            Tensor: the smallest dtype that holds all codes, [*shape].
        """

    @abstractmethod
    def decode(self, codes: Tensor) -> Tensor:
        """The elements of stored codes.

        Args:
            codes: integer [*shape].

        Returns:
            Tensor: float32 [*shape]; NaN where a code stands for no element.
        """

    def tensors(self) -> dict[str, Tensor]:
        """What the set holds in tensors, by name; none here."""
        return {}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> "ElementSet":
        """The same set on other tensors: those of a buffer, or of a file."""
        return self

    def is_of(self, format_elements: "ElementSet") -> bool:
        """Whether this set is one that a format allows, given the set that the format names."""
        return self == format_elements


def moved(elements: ElementSet, device: torch.device | str) -> ElementSet:
    """The same set with its tensors on a device."""
    tensors = elements.tensors()
    return elements.with_tensors({name: tensor.to(device) for name, tensor in tensors.items()}) if tensors else elements


@dataclass(frozen=True)
class ListedElements(ElementSet):
    """A few elements, listed with their codes.

    Rounds to the nearest. A tie goes to the element whose code is even; where both are even or both odd, upwards: of
    {-1, 1}, 0.0 becomes 1.

    Args:
        values: The elements, ascending, each once; some above 0, none above 0 alone.
        codes: Their stored codes, in the same order.

    Raises:
        RangeError: the lists contradict what is said above.

    Example:
        >>> ListedElements((-1.0, 0.0, 1.0), (-1, 0, 1)).round_to(tensor([-0.4, 0.6, 9.0]))
        tensor([0., 1., 1.])
    """

    values: tuple[float, ...]
    codes: tuple[int, ...]

    def __post_init__(self) -> None:
        values, codes = self.values, self.codes
        if len(values) < 2 or list(values) != sorted(set(values)) or not all(map(math.isfinite, values)):
            raise RangeError(f"elements: values must be finite and ascending, two or more; got {list(values)[:8]}.")
        if len(codes) != len(values) or len(set(codes)) < len(codes):
            raise RangeError(f"elements: needs one code for each of {len(values)} values; got {list(codes)[:8]}.")
        if not values[0] <= 0 < values[-1] and not values[0] < 0 <= values[-1]:
            raise RangeError(f"elements: must reach from 0 or below to 0 or above; got {values[0]} to {values[-1]}.")

    @property
    def bits(self) -> int:
        """Width of one stored code; the fewest that tell the codes apart."""
        return max(1, (len(self.codes) - 1).bit_length())

    @property
    def lowest(self) -> float:
        """The first value."""
        return self.values[0]

    @property
    def highest(self) -> float:
        """The last value."""
        return self.values[-1]

    @property
    def edges(self) -> tuple[float, float]:
        """Half a step beyond the first and the last value."""
        first, second, *_ = self.values
        *_, before, last = self.values
        return first - (second - first) / 2, last + (last - before) / 2

    @property
    def words(self) -> str:
        """As `a set of 2 codes`."""
        return f"a set of {len(self.codes)} codes"

    @property
    def code_bounds(self) -> tuple[int, int]:
        """Lowest and highest code, and 0."""
        return min(0, *self.codes), max(0, *self.codes)

    @property
    def has_zero(self) -> bool:
        """Whether 0.0 is listed."""
        return 0.0 in self.values

    @cached_property
    def _bounds(self) -> Tensor:
        """Float64: the lowest real that belongs to each value but the first."""
        pairs = zip(self.values, self.values[1:], self.codes, self.codes[1:], strict=False)
        bounds = [((low + high) / 2, high_code % 2 > low_code % 2) for low, high, low_code, high_code in pairs]
        middles = torch.tensor([middle for middle, _ in bounds], dtype=torch.float64)
        to_lower = torch.tensor([is_lower for _, is_lower in bounds])
        return torch.where(to_lower, torch.nextafter(middles, torch.full_like(middles, math.inf)), middles)

    @cached_property
    def _bounds32(self) -> Tensor:
        """The same for float32: the lowest float32 that is not below the bound."""
        bounds = self._bounds.float()
        above = torch.nextafter(bounds, torch.full_like(bounds, math.inf))
        return torch.where(bounds.double() < self._bounds, above, bounds)

    @cached_property
    def _values(self) -> Tensor:
        return torch.tensor(self.values, dtype=torch.float64)

    def round_to(self, x: Tensor) -> Tensor:
        """The nearest value."""
        bounds = self._bounds32 if x.dtype == torch.float32 else self._bounds
        if len(self.values) <= _FEW:
            found = x.new_full(x.shape, self.values[0])
            for bound, value in zip(bounds.tolist(), self.values[1:], strict=True):
                found.masked_fill_(x >= bound, value)
            return found.masked_fill_(torch.isnan(x), math.nan)
        index = torch.bucketize(x.contiguous(), bounds.to(x.device, x.dtype), out_int32=True, right=True)
        found = self._values.to(x.device, x.dtype)[index]
        return torch.where(torch.isnan(x), x, found)

    def encode(self, elements: Tensor) -> Tensor:
        """Codes as listed."""
        low, high = self.code_bounds
        dtype = next(d for d in _DTYPES if torch.iinfo(d).min <= low and high <= torch.iinfo(d).max)
        codes = torch.tensor(self.codes, dtype=dtype, device=elements.device)
        return codes[torch.bucketize(elements.contiguous(), self._bounds32.to(elements.device), right=True)]

    def decode(self, codes: Tensor) -> Tensor:
        """Values as listed."""
        order = sorted(range(len(self.codes)), key=self.codes.__getitem__)
        known = torch.tensor([self.codes[i] for i in order], device=codes.device)
        index = torch.searchsorted(known, codes.long()).clamp(max=len(order) - 1)
        found = self._values.float().to(codes.device)[torch.tensor(order, device=codes.device)[index]]
        return torch.where(known[index] == codes, found, math.nan)


_FEW = 16  # values up to which one comparison each is faster than a search
_DTYPES = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64)
