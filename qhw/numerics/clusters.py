# SPDX-License-Identifier: Apache-2.0
"""One-dimensional k-means of many rows at once: Lloyd's iterations on sorted values, by prefix sums."""

import torch
from torch import Tensor

__all__ = ["cluster_rows"]

_ITERATIONS = 100
_FEW = 32  # centres up to which cuts are tried
_CUTS = 192
_ROWS = 8  # rows cut at a time: 2.4 MB of costs, which stay in the cache


def cluster_rows(rows: Tensor, count: int) -> Tensor:
    """Centres of the clusters of each row that make the squared distance to the nearest centre small.

    Started several times and run until nothing moves, at most 100 times; the best is kept, row by row:

        quantiles of the values; equal steps over their range; steps that shrink with the third root of the density,
        which is where many clusters end up (Panter and Dite, 1951); up to 32 centres also the best cut of the sorted
        values into runs, by dynamic programming over 192 places to cut at

    With no more than 192 values the last is the optimum. Values are sorted once. A pass then takes K log N operations
    per row, and no random numbers are drawn.

    Args:
        rows: float [rows, values]; NaN is passed over, so that rows may be of different lengths.
        count: Centres per row, 1 or more. With fewer values centres repeat.

    Returns:
        Tensor: float64 [rows, count], ascending.

    Reference:
        Lloyd, 1982, "Least squares quantization in PCM"; Han et al., 2016, arXiv:1510.00149, section 3.
    """
    x = rows.double().sort(1).values
    known = (~x.isnan()).sum(1, keepdim=True)
    x = x.nan_to_num(0.0) if bool((known < x.shape[1]).any()) else x
    # Positions past the known values repeat the last one, for searches; sums never reach them.
    last = x.gather(1, (known - 1).clamp(min=0))
    x = torch.where(torch.arange(x.shape[1], device=x.device) < known, x, last)
    sums = _Sums(x, known)
    best, least = torch.zeros(len(x), count, dtype=torch.float64, device=x.device), None
    starts = [_quantiles(x, known, count), _steps(x, known, count), _companded(x, known, count)]
    if count <= _FEW:
        starts.append(torch.cat([sums.cut(part, count) for part in torch.split(torch.arange(len(x)), _ROWS)]))
    for start in starts:
        centres, cost = sums.settle(start)
        if least is None:
            best, least = centres, cost
        else:
            is_better = cost < least
            best = torch.where(is_better[:, None], centres, best)
            least = torch.where(is_better, cost, least)
    return best.sort(1).values


