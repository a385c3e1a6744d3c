# SPDX-License-Identifier: Apache-2.0
"""Batch norm in training: kept behind its operator, or folded into it at each step."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qhw.errors import TrainingError
from qhw.graph.switching import BatchNorm
from qhw.numerics import FakeQuantizer

__all__ = ["DoubleForward", "KeptNorm", "NormLayer", "OperatorCall", "SyncedBatchNorm", "is_distributed"]


class OperatorCall:
    """A convolution or linear operator as a function of input and weight, without a bias.

    Args:
        target: The ATen operator.
        rest: Its positional arguments behind the bias.
        kwargs: Its named arguments.
    """

    def __init__(self, target: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._target = target
        self._rest = rest
        self._kwargs = kwargs

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = self._target(x, weight, None, *self._rest, **self._kwargs)
        return result


class SyncedBatchNorm(BatchNorm):
    """Batch norm whose batch is that of all processes of a distributed run, so that ranks keep equal statistics.

    Alone it is the plain batch norm. Biased variance normalizes, the unbiased one is averaged, as in torch.

    Args:
        momentum: Share of each batch in the running statistics; None averages over all batches.
        eps: What is added to the variance.
        name: Of the layer, for messages.

    Attributes:
        is_made_again: Whether the one reader of the output makes it again for its gradient: the output then carries
            what it is made of. False at the start.
    """

    def __init__(self, momentum: float | None, eps: float, name: str) -> None:
        super().__init__(momentum, eps)
        self.name = name
        self.is_made_again = False

    @classmethod
    def taking(cls, norm: BatchNorm, name: str) -> "SyncedBatchNorm":
        """One with the tensors of another batch norm."""
        made = cls(norm.momentum, norm.eps, name)
        made._parameters.update(norm._parameters)
        made._buffers.update(norm._buffers)
        return made.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        """The normalized tensor.

        Raises:
            TrainingError: a batch in training has one value per channel.
        """
        if not self.training:
            return super().forward(x)
        if not is_distributed():
            self._check_count(x.numel() // max(x.shape[1], 1))
            if self.is_made_again and x.dtype == torch.float32 and not torch.compiler.is_compiling():
                return self._with_origin(x)
            return super().forward(x)
        mean, var, count = self.statistics(x)
        self.update(mean, var, count)
        shape = (1, -1, *[1] * (x.dim() - 2))
        scale = torch.rsqrt(var + self.eps) if self.weight is None else self.weight * torch.rsqrt(var + self.eps)
        shift = -mean * scale if self.bias is None else self.bias - mean * scale
        return (x * scale.reshape(shape) + shift.reshape(shape)).to(x.dtype)

    def _with_origin(self, x: Tensor) -> Tensor:
        """In training and alone: the normalized tensor; `made_of` has x, what multiplied it and what was added."""
        share = self.count_batch()
        tensors = self.weight, self.bias, self.running_mean, self.running_var
        normalized, mean, deviation = torch.native_batch_norm(x, *tensors, True, share, self.eps)
        with torch.no_grad():
            factor = deviation if self.weight is None else deviation * self.weight
            offset = -mean * factor if self.bias is None else self.bias - mean * factor
        normalized.made_of = (x, factor, offset)  # type: ignore[attr-defined]
        return normalized

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance of each channel over the batch of all processes, differentiable; values per channel.

        Raises:
            TrainingError: there is one value per channel.
        """
        found = batch_statistics(x)
        self._check_count(found[2])
        return found

    def _check_count(self, count: int) -> None:
        if count < 2:
            raise TrainingError(
                f"{self.name}: a batch in training must hold 2 values per channel or more; got {count}. Enlarge the "
                "batch, drop a last batch of one sample, or call eval() to run a single one."
            )

    @torch.no_grad()
    def update(self, mean: Tensor, var: Tensor, count: int) -> None:
        """Move the running statistics towards those of a batch.

        Args:
            mean: float32 [channels].
            var: float32 [channels], biased.
            count: Values per channel.
        """
        if self.running_mean is None or self.running_var is None:
            return
        share = self.count_batch()
        self.running_mean.lerp_(mean.detach(), share)
        self.running_var.lerp_(var.detach() * (count / max(count - 1, 1)), share)


