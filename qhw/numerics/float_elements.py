# SPDX-License-Identifier: Apache-2.0
"""Small floating-point numbers: sign, exponent and mantissa of any width, with a largest finite value."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.elements import ElementSet

__all__ = ["BFLOAT16", "FLOAT16", "FloatElements"]

_MOST_MANTISSA = 20
_FLOAT32_EMIN, _FLOAT32_EMAX, _FLOAT32_MANTISSA = -126, 127, 23


@dataclass(frozen=True)
class FloatElements(ElementSet):
    """The finite values of a binary floating-point format with subnormals: a sign bit, exponent, mantissa.

        value = (-1)^s 2^(e - bias) (1 + f / 2^m)  for e > 0;   (-1)^s 2^(1 - bias) f / 2^m  for e = 0

    Rounds half to even on the mantissa, keeps subnormals, and saturates at the largest finite value, as the saturating
    conversion of OCP's 8-bit floats. Codes are stored patterns, sign first; those past the largest finite value stand
    for no element.

    Args:
        exponent_bits: Width of the exponent, 1 to 8.
        mantissa_bits: Stored bits of the mantissa, 0 to 20.
        finite_max: The largest finite value; one of the format's values.
        exponent_bias: Absent: 2^(exponent_bits - 1) - 1.

    Raises:
        RangeError: a width is out of bounds, finite_max is no value of the format, or float32 cannot hold its values.

    Reference:
        Micikevicius et al., 2022, arXiv:2209.05433 (E4M3, E5M2); OCP Microscaling Formats v1.0, 2023, section 5.3.

    Example:
        >>> FloatElements(4, 3, 448.0).round_to(tensor([0.3, 17.0, 500.0]))
        tensor([  0.3125,  16.0000, 448.0000])
    """

    exponent_bits: int
    mantissa_bits: int
    finite_max: float
    exponent_bias: int | None = None

    def __post_init__(self) -> None:
        name = f"float with {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits"
        if not (1 <= self.exponent_bits <= 8 and 0 <= self.mantissa_bits <= _MOST_MANTISSA):
            raise RangeError(f"{name}: must have 1 to 8 and 0 to {_MOST_MANTISSA}. Keep the tensor in float.")
        smallest, top = math.ldexp(1.0, self._emin - self.mantissa_bits), self._highest_pattern
        is_value = not self.finite_max % smallest and self._significant(self.finite_max) <= self.mantissa_bits + 1
        if not (0 < self.finite_max <= top and is_value):
            raise RangeError(f"{name}: finite_max must be one of its values, at most {top:g}; got {self.finite_max}.")
        if self._emin < _FLOAT32_EMIN or not (self._has_room or self._emin == _FLOAT32_EMIN):
            raise RangeError(f"{name}, bias {self.bias}: its values must fit float32. Choose another exponent_bias.")

    @staticmethod
    def _significant(value: float) -> int:
        """Bits from the first to the last one of a value."""
        whole = int(math.ldexp(math.frexp(value)[0], 53))
        return 53 - ((whole & -whole).bit_length() - 1)

    @property
    def bias(self) -> int:
        """What is subtracted from a stored exponent."""
        return 2 ** (self.exponent_bits - 1) - 1 if self.exponent_bias is None else self.exponent_bias

    @property
    def bits(self) -> int:
        """Sign, exponent, mantissa."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def lowest(self) -> float:
        """-finite_max."""
        return -self.finite_max

    @property
    def highest(self) -> float:
        """finite_max."""
        return self.finite_max

    @property
    def edges(self) -> tuple[float, float]:
        """Half of the last step beyond the largest value."""
        half = math.ldexp(0.5, max(self.highest_exponent, self._emin) - self.mantissa_bits)
        return -(self.finite_max + half), self.finite_max + half

    @property
    def words(self) -> str:
        """As `8-bit floats (e4m3)`."""
        return f"{self.bits}-bit floats (e{self.exponent_bits}m{self.mantissa_bits})"

    @property
    def _emin(self) -> int:
        """Exponent of the smallest normal value."""
        return 1 - self.bias

    @property
    def _highest_pattern(self) -> float:
        """The value of all ones, were it finite."""
        exponent = 2**self.exponent_bits - 1 - self.bias
        return math.ldexp(2.0 - math.ldexp(1.0, -self.mantissa_bits), min(exponent, 1000))

    @property
    def _has_room(self) -> bool:
        """Whether 1.5 * 2^(23 - m) times the largest power of two is a finite float32."""
        return self.highest_exponent + _FLOAT32_MANTISSA - self.mantissa_bits < _FLOAT32_EMAX

    def round_to(self, x: Tensor) -> Tensor:
        """The nearest value, a tie to the even mantissa."""
        held = x.clamp(-self.finite_max, self.finite_max)
        if x.dtype == torch.float64:
            exponents, mask, mantissa = held.view(torch.int64), 0x7FF0000000000000, 52
        elif self._has_room:
            exponents, mask, mantissa = held.view(torch.int32), 0x7F800000, _FLOAT32_MANTISSA
        else:
            return self._round_patterns(held)
        # Adding 1.5 * 2^(23 - m) times the power of two below |x| leaves m bits to the sum, which the adder rounds half
        # to even; taking it away is exact. Below the smallest normal value the power of two stays: subnormals.
        power = exponents.bitwise_and(mask).view(x.dtype).clamp_(min=2.0**self._emin)
        power.mul_(1.5 * 2.0 ** (mantissa - self.mantissa_bits))
        rounded = held.add_(power).sub_(power)
        return rounded.copysign_(x)  # what rounds to 0 keeps its sign

    def _round_patterns(self, x: Tensor) -> Tensor:
        """Rounding of float32 patterns, for formats with its exponents: the bits that go are added to those that stay.

        A carry moves on into the exponent, where it belongs.
        """
        dropped = _FLOAT32_MANTISSA - self.mantissa_bits
        pattern = x.view(torch.int32)
        odd = pattern.bitwise_right_shift(dropped).bitwise_and_(1)
        kept = odd.add_(pattern).add_((1 << (dropped - 1)) - 1).bitwise_and_(-(1 << dropped))
        # Twice clamped: past the last value a float32 rounds to the next power of two. NaN would become infinite.
        rounded = kept.view(torch.float32).clamp_(-self.finite_max, self.finite_max)
        return torch.where(torch.isnan(x), x, rounded)

    def encode(self, elements: Tensor) -> Tensor:
        """Stored patterns: uint8 up to 8 bits, else int32."""
        size = elements.double().abs()
        exponent = torch.frexp(size).exponent - 1
        m = self.mantissa_bits
        # In units of the last place the pattern of a value is a whole number, and continues over each exponent.
        step = torch.where(size > 0, exponent, self._emin).clamp(min=self._emin)  # the exponent of 0 would be -1
        whole = torch.ldexp(size, m - step).long()
        pattern = whole + ((step - self._emin).long() << m)
        sign = torch.signbit(elements).long() << (self.bits - 1)
        return (pattern + sign).to(torch.uint8 if self.bits <= 8 else torch.int32)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of stored patterns; NaN past the largest finite one."""
        code, m = codes.long(), self.mantissa_bits
        exponent = (code >> m) & (2**self.exponent_bits - 1)
        fraction = code & (2**m - 1)
        whole = torch.where(exponent > 0, fraction + 2**m, fraction).double()
        size = torch.ldexp(whole, exponent.clamp(min=1) - self.bias - m)
        value = torch.where(size > self.finite_max, math.nan, size)
        return torch.where((code >> (self.bits - 1)) & 1 == 1, -value, value).float()


FLOAT16, BFLOAT16 = FloatElements(5, 10, 65504.0), FloatElements(8, 7, 255 * 2.0**120)
