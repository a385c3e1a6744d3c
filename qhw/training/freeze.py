# SPDX-License-Identifier: Apache-2.0
"""From a trained model back to codes: batch norms merged, scales legal, the target's constraints met or refused."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from qhw.decisions import StepReport
from qhw.engine import (
    Calibration,
    CalibrationData,
    Context,
    QuantizedModel,
    Work,
    apply_step,
    default_progress,
    finished,
)
from qhw.errors import TrainingError
from qhw.extension import Registry, default_registry
from qhw.numerics import (
    ChannelNormal,
    FoldedBatchNorm,
    LearnedQuantizer,
    QParams,
    dequantize,
    legal_scale,
    quantize,
)
from qhw.training.batch_norm import DoubleForward, NormLayer
from qhw.training.form import TrainingForm
from qhw.training.statistics import reestimate
from qhw.training.trainable import training_steps

__all__ = ["freeze"]

_log = logging.getLogger("qhw")


def freeze(
    result: QuantizedModel,
    *,
    calibration: CalibrationData | None = None,
    registry: Registry | None = None,
) -> QuantizedModel:
    """Turn a trained model into a result: its codes fixed, batch norms merged, the target's constraints checked again.

    The codes are those that the model computes with in eval mode. Steps of the stage `fit` run again, for sums,
    multipliers and shifts depend on the weights.

    Args:
        result: What `qhw.trainable` made trainable; left as it is, so that training may go on.
        calibration: Data to estimate the statistics of batch norms anew with, in place of the running ones.
        registry: Plugins to use; absent: all that are installed.

    Returns:
        QuantizedModel: a new one, in eval mode.

    Raises:
        TrainingError: the result is not being trained, or a parameter became NaN or infinite; names it.
        PlanError: the trained model no longer meets a constraint of the target, and nothing mends it.
        CalibrationError: the data does not fit the model.
    """
    form = result.trained_form if isinstance(result, QuantizedModel) else None
    if form is None:
        raise TrainingError(
            "freeze: takes a result that qhw.trainable made trainable. Call qhw.trainable(result) first."
        )
    registry = registry or default_registry()
    check_finite(result)
    if calibration is not None:
        reestimate(result, calibration)
    work = _settled(result, form)
    reports = [report for report in result.steps if report.stage not in ("train", "fit")]
    learned = _reports(result)
    samples = Calibration([dict(result.samples)], work.graph) if result.samples else None
    context = Context(samples, default_progress(), int(result.provenance.get("seed", 0)))
    work.keep_reference()
    fitted = [
        apply_step(number, work, context, registry)
        for number, step in enumerate(result.plan.steps)
        if step.stage == "fit"
    ]
    return finished(work, (*reports, *learned, *fitted), {**result.provenance, "trained": True}, result.samples)


def check_finite(result: QuantizedModel) -> None:
    """Refuse a model in which training came to values that are no numbers.

    Raises:
        TrainingError: names the first quantizer or parameter.
    """
    norms = {name for name, _ in result.named_buffers() if name.endswith((".running_mean", ".running_var"))}
    tensors = [*result.named_parameters(), *((n, b) for n, b in result.named_buffers() if n in norms)]
    bad = [name for name, value in tensors if not bool(torch.isfinite(value).all())]
    if bad:
        of_quantizers = [name for name in bad if ".quantizers." in name or name.endswith(".scale_parameter")]
        first = (of_quantizers or bad)[0].removeprefix("module.")
        raise TrainingError(
            f"{first}: became NaN or infinite in training ({len(bad)} tensors in all). Go back to an earlier state, "
            "and lower the learning rate."
        )


def _settled(result: QuantizedModel, form: TrainingForm) -> Work:
    """A working copy with the trained tensors, and legal scales for every group but those of biases."""
    graph = form.origin.copy()
    state = dict(result.module.state_dict())
    for name in graph.module.state_dict():
        if name in state:
            graph.set_tensor(name, state[name].detach())
    work = Work(graph, result.target, result.plan)
    biases = {point.group for point in result.plan.points if point.role == "bias"}
    for group in result.groups():
        if group not in biases:
            work.qparams[group] = _legal(result, group)
    for operator, norm in form.folded_norms.items():
        work.folded_norms[operator], work.normals[operator] = norm, norm.normal
    for operator, layer in form.layers.items():
        _merge(work, form, operator, layer)
    return work


def _legal(result: QuantizedModel, group: str) -> QParams:
    quantizer = result.quantizer(group)
    if isinstance(quantizer, LearnedQuantizer) and quantizer.is_at_smallest:
        _log.warning("%s: its scale was driven to its lower bound in training; it quantizes next to nothing.", group)
    return quantizer.qparams


def _merge(work: Work, form: TrainingForm, operator: str, layer: NormLayer) -> None:
    """Put a batch norm back into weights and bias; the codes stay, but for the sign of channels with gamma < 0.

    s~[k] = |gamma[k]| s[k] / sigma[k], codes times the sign of gamma[k]        (41)
    b~[k] = beta[k] - gamma[k] mean[k] / sigma[k]                               (12)
    """
    found = work.graph.operator(operator)
    group = form.weight_group(operator)
    norm = layer.batch_norm
    assert norm.running_mean is not None and norm.running_var is not None
    assert norm.weight is not None and norm.bias is not None
    gamma, beta = norm.weight.detach().double(), norm.bias.detach().double()
    sigma = (norm.running_var.double() + norm.eps).sqrt()
    factor = gamma / sigma
    weight = work.graph.tensor(str(found.weight)).detach()
    channels = (-1, *[1] * (weight.dim() - 1))
    if isinstance(layer, DoubleForward):
        work.graph.set_tensor(str(found.weight), (weight.double() * factor.reshape(channels)).float())
    else:
        work.graph.set_tensor(str(found.weight), _merged_weight(work, group, weight, factor))
    work.graph.set_tensor(str(found.bias), (beta - factor * norm.running_mean.double()).float())
    work.normals[operator] = ChannelNormal(beta, gamma.abs())
    work.folded_norms[operator] = FoldedBatchNorm(sigma, norm.eps, norm.momentum, work.normals[operator])


def _merged_weight(work: Work, group: str, weight: Tensor, factor: Tensor) -> Tensor:
    """The weight on the grid of the merged scales, which become the group's."""
    before = work.qparams[group]
    codes = quantize(weight, before, name=group).long()
    flipped = (factor < 0).reshape(-1, *[1] * (weight.dim() - 1))
    signed = torch.where(flipped, -codes, codes)
    kept = signed.clamp(before.quant_min, before.quant_max)
    lost = int((kept != signed).sum())
    if lost:
        _log.warning("%s: %d codes were %d and have no counterpart of the other sign.", group, lost, before.quant_min)
    grid = work.grid(group)
    scale = legal_scale(factor.abs() * before.scale.double(), grid, "nearest")
    after = QParams(scale, before.zero_point, before.quant_min, before.quant_max, before.granularity)
    work.qparams[group] = after
    return dequantize(kept, after, group)


def _reports(result: QuantizedModel) -> Iterable[StepReport]:
    """What the steps of training came to."""
    for step in training_steps(result.plan):
        summary = f"{len(step.sites)} site{'s' if len(step.sites) != 1 else ''} trained"
        yield StepReport(stage="train", algorithm=step.algorithm, summary=summary)
