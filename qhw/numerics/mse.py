# SPDX-License-Identifier: Apache-2.0
"""Range search: the legal scale and zero point with the least squared quantization error."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.numerics.affine import check_range, covering_scale, qparams_from_range, scale_and_zero_point
from qhw.numerics.granularity import Granularity, PerTensor, parameter_shape, range_of, to_rows
from qhw.numerics.grid import Grid, legal_scale, scale_candidates
from qhw.numerics.qparams import QParams
from qhw.numerics.squared_error import HistogramError, TensorError
from qhw.numerics.statistics import Histogram

# Squared error of candidates: scale float32 [candidates, parameters], zero point int32 alike -> float64 alike.
ErrorOf = Callable[[Tensor, Tensor], Tensor]

_CANDIDATES = 100
# A second pass tries tenths of the first one's step, up to the neighbouring candidates.
_FINER = torch.arange(9, -10, -1, dtype=torch.float64) / 10 / _CANDIDATES
# Free zero point: 20 x 20 fractions of the two ends of the range, then twice 9 x 9 around the best, each 4 times finer.
_COARSE = 20
_ZOOM = 4
_ZOOMS = 2


def mse_qparams_from_histogram(histogram: Histogram, grid: Grid) -> QParams:
    """Per-tensor qparams that minimize the squared error of the values a histogram counted.

    Never worse than the min-max range, which is one of the candidates. Values count as their bin's centre.

    Args:
        histogram: What was seen.
        grid: What is legal; only legal scales and zero points are tried.

    Returns:
        QParams: per tensor.

    Raises:
        CalibrationError: the histogram is empty.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eq. 16. Differs: the search covers fractions of the range seen, without
        the margin of 0.5 above it; on a grid that covers the range a larger scale only rounds more coarsely.
    """
    low, high = histogram.min.reshape(1), histogram.max.reshape(1)
    best = _search(low, high, grid, HistogramError(histogram, grid))
    scale, zero_point = best.scale.reshape(()), best.zero_point.reshape(())
    return QParams(scale, zero_point, grid.quant_min, grid.quant_max, PerTensor())


def mse_qparams_from_tensor(
    w: Tensor,
    grid: Grid,
    granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
    name: str = "tensor",
    *,
    clipping_weight: float = 1.0,
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
    error = TensorError(to_rows(w, granularity), grid, clipping_weight)
    best = _search(low.reshape(-1), high.reshape(-1), grid, error)
    scale, zero_point = best.scale.reshape(shape), best.zero_point.reshape(shape)
    return QParams(scale, zero_point, grid.quant_min, grid.quant_max, granularity)


@dataclass
class _Best:
    """The best candidate so far of each parameter; an equal one does not replace an earlier one."""

    scale: Tensor
    zero_point: Tensor
    error: Tensor

    def take(self, scale: Tensor, zero_point: Tensor, error_of: ErrorOf) -> Tensor:
        """Try candidates [candidates, P]; return the index of the best among these, [P]."""
        errors = error_of(scale, zero_point)
        index = errors.argmin(0)
        error = errors.gather(0, index[None])[0]
        better = error < self.error
        self.scale = torch.where(better, scale.gather(0, index[None])[0], self.scale)
        self.zero_point = torch.where(better, zero_point.gather(0, index[None])[0], self.zero_point)
        self.error = torch.where(better, error, self.error)
        return index


def _search(low: Tensor, high: Tensor, grid: Grid, error_of: ErrorOf) -> _Best:
    """Best legal qparams for ranges [P]; the first candidate is the min-max range."""
    scale, zero_point = scale_and_zero_point(low, high, grid)
    best = _Best(scale, zero_point, error_of(scale[None], zero_point[None])[0])
    low, high = low.double().clamp(max=0.0), high.double().clamp(min=0.0)
    if grid.zero_point is None:
        _search_ranges(low, high, grid, error_of, best)
    for zero_point_code in grid.zero_points:
        _search_scales(covering_scale(low, high, grid, zero_point_code), zero_point_code, grid, error_of, best)
    return best


def _search_scales(covering: Tensor, zero_point: int, grid: Grid, error_of: ErrorOf, best: _Best) -> None:
    """One-dimensional search over legal scales up to the covering one, around a fixed zero point."""
    scale = scale_candidates(covering, grid, _CANDIDATES)
    index = best.take(scale, torch.full_like(scale, zero_point, dtype=torch.int32), error_of)
    if grid.scale_kind == "float32":
        fraction = 1.0 - index.double() / _CANDIDATES
        fractions = (fraction + _FINER.to(covering.device)[:, None]).clamp(max=1.0)
        scale = legal_scale(covering * fractions, grid)
        best.take(scale, torch.full_like(scale, zero_point, dtype=torch.int32), error_of)


def _search_ranges(low: Tensor, high: Tensor, grid: Grid, error_of: ErrorOf, best: _Best) -> None:
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
