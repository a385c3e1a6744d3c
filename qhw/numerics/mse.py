# SPDX-License-Identifier: Apache-2.0
"""Range search: the legal scale and zero point with the least squared quantization error."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from qhw.numerics.affine import check_range, covering_scale, qparams_from_range, scale_and_zero_point
from qhw.numerics.golden import golden_section
from qhw.numerics.granularity import Granularity, PerTensor, parameter_shape, range_of, to_rows
from qhw.numerics.grid import Grid, legal_scale, scale_candidates
from qhw.numerics.qparams import QParams
from qhw.numerics.squared_error import HistogramError, TensorError
from qhw.numerics.statistics import Histogram

Search = Literal["grid", "golden"]
"""How the scale around a fixed zero point is searched: 100 fractions of the range and tenths around the best, or 8
fractions and a golden section around the best. A free zero point and listed scales are searched by grid either way."""

# Loss of candidates: scale float32 [candidates, parameters], zero point int32 alike -> float64 alike.
ErrorOf = Callable[[Tensor, Tensor], Tensor]

_CANDIDATES = 100
# A second pass tries tenths of the first one's step, up to the neighbouring candidates.
_FINER = torch.arange(9, -10, -1, dtype=torch.float64) / 10 / _CANDIDATES
# A golden section starts between the neighbours of the best of these: with a far outlier and few bits the loss has a
# second minimum. It ends where the second pass of the grid does.
_BRACKET = torch.tensor([1.0, 0.64, 0.32, 0.16, 0.08, 0.04, 0.02, 0.01], dtype=torch.float64)
_TOLERANCE = 0.1 / _CANDIDATES
# Free zero point: 20 x 20 fractions of the two ends of the range, then twice 9 x 9 around the best, each 4 times finer.
_COARSE = 20
_ZOOM = 4
_ZOOMS = 2


def mse_qparams_from_histogram(histogram: Histogram, grid: Grid, *, search: Search = "grid") -> QParams:
    """Per-tensor qparams that minimize the squared error of the values a histogram counted.

    Never worse than the min-max range, which is one of the candidates. Values count as their bin's centre.

    Args:
        histogram: What was seen.
        grid: What is legal; only legal scales and zero points are tried.
        search: How a fixed zero point's scale is searched.

    Returns:
        QParams: per tensor.

    Raises:
        CalibrationError: the histogram is empty.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eq. 16. Differs: the search covers fractions of the range seen, without
        the margin of 0.5 above it; on a grid that covers the range a larger scale only rounds more coarsely.
    """
    low, high = histogram.min.reshape(1), histogram.max.reshape(1)
    best = least_loss(low, high, grid, HistogramError(histogram, grid), search)
    scale, zero_point = best.scale.reshape(()), best.zero_point.reshape(())
    return grid.qparams(scale, zero_point, PerTensor())


def mse_qparams_from_tensor(
    w: Tensor,
    grid: Grid,
    granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
    name: str = "tensor",
    *,
    clipping_weight: float = 1.0,
    search: Search = "grid",
) -> QParams:
    """Qparams that minimize the squared error of a tensor, each parameter by itself.

    Never worse than the min-max range, which is one of the candidates. Dead channels keep what
    `qparams_from_range` gives them.

    Args:
        w: float [*shape].
        grid: What is legal; only legal scales and zero points are tried.
        granularity: Which elements share a scale.
        name: The tensor's name, for messages.
        clipping_weight: How much the squared error of a clipped element counts. Clipping shrinks a tensor's largest
            values all the same way, while rounding errors average out over a sum of products, so that more than 1
            (eq. 16) may serve few bits.
        search: How a fixed zero point's scales are searched.

    Returns:
        QParams: scale float32 [*P], zero_point int32 [*P].

    Raises:
        RangeError: w has a NaN or an infinite value, or the granularity does not fit its shape.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eq. 16. Differs: as `mse_qparams_from_histogram`.
    """
    w = w.detach().float()
    low, high = range_of(w, granularity)
    check_range(low, high, name)
    if w.numel() == 0:
        return qparams_from_range(low, high, grid, granularity, name)
    shape = parameter_shape(granularity, tuple(w.shape))
    # A ragged last group is padded with what adds no error: 0.0 where the grid has it, else NaN, which is passed over.
    padding = 0.0 if grid.elements is None or grid.elements.has_zero else math.nan
    error = TensorError(to_rows(w, granularity, padding), grid, clipping_weight)
    best = least_loss(low.reshape(-1), high.reshape(-1), grid, error, search)
    scale, zero_point = best.scale.reshape(shape), best.zero_point.reshape(shape)
    return grid.qparams(scale, zero_point, granularity)


@dataclass
class Best:
    """The best candidate so far of each parameter; an equal one does not replace an earlier one.

    Attributes:
        scale: float32 [P], legal.
        zero_point: int32 [P].
        error: float64 [P], the loss.
    """

    scale: Tensor
    zero_point: Tensor
    error: Tensor

    def take(self, scale: Tensor, zero_point: Tensor, error_of: ErrorOf) -> Tensor:
        """Try candidates [candidates, P]; return the index of the best among these, [P]."""
        return self.keep(scale, zero_point, error_of(scale, zero_point))

    def keep(self, scale: Tensor, zero_point: Tensor, errors: Tensor) -> Tensor:
        """As `take`, with the errors known, [candidates, P]."""
        index = errors.argmin(0)
        error = errors.gather(0, index[None])[0]
        better = error < self.error
        self.scale = torch.where(better, scale.gather(0, index[None])[0], self.scale)
        self.zero_point = torch.where(better, zero_point.gather(0, index[None])[0], self.zero_point)
        self.error = torch.where(better, error, self.error)
        return index


def least_loss(low: Tensor, high: Tensor, grid: Grid, error_of: ErrorOf, search: Search = "grid") -> Best:
    """The legal qparams of least loss for ranges; the first candidate is the min-max range.

    Args:
        low: float [P], lowest values seen.
        high: float [P], highest values seen.
        grid: What is legal.
        error_of: The loss.
        search: How a fixed zero point's scales are searched.
    """
    scale, zero_point = scale_and_zero_point(low, high, grid)
    best = Best(scale, zero_point, error_of(scale[None], zero_point[None])[0])
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if grid.zero_point is None:
        _search_ranges(low, high, grid, error_of, best)
    search_scales = _golden_scales if search == "golden" and grid.scale_kind == "float32" else _search_scales
    for zero_point_code in grid.zero_points:
        search_scales(covering_scale(low, high, grid, zero_point_code), zero_point_code, grid, error_of, best)
    return best


def _golden_scales(covering: Tensor, zero_point: int, grid: Grid, error_of: ErrorOf, best: Best) -> None:
    """As `_search_scales`, in a fifth of the evaluations."""

    def losses(fractions: Tensor) -> Tensor:
        scale = legal_scale(covering * fractions, grid)
        zero_points = torch.full_like(scale, zero_point, dtype=torch.int32)
        errors = error_of(scale, zero_points)
        best.keep(scale, zero_points, errors)
        return errors

    bracket = _BRACKET.to(covering.device)
    index = losses(bracket[:, None]).argmin(0)
    low, high = bracket[(index + 1).clamp(max=len(bracket) - 1)], bracket[(index - 1).clamp(min=0)]
    golden_section(lambda fraction: losses(fraction[None])[0], low, high, _TOLERANCE)


def _search_scales(covering: Tensor, zero_point: int, grid: Grid, error_of: ErrorOf, best: Best) -> None:
    """One-dimensional search over legal scales up to the covering one, around a fixed zero point."""
    scale = scale_candidates(covering, grid, _CANDIDATES)
    index = best.take(scale, torch.full_like(scale, zero_point, dtype=torch.int32), error_of)
    if grid.scale_kind not in ("power_of_two", "e8m0", "fixed", "enumerated"):
        fraction = 1.0 - index.double() / _CANDIDATES
        fractions = (fraction + _FINER.to(covering.device)[:, None]).clamp(max=1.0)
        scale = legal_scale(covering * fractions, grid)
        best.take(scale, torch.full_like(scale, zero_point, dtype=torch.int32), error_of)


def _search_ranges(low: Tensor, high: Tensor, grid: Grid, error_of: ErrorOf, best: Best) -> None:
    """Search over fractions of both ends of the range, coarse to fine; scale and zero point follow from them.

    Shrinking both ends together is tried in finer steps: for one-sided data that is the whole search, and the pairs
    add nothing. So they are left out when no parameter is two-sided, without changing any parameter's result.
    """
    together = torch.arange(_CANDIDATES, 0, -1, dtype=torch.float64, device=low.device)[:, None] / _CANDIDATES
    low_fraction = high_fraction = together
    if bool(((low < 0) & (high > 0)).any()):
        coarse = torch.arange(_COARSE, 0, -1, dtype=torch.float64, device=low.device) / _COARSE
        low_pair, high_pair = _pairs(coarse)
        low_fraction, high_fraction = torch.cat([together, low_pair]), torch.cat([together, high_pair])
    low_fraction, high_fraction = low_fraction.expand(-1, len(low)), high_fraction.expand(-1, len(low))
    step = 1.0 / _COARSE
    for zoom in range(_ZOOMS + 1):
        scale, zero_point = scale_and_zero_point(low * low_fraction, high * high_fraction, grid)
        index = best.take(scale, zero_point, error_of)[None]
        if zoom == _ZOOMS:
            return
        step /= _ZOOM
        low_offset, high_offset = _pairs(torch.arange(-_ZOOM, _ZOOM + 1, dtype=torch.float64, device=low.device) * step)
        low_fraction = (low_fraction.gather(0, index) + low_offset).clamp(step, 1.0)
        high_fraction = (high_fraction.gather(0, index) + high_offset).clamp(step, 1.0)


def _pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair from a list, as two columns."""
    pairs = torch.cartesian_prod(values, values)
    return pairs[:, :1], pairs[:, 1:]
