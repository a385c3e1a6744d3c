# SPDX-License-Identifier: Apache-2.0
"""A quantized model on other grids: scales that put results on ties or near, other zero points."""

import math
import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhw.engine import QuantizedModel
from qhw.graph import QuantPoint
from qhw.integer.site import PointIndex
from qhw.numerics import QParams, dequantize

_SUMS = ("Add", "Sub", "Concat", "Max", "Min")
SCALES = ("random", "decimal", "power_of_two")


def rescaled(
    result: QuantizedModel, kind: str, seed: int, spread: float = 2.0, *, ends_at_clips: bool = True
) -> QuantizedModel:
    """The same model on other grids; those that the target prescribes stay.

    Args:
        result: The model.
        kind: One of `SCALES`.
        seed: Of the draws.
        spread: How far a scale may be from the calibrated one, as a factor.
        ends_at_clips: Whether the runtime knows a clip only as the end of its result's grid, so that the grid must end
            there.
    """
    rng, near = random.Random(seed), random.Random(-1 - seed)
    grids, index = result.encodings(), PointIndex(result.plan)
    operators = {operator.name: operator for operator in result.float_graph.operators}
    clips = _clips(result) if ends_at_clips else {}
    found = {point.group: grids[point.group] for point in result.plan.points if point.fixed is not None}
    for point in result.plan.points:
        if point.role == "bias" or point.group in found:
            continue
        drawn = _drawn(point, grids[point.group], clips.get(point.group), kind, rng, spread)
        is_activation = point.role == "activation" and point.group not in clips
        if is_activation and kind == "decimal" and operators[point.operator].kind not in _SUMS and near.random() < 0.5:
            drawn = replace(drawn, scale=_next_to_a_power_of_two(_unit(result, index, point, found), drawn.scale))
        found[point.group] = drawn
        if point.role == "activation" and point.group not in clips and rng.random() < 0.2:
            source = index.read(result.float_graph, operators[point.tensor], 0)
            if source is not None and source.group in found and source.format == point.format:
                found[point.group] = found[source.group]
    for point in result.plan.points:
        if point.role == "bias":
            source = index.read(result.float_graph, operators[point.operator], 0)
            assert source is not None
            weight = found[index.weights[point.operator].group]
            scale = found[source.group].scale * weight.scale
            found[point.group] = replace(grids[point.group], scale=scale.expand(grids[point.group].scale.shape).clone())
    return QuantizedModel(result.float_graph, result.plan, result.target, found)


def _unit(result: QuantizedModel, index: PointIndex, point: QuantPoint, found: Mapping[str, QParams]) -> list[Tensor]:
    """The scales, and the slope, whose product is what one unit of an operator's sum stands for."""
    operator = result.float_graph.operator(point.operator)
    reads = [index.read(result.float_graph, operator, i) for i in range(len(operator.inputs))]
    factors = [found[read.group].scale for read in reads if read is not None]
    if operator.kind not in ("Mul", "MatMul"):
        factors = factors[:1]
    if operator.name in index.weights:
        factors.append(found[index.weights[operator.name].group].scale.flatten()[0])
    return [*factors, torch.tensor(float(operator.attributes.get("slope", 1.0)))]


def _next_to_a_power_of_two(unit: list[Tensor], wanted: Tensor) -> Tensor:
    """The scale nearest to the one wanted, of those that make the ratio of scales a power of two but for rounding.

    The product is formed of the decimals that the factors were rounded from: the float32 scales miss the power by
    their rounding, and whether a sum lies above or below a tie hangs on each rounding in the ratio.
    """
    product = math.prod(float(str(factor.numpy())) for factor in unit)
    power = round(math.log2(float(wanted) / product))
    return torch.tensor(product * 2.0**power, dtype=torch.float32)


def _clips(result: QuantizedModel) -> dict[str, list[Mapping[str, Any]]]:
    """Bounds of the clips behind each group's tensors."""
    operators = {operator.name: operator for operator in result.float_graph.operators}
    found: dict[str, list[Mapping[str, Any]]] = {}
    for point in result.plan.points:
        operator = operators.get(point.tensor)
        if operator is not None and operator.kind in ("Relu", "Clip"):
            found.setdefault(point.group, []).append(operator.attributes)
    return found


def _drawn(
    point: QuantPoint, q: QParams, clips: list[Mapping[str, Any]] | None, kind: str, rng: random.Random, spread: float
) -> QParams:
    scale, zero = _scale(q.scale, kind, rng, 1.0 if clips is not None else spread), q.zero_point
    if point.role == "weight":
        return replace(q, scale=scale)
    low, high = q.quant_min, q.quant_max
    for bounds in clips or ():  # the grid ends at the clip
        if (maximum := bounds.get("maximum")) is not None:
            low = max(low, q.quant_max - int(maximum / float(scale)))
        if (minimum := bounds.get("minimum")) is not None:
            high = min(high, q.quant_min - int(minimum / float(scale)))
    high = max(low, high)
    near = int(zero) + rng.randint(-24, 24)  # so that most codes stay off the ends
    drawn = rng.choice((near, near, near, near, low, high, rng.randint(low, high)))
    return replace(q, scale=scale, zero_point=torch.tensor(min(max(drawn, low), high), dtype=zero.dtype))


def _scale(scale: Tensor, kind: str, rng: random.Random, spread: float) -> Tensor:
    down = spread == 1.0  # a grid that must not reach past a clip
    factors = [spread ** rng.uniform(-1, 1) for _ in range(scale.numel())]
    wanted = scale.double() * torch.tensor(factors, dtype=torch.float64).reshape(scale.shape)
    whole = torch.floor if down else torch.round
    if kind == "power_of_two":
        return (2.0 ** whole(wanted.log2())).float()
    if kind == "decimal":
        unit = 10.0 ** wanted.log10().floor()
        if rng.random() < 0.2:
            return (whole(wanted / unit) * unit).float()
        digits = torch.tensor([1.0, 2.0, 5.0, 10.0], dtype=torch.float64)  # their quotients put many sums next to ties
        place = torch.searchsorted(digits if down else digits[:-1] * 1.5, wanted / unit, right=True)
        return (digits[place - int(down)] * unit).float()
    return (wanted * (0.9 if down else 1.0)).float()


def grid_of(result: QuantizedModel, name: str) -> QParams:
    """Of an input."""
    point = next(p for p in result.plan.points if p.tensor == name)
    return result.encodings()[point.group]


def input_of(result: QuantizedModel, like: Tensor, seed: int) -> Tensor:
    """Reals of random codes of the input's grid, shaped as another input."""
    q = grid_of(result, result.input_names[0])
    codes = torch.randint(q.quant_min, q.quant_max + 1, like.shape, generator=torch.Generator().manual_seed(seed))
    return dequantize(codes, q)
