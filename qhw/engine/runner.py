# SPDX-License-Identifier: Apache-2.0
"""Applying a plan: a working copy goes through its steps, in order, seeded, with progress shown."""

import logging
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhw.decisions import QuantPlan, StepReport
from qhw.engine.bias import add_required_biases, bias_qparams
from qhw.engine.blame import blaming, must_be
from qhw.engine.calibration import Calibration
from qhw.engine.options import options_for
from qhw.engine.outcome import check_outcome
from qhw.engine.parameters import round_parameters
from qhw.engine.progress import Progress, RichProgress, SilentProgress
from qhw.engine.replay import check_plan
from qhw.engine.result import QuantizedModel
from qhw.engine.weight_sums import check_weight_sums
from qhw.engine.work import Context, Work
from qhw.engine.work_folder import KeptStep, WorkFolder, facts_of
from qhw.errors import PlanError, RangeError
from qhw.extension import Registry
from qhw.graph import Graph
from qhw.graph.verify import not_finite
from qhw.numerics import PerTensor, legal_scale
from qhw.schema import TargetSpec

__all__ = ["apply_step", "finished", "run"]

_PRESERVING = ("prepare", "equalize")  # the stages that leave the model's function as it is
_log = logging.getLogger("qhw")


def run(
    graph: Graph,
    target: TargetSpec,
    plan: QuantPlan,
    registry: Registry,
    calibration: Calibration | None,
    *,
    progress: Progress | None = None,
    seed: int = 0,
    work_folder: WorkFolder | None = None,
) -> QuantizedModel:
    """Apply a plan to a model.

    Args:
        graph: The captured model; left as it is.
        target: The target the plan was made for.
        plan: The decisions.
        registry: Where the plan's algorithms are found.
        calibration: Data for the steps that need it.
        progress: Where progress is shown.
        seed: For algorithms that draw random numbers.
        work_folder: Where finished layers are kept and found again; None: nothing is kept.

    Returns:
        QuantizedModel: in eval mode.

    Raises:
        PlanError: the plan belongs to another model or target, was edited in a way that is not legal, or leaves a point
            without a range.
        PluginError: an algorithm raised, or returned no report.
        RangeError: a parameter holds NaN or infinite values; names it.
        CalibrationError: the data does not fit the model.
    """
    plan = check_plan(plan, graph, target, registry)
    _check_finite(graph)
    progress = progress or SilentProgress()
    work = Work(graph.copy(), target, plan, registry)
    context = Context(calibration, progress, seed)
    _set_given(work)
    add_required_biases(work)
    round_parameters(work)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            reports = tuple(apply_step(n, work, context, registry, work_folder) for n in range(len(plan.steps)))
    finally:
        if isinstance(progress, RichProgress):
            progress.stop()
    _check_folded(work)
    samples = calibration.first_samples if calibration is not None else {}
    for remark in calibration.remarks if calibration is not None else ():
        _log.warning("warning: %s", remark)
    result = finished(work, reports, _provenance(calibration, seed), samples)
    registry.quantized(result, plan, reports)
    return result


def finished(
    work: Work, reports: tuple[StepReport, ...], provenance: Mapping[str, Any], samples: Mapping[str, Tensor]
) -> QuantizedModel:
    """The quantized model that a working copy has become.

    Raises:
        PlanError: a point has no scale, or a bias or the weights of a channel do not fit.
        RangeError: a bias holds NaN or infinite values.
    """
    _check_complete(work)
    work.qparams.update(bias_qparams(work))
    check_weight_sums(work)
    folded = {
        name: replace(norm, normal=work.normals[name])
        for name, norm in work.folded_norms.items()
        if name in work.normals
    }
    return QuantizedModel(work.graph, work.plan, work.target, work.qparams, reports, provenance, samples, folded)


def apply_step(
    number: int, work: Work, context: Context, registry: Registry, folder: WorkFolder | None = None
) -> StepReport:
    """Let one step of the plan act on the working copy.

    Args:
        number: Of the step in `work.plan.steps`.
        work: The working copy.
        context: Data, progress, seed.
        registry: Where its algorithm is found.
        folder: Where finished layers are kept; None: nothing is kept.

    Raises:
        PluginError: the algorithm raised, returned no report, or left undone what it promised.
    """
    step = work.plan.steps[number]
    entry = registry.algorithms[step.algorithm]
    options = options_for(entry.value, step.options, f"plan: step '{step.algorithm}'.options")
    doing = f"algorithm '{entry.name}': apply"
    if step.stage not in _PRESERVING:
        work.keep_reference()
    if folder is not None:
        context.kept = KeptStep(folder, number, facts_of(work.plan, number, options, entry.record, context.seed))
    with blaming(entry.record, doing):
        answer = entry.value(options).apply(work, step, context)
    report = must_be(answer, StepReport, entry.record, doing)
    check_outcome(work, step, report, entry.record)
    _log.info("%s: %s", step.algorithm, report.summary)
    return report


def _check_finite(graph: Graph) -> None:
    """Refuse broken weights by name, before they show as broken activations far behind. Buffers may be masks of inf."""
    name = not_finite(graph)
    if name is not None:
        raise RangeError(f"{name}: holds NaN or infinite values. Repair the checkpoint before quantizing.")


def _set_given(work: Work) -> None:
    """Scales that the hardware prescribes; for tensors whose scales it computes itself, one that stands for them."""
    for point in work.plan.points:
        if point.is_dynamic:
            grid = work.grid(point.group)
            scale = legal_scale(torch.tensor(1.0, dtype=torch.float64), grid)
            zero_point = torch.tensor(grid.zero_points[0] if grid.zero_points else grid.quant_min, dtype=torch.int32)
            work.qparams[point.group] = grid.qparams(scale, zero_point, PerTensor())
        if point.fixed is not None:
            grid = work.grid(point.group)
            scale = torch.tensor(point.fixed.scale, dtype=torch.float32)
            zero_point = torch.tensor(point.fixed.zero_point, dtype=torch.int32)
            work.qparams[point.group] = grid.qparams(scale, zero_point, PerTensor())


def _check_folded(work: Work) -> None:
    left = {operator.name: operator.kind for operator in work.graph.operators}
    for placement in work.plan.operators:
        if placement.where != "folded" and left.get(placement.name, placement.kind) != placement.kind:
            raise PlanError(
                f"{placement.name}: the plan counts on it being {placement.kind}, and no step changed "
                f"{left[placement.name]}. Put that step back, or plan again with --without."
            )
        if placement.where == "folded" and placement.name in left:
            raise PlanError(
                f"{placement.name}: the plan counts on it being folded, and no step folded it. "
                "Put that step back, or plan again with --without."
            )


def _check_complete(work: Work) -> None:
    for point in work.plan.points:
        if point.role != "bias" and point.group not in work.qparams:
            raise PlanError(f"{point.name}: no step of the plan gave it a range. Add a range step, or plan again.")


def _provenance(calibration: Calibration | None, seed: int) -> Mapping[str, Any]:
    facts: dict[str, Any] = {
        "seed": seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }
    if calibration is not None and calibration.digest is not None:
        facts["calibration_sha256"] = calibration.digest
        facts["calibration_samples"] = calibration.num_samples
        if calibration.remarks:
            facts["calibration_remarks"] = list(calibration.remarks)
    return facts
