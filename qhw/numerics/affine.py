# SPDX-License-Identifier: Apache-2.0
"""Scale and zero point from a real range, on whatever grid a format allows."""

import math

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.granularity import Granularity, PerTensor
from qhw.numerics.grid import Grid, block_scale, legal_scale
from qhw.numerics.qparams import QParams

_DEAD_SCALE = 1.0


def affine_qparams(
    min_val: Tensor,
    max_val: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
) -> QParams:
    """Scale and zero point that cover a real range, keeping 0.0 exact.

        scale      = (max(max_val, 0) - min(min_val, 0)) / (quant_max - quant_min)      (1)
        zero_point = clamp(quant_min - round_half_even(min(min_val, 0) / scale))        (2)

    (1) is computed in float64 and rounded to float32 once; (2) uses that float32 scale.

    Args:
        min_val: float32 [*P]. Lowest value seen, in the units of the tensor. P is () or (channels,).
        max_val: float32 [*P]. Highest value seen.
        quant_min: Lowest integer code, inclusive.
        quant_max: Highest integer code, inclusive; must exceed quant_min.
        granularity: Which elements share a scale; fits P.

    Returns:
        QParams: scale float32 [*P] > 0; zero_point int32 [*P] in [quant_min, quant_max].

    Raises:
        RangeError: a bound is NaN or infinite, or min_val > max_val.

    Reference:
        Jacob et al., 2018, arXiv:1712.05877, section 2.1. Differs: range is widened to contain 0.

    Example:
        >>> affine_qparams(tensor(-1.0), tensor(3.0), quant_min=0, quant_max=255).zero_point
        tensor(64, dtype=torch.int32)
    """
    return qparams_from_range(min_val, max_val, Grid(quant_min, quant_max), granularity)


def symmetric_qparams(
    max_abs: Tensor,
    *,
    quant_min: int,
    quant_max: int,
    zero_point: int = 0,
    granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
) -> QParams:
    """Scale that covers [-max_abs, max_abs] around a fixed zero point.

        scale = max_abs / min(quant_max - zero_point, zero_point - quant_min)

    A side without codes does not count, so an unsigned grid covers [0, max_abs] (paper, eq. 8b).

    Args:
        max_abs: float32 [*P] >= 0. Largest magnitude seen.
        quant_min: Lowest integer code, inclusive.
        quant_max: Highest integer code, inclusive; must exceed quant_min.
        zero_point: The code of 0.0.
        granularity: Which elements share a scale; fits P.

    Returns:
        QParams: scale float32 [*P] > 0; zero_point int32 [*P], all the same.

    Raises:
        RangeError: max_abs is negative, NaN or infinite.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eq. 8.
    """
    return qparams_from_range(-max_abs, max_abs, Grid(quant_min, quant_max, zero_point), granularity)


def qparams_from_range(
    min_val: Tensor,
    max_val: Tensor,
    grid: Grid,
    granularity: Granularity = PerTensor(),  # noqa: B008 (frozen)
    name: str = "tensor",
) -> QParams:
    """The finest legal qparams that cover a real range; 0.0 is always exact.

    Free zero point: equations (1) and (2) of `affine_qparams`. Fixed zero point z:

        scale = max(max_val / (quant_max - z), -min_val / (z - quant_min))              (3)

    a side without codes does not count: its values are clipped. With elements, quant_max - z and z - quant_min are the
    highest element and minus the lowest. An e8m0 scale follows `block_scale`. Several zero points: the one that covers
    the range with the smallest scale, the first listed on a tie. The scale is then made legal, upwards, and a free zero
    point computed from the legal scale. If the grid's highest scale is too small, the range is clipped.

    An all-zero tensor gets the legal scale at or above 1.0. In a tensor with several scales an all-zero share (a dead
    channel) gets the largest scale of the others, so that bias and multiplier stay in their ordinary range. A constant
    c has the range from 0 to c and lies on the last code. Ranges below 2**-126 * (quant_max - quant_min), denormals
    among them, get the scale 2**-126.

    Args:
        min_val: float [*P]. Lowest value seen.
        max_val: float [*P]. Highest value seen.
        grid: What is legal.
        granularity: Which elements share a scale; fits P.
        name: The tensor's name, for messages.

    Returns:
        QParams: scale float32 [*P], legal; zero_point int32 [*P].

    Raises:
        RangeError: a bound is NaN or infinite, or min_val > max_val.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eqs. 7, 8, 14, 15. Differs: (3) uses the code -2**(b-1) where it exists;
        the paper divides both sides by 2**(b-1) - 1.
    """
    check_range(min_val, max_val, name)
    scale, zero_point = scale_and_zero_point(min_val, max_val, grid)
    return grid.qparams(scale, zero_point, granularity)


