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
from qhw.schema import Bias, Shift

__all__ = ["add_required_biases", "bias_qparams", "is_bounded_bias", "weight_scale_floor"]

_log = logging.getLogger("qhw")


def add_required_biases(work: Work) -> None:
    """Give operators without a bias one of zeros, where the target's rule requires one (`biases.*.required`)."""
    operators = {operator.name: operator for operator in work.graph.operators}
    lacking = [
        (operators[point.operator], point)
        for point in work.plan.points
        if point.role == "bias"
        and operators[point.operator].bias is None
        and work.target.biases[point.format].required is True
    ]
    if not lacking:
        return
    with work.graph.changes():
        for operator, point in lacking:
            name = work.graph.add_bias(operator, torch.zeros(int(operator.attributes["out_channels"])))
            _log.info("%s: got a bias of zeros, which biases.%s requires.", name, point.format)


def bias_qparams(work: Work) -> dict[str, QParams]:
    """QParams of every bias point, once inputs and weights have theirs.

        scale = float32(input scale * weight scale)                    (Nagel et al. 2021, section 2.1)

    Its codes are signed and its zero point is 0, unless the rule says otherwise.

    A bias scale of its own is the finest that covers the bias, for the tensor or for each channel (`biases.*.per`);
    where a shift brings it to the sum (`align`), 2^k float32(input scale * weight scale) with the smallest k >= 0 that
    `biases.*.shift` allows.

    A bias that would leave its width, as that of a dead channel with weights near 0, does what `out_of_range` says.
    "enlarge_scale", or nothing stated: its weights get the smallest legal scale with which it fits (a channel's own,
    else the tensor's). "saturate": it is clamped, as the target's tool clamps it. "refuse" and "wrap": it is an error.

    Returns:
        Group -> QParams with scale [] or [out_channels].

    Raises:
        PlanError: a bias does not fit its width, or its weight has a scale per group of inputs.
        RangeError: a bias holds NaN or infinite values; names the parameter.
    """
    points = [point for point in work.plan.points if point.role == "bias"]
    for point in points:  # before any bias gets a scale: two operators may share a weight
        if _grows(work.target.biases[point.format]):
            _coarsen_weights(work, point)
    return {point.group: _qparams(work, point, work.target.biases[point.format]) for point in points}


def is_bounded_bias(rule: Bias) -> bool:
    """Whether a bias may be too large for its scale: that of the sum, or one that shifts bring no further from it."""
    return rule.scale != "own" or _left_shifts(rule)[1] is not None


def _grows(rule: Bias) -> bool:
    return is_bounded_bias(rule) and rule.out_of_range in (None, "unknown", "enlarge_scale")


def _left_shifts(rule: Bias) -> tuple[int, int | None]:
    """Fewest and most bits by which a bias of its own scale is shifted left; None: as many as it takes."""
    if not rule.meets_sum or not isinstance(rule.shift, Shift):
        return 0, None
    least, most = rule.shift.max, rule.shift.min
    return -least if isinstance(least, int) else 0, -most if isinstance(most, int) else None


def _limits(rule: Bias) -> tuple[int, int]:
    """Lowest and highest code."""
    assert isinstance(rule.bits, int)  # a bias without a width has no point
    bits = rule.bits
    return (0, 2**bits - 1) if rule.signed is False else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def _zero_point(rule: Bias) -> int:
    return rule.zero_point if isinstance(rule.zero_point, int) else 0


def _finest(bias: Tensor, rule: Bias) -> Tensor:
    """The finest scale on which each bias is a code of the rule: float64; infinite where none is.

    Around a zero point of 0 the lowest code is left out, so that a bias and its negative have one scale.
    """
    low, high = _limits(rule)
    zero = _zero_point(rule)
    below = zero - low if zero or rule.signed is False else high
    reach = torch.where(bias < 0, float(below), float(high - zero)).double()
    return torch.where(bias == 0, 0.0, bias.abs().double() / reach)


def weight_scale_floor(work: Work, point: QuantPoint) -> Tensor | None:
    """The smallest scales of an operator's weights with which its bias fits its width.

        scale >= |bias| / (2^(bits - 1) - 1) / input scale / 2^k

    with k the most bits by which a bias of its own scale may be shifted left, else 0.

    Args:
        work: Inputs and weights have their scales.
        point: A bias point.

    Returns:
        float64, one for each scale of the weight; None for a bias whose own scale is not bounded, and where weights
        have a scale per group of inputs.

    Raises:
        RangeError: the bias holds NaN or infinite values.
    """
    rule = work.target.biases[point.format]
    scale = work.qparams[_weight_group(work, point)].scale
    if not is_bounded_bias(rule) or isinstance(work.qparams[_weight_group(work, point)].granularity, PerGroup):
        return None
    most = _left_shifts(rule)[1] or 0 if rule.scale == "own" else 0
    unit = work.qparams[work.input_group(point.operator)].scale.double() * 2.0**most
    # A float32 product of two scales may lie half an ulp below the real one.
    floor = _finest(_bias(work, point), rule) / unit * (1 + 2.0**-20)
    if not scale.dim():
        return floor.amax() if floor.numel() else torch.zeros((), dtype=torch.float64)
    # A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
    return floor.reshape(-1, len(scale)).amax(0)


