# SPDX-License-Identifier: Apache-2.0
"""Statistics of tensors seen during calibration that give the same bytes for any order and split of the data."""

import math

import torch
from torch import Tensor

from qhw.errors import CalibrationError
from qhw.numerics.affine import check_range
from qhw.numerics.granularity import Granularity, PerTensor, in_memory_order, range_of

BINS_PER_SIGN = 8192
_BITS = 13
_CENTRE = BINS_PER_SIGN - 1
# Bin width 2**(exponent - 13); its inverse must be a finite float32, so tiny ranges share the width 2**-125.
_SMALLEST_EXPONENT = -112
# Codes of one chunk (1 MB of int32) stay in the second-level cache between making and counting them.
_CHUNK = 2**18


class MinMax:
    """Exact lowest and highest value, per tensor, axis or group.

    Args:
        granularity: Which elements share a range.
        name: The tensor's name, for messages.

    Attributes:
        count: Elements seen.
    """

    def __init__(self, granularity: Granularity = PerTensor(), name: str = "tensor") -> None:  # noqa: B008 (frozen)
        self.granularity = granularity
        self.name = name
        self.count = 0
        self._min: Tensor | None = None
        self._max: Tensor | None = None

    def update(self, x: Tensor) -> None:
        """Take in one tensor; an empty one changes nothing.

        Args:
            x: float [*shape].

        Raises:
            RangeError: x has a NaN or an infinite value.
        """
        if x.numel() == 0:
            return
        low, high = range_of(x.detach(), self.granularity)
        check_range(low, high, self.name)
        self._widen(low, high, x.numel())

    def merge(self, other: "MinMax") -> None:
        """Take in what another instance saw; in any order the result is the same."""
        if other._min is not None and other._max is not None:
            self._widen(other._min, other._max, other.count)

    def _widen(self, low: Tensor, high: Tensor, count: int) -> None:
        self._min = low if self._min is None else torch.minimum(self._min, low)
        self._max = high if self._max is None else torch.maximum(self._max, high)
        self.count += count

    @property
    def min(self) -> Tensor:
        """Lowest value, x's dtype [*P].

        Raises:
            CalibrationError: nothing was seen.
        """
        if self._min is None:
            raise CalibrationError(_unseen(self.name))
        return self._min

    @property
    def max(self) -> Tensor:
        """Highest value, x's dtype [*P].

        Raises:
            CalibrationError: nothing was seen.
        """
        if self._max is None:
            raise CalibrationError(_unseen(self.name))
        return self._max


class Histogram:
    """Counts of a tensor's values in bins whose width is a power of two, with the exact range.

    Bin i holds the x with trunc(x / w) = i, -8192 < i < 8192: bins [i*w, (i+1)*w) above, their mirror images below,
    and the middle bin (-w, w), twice as wide. When a value does not fit, w doubles and neighbouring bins add:
    trunc(trunc(x / w) / 2) = trunc(x / 2w), so the counts are those of one pass with the final width. Hence they
    depend neither on the order nor on the split of the data.

    Args:
        name: The tensor's name, for messages.

    Attributes:
        count: Elements seen.
    """

    def __init__(self, name: str = "tensor") -> None:
        self.name = name
        self.count = 0
        self._exponent = _SMALLEST_EXPONENT
        self._counts = torch.zeros(2 * BINS_PER_SIGN - 1, dtype=torch.int64)
        self._min = math.inf
        self._max = -math.inf

    def update(self, x: Tensor) -> None:
        """Take in one tensor; an empty one changes nothing.

        Args:
            x: float [*shape]; counted in float32.

        Raises:
            RangeError: x has a NaN or an infinite value.
        """
        if x.numel() == 0:
            return
        x = in_memory_order(x.detach().float())
        low, high = x.aminmax()
        check_range(low, high, self.name)
        self._widen(low.item(), high.item())
        # Exact: the factor is a power of two, and what underflows belongs to the middle bin anyway.
        factor = 2.0 ** (_BITS - self._exponent)
        one_sided = low.item() >= 0
        for chunk in torch.split(x.reshape(-1), _CHUNK):
            codes = (chunk * factor).to(torch.int32)
            if one_sided:
                self._counts[_CENTRE:] += torch.bincount(codes, minlength=BINS_PER_SIGN).cpu()
            else:
                self._counts += torch.bincount(codes.add_(_CENTRE), minlength=2 * BINS_PER_SIGN - 1).cpu()
        self.count += x.numel()

    def merge(self, other: "Histogram") -> None:
        """Take in what another instance saw; in any order the result is the same."""
        if other.count == 0:
            return
        self._widen(other._min, other._max)
        self._counts += _fold(other._counts, self._exponent - other._exponent)
        self.count += other.count

    def _widen(self, low: float, high: float) -> None:
        self._min, self._max = min(self._min, low), max(self._max, high)
        # frexp: max_abs = fraction * 2**exponent with fraction < 1, so max_abs < 2**exponent, the outer edge; the
        # floor inside it keeps 0, whose exponent frexp calls 0, from widening the bins.
        max_abs = max(-self._min, self._max, 2.0 ** (_SMALLEST_EXPONENT - 1))
        exponent = math.frexp(max_abs)[1]
        self._counts = _fold(self._counts, exponent - self._exponent)
        self._exponent = exponent

    @property
    def min(self) -> Tensor:
        """Lowest value, float32 [].

        Raises:
            CalibrationError: nothing was seen.
        """
        if self.count == 0:
            raise CalibrationError(_unseen(self.name))
        return torch.tensor(self._min, dtype=torch.float32)

    @property
    def max(self) -> Tensor:
        """Highest value, float32 [].

        Raises:
            CalibrationError: nothing was seen.
        """
        if self.count == 0:
            raise CalibrationError(_unseen(self.name))
        return torch.tensor(self._max, dtype=torch.float32)

    @property
    def bin_width(self) -> float:
        """Width of a bin, a power of two, in the units of the tensor; the middle bin is twice as wide."""
        return float(2.0 ** (self._exponent - _BITS))

    @property
    def counts(self) -> Tensor:
        """Elements per bin, int64 [16383], lowest bin first; a copy."""
        return self._counts.clone()

    @property
    def edges(self) -> Tensor:
        """Bounds of the bins, float64 [16384], ascending: -8192*w, ..., -w, w, ..., 8192*w."""
        above = torch.arange(1, BINS_PER_SIGN + 1, dtype=torch.float64) * self.bin_width
        return torch.cat([-above.flip(0), above])

    @property
    def centres(self) -> Tensor:
        """Middles of the bins, float64 [16383], ascending; that of the middle bin is 0."""
        edges = self.edges
        return (edges[:-1] + edges[1:]) / 2


def _fold(counts: Tensor, doublings: int) -> Tensor:
    """Counts after the bin width doubled this many times, in as many bins as before."""
    if doublings == 0:
        return counts
    group = 2 ** min(doublings, _BITS)
    # Magnitudes 0 ... 8191 of each sign; the middle bin is counted with the positive ones.
    positive, negative = counts[_CENTRE:], counts[: _CENTRE + 1].flip(0).clone()
    negative[0] = 0
    folded = torch.zeros_like(counts)
    kept = BINS_PER_SIGN // group
    folded[_CENTRE : _CENTRE + kept] += positive.reshape(kept, group).sum(1)
    folded[_CENTRE + 1 - kept : _CENTRE + 1] += negative.reshape(kept, group).sum(1).flip(0)
    return folded


def _unseen(name: str) -> str:
    return f"{name}: a range needs at least one value; got none. Pass calibration data that reaches this tensor."
