# SPDX-License-Identifier: Apache-2.0
"""The largest sum of weight codes that a kernel allows per output channel, and the proof that each channel keeps it."""

import torch

from qhw.engine.matrix_form import MatrixForm
from qhw.engine.work import Work
from qhw.errors import PlanError
from qhw.graph import WEIGHTED_KINDS, Operator, accumulator_width, input_point
from qhw.numerics import expand, quantize

__all__ = ["check_weight_sums", "weight_sum_limit"]


def weight_sum_limit(work: Work, operator: str) -> int | None:
    """Largest sum of |weight code - zero point| over one output channel that an operator's kernel allows.

    `from_accumulator`: (2^(bits - 1) - 1) / max |input code - zero point|, rounded down, so that no input can make the
    products overflow a signed accumulator of that width (Colbert et al. 2023, arXiv:2308.13504).

    Args:
        work: Inputs have their scales.
        operator: Its name.

    Returns:
        int; None where the target states none, or what it follows from is not known.
    """
    placement = next((one for one in work.plan.operators if one.name == operator), None)
    if placement is None or placement.kernel is None:
        return None
    stated = work.target.kernels[placement.kernel].weight_abs_sum_max
    if stated != "from_accumulator":
        return stated if isinstance(stated, int) else None
    bits, point = accumulator_width(work.target, placement.kernel), input_point(work.plan.points, operator)
    if bits is None or point is None or point.group not in work.qparams:
        return None
    x = work.qparams[point.group]
    reach = max(x.quant_max - int(x.zero_point), int(x.zero_point) - x.quant_min)
    return int((2 ** (bits - 1) - 1) // max(reach, 1))


def check_weight_sums(work: Work) -> None:
    """Refuse weights that a kernel cannot hold.

    Raises:
        PlanError: the codes of an output channel sum to more than `weight_abs_sum_max`; names the channel.
    """
    operators = {one.name: one for one in work.graph.operators}
    for point in work.plan.points:
        if point.role != "weight":
            continue
        for name in point.consumers:
            limit = weight_sum_limit(work, name)
            if limit is not None and operators[name].kind in WEIGHTED_KINDS:
                _check(work, point.group, operators[name], limit)


def _check(work: Work, group: str, operator: Operator, limit: int) -> None:
    weight, qparams = work.weight(group), work.weight_qparams(group)
    if qparams.elements is not None:  # codes of other kinds of numbers are no integers that a register sums
        return
    zero_point = expand(qparams.zero_point, qparams.granularity, tuple(weight.shape))
    distance = (quantize(weight, qparams, name=group).long() - zero_point.long()).abs()
    sums = MatrixForm(operator, tuple(weight.shape)).weight_rows(distance).flatten(0, 1).sum(1)
    if bool((sums > limit).any()):
        channel = int(torch.argmax(sums))
        kernel = next(one.kernel for one in work.plan.operators if one.name == operator.name)
        raise PlanError(
            f"{group}: output channel {channel} has weight codes of {int(sums[channel]):,} together; "
            f"kernels.{kernel}.weight_abs_sum_max allows {limit:,}. Let a fit step shrink them, "
            f"or keep '{operator.name}' in float with --keep-float."
        )