def is_distributed() -> bool:
    """Whether several processes train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance of each channel over the batch of all processes, differentiable; values per channel.

    Computed in float32, whatever x is.
    """
    x = x.float()
    axes = [0, *range(2, x.dim())]
    count = x.numel() // x.shape[1]
    if not is_distributed():
        var, mean = torch.var_mean(x, axes, correction=0)
        return mean, var, count
    total = _sum_over_ranks(torch.cat([x.sum(axes), x.new_tensor([float(count)])]))
    count_all = total[-1].detach()
    mean = total[:-1] / count_all
    centred = x - mean.reshape(1, -1, *[1] * (x.dim() - 2))
    var = _sum_over_ranks(centred.square().sum(axes)) / count_all
    return mean, var, int(count_all)


class _SumOverRanks(torch.autograd.Function):
    """The sum over all processes; each process gets the sum of all gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        total = grads[0].clone()
        dist.all_reduce(total)
        return total


def _sum_over_ranks(x: Tensor) -> Tensor:
    result: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]
    return result


class NormLayer(nn.Module):
    """An operator with weights and the batch norm behind it, as one module of input and weight.

    Args:
        call: The operator, without a bias.
        batch_norm: What normalizes its output.
    """

    def __init__(self, call: OperatorCall, batch_norm: SyncedBatchNorm) -> None:
        super().__init__()
        self.call = call
        self.batch_norm = batch_norm


class KeptNorm(NormLayer):
    """Quantized weights, then the batch norm as it is; merged into the scales afterwards.

        y[k] = gamma[k] s[k] / sqrt(var[k] + eps) (W_int[k] x) + b[k]               (41)

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.2, eq. 41.
    """

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The normalized output; `weight` comes quantized."""
        normalized: Tensor = self.batch_norm(self.call(x, weight))
        return normalized


class DoubleForward(NormLayer):
    """Weights with the batch norm's running statistics folded in, quantized; the batch's own restored behind.

    A step in training computes the operator twice: with plain weights for the batch's mean and deviation, then with
    quantized gamma W / sigma, sigma being the running one, multiplied by sigma / sigma_batch. Once frozen, or in eval
    mode, the running statistics serve all.

    Args:
        call: The operator, without a bias.
        batch_norm: What normalizes its output.
        quantizer: Of the folded weights.
        freeze_after: Training steps after which the statistics are frozen; None: never.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 4.2; Krishnamoorthi, 2018, arXiv:1806.08342, section 4.2.
    """

    num_steps: Tensor

    def __init__(
        self, call: OperatorCall, batch_norm: SyncedBatchNorm, quantizer: FakeQuantizer, freeze_after: int | None
    ) -> None:
        super().__init__(call, batch_norm)
        self.quantizer = quantizer
        self.freeze_after = freeze_after
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The normalized output; `weight` comes as it is stored, in float."""
        norm = self.batch_norm
        assert norm.running_mean is not None and norm.running_var is not None
        if self.training:
            self.num_steps.add_(1)
        if not self.training or (self.freeze_after is not None and int(self.num_steps) > self.freeze_after):
            scale, shift = self._affine(norm.running_mean, norm.running_var)
            return _along(self.call(x, self.quantizer(_scaled(weight, scale))), None, shift)
        mean, var, count = norm.statistics(self.call(x, weight))
        norm.update(mean, var, count)
        ratio = torch.sqrt((norm.running_var + norm.eps) / (var + norm.eps))
        scale, _ = self._affine(norm.running_mean, norm.running_var)
        _, shift = self._affine(mean, var)
        return _along(self.call(x, self.quantizer(_scaled(weight, scale))), ratio, shift)

    @torch.no_grad()
    def folded(self, weight: Tensor) -> Tensor:
        """The weight with the running statistics folded in, as eval mode quantizes it: to the bit."""
        norm = self.batch_norm
        assert norm.running_mean is not None and norm.running_var is not None
        return _scaled(weight, self._affine(norm.running_mean, norm.running_var)[0])

    def _affine(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """What the batch norm multiplies by, and what it adds: [channels]."""
        norm = self.batch_norm
        scale = torch.rsqrt(var + norm.eps)
        scale = scale if norm.weight is None else scale * norm.weight
        return scale, -mean * scale if norm.bias is None else norm.bias - mean * scale


def _scaled(weight: Tensor, factor: Tensor) -> Tensor:
    """factor[k] weight[k] along axis 0."""
    return weight * factor.reshape(-1, *[1] * (weight.dim() - 1))


def _along(y: Tensor, factor: Tensor | None, offset: Tensor) -> Tensor:
    """factor[k] y[k] + offset[k] along axis 1."""
    shape = (1, -1, *[1] * (y.dim() - 2))
    moved = y * factor.reshape(shape) + offset.reshape(shape) if factor is not None else y + offset.reshape(shape)
    return moved.to(y.dtype)
