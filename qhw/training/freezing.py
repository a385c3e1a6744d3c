# SPDX-License-Identifier: Apache-2.0
"""From a trained model back to codes: batch norms merged, scales legal, the target's constraints met or refused."""

import logging
from contextlib import nullcontext

import torch
from torch import Tensor

from qhw.decisions import Json, Step, StepReport
from qhw.engine import (
    Calibration,
    CalibrationData,
    Context,
    QuantizedModel,
    RichProgress,
    Work,
    apply_step,
    default_progress,
    finished,
)
from qhw.errors import TrainingError
from qhw.extension import Registry, default_registry
from qhw.numerics import (
    ChannelNormal,
    FakeQuantizer,
    FoldedBatchNorm,
    LearnedQuantizer,
    QParams,
    dequantize,
    legal_scale,
    quantize,
)
from qhw.training.batch_norm import DoubleForward, KeptNorm, NormLayer
from qhw.training.blame import check_finite
from qhw.training.form import TrainingForm
from qhw.training.start import training_steps
from qhw.training.statistics import reestimated
from qhw.wording import counted

__all__ = ["freeze"]

_log = logging.getLogger("qhw")

Remarks = dict[str, str]
"""Group -> what its user should know."""


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
            "freeze: takes a result that qhw.trainable made trainable, itself and not what wraps it. Call "
            "qhw.trainable(result) first."
        )
    registry = registry or default_registry()
    check_finite(result)
    with nullcontext() if calibration is None else reestimated(result, calibration):
        work, remarks = _settled(result, form)
    earlier = [report for report in result.steps if report.stage not in ("train", "fit")]
    trained = [_report(step, remarks) for step in training_steps(result.plan)]
    fitted = _fitted(result, work, registry)
    reports = (*earlier, *trained, *fitted)
    frozen = finished(work, reports, {**result.provenance, "trained": True}, result.samples)
    registry.quantized(frozen, frozen.plan, reports)
    return frozen


def _fitted(result: QuantizedModel, work: Work, registry: Registry) -> list[StepReport]:
    """Let the steps of the stage `fit` act on the trained model."""
    progress = default_progress()
    samples = Calibration([dict(result.samples)], work.graph) if result.samples else None
    context = Context(samples, progress, int(result.provenance.get("seed", 0)))
    work.keep_reference()
    steps = [number for number, step in enumerate(result.plan.steps) if step.stage == "fit"]
    try:
        return [apply_step(number, work, context, registry) for number in steps]
    finally:
        if isinstance(progress, RichProgress):
            progress.stop()


def _settled(result: QuantizedModel, form: TrainingForm) -> tuple[Work, Remarks]:
    """A working copy with the trained tensors, and legal scales for every group but those of biases."""
    graph = form.origin.copy()
    state = dict(result.module.state_dict())
    for name in graph.module.state_dict():
        if name in state:
            graph.set_tensor(name, state[name].detach())
    work = Work(graph, result.target, result.plan, form.registry)
    remarks: Remarks = {}
    biases = {point.group for point in result.plan.points if point.role == "bias"}
    folded = {form.weight_group(name): layer for name, layer in form.layers.items() if isinstance(layer, DoubleForward)}
    for group in result.groups():
        if group not in biases:
            quantizer = result.quantizer(group)
            work.set_qparams(group, quantizer.qparams)
            if isinstance(quantizer, LearnedQuantizer) and quantizer.is_at_smallest:
                _remark(remarks, group, "its scale was driven to its lower bound, and it quantizes next to nothing")
            if work.group(group)[0].role == "weight":
                _settle_weight(work, group, quantizer, folded.get(group))
    for operator, norm in form.folded_norms.items():
        work.folded_norms[operator], work.normals[operator] = norm, norm.normal
    for operator, layer in form.layers.items():
        _merge(work, form, operator, layer, remarks)
    return work, remarks


def _settle_weight(work: Work, group: str, quantizer: FakeQuantizer, layer: DoubleForward | None) -> None:
    """Let a weight have the codes that its quantizer computes with, which may do more than round to nearest."""
    for name in dict.fromkeys(point.tensor for point in work.group(group)):
        weight = work.graph.tensor(name).detach()
        weight = weight if layer is None else layer.folded(weight)
        with torch.no_grad():
            computed = quantizer(weight)
        qparams = work.qparams[group]
        differs = quantize(weight, qparams, name=group) != quantize(computed, qparams, name=group)
        work.graph.set_tensor(name, torch.where(differs, computed, weight))


def _remark(remarks: Remarks, group: str, remark: str) -> None:
    """Say what training came to, now and in the step's report."""
    remarks[group] = remark
    _log.warning("%s: %s.", group, remark)


def _merge(work: Work, form: TrainingForm, operator: str, layer: NormLayer, remarks: Remarks) -> None:
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
    if isinstance(layer, KeptNorm):
        weight = _merged_weight(work, group, weight, factor, remarks)
    work.graph.set_tensor(str(found.weight), weight)
    work.graph.set_tensor(str(found.bias), (beta - factor * norm.running_mean.double()).float())
    work.normals[operator] = ChannelNormal(beta, gamma.abs())
    work.folded_norms[operator] = FoldedBatchNorm(sigma, norm.eps, norm.momentum, work.normals[operator])


def _merged_weight(work: Work, group: str, weight: Tensor, factor: Tensor, remarks: Remarks) -> Tensor:
    """The weight on the grid of the merged scales, which become the group's."""
    before = work.qparams[group]
    # A channel that its batch norm multiplies by 0 is 0 on any scale: it keeps its own.
    sign = factor.sign().long().reshape(-1, *[1] * (weight.dim() - 1))
    signed = quantize(weight, before, name=group).long() * sign
    kept = signed.clamp(before.quant_min, before.quant_max)
    lost = int((kept != signed).sum())
    if lost:
        _remark(remarks, group, f"{lost} codes {before.quant_min} of channels with gamma < 0 became {before.quant_max}")
    size = torch.where(factor == 0, 1.0, factor.abs())
    scale = legal_scale(size * before.scale.double(), work.grid(group), "nearest")
    after = QParams(scale, before.zero_point, before.quant_min, before.quant_max, before.granularity)
    work.set_qparams(group, after)
    return dequantize(kept, after, group)


def _report(step: Step, remarks: Remarks) -> StepReport:
    """What a step of training came to."""
    sites: dict[str, dict[str, Json]] = {name: {"remark": remarks[name]} for name in step.sites if name in remarks}
    summary = "; ".join(
        [f"{counted(len(step.sites), 'site')} trained", *(f"{name}: {remarks[name]}" for name in sites)]
    )
    return StepReport(stage="train", algorithm=step.algorithm, summary=summary, sites=sites)
