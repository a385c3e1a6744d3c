# SPDX-License-Identifier: Apache-2.0
"""Batch norm and dropout that read `self.training`, because export bakes train or eval into the operator."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DROPOUT_FORMS", "BatchNorm", "Dropout"]

DROPOUT_FORMS: Mapping[str, Callable[[Tensor, float, bool], Tensor]] = MappingProxyType(
    {
        "dropout": torch.dropout,
        "feature_dropout": torch.feature_dropout,
        "alpha_dropout": torch.alpha_dropout,
        "feature_alpha_dropout": torch.feature_alpha_dropout,
    }
)
"""ATen's dropouts: of elements or of whole channels, with zeros or with the negative saturation value of SELU."""


class BatchNorm(nn.Module):
    """Batch normalization over axis 1 at any rank: float32 [batch, channels, *] -> the same shape.

    The parameters keep the names of `torch.nn.BatchNorm2d`, so a state dict fits either. A momentum of None averages
    over all batches seen, as in torch.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None

    def __init__(self, momentum: float | None, eps: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.eps = eps
        for name in ("weight", "bias"):
            self.register_parameter(name, None)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, None)

    def forward(self, x: Tensor) -> Tensor:
        factor = self.count_batch() if self.training else 0.0
        batch_statistics = self.training or self.running_mean is None
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, batch_statistics, factor, self.eps
        )

    def count_batch(self) -> float:
        """Count a batch of training; its share in the running statistics."""
        if self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                return 1.0 / float(self.num_batches_tracked)
        return 0.0 if self.momentum is None else self.momentum

    def extra_repr(self) -> str:
        return f"momentum={self.momentum}, eps={self.eps}"


class Dropout(nn.Module):
    """Dropout with probability `p` in training, identity otherwise: any shape. `form` is one of DROPOUT_FORMS."""

    def __init__(self, p: float, form: str = "dropout") -> None:
        super().__init__()
        self.p = p
        self.form = form

    def forward(self, x: Tensor) -> Tensor:
        return DROPOUT_FORMS[self.form](x, self.p, self.training)

    def extra_repr(self) -> str:
        return f"p={self.p}, form={self.form}"
