# SPDX-License-Identifier: Apache-2.0
"""Grid: what a number format allows, in plain values, and the legal scales nearest to a wanted one."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.elements import ElementSet
from qhw.numerics.float_elements import BFLOAT16, FLOAT16, FloatElements
from qhw.numerics.granularity import Granularity
from qhw.numerics.qparams import QParams

ScaleKind = Literal["float32", "float16", "bfloat16", "e4m3", "power_of_two", "e8m0", "fixed", "enumerated"]

# Below the smallest normal float32 a scale would be flushed to zero on hardware that flushes denormals.
SMALLEST_SCALE = 2.0**-126
_FLOAT32_MAX = torch.finfo(torch.float32).max
# A power-of-two search tries the covering exponent and the eight below: each halves the range it does not clip.
_EXPONENTS_BELOW_COVERING = 8
_SMALLEST_E8M0 = 2.0**-127
_TYPES = {"float16": FLOAT16, "bfloat16": BFLOAT16, "e4m3": FloatElements(4, 3, 448.0)}
_POWERS = ("power_of_two", "e8m0")


@dataclass(frozen=True)
class Grid:
    """The codes, zero points and scales a number format allows.

    Args:
        quant_min: Lowest integer code, inclusive.
        quant_max: Highest integer code, inclusive; exceeds quant_min.
        zero_point: None when free in [quant_min, quant_max]; an int when fixed; a tuple when one of several.
        scale_kind: "float32" any positive float32; "float16", "bfloat16", "e4m3" a positive value of that type;
            "power_of_two" 2**exponent; "e8m0" the same from 2**-127, chosen for a range by `block_scale`; "fixed"
            the one value in scale_values; "enumerated" one of scale_values.
        scale_min: Lowest legal scale where none are listed. None: 2**-126, the smallest normal float32; of
            e8m0 2**-127, or what exponent_min says.
        scale_max: Highest legal scale. None: what keeps every real on the grid finite in float32.
        scale_values: The legal scales when fixed or enumerated.
        exponent_min: Lowest legal exponent, power_of_two and e8m0 only.
        exponent_max: Highest legal exponent, power_of_two and e8m0 only.
        elements: What codes stand for, where they are not evenly spaced; quant_min and quant_max are its codes then,
            and the zero point is 0.

    Raises:
        RangeError: the fields contradict each other or leave no legal scale.
    """

    quant_min: int
    quant_max: int
    zero_point: int | tuple[int, ...] | None = None
    scale_kind: ScaleKind = "float32"
    scale_min: float | None = None
    scale_max: float | None = None
    scale_values: tuple[float, ...] = ()
    exponent_min: int | None = None
    exponent_max: int | None = None
    elements: ElementSet | None = None

    def __post_init__(self) -> None:
        if self.quant_min >= self.quant_max:
            raise RangeError(
                f"grid: quant_min must be below quant_max; got {self.quant_min} and {self.quant_max}. "
                "Swap or widen them."
            )
        for zero_point in self.zero_points:
            if not self.quant_min <= zero_point <= self.quant_max:
                raise RangeError(
                    f"grid: zero_point must lie in [{self.quant_min}, {self.quant_max}]; got {zero_point}. "
                    "Use a code of the grid, or None for a free one."
                )
        if self.zero_point != 0 and (self.elements is not None or self.scale_kind == "e8m0"):
            what = "elements" if self.elements is not None else "an e8m0 scale"
            raise RangeError(f"grid: {what} need zero_point 0; got {self.zero_point}. Fix it at 0.")
        if self.elements is not None and self.elements.code_bounds != (self.quant_min, self.quant_max):
            raise RangeError(
                f"grid: quant_min and quant_max must be the codes of the elements, {self.elements.code_bounds}; got "
                f"({self.quant_min}, {self.quant_max}). Use elements.code_bounds."
            )
        if self.scale_kind in ("fixed", "enumerated"):
            self._check_values()
        elif self.scale_kind not in get_args(ScaleKind):
            raise RangeError(
                f"grid: scale_kind must be one of {', '.join(get_args(ScaleKind))}; got {self.scale_kind!r}. "
                "Choose one."
            )
        else:
            low, high = self.scale_bounds
            if low > high:
                raise RangeError(
                    f"grid: the lowest legal scale must not exceed the highest; got {low} and {high}. Widen the bounds."
                )

    def _check_values(self) -> None:
        values = self.scale_values
        if not values or not all(SMALLEST_SCALE <= v <= _FLOAT32_MAX for v in values):
            raise RangeError(
                f"grid: scale_values must be normal positive float32 numbers for a {self.scale_kind} scale; "
                f"got {values}. List the legal scales."
            )
        if self.scale_kind == "fixed" and len(values) != 1:
            raise RangeError(f"grid: a fixed scale has exactly one value; got {len(values)}. Use enumerated.")

    @property
    def zero_points(self) -> tuple[int, ...]:
        """The zero points listed; empty when the zero point is free."""
        if self.zero_point is None:
            return ()
        return self.zero_point if isinstance(self.zero_point, tuple) else (self.zero_point,)

    @property
    def span(self) -> int:
        """Steps between the lowest and the highest code."""
        return self.quant_max - self.quant_min

    @property
    def extent(self) -> float:
        """Highest less lowest real at scale 1."""
        return self.span if self.elements is None else self.elements.highest - self.elements.lowest

    def ends(self, zero_point: int) -> tuple[float, float]:
        """Lowest and highest real at scale 1, around a zero point."""
        if self.elements is not None:
            return self.elements.lowest, self.elements.highest
        return self.quant_min - zero_point, self.quant_max - zero_point

    @property
    def highest_exponent(self) -> int:
        """Exponent of the largest power of two that is not above the highest real at scale 1, zero point 0."""
        return self.quant_max.bit_length() - 1 if self.elements is None else self.elements.highest_exponent

    def qparams(self, scale: Tensor, zero_point: Tensor, granularity: Granularity) -> QParams:
        """QParams on this grid.

        Args:
            scale: float32 [*P], legal.
            zero_point: int32 [*P].
            granularity: Which elements share a scale; fits P.
        """
        return QParams(scale, zero_point, self.quant_min, self.quant_max, granularity, self.elements)

    @property
    def exponent_bounds(self) -> tuple[int, int]:
        """Lowest and highest legal exponent of a power-of-two scale; scale bounds count too."""
        smallest = SMALLEST_SCALE
        if self.scale_kind == "e8m0":  # of codes in units of less than 1, as 8-bit integers over 2^6, it may be less
            smallest = _SMALLEST_E8M0 if self.exponent_min is None else 2.0**self.exponent_min
        low = max(self.scale_min or smallest, smallest)
        # frexp is exact where log2 is not: low = fraction * 2**exponent, fraction in [0.5, 1).
        fraction, exponent = math.frexp(low)
        lowest = exponent - 1 if fraction == 0.5 else exponent
        highest = math.frexp(min(self.scale_max or _FLOAT32_MAX, _FLOAT32_MAX / self.extent))[1] - 1
        if self.exponent_min is not None:
            lowest = max(lowest, self.exponent_min)
        if self.exponent_max is not None:
            highest = min(highest, self.exponent_max)
        return lowest, highest

    @property
    def scale_bounds(self) -> tuple[float, float]:
        """Lowest and highest legal scale, both exact in float32."""
        if self.scale_kind in ("fixed", "enumerated"):
            values = _float32_values(self.scale_values)
            return float(values[0]), float(values[-1])
        if self.scale_kind in _POWERS:
            lowest, highest = self.exponent_bounds
            return 2.0**lowest, 2.0**highest
        low = max(self.scale_min or SMALLEST_SCALE, SMALLEST_SCALE)
        high = min(self.scale_max or _FLOAT32_MAX, _FLOAT32_MAX / self.extent)
        if self.scale_kind in _TYPES:
            of_type = _TYPES[self.scale_kind]
            ends = torch.tensor([max(low, float(of_type.decode(torch.tensor(1)))), high], dtype=torch.float64)
            least, most = _of_type(ends, of_type, "up"), -_of_type(-ends, of_type, "up")
            return float(least[0]), float(most[1])
        return _float32_inside(low, up=True), _float32_inside(high, up=False)


def legal_scale(scale: Tensor, grid: Grid, direction: Literal["up", "nearest"] = "up") -> Tensor:
    """Legal scale for a wanted one: the smallest that is not below it, or the nearest.

    A float32 scale is rounded to the nearest float32 either way, so its last code may lie half an ulp short of the
    range: 0.004 codes at 16 bits. Coarser types keep the direction, so that the range is covered. A scale past the
    highest legal one becomes that one: the range is then clipped.

    Args:
        scale: float64 [*P], wanted scales >= 0.
        grid: What is legal.
        direction: "up", or "nearest": least distance for listed values, least ratio for powers of two.

    Returns:
        Tensor: float32 [*P], each legal.
    """
    scale = scale.double()
    if grid.scale_kind == "float32":
        low, high = grid.scale_bounds
        return scale.clamp(low, high).float()
    if grid.scale_kind in _TYPES:
        return _of_type(scale.clamp(*grid.scale_bounds), _TYPES[grid.scale_kind], direction).float()
    if grid.scale_kind in _POWERS:
        lowest, highest = grid.exponent_bounds
        fraction, exponent = torch.frexp(scale.clamp(*grid.scale_bounds))
        threshold = 0.5 if direction == "up" else math.sqrt(0.5)
        exponent = torch.where(fraction > threshold, exponent, exponent - 1).clamp(lowest, highest)
        return torch.ldexp(torch.ones_like(scale), exponent).float()
    values = _float32_values(grid.scale_values).to(scale.device)
    index = torch.searchsorted(values, scale.contiguous()).clamp(max=len(values) - 1)
    if direction == "nearest":
        below = (index - 1).clamp(min=0)
        index = torch.where(scale - values[below] <= values[index] - scale, below, index)
    return values[index].float()


def scale_candidates(covering: Tensor, grid: Grid, count: int = 100) -> Tensor:
    """Legal scales worth trying in a search, from the one that covers the range downwards.

    Args:
        covering: float64 [*P], the scale that just covers the range.
        grid: What is legal.
        count: How many linear fractions of a scale of some float type: covering * i / count, i = count ... 1. Other
            kinds ignore it: powers of two give the covering exponent and the eight below, listed scales the whole list.

    Returns:
        Tensor: float32 [candidates, *P]; may repeat a scale where bounds cut.
    """
    covering = covering.double()
    column = (-1,) + (1,) * covering.ndim
    if grid.scale_kind == "float32" or grid.scale_kind in _TYPES:
        fractions = torch.arange(count, 0, -1, dtype=torch.float64, device=covering.device) / count
        return legal_scale(covering * fractions.reshape(column), grid)
    if grid.scale_kind in _POWERS:
        steps = torch.arange(_EXPONENTS_BELOW_COVERING + 1, dtype=torch.float64, device=covering.device)
        return legal_scale(legal_scale(covering, grid).double() * torch.exp2(-steps).reshape(column), grid)
    values = _float32_values(grid.scale_values).to(covering.device).float().flip(0)
    return values.reshape(column).expand(len(values), *covering.shape)


def block_scale(low: Tensor, high: Tensor, grid: Grid) -> Tensor:
    """The scale that a block shares, by the rule of OCP's block formats:

        scale = 2^(floor(log2(max |x|)) - floor(log2(highest element)))

    The largest values of a block may lie past the highest element and saturate: with E4M3, those above 448 / 512 of the
    next power of two. All-zero blocks get the scale 1, where that is legal.

    Args:
        low: float [*P] <= 0, lowest values.
        high: float [*P] >= 0, highest values.
        grid: Of scale kind "e8m0".

    Returns:
        Tensor: float32 [*P], legal.

    Reference:
        OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3.
    """
    least, most = grid.ends(0)
    size = torch.maximum(high if most else torch.zeros_like(high), -low if least else torch.zeros_like(low)).double()
    exponent = torch.frexp(size).exponent - 1 - grid.highest_exponent
    lowest, highest = grid.exponent_bounds
    wanted = torch.where(size > 0, exponent, 0).clamp(lowest, highest)
    return torch.ldexp(torch.ones_like(size), wanted).float()


def _of_type(scale: Tensor, values: FloatElements, direction: Literal["up", "nearest"]) -> Tensor:
    """Reals as values of a float type: the smallest that is not below, or the nearest; float64."""
    nearest = values.round_to(scale)
    if direction == "nearest":
        return nearest
    step = torch.frexp(nearest.abs()).exponent - 1
    smallest = 1 - values.bias
    unit = torch.ldexp(torch.ones_like(scale), step.clamp(min=smallest) - values.mantissa_bits)
    # The next value above lies one unit away, or half of one below a negative power of two: 0.6 rounds to either.
    return torch.where(nearest < scale, values.round_to(nearest + 0.6 * unit), nearest)


def _float32_values(values: tuple[float, ...]) -> Tensor:
    """Listed scales rounded to float32, ascending, in float64 for comparisons."""
    return torch.tensor(values, dtype=torch.float32).sort().values.double()


def _float32_inside(bound: float, up: bool) -> float:
    """The float32 nearest to a bound that does not step over it."""
    rounded = torch.tensor(bound, dtype=torch.float32)
    if (rounded.item() < bound) if up else (rounded.item() > bound):
        rounded = torch.nextafter(rounded, torch.tensor(math.inf if up else 0.0))
    return float(rounded.item())