class _Sums:
    """Sorted rows with the sums of their first values, of which those of a cluster are differences."""

    def __init__(self, x: Tensor, known: Tensor) -> None:
        self._x = x
        self._known = known
        zero = torch.zeros(len(x), 1, dtype=torch.float64, device=x.device)
        self._first = torch.cat([zero, x.cumsum(1)], 1)
        self._second = torch.cat([zero, x.square().cumsum(1)], 1)

    def settle(self, centres: Tensor) -> tuple[Tensor, Tensor]:
        """Lloyd's iterations; the centres, and the squared distances of each row, summed."""
        for _ in range(_ITERATIONS):
            number, total, _ = self._clusters(centres)
            moved = torch.where(number > 0, total / number.clamp(min=1), centres)
            if torch.equal(moved, centres):
                break
            centres = moved.sort(1).values
        number, total, squares = self._clusters(centres)
        return centres, (squares - 2 * centres * total + centres.square() * number).sum(1)

    def cut(self, part: Tensor, count: int) -> Tensor:
        """The means of the runs into which some sorted rows are cut best.

        Args:
            part: int64, which rows.
            count: How many runs; some may be empty.
        """
        x, known = self._x[part], self._known[part]
        places = _places(x, known, min(_CUTS, x.shape[1]))
        first, second = self._first[part].gather(1, places), self._second[part].gather(1, places)
        # Cost of the run from each place (last axis) to each place (the one before).
        number = (places[:, :, None] - places[:, None]).double()
        total = first[:, :, None] - first[:, None]
        run = second[:, :, None] - second[:, None] - total.square() / number.clamp(min=1)
        run = torch.where(number < 0, torch.inf, run.clamp(min=0))
        best = [torch.full_like(first, torch.inf)]
        best[0][:, 0] = 0
        tried = torch.empty_like(run)  # one buffer: fresh memory for each sum takes longer than the sum
        for _ in range(count):
            best.append(torch.add(best[-1][:, None], run, out=tried).amin(2))
        end = torch.full((len(part), 1), places.shape[1] - 1)
        centres = []
        for before in reversed(best[:-1]):
            to_end = run.gather(1, end[:, :, None].expand(-1, 1, run.shape[2]))[:, 0]
            start = (before + to_end).argmin(1, keepdim=True)
            size = places.gather(1, end) - places.gather(1, start)
            mean = (first.gather(1, end) - first.gather(1, start)) / size.clamp(min=1)
            nearest = x.gather(1, places.gather(1, end).clamp(max=x.shape[1] - 1))
            centres.append(torch.where(size > 0, mean, nearest))
            end = start
        return torch.cat(centres[::-1], 1)

    def _clusters(self, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Count, sum and sum of squares of the values nearest to each centre; a tie goes to the lower one."""
        middles = ((centres[:, 1:] + centres[:, :-1]) / 2).contiguous()
        ends = torch.searchsorted(self._x, middles, right=True).minimum(self._known)
        edges = torch.cat([torch.zeros_like(self._known), ends, self._known], 1)
        first, second = self._first.gather(1, edges), self._second.gather(1, edges)
        return edges.diff(dim=1).double(), first.diff(dim=1), second.diff(dim=1)


def _quantiles(x: Tensor, known: Tensor, count: int) -> Tensor:
    share = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    return x.gather(1, (share * known).long().minimum((known - 1).clamp(min=0)))


def _steps(x: Tensor, known: Tensor, count: int) -> Tensor:
    share = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    low, high = x[:, :1], x.gather(1, (known - 1).clamp(min=0))
    return low + share * (high - low)


def _places(x: Tensor, known: Tensor, count: int) -> Tensor:
    """Places to cut sorted rows at, from 0 to all: spread evenly by rank and by density^(1/3), half each.

    Args:
        x: float64 [rows, values].
        known: int64 [rows, 1], how many of them count.
        count: How many pieces there are between places; all values apart where that is as many.
    """
    pieces = torch.arange(count + 1, device=x.device)
    if count >= x.shape[1]:
        return pieces.minimum(known)
    measure = _measure(x)
    rank = torch.arange(x.shape[1], dtype=torch.float64, device=x.device).minimum(known) / known.clamp(min=1)
    mixed = rank + measure / measure[:, -1:].clamp(min=1e-300)
    inner = torch.searchsorted(mixed, (pieces[1:-1].double() / count * mixed[:, -1:]).contiguous())
    ends = torch.zeros_like(known), known
    return torch.cat([ends[0], inner.minimum(known), ends[1]], 1)


def _measure(x: Tensor) -> Tensor:
    """Sums of gaps to the power of 2/3, density^(1/3) times the gap each, up to every value."""
    return torch.cat([x.new_zeros(len(x), 1), x.diff(dim=1).clamp(min=0).pow(2 / 3).cumsum(1)], 1)


def _companded(x: Tensor, known: Tensor, count: int) -> Tensor:
    """Values at equal shares of the sum of these."""
    measure = _measure(x)
    share = (torch.arange(count, dtype=torch.float64, device=x.device) + 0.5) / count
    index = torch.searchsorted(measure, (share * measure[:, -1:]).contiguous())
    return x.gather(1, index.minimum((known - 1).clamp(min=0)))
