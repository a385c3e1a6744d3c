# SPDX-License-Identifier: Apache-2.0
"""What is left to know of a batch norm that was folded: enough to take it out again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qhw.errors import RangeError
from qhw.numerics.normal import ChannelNormal

__all__ = ["FoldedBatchNorm"]


@dataclass(frozen=True)
class FoldedBatchNorm:
    """A batch norm that is part of the weights and bias before it.

    Args:
        inner_std: float64 [channels] > 0; sqrt(var + eps) of what it normalized.
        eps: What it added to the variance.
        momentum: Of its running statistics; None averages over all batches.
        normal: Mean (beta) and standard deviation (|gamma|) of its output, in step with all that was done to the
            weights since.
    """

    inner_std: Tensor
    eps: float
    momentum: float | None
    normal: ChannelNormal

    def as_dict(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors for safetensors, and plain fields; `from_dict` is the inverse."""
        tensors = {"inner_std": self.inner_std, "mean": self.normal.mean, "std": self.normal.std}
        return tensors, {"eps": self.eps, "momentum": self.momentum}

    @classmethod
    def from_dict(cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> "FoldedBatchNorm":
        """What `as_dict` took apart.

        Raises:
            RangeError: a field is missing or out of its range.
        """
        try:
            momentum = header["momentum"]
            inner_std = tensors["inner_std"].double()
            normal = ChannelNormal(tensors["mean"].double(), tensors["std"].double())
            found = cls(inner_std, float(header["eps"]), None if momentum is None else float(momentum), normal)
        except (KeyError, TypeError, ValueError) as error:
            raise RangeError(f"batch norm: saved form is damaged ({error!r}). Quantize again.") from error
        if inner_std.shape != normal.std.shape or not bool(torch.isfinite(inner_std).all() & (inner_std > 0).all()):
            raise RangeError("batch norm: inner_std must be positive, one per channel. Quantize again.")
        return found
