# SPDX-License-Identifier: Apache-2.0
"""Statistics of tensors seen during calibration that give the same bytes for any order and split of the data."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from qhw.errors import CalibrationError
from qhw.numerics.affine import check_range
from qhw.numerics.granularity import Granularity, PerTensor, in_memory_order, parameter_shape, range_of, to_rows

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


class MinMaxSeries:
    """Exact lowest and highest value of each micro-batch, kept by the micro-batch's number.

    For reductions that depend on the order of the data. Processes that share the micro-batches number them as one
    process would, and merge: the series is then that of one process.

    Args:
        name: The tensor's name, for messages.
        first: Number of the micro-batch that the first update shows.
        step: From one update's number to the next one's; the count of processes where they take turns.
    """

    def __init__(self, name: str = "tensor", *, first: int = 0, step: int = 1) -> None:
        self.name = name
        self._first = first
        self._step = step
        self._updates: list[tuple[float, float] | None] = []
        self._others: dict[int, tuple[float, float]] = {}

    def update(self, x: Tensor) -> None:
        """Take in the next micro-batch; an empty one has a number and no range.

        Args:
            x: float [*shape].

        Raises:
            RangeError: x has a NaN or an infinite value.
        """
        found = None
        if x.numel():
            low, high = range_of(x.detach(), PerTensor())
            check_range(low, high, self.name)
            found = (low.item(), high.item())
        self._updates.append(found)

    def join_updates(self, num_micro_batches: int) -> None:
        """Make one of the updates that show the same micro-batch, where a series sees several tensors in turn.

        Args:
            num_micro_batches: How many were shown; each by equally many updates, one after the other.

        Raises:
            CalibrationError: the updates do not fall into that many equal parts.
        """
        size, rest = divmod(len(self._updates), max(num_micro_batches, 1))
        if rest:
            raise CalibrationError(
                f"{self.name}: {len(self._updates)} updates must fall into equal parts; got {num_micro_batches} "
                "micro-batches. Update as often for each."
            )
        parts = [self._updates[i : i + size] for i in range(0, len(self._updates), max(size, 1))]
        self._updates = [_hull(part) for part in parts]

    def merge(self, other: "MinMaxSeries") -> None:
        """Take in what another instance saw; in any order the result is the same.

        Raises:
            CalibrationError: both saw a micro-batch of the same number.
        """
        mine, theirs = self._ranges(), other._ranges()
        both = sorted(mine.keys() & theirs.keys())
        if both:
            raise CalibrationError(
                f"{self.name}: micro-batches must be seen once; got number {both[0]} from both. "
                "Number those of each process with first= and step=."
            )
        self._others |= theirs

    def _ranges(self) -> dict[int, tuple[float, float]]:
        """Number to range, in the order of the numbers."""
        own = {self._first + i * self._step: found for i, found in enumerate(self._updates) if found is not None}
        return dict(sorted((own | self._others).items()))

    @property
    def min(self) -> Tensor:
        """Lowest values, float64 [micro-batches], in the order of their numbers, without those that are empty.

        Raises:
            CalibrationError: nothing was seen.
        """
        return self._bounds(0)

    @property
    def max(self) -> Tensor:
        """Highest values, as `min`.

        Raises:
            CalibrationError: nothing was seen.
        """
        return self._bounds(1)

    def _bounds(self, end: int) -> Tensor:
        ranges = self._ranges()
        if not ranges:
            raise CalibrationError(_unseen(self.name))
        return torch.tensor([found[end] for found in ranges.values()], dtype=torch.float64)


def _hull(ranges: list[tuple[float, float] | None]) -> tuple[float, float] | None:
    """The range that covers some; None where there is none."""
    known = [found for found in ranges if found is not None]
    return (min(low for low, _ in known), max(high for _, high in known)) if known else None


def running_average(values: Tensor, momentum: float) -> Tensor:
    """Exponential moving average over the first axis, in its order.

        m_0 = x_0;  m_i = momentum * m_(i-1) + (1 - momentum) * x_i

    Args:
        values: float [steps, *shape], at least one step.
        momentum: From 0 (the last value) to below 1.

    Returns:
        Tensor: float64 [*shape].
    """
    first, *others = values.double()
    average: Tensor = first
    for value in others:
        average = average + (1.0 - momentum) * (value - average)  # this form keeps a constant as it is
    return average


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

    def percentile_range(self, percentile: float) -> tuple[Tensor, Tensor]:
        """The narrowest range of whole bins that leaves out no more than a share of the values at each end.

        Its ends are edges of bins, never beyond what was seen; 100 gives the exact range.

        Args:
            percentile: Above 50, up to 100: at most 100 - percentile percent lie below, and as many above.

        Returns:
            tuple: lowest and highest value, float32 [].

        Raises:
            CalibrationError: nothing was seen.
        """
        low, high = self.min, self.max
        left_out = _left_out([self.count], percentile)[0]
        first = int((self._counts.cumsum(0) > left_out).nonzero()[0])
        last = len(self._counts) - 1 - int((self._counts.flip(0).cumsum(0) > left_out).nonzero()[0])
        edges = self.edges.float()
        return torch.maximum(low, edges[first]), torch.minimum(high, edges[last + 1])

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


def percentile_range_of(x: Tensor, granularity: Granularity, percentile: float) -> tuple[Tensor, Tensor]:
    """The narrowest range that leaves out no more than a share of a tensor's elements at each end, exactly.

    Args:
        x: float [*shape].
        granularity: Which elements share a range.
        percentile: Above 50, up to 100: at most floor(n * (100 - percentile) / 100) of a share's n elements lie below
            the range, and as many above. 100 gives `range_of`.

    Returns:
        tuple: lowest and highest, of x's dtype, [*P]. Each is an element of x; 0 without elements; NaN where a share
        holds a NaN.
    """
    shape = parameter_shape(granularity, tuple(x.shape))
    low, high = range_of(x, granularity)
    if x.numel() == 0:
        return low, high
    # What pads a ragged last group sorts behind all elements, so that ranks count from the front.
    rows = to_rows(x, granularity, fill=math.inf).sort(1).values
    present = to_rows(torch.ones_like(x, dtype=torch.bool), granularity, fill=False).sum(1)
    left_out = torch.tensor(_left_out(present.tolist(), percentile), device=x.device)[:, None]
    lowest, highest = rows.gather(1, left_out), rows.gather(1, present[:, None] - 1 - left_out)
    broken = torch.isnan(low)
    return torch.where(broken, low, lowest.reshape(shape)), torch.where(broken, high, highest.reshape(shape))


def _left_out(counts: list[int], percentile: float) -> list[int]:
    """floor(count * (100 - percentile) / 100), exactly: 99.99 is the decimal number, not its neighbour in binary."""
    share = 1 - Fraction(str(percentile)) / 100
    return [count * share.numerator // share.denominator for count in counts]


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
