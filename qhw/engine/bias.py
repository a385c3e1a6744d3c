# SPDX-License-Identifier: Apache-2.0
"""Scales of integer biases: input scale times weight scale, so that a bias adds onto the accumulator as it is."""

import logging
from dataclasses import replace

import torch
from torch import Tensor

from qhw.engine.work import Work
from qhw.errors import PlanError, RangeError
from qhw.graph import QuantPoint
from qhw.numerics import PerAxis, PerGroup, PerTensor, QParams, legal_scale
from qhw.numerics.grid import SMALLEST_SCALE
from qhw.schema import Bias

__all__ = ["bias_qparams"]

_log = logging.getLogger("qhw")


def bias_qparams(work: Work) -> dict[str, QParams]:
    """QParams of every bias point, once inputs and weights have theirs.

        scale = float32(input scale * weight scale), zero point 0      (Nagel et al. 2021, section 2.1)

    A bias scale of its own is the finest that covers the bias. A bias that would leave its width, as that of a dead
    channel with weights near 0, gets coarser weights: its channel's weight scale grows to the smallest legal one with
    which it fits. A 32-bit bias that needs this is so large that the weights lose at most some 2**-15 of it. Where the
    weight scale is not the channel's own, the bias is refused.

    Returns:
        Group -> QParams with scale [] or [out_channels].

    Raises:
        PlanError: a bias does not fit its width, or its weight has a scale per group of inputs.
        RangeError: a bias holds NaN or infinite values; names the parameter.
    """
    found: dict[str, QParams] = {}
    for point in work.plan.points:
        if point.role == "bias":
            rule = work.target.biases[point.format]
            if rule.scale != "own":
                _coarsen_weights(work, point, _bits(rule))
            found[point.group] = _qparams(work, point, rule)
    return found


def _bits(rule: Bias) -> int:
    return int(rule.bits) if isinstance(rule.bits, int) else 32


def _coarsen_weights(work: Work, point: QuantPoint, bits: int) -> None:
    """Let the weight scales of channels grow whose bias would leave its width."""
    weight = next(p for p in work.plan.points if p.role == "weight" and point.operator in p.consumers)
    found = work.qparams[weight.group]
    bias = work.graph.tensor(point.tensor).detach().double().abs()
    if not isinstance(found.granularity, PerAxis) or len(found.scale) != len(bias):
        return
    high = 2 ** (bits - 1) - 1
    # A float32 product of two scales may lie half an ulp below the real one.
    smallest = bias / high / work.qparams[work.input_group(point.operator)].scale.double() * (1 + 2.0**-20)
    short = bias.isfinite() & (found.scale.double() < smallest)
    if bool(short.any()):
        wanted = torch.where(short, smallest, found.scale.double())
        scale = torch.where(short, legal_scale(wanted, work.grid(weight.group)), found.scale)
        work.qparams[weight.group] = replace(found, scale=scale)
        _log.info("%s: %d weight scales grew so that the bias fits %d bits.", point.name, int(short.sum()), bits)


def _qparams(work: Work, point: QuantPoint, rule: Bias) -> QParams:
    bits = _bits(rule)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    bias = work.graph.tensor(point.tensor).detach().double()
    if not bool(torch.isfinite(bias).all()):
        raise RangeError(
            f"{point.tensor}: biases hold NaN or infinite values. Repair the checkpoint before quantizing."
        )
    if rule.scale == "own":
        scale = (bias.abs().max() / high).clamp(min=SMALLEST_SCALE).float()
        return QParams(scale, torch.zeros((), dtype=torch.int32), low, high, PerTensor())
    scale = work.qparams[work.input_group(point.operator)].scale * _weight_scale(work, point, len(bias))
    scale = scale.clamp(min=SMALLEST_SCALE)
    worst = float((bias / scale.double()).abs().max()) if bias.numel() else 0.0
    if worst > high:
        raise PlanError(
            f"{point.name}: needs {int(worst).bit_length() + 1} bits at scale input*weight; biases.{point.format} has "
            f"{bits}. Keep '{point.operator}' in float with --keep-float, or choose a coarser weight format."
        )
    granularity = PerAxis(0) if scale.dim() else PerTensor()
    return QParams(scale, torch.zeros_like(scale, dtype=torch.int32), low, high, granularity)


def _weight_scale(work: Work, point: QuantPoint, out_channels: int) -> Tensor:
    """Scale of the weights behind each output channel: [] or [out_channels]."""
    weight = next(p for p in work.plan.points if p.role == "weight" and point.operator in p.consumers)
    weights = work.qparams[weight.group]
    if isinstance(weights.granularity, PerGroup):
        raise PlanError(
            f"{point.name}: weights have a scale per group of inputs, so an integer bias has no scale "
            f"(biases.{point.format}). Keep the bias in float, or choose another weight format."
        )
    if not weights.scale.dim():
        return weights.scale
    # A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
    return weights.scale.repeat(out_channels // len(weights.scale))
