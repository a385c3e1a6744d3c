# SPDX-License-Identifier: Apache-2.0
"""Squared quantization error of many candidate scales and zero points at once, for range searches."""

import torch
from torch import Tensor

from qhw.numerics.elements import ElementSet
from qhw.numerics.grid import Grid
from qhw.numerics.statistics import BINS_PER_SIGN, Histogram

# torch splits a sum among threads from 32,768 elements on; below, its bytes do not depend on the thread count.
_BLOCK = 32_000
# Bounds x candidates held at once: 512 KB of float64, so that the passes over them stay in the cache.
_BOUNDS = 2**16
# A grid with more codes than a quarter of the bins of one sign is finer than what bin centres can tell apart.
_FINE_SPAN = BINS_PER_SIGN // 4


class HistogramError:
    """Squared error of the values in a histogram, in units of its bin width squared.

    With N, S1, S2 the count, sum and sum of squares of the bins below a bound (or of all), t = scale / bin width and
    codes k = quant_min - z ... K = quant_max - z, summing by parts over the bounds b_k = (k + 1/2) t between codes:

        error = S2 - 2 t (K S1 - sum_k S1(b_k)) + t**2 (K**2 N - sum_k (2 k + 1) N(b_k))            (1)

    which is exact for values at their bin's centre. Elements that are not evenly spaced are tried on every bin that
    holds values, to the same effect. A grid of more than 2,049 codes is finer than the bins: there the values inside
    the grid count t**2 / 12 each, those of the middle bin 0, and the clipped ones by (1) with one code.

    Args:
        histogram: What was seen.
        grid: Its code bounds, or its elements.
    """

    def __init__(self, histogram: Histogram, grid: Grid) -> None:
        self._grid = grid
        self._bin_width = histogram.bin_width
        self._centres = histogram.centres / histogram.bin_width
        counts = histogram.counts.double()
        self._counts = counts
        self._n, self._s1, self._s2 = (_prefix(counts * self._centres**power) for power in (0, 1, 2))
        self._zeros = counts[BINS_PER_SIGN - 1]

    def __call__(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Error of each candidate.

        Args:
            scale: float32 [candidates, 1].
            zero_point: int32 [candidates, 1].

        Returns:
            Tensor: float64 [candidates, 1].
        """
        t, z = scale.double() / self._bin_width, zero_point.double()
        if self._grid.elements is not None:
            return self._of_elements(t, self._grid.elements)
        if self._grid.span > _FINE_SPAN:
            return self._fine(t, z)
        size = max(1, _BOUNDS // self._grid.span)
        parts = zip(torch.split(t, size), torch.split(z, size), strict=True)
        return torch.cat([self._exact(*part) for part in parts])

    def _of_elements(self, t: Tensor, elements: ElementSet) -> Tensor:
        known = self._counts > 0
        counts, centres = self._counts[known], self._centres[known]
        size = max(1, _BOUNDS // max(len(centres), 1))
        # float32, as the quotient that is rounded when the tensor is quantized.
        errors = [
            (elements.round_to((centres / part).float()).double().mul_(part).sub_(centres).square_() * counts).sum(1)
            for part in torch.split(t, size)
        ]
        return torch.cat(errors)[:, None]

    def _exact(self, t: Tensor, z: Tensor) -> Tensor:
        k = torch.arange(self._grid.quant_min, self._grid.quant_max, dtype=torch.float64) - z
        below = _centres_below((k + 0.5) * t)
        last = self._grid.quant_max - z
        first_moment = last * self._s1[-1] - self._s1[below].sum(1, keepdim=True)
        squares = last.square() * self._n[-1] - ((2 * k + 1) * self._n[below]).sum(1, keepdim=True)
        return self._s2[-1] - 2 * t * first_moment + t.square() * squares

    def _fine(self, t: Tensor, z: Tensor) -> Tensor:
        low, high = (self._grid.quant_min - z) * t, (self._grid.quant_max - z) * t
        below, above = _centres_below(low), torch.searchsorted(self._centres, high, right=True)
        under = self._s2[below] - 2 * low * self._s1[below] + low.square() * self._n[below]
        n, s1, s2 = (moment[-1] - moment[above] for moment in (self._n, self._s1, self._s2))
        over = s2 - 2 * high * s1 + high.square() * n
        inside = self._n[above] - self._n[below] - self._zeros
        return under + over + inside * t.square() / 12


class TensorError:
    """Squared error of each row of a matrix, relative to the square of the row's power-of-two magnitude.

    Args:
        rows: float32 [parameters, elements], finite; on a grid without 0.0 also NaN, which is passed over.
        grid: Its code bounds, or its elements.
        clipping_weight: The squared error of an element that the grid clips counts this much.
    """

    def __init__(self, rows: Tensor, grid: Grid, clipping_weight: float = 1.0) -> None:
        self._grid = grid
        self._clipping_weight = clipping_weight
        fixed = grid.zero_points if len(grid.zero_points) == 1 else None
        # Plain numbers, where every candidate has the same zero point: two passes over the rows less.
        self._bounds = None if fixed is None else (grid.quant_min - fixed[0], grid.quant_max - fixed[0])
        # Every row is brought to a magnitude in [0.5, 1), exactly: the square of 1e30 would overflow float32.
        magnitude = rows.abs().nan_to_num_(0.0).amax(1, keepdim=True).double()
        self._unit = torch.ldexp(torch.ones_like(magnitude), -torch.frexp(magnitude).exponent)
        self._rows = (rows.double() * self._unit).float()

    def __call__(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Error of each candidate for each row.

        Args:
            scale: float32 [candidates, parameters].
            zero_point: int32 [candidates, parameters].

        Returns:
            Tensor: float64 [candidates, parameters].
        """
        scale = (scale.double() * self._unit[:, 0]).float()
        total = torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
        height = max(1, _BLOCK // self._rows.shape[1])
        for top in range(0, len(self._rows), height):
            band = slice(top, top + height)
            scales, zero_points = scale[:, band, None], zero_point[:, band, None].float()
            for block in torch.split(self._rows[band], _BLOCK, dim=1):
                for candidate in range(len(scale)):
                    total[candidate, band] += self._block_error(block, scales[candidate], zero_points[candidate])
        return total

    def _block_error(self, block: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        if self._grid.elements is not None:
            return self._element_error(block, scale, self._grid.elements)
        code = (block / scale).round_()
        nearest = code.clone() if self._clipping_weight != 1.0 else None
        if self._bounds is None:
            code.add_(zero_point).clamp_(self._grid.quant_min, self._grid.quant_max).sub_(zero_point)
        else:
            code.clamp_(*self._bounds)
        error = torch.addcmul(block, code, scale, value=-1.0).square_()
        if nearest is not None:
            error = torch.where(nearest == code, error, error * self._clipping_weight)
        return error.sum(1).double()

    def _element_error(self, block: Tensor, scale: Tensor, elements: ElementSet) -> Tensor:
        quotient = block / scale
        error = torch.addcmul(block, elements.round_to(quotient), scale, value=-1.0).square_()
        if self._clipping_weight != 1.0:
            low, high = elements.edges
            inside = (quotient >= low) & (quotient <= high)
            error = torch.where(inside, error, error * self._clipping_weight)
        return error.nan_to_num_(0.0).sum(1).double()


def _centres_below(bound: Tensor) -> Tensor:
    """How many bin centres lie below each bound, in bin widths: `searchsorted` in a fifth of its time.

    Centres are 0 for the middle bin and +-(i + 1/2) for i = 1 ... 8191, so the count is arithmetic.

    Args:
        bound: float64 [*shape].

    Returns:
        Tensor: int32 [*shape], 0 to 16383.
    """
    positive = (bound - 0.5).ceil_().clamp_(1, BINS_PER_SIGN)
    negative = (bound + 0.5).ceil_().clamp_(1 - BINS_PER_SIGN, 0)
    return torch.where(bound > 0, positive, negative).to(torch.int32).add_(BINS_PER_SIGN - 1)


def _prefix(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... all values."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
