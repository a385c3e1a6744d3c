# SPDX-License-Identifier: Apache-2.0
"""Range search for logits: the legal scale and zero point that change the softmax least."""

import torch
from torch import Tensor

from qhw.errors import CalibrationError
from qhw.numerics.affine import check_range
from qhw.numerics.granularity import PerTensor
from qhw.numerics.grid import Grid
from qhw.numerics.mse import least_loss
from qhw.numerics.qparams import QParams

# torch splits a sum among threads from 32,768 elements on; below, its bytes do not depend on the thread count.
_BLOCK = 32_000
# (1) in float32 while no logit moves further from the mean change of its row, which the softmax does not see:
# exp(d) - 1 keeps the digits that a difference of logarithms would lose.
_SMALL = 1.0
# Square of a float32's last digit: rows that only move as a whole stay below it, and count as unchanged.
_NOISE = 1e-13


def cross_entropy_qparams(logits: Tensor, grid: Grid, name: str = "tensor") -> QParams:
    """Per-tensor qparams that minimize the cross-entropy between the softmax of logits and that of their image.

        argmin over (q_min, q_max) of H(softmax(v), softmax(v_hat)),  H(p, q) = -sum p log q        (17)

    Summed over the rows. Never worse than the min-max range, which is one of the candidates; the others are those of
    `mse_qparams_from_tensor`.

    Args:
        logits: float [rows, classes]; computed in float32.
        grid: What is legal; only legal scales and zero points are tried.
        name: The tensor's name, for messages.

    Returns:
        QParams: per tensor.

    Raises:
        CalibrationError: there are no logits.
        RangeError: they hold a NaN or an infinite value.

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, eq. 17.
    """
    logits = logits.detach().float()
    if logits.numel() == 0:
        raise CalibrationError(
            f"{name}: cross-entropy needs at least one row of logits; got none. Pass calibration data that reaches "
            "this tensor."
        )
    low, high = logits.min().reshape(1), logits.max().reshape(1)
    check_range(low, high, name)
    best = least_loss(low, high, grid, CrossEntropy(logits, grid))
    scale, zero_point = best.scale.reshape(()), best.zero_point.reshape(())
    return grid.qparams(scale, zero_point, PerTensor())


class CrossEntropy:
    """Cross-entropy between the softmax of logits and that of their images on a grid, beyond the entropy of the former.

    Summed over the rows, in nats. With p = softmax(v), d = v_hat - v, per row:

        H(p, softmax(v_hat)) - H(p, p) = log(sum p exp(d)) - sum p d                    (1)

    Args:
        logits: float32 [rows, classes], finite.
        grid: Its code bounds, or its elements.
    """

    def __init__(self, logits: Tensor, grid: Grid) -> None:
        self._grid = grid
        self._logits = torch.split(logits, max(1, _BLOCK // logits.shape[1]))
        self._norms = [torch.logsumexp(rows.double(), 1) for rows in self._logits]
        self._probabilities = [
            (rows.double() - norms[:, None]).exp().float()
            for rows, norms in zip(self._logits, self._norms, strict=True)
        ]

    def __call__(self, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Loss of each candidate.

        Args:
            scale: float32 [candidates, 1].
            zero_point: int32 [candidates, 1].

        Returns:
            Tensor: float64 [candidates, 1].
        """
        total = torch.zeros(scale.shape, dtype=torch.float64, device=scale.device)
        for block in zip(self._logits, self._norms, self._probabilities, strict=True):
            for candidate, zero in enumerate(zero_point[:, 0].tolist()):
                total[candidate] += self._block_loss(*block, scale[candidate], zero)
        return total

    def _block_loss(self, rows: Tensor, norms: Tensor, probabilities: Tensor, scale: Tensor, zero_point: int) -> Tensor:
        low, high = self._grid.quant_min - zero_point, self._grid.quant_max - zero_point
        elements, quotient = self._grid.elements, rows / scale
        code = quotient.round_().clamp_(low, high) if elements is None else elements.round_to(quotient)
        image = code.mul_(scale)
        change = image - rows
        mean = _row_sums(probabilities * change)
        centred = change.sub_(mean.float()[:, None])
        smallest, largest = centred.aminmax()
        if max(-smallest.item(), largest.item()) <= _SMALL:
            rest = _row_sums(probabilities * centred)
            loss = torch.log1p(_row_sums(centred.expm1_().mul_(probabilities))) - rest
            return torch.where(loss < _NOISE, 0.0, loss).sum()
        highest = image.amax(1, keepdim=True)
        norm = _row_sums(image.sub_(highest).exp_()).log() + highest[:, 0]
        return (norm - norms - mean).sum()


def _row_sums(x: Tensor) -> Tensor:
    """Sums of the rows, float64 [rows], in an order that does not depend on the thread count."""
    parts = [part.sum(1).double() for part in torch.split(x, _BLOCK, dim=1)]
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
