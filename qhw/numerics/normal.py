# SPDX-License-Identifier: Apache-2.0
"""Channels as normal distributions: what a batch norm tells of its output, and its moments after clipping."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.errors import RangeError

__all__ = ["ChannelNormal"]


@dataclass(frozen=True)
class ChannelNormal:
    """Mean and standard deviation of every channel of a tensor.

    Args:
        mean: float64 [channels], in the units of the tensor.
        std: float64 [channels] >= 0.

    Raises:
        RangeError: the shapes differ, or a value is not finite or a std negative.
    """

    mean: Tensor
    std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.std.shape or self.mean.dim() != 1:
            raise RangeError(
                f"normal: mean and std must be [channels]; got {list(self.mean.shape)} and {list(self.std.shape)}. "
                "Give one value per channel."
            )
        if not bool(torch.isfinite(self.mean).all() & torch.isfinite(self.std).all() & (self.std >= 0).all()):
            raise RangeError("normal: mean and std must be finite, std not negative. Repair the statistics.")

    def scaled(self, factor: Tensor) -> "ChannelNormal":
        """That of factor * x, factor float64 [channels]."""
        return ChannelNormal(self.mean * factor, self.std * factor.abs())

    def shifted(self, offset: Tensor) -> "ChannelNormal":
        """That of x + offset, offset float64 [channels]."""
        return ChannelNormal(self.mean + offset, self.std)

    def clipped(self, low: float | Tensor = -math.inf, high: float | Tensor = math.inf) -> "ChannelNormal":
        """Mean and standard deviation of clip(x, low, high) for a normal x.

            a = (low - mean) / std, b = (high - mean) / std; n, P: density and distribution of the standard normal
            m   = std (n(a) - n(b)) + mean (P(b) - P(a)) + low P(a) + high (1 - P(b))
            var = E[x^2; a < x < b] + low^2 P(a) + high^2 (1 - P(b)) - m^2
            E[x^2; a < x < b] = (mean^2 + std^2) (P(b) - P(a)) + std ((low + mean) n(a) - (high + mean) n(b))

        Args:
            low: Lower bound, a number or float64 [channels]; -inf: none.
            high: Upper bound; inf: none.

        Returns:
            ChannelNormal: exact for channels with std 0, too.

        Reference:
            Nagel et al., 2021, arXiv:2106.08295, eq. 28 (low 0); Nagel et al., 2019, arXiv:1906.04721, appendix C.
        """
        low, high = torch.as_tensor(low, dtype=torch.float64), torch.as_tensor(high, dtype=torch.float64)
        std = self.std.clamp(min=torch.finfo(torch.float64).tiny)
        a, b = (low - self.mean) / std, (high - self.mean) / std
        below, above = _distribution(a), _distribution(-b)
        inside = (1.0 - below - above).clamp(min=0.0)
        at_low, at_high = _density(a), _density(b)
        # An absent bound has no weight; inf * 0 would be NaN.
        finite_low, finite_high = torch.nan_to_num(low, neginf=0.0), torch.nan_to_num(high, posinf=0.0)
        mean = std * (at_low - at_high) + self.mean * inside + finite_low * below + finite_high * above
        square = (self.mean.square() + std.square()) * inside
        square = square + std * ((finite_low + self.mean) * at_low - (finite_high + self.mean) * at_high)
        square = square + finite_low.square() * below + finite_high.square() * above
        variance = (square - mean.square()).clamp(min=0.0)
        fixed = self.std == 0
        sure = self.mean.clamp(min=low).clamp(max=high)
        return ChannelNormal(torch.where(fixed, sure, mean), torch.where(fixed, 0.0, variance.sqrt()))


def _density(x: Tensor) -> Tensor:
    return torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def _distribution(x: Tensor) -> Tensor:
    result: Tensor = torch.special.ndtr(x)
    return result