def check_range(min_val: Tensor, max_val: Tensor, name: str) -> None:
    """Refuse a range that no grid can cover.

    Raises:
        RangeError: a bound is NaN or infinite, or min_val > max_val.
    """
    if min_val.numel() == max_val.numel() == 1 and -math.inf < min_val.item() <= max_val.item() < math.inf:
        return  # the common case, in a tenth of the time: it runs once for every tensor of every micro-batch
    for bound in (min_val, max_val):
        finite = torch.isfinite(bound)
        if not bool(finite.all()):
            bad = bound[~finite].flatten()[0].item()
            raise RangeError(
                f"{name}: values must be finite; got {bad} in {int((~finite).sum())} of {bound.numel()} ranges. "
                "Remove what makes NaN or inf."
            )
    if bool((min_val > max_val).any()):
        index = (min_val > max_val).flatten().nonzero()[0]
        low, high = min_val.flatten()[index].item(), max_val.flatten()[index].item()
        raise RangeError(f"{name}: min_val must not exceed max_val; got {low} and {high}. Swap them.")


def scale_and_zero_point(min_val: Tensor, max_val: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Legal scale and zero point of each range, as `qparams_from_range` defines them, without its checks.

    Args:
        min_val: float [*P], finite.
        max_val: float [*P], finite, not below min_val.
        grid: What is legal.

    Returns:
        tuple: scale float32 [*P] and zero_point int32 [*P].
    """
    # float64: max - min of two float32 may overflow float32, and the scale is rounded once.
    low, high = min_val.double().clamp(max=0.0), max_val.double().clamp(min=0.0)
    if grid.scale_kind == "e8m0":
        scale = block_scale(low, high, grid)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    if grid.zero_point is None:
        scale = legal_scale(_revive((high - low) / grid.span), grid)
        # round() on a float64 tensor is half to even.
        zero_point = (grid.quant_min - (low / scale.double()).round()).clamp(grid.quant_min, grid.quant_max)
        return scale, zero_point.to(torch.int32)
    wanted = torch.stack([covering_scale(low, high, grid, z) for z in grid.zero_points])
    blind = torch.stack([_is_clipped(low, high, grid, z) for z in grid.zero_points])
    best = torch.where(blind, torch.inf, wanted).argmin(0)
    scale = legal_scale(_revive(wanted.gather(0, best[None])[0]), grid)
    listed = torch.tensor(grid.zero_points, dtype=torch.int32, device=scale.device)
    return scale, listed[best]


def covering_scale(low: Tensor, high: Tensor, grid: Grid, zero_point: int) -> Tensor:
    """Equation (3): the smallest real scale that covers [low, high] around a fixed zero point, legal or not.

    Args:
        low: float64 [*P] <= 0.
        high: float64 [*P] >= 0.
        grid: Its code bounds, or its elements.
        zero_point: The code of 0.0.

    Returns:
        Tensor: float64 [*P] >= 0.
    """
    least, above = grid.ends(zero_point)
    below = -least
    scale = torch.zeros_like(high)
    if above:
        scale = high / above
    if below:
        scale = torch.maximum(scale, -low / below)
    return scale


def _is_clipped(low: Tensor, high: Tensor, grid: Grid, zero_point: int) -> Tensor:
    """Whether the range reaches to a side of the zero point that has no codes."""
    clipped = torch.zeros_like(low, dtype=torch.bool)
    least, most = grid.ends(zero_point)
    if not most:
        clipped |= high > 0
    if not least:
        clipped |= low < 0
    return clipped


def _revive(scale: Tensor) -> Tensor:
    """Scales with a sensible value where the range is empty: the largest of the others, or 1.0."""
    if scale.numel() == 0 or bool((scale > 0).all()):
        return scale
    largest = scale.max()
    return torch.where(scale > 0, scale, torch.where(largest > 0, largest, _DEAD_SCALE))