def _weight_group(work: Work, point: QuantPoint) -> str:
    return next(p.group for p in work.plan.points if p.role == "weight" and point.operator in p.consumers)


def _bias(work: Work, point: QuantPoint) -> Tensor:
    bias = work.graph.tensor(point.tensor).detach().double()
    if not bool(torch.isfinite(bias).all()):
        raise RangeError(
            f"{point.tensor}: biases hold NaN or infinite values. Repair the checkpoint before quantizing."
        )
    return bias


def _coarsen_weights(work: Work, point: QuantPoint) -> None:
    """Let the weight scales grow where the bias would leave its width."""
    smallest = weight_scale_floor(work, point)
    if smallest is None:
        return
    group = _weight_group(work, point)
    found = work.qparams[group]
    short = found.scale.double() < smallest
    if bool(short.any()) and bool(torch.isfinite(smallest).all()):
        wanted = torch.where(short, smallest, found.scale.double())
        scale = torch.where(short, legal_scale(wanted, work.grid(group)), found.scale)
        work.qparams[group] = replace(found, scale=scale)
        bits = work.target.biases[point.format].bits
        _log.info("%s: %d weight scales grew so that the bias fits %s bits.", point.name, int(short.sum()), bits)


def _qparams(work: Work, point: QuantPoint, rule: Bias) -> QParams:
    low, high = _limits(rule)
    bias = _bias(work, point)
    finest = _finest(bias, rule)
    if not bool(torch.isfinite(finest).all()):
        raise _too_negative(point, rule)
    if rule.scale == "own":
        scale = _own_scale(work, point, rule, finest)
    else:
        scale = work.qparams[work.input_group(point.operator)].scale * _weight_scale(work, point, len(bias))
        _check_unit(point, scale)
        scale = scale.clamp(min=SMALLEST_SCALE)
    over = int((finest > scale.double()).sum()) if is_bounded_bias(rule) else 0
    if over and rule.out_of_range == "saturate":
        _log.warning(
            "%s: %d biases do not fit biases.%s.bits = %s and are clamped.", point.name, over, point.format, rule.bits
        )
    elif over:
        raise _too_large(point, rule, float((bias / scale.double()).abs().max()))
    granularity = PerAxis(0) if scale.dim() else PerTensor()
    return QParams(scale, torch.full_like(scale, _zero_point(rule), dtype=torch.int32), low, high, granularity)


def _own_scale(work: Work, point: QuantPoint, rule: Bias, finest: Tensor) -> Tensor:
    """The finest scale that covers a bias: any; or, where it is shifted left to meet the sum, 2^k times the sum's."""
    smallest = finest if rule.per == "out_channel" else finest.amax()
    if not rule.meets_sum:
        return smallest.clamp(min=SMALLEST_SCALE).float()
    unit = work.qparams[work.input_group(point.operator)].scale * _weight_scale(work, point, len(finest))
    unit = unit.expand(len(finest)) if rule.per == "out_channel" else unit.amax()
    mantissa, exponent = torch.frexp(smallest / unit.double())
    least, most = _left_shifts(rule)
    shift = torch.where(mantissa > 0.5, exponent, exponent - 1).clamp(least, most)
    return torch.ldexp(unit, shift)


def _check_unit(point: QuantPoint, scale: Tensor) -> None:
    if not bool(torch.isfinite(scale).all()):
        raise RangeError(
            f"{point.operator}: input scale times weight scale must be a finite float32; got {float(scale.max()):g}. "
            f"Scale its inputs or weights down, or keep '{point.operator}' in float with --keep-float."
        )


def _too_negative(point: QuantPoint, rule: Bias) -> PlanError:
    low, high = _limits(rule)
    return PlanError(
        f"{point.name}: has values on the side of the zero point {_zero_point(rule)} where biases.{point.format} "
        f"has no codes ({low} to {high}). Keep '{point.operator}' in float with --keep-float, or take another kernel."
    )


def _too_large(point: QuantPoint, rule: Bias, worst: float) -> PlanError:
    needed = int(worst).bit_length() + 1
    most = _left_shifts(rule)[1]
    shifted = "" if not most else f" times 2^{most}"
    stated = (
        "" if rule.out_of_range in (None, "unknown", "enlarge_scale") else f', out_of_range = "{rule.out_of_range}"'
    )
    return PlanError(
        f"{point.name}: needs {needed} bits at scale input*weight{shifted}; biases.{point.format} has "
        f"{rule.bits}{stated}. "
        f"Let a fit step coarsen its weights, or keep '{point.operator}' in float with --keep-float."
    )


def _weight_scale(work: Work, point: QuantPoint, out_channels: int) -> Tensor:
    """Scale of the weights behind each output channel: [] or [out_channels]."""
    weights = work.qparams[_weight_group(work, point)]
    if isinstance(weights.granularity, PerGroup):
        raise PlanError(
            f"{point.name}: weights have a scale per group of inputs, so an integer bias has no scale "
            f"(biases.{point.format}). Keep the bias in float, or choose another weight format."
        )
    if not weights.scale.dim():
        return weights.scale
    # A grouped transposed convolution has weights [in, out / groups, ...]: its groups share the scales.
    return weights.scale.repeat(out_channels // len(weights.scale))
