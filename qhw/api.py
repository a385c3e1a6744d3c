# SPDX-License-Identifier: Apache-2.0
"""The public calls: load a target, plan, quantize, save, load, export. The command line is a thin layer over these."""

import inspect
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qhw.decisions import Overrides, QuantPlan, Resources
from qhw.engine import (
    Calibration,
    CalibrationData,
    Progress,
    QuantizedModel,
    WorkFolder,
    blaming,
    default_progress,
    has_labels,
    load_result,
    must_be,
    run,
    save_result,
    select,
    written_files,
)
from qhw.errors import CaptureError, ExportError, PlanError, PluginError
from qhw.extension import Exporter, Registry, default_registry
from qhw.graph import ExampleInputs, Graph, capture
from qhw.graph.forms import DTYPES
from qhw.schema import TargetSpec, load_target_file

__all__ = ["export", "exporter_for", "graph_of", "load", "load_target", "plan", "quantize", "save", "target_of"]

_log = logging.getLogger("qhw")

Model = nn.Module | Graph
"""A module, or what `qhw.capture` made of it (capturing is then paid once)."""

# Fingerprint -> the target that a plan of this process was made for: a file's target has no name to find it by again.
_planned: dict[str, TargetSpec] = {}


def load_target(name: str | os.PathLike[str], *, registry: Registry | None = None) -> TargetSpec:
    """A target by name or by file.

    Args:
        name: A registered name, as "onnxruntime/cpu-x86-vnni", or a path that ends in .toml or .json.
        registry: Plugins to look in; absent: all that are installed.

    Raises:
        TargetError: no such target, or the file does not describe one.
    """
    registry = registry or default_registry()
    text = os.fspath(name)
    path = Path(text) if text.endswith((".toml", ".json")) else registry.target_path(text)
    return load_target_file(path, find_base=registry.target_path)


def plan(
    model: Model,
    target: TargetSpec | str | os.PathLike[str],
    example_inputs: ExampleInputs | None = None,
    *,
    calibration: CalibrationData | None = None,
    pipeline: str | None = None,
    prefer: Sequence[str] = (),
    without: Sequence[str] = (),
    keep_float: Sequence[str] = (),
    formats: dict[str, str] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    registry: Registry | None = None,
) -> QuantPlan:
    """Decide how a model is quantized for a target, and why. Nothing is run but the capture.

    Args:
        model: A module in any mode; it is not changed.
        target: A target, its name, or a path to its file.
        example_inputs: One batch: a tensor, a tuple, or a dict by input name. Not needed for a captured graph.
        calibration: Only whether it is given, and with labels, counts here; see `quantize`. An iterator that can be
            read only once is left as it is.
        pipeline: Another pipeline than the default one.
        prefer: Algorithms that come first at their stage.
        without: Algorithms to leave out.
        keep_float: Operator names or patterns (`features.3.*`) that stay in float on the host.
        formats: Point name or pattern -> format id of the target.
        options: Algorithm -> its options, as {"mse_weights": {"clipping_weight": 3.0}}; `qhw plugin show` lists them.
        registry: Plugins to use; absent: all that are installed.

    Returns:
        QuantPlan: frozen data; `to_json()` writes it, `QuantPlan.from_json` reads an edited one.

    Raises:
        CaptureError: the model cannot be captured.
        PlanError: no algorithm fits a point, or a wish cannot be met; says which fields of the target decided.
    """
    registry = registry or default_registry()
    graph = graph_of(model, example_inputs)
    spec = target if isinstance(target, TargetSpec) else load_target(target, registry=registry)
    overrides = Overrides.of(pipeline, prefer, without, keep_float, formats, options)
    labels = calibration is not None and has_labels(calibration, graph)
    resources = Resources(calibration=calibration is not None, labels=labels)
    made = select(graph, spec, registry, resources, overrides)
    _planned[made.target_fingerprint] = spec
    registry.plan_ready(made, spec)
    return made


def quantize(
    model: Model,
    plan_or_target: QuantPlan | TargetSpec | str | os.PathLike[str],
    *,
    calibration: CalibrationData | None = None,
    example_inputs: ExampleInputs | None = None,
    target: TargetSpec | str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    work_folder: WorkFolder | str | os.PathLike[str] | None = None,
    registry: Registry | None = None,
    **wishes: Any,
) -> QuantizedModel:
    """Quantize a model by a plan, or plan and quantize in one call.

    Args:
        model: A module; it is not changed.
        plan_or_target: A plan of `qhw.plan`, or a target as `qhw.plan` takes it.
        calibration: Batches of a tensor, a tuple of inputs, or a dict by input name. The result does not depend on
            the batch size: data is cut into micro-batches of 32.
        example_inputs: One batch, needed when a target is given and the model is not captured yet.
        target: The target of a plan that was read from a file, where no plugin registers it; a plan that this process
            made knows its own.
        seed: For algorithms that draw random numbers.
        progress: Where progress is shown; absent: a bar on a terminal.
        work_folder: Where layers that are done are kept until the call ends well. The same call reads them back after
            a kill, and gives the same result. Absent: nothing is kept. A `WorkFolder` whose `with` block the caller
            has entered keeps them until the block ends.
        registry: Plugins to use; absent: all that are installed.
        wishes: With a target: `pipeline`, `prefer`, `without`, `keep_float`, `formats`, `options`, as `qhw.plan` takes
            them.

    Returns:
        QuantizedModel: an nn.Module in eval mode.

    Raises:
        QhwError: see `plan`; and CalibrationError for data that does not fit, RangeError for NaN in weights,
            ResultError for a work folder that cannot be written.
    """
    registry = registry or default_registry()
    if isinstance(plan_or_target, QuantPlan):
        if wishes:
            raise PlanError(f"quantize: '{next(iter(wishes))}' is decided by the plan already. Pass it to qhw.plan.")
        made = plan_or_target
        graph = graph_of(model, example_inputs if example_inputs is not None else _examples(made, model))
        spec = target_of(made, target, registry)
        data = _calibration(calibration, graph)
    else:
        if target is not None:
            raise PlanError(
                "quantize: target= goes with a plan; here the second argument is a target already. Drop one."
            )
        graph = graph_of(model, example_inputs)
        spec = (
            plan_or_target if isinstance(plan_or_target, TargetSpec) else load_target(plan_or_target, registry=registry)
        )
        # Once, and for both: an iterator that can be read only once would be used up by the first.
        data = _calibration(calibration, graph)
        made = plan(graph, spec, calibration=data, registry=registry, **wishes)
    with _entered(work_folder) as folder:
        return run(
            graph, spec, made, registry, data, progress=progress or default_progress(), seed=seed, work_folder=folder
        )


def save(
    result: QuantizedModel,
    folder: str | os.PathLike[str],
    *,
    artefact: bool = True,
    samples: bool = True,
    evaluate_artefact: Callable[[Path | None], Any] | None = None,
    registry: Registry | None = None,
) -> Path:
    """Write a result folder: plan, target, graph, tensors, step reports and the artefact; whole or not at all.

    Args:
        result: The quantized model.
        folder: Where. An earlier result there is replaced; a folder with other content is refused.
        artefact: Also export, into `artefacts/`. Where the target names no exporter and no portable form holds the
            result, there is none, and the log says why.
        samples: Also keep the first calibration samples, at most 8, which `verify` runs by default.
        evaluate_artefact: Called with the artefact, or None where there is none, before the folder is put in place;
            what it returns is written to `evaluation.json`.
        registry: Plugins to use; absent: all that are installed.

    Raises:
        ResultError: the place is taken or cannot be written.
        ExportError: the target's own exporter cannot hold the result.
    """

    def write_more(inside: Path) -> None:
        if not artefact:
            return
        path = _artefact(result, inside / "artefacts", registry or default_registry())
        if evaluate_artefact is not None:
            scores = json.dumps(evaluate_artefact(path), indent=1)
            (inside / "evaluation.json").write_text(scores + "\n", encoding="utf-8")

    return save_result(result, Path(folder), write_more, keep_samples=samples)


def _artefact(result: QuantizedModel, folder: Path, registry: Registry) -> Path | None:
    """The artefact, exported; None, and the log says why, where a target that names no exporter gets none."""
    target = result.target
    if target.artefact is not None and target.artefact.exporter is not None:
        return export(result, folder, registry=registry)[0]
    try:
        portable = exporter_for(target, registry=registry)
    except ExportError as error:
        _log.warning("warning: no artefact: %s", error)
        return None
    problems = _problems(portable, result, registry)
    if problems:
        said = f"'{target.name}' names no exporter, and '{portable.name}' cannot hold the result: {problems[0]}"
        _log.warning("warning: no artefact: %s", said)
        return None
    return _written(portable, result, folder, registry)[0]


def load(folder: str | os.PathLike[str], *, registry: Registry | None = None) -> QuantizedModel:
    """Read a result folder. Runs no code from it.

    Args:
        folder: What `save` wrote.
        registry: Plugins that know kinds of numbers; absent: all that are installed, asked only where one is needed.

    Raises:
        ResultError: it is no result folder, or a file in it is missing or was changed.
    """
    return load_result(Path(folder), registry)


def export(
    result: QuantizedModel,
    folder: str | os.PathLike[str],
    *,
    exporter: str | None = None,
    registry: Registry | None = None,
    **options: Any,
) -> tuple[Path, ...]:
    """Write what the target's toolchain takes.

    Args:
        result: The quantized model.
        folder: Where; made if absent. Files of the same name are replaced once the new ones are whole.
        exporter: Another exporter than the target's own; targets that name none get the portable one.
        registry: Plugins to use; absent: all that are installed.
        options: Of the exporter.

    Returns:
        The files written, the artefact first.

    Raises:
        ExportError: the form cannot hold the result; says what and why.
        ResultError: the folder cannot be written.
    """
    registry = registry or default_registry()
    chosen = exporter_for(result.target, exporter, registry=registry, **options)
    problems = _problems(chosen, result, registry)
    if problems:
        raise ExportError(f"exporter '{chosen.name}': {'; '.join(problems)}")
    return _written(chosen, result, Path(folder), registry)


def _problems(chosen: Exporter, result: QuantizedModel, registry: Registry) -> tuple[str, ...]:
    record, doing = registry.exporters[chosen.name].record, f"exporter '{chosen.name}': check"
    with blaming(record, doing):
        return must_be(chosen.check(result), tuple, record, doing)


def _written(chosen: Exporter, result: QuantizedModel, place: Path, registry: Registry) -> tuple[Path, ...]:
    """The files of an exporter that can hold the result, put in place once they are whole."""
    record, doing = registry.exporters[chosen.name].record, f"exporter '{chosen.name}'"
    with written_files(place) as inside:
        with blaming(record, f"{doing}: export"):
            files = must_be(chosen.export(result, inside), tuple, record, f"{doing}: export")
        astray = [path for path in files if not Path(path).is_relative_to(inside) or not Path(path).is_file()]
        if astray or not files:
            what = f"got {astray[0]}" if astray else "got none"
            raise record.author_error(f"{doing}: export must return files that it wrote into its folder; {what}.")
        names = [path.relative_to(inside) for path in files]
    return tuple(place / name for name in names)


def exporter_for(
    target: TargetSpec, name: str | None = None, *, registry: Registry | None = None, **options: Any
) -> Exporter:
    """The exporter to use for a target: the one asked for, the target's own, or the portable one.

    Raises:
        ExportError: no such exporter, or the target names none and no portable one is installed, or an option is wrong.
    """
    registry = registry or default_registry()
    own = target.artefact.exporter if target.artefact is not None else None
    wanted = name or own
    if wanted is None:
        portable = sorted(n for n, entry in registry.exporters.items() if entry.value.portable)
        if not portable:
            raise ExportError(f"'{target.name}' names no exporter, and no portable one is installed. Name one.")
        wanted = portable[0]
    try:
        chosen = registry.exporter(wanted)
    except PluginError as error:
        asked = "" if name else f"'{target.name}': artefact.exporter: "
        raise ExportError(f"{asked}{error}") from error
    try:
        return chosen(chosen.Options(**options))
    except ValueError as error:
        first = error.errors()[0] if hasattr(error, "errors") else {"loc": ("options",), "msg": str(error)}
        field = ".".join(map(str, first["loc"]))
        raise ExportError(f"exporter '{wanted}': option {field}: {first['msg']}. Known: {_known(chosen)}.") from error


def _known(exporter: type[Exporter]) -> str:
    return ", ".join(exporter.Options.model_fields) or "none"


def graph_of(model: Model, example_inputs: ExampleInputs | None) -> Graph:
    """A model as a captured graph.

    Raises:
        CaptureError: it is no graph yet, and there are no example inputs to capture it with.
    """
    if isinstance(model, Graph):
        return model
    if example_inputs is None:
        raise CaptureError("example_inputs: needed to capture the model. Pass one batch as the model takes it.")
    return capture(model, example_inputs)


def target_of(made: QuantPlan, target: TargetSpec | str | os.PathLike[str] | None, registry: Registry) -> TargetSpec:
    """The target given with a plan, else the one it was made for, else the one that its name stands for."""
    if isinstance(target, TargetSpec):
        return target
    if target is not None:
        return load_target(target, registry=registry)
    if made.target_fingerprint in _planned:
        return _planned[made.target_fingerprint]
    if made.target not in registry.target_names():
        raise PlanError(
            f"plan: was made for '{made.target}', which no installed plugin brings. "
            "Pass its file: target=PATH in Python, --target PATH on the command line."
        )
    return load_target(made.target, registry=registry)


def _calibration(data: CalibrationData | None, graph: Graph) -> Calibration | None:
    if data is None or (isinstance(data, Calibration) and data.graph is graph):
        return data
    return Calibration(data, graph)


def _entered(folder: WorkFolder | str | os.PathLike[str] | None) -> AbstractContextManager[WorkFolder | None]:
    """A path becomes a folder of this call's own; a WorkFolder is its caller's, who entered it."""
    return nullcontext(folder) if folder is None or isinstance(folder, WorkFolder) else WorkFolder(folder)


def _examples(made: QuantPlan, model: Model) -> ExampleInputs:
    """Inputs of the shapes that the plan was made with; their values do not matter to the graph."""
    for i in made.inputs:
        if i.dtype not in DTYPES or min(i.shape, default=0) < 0:
            raise PlanError(
                f"plan: inputs.{i.name}: must have a dtype of torch and sizes of 0 or more; got {i.dtype!r} and "
                f"{list(i.shape)}. Plan again, or pass example_inputs."
            )
    zeros = {i.name: torch.zeros(i.shape, dtype=DTYPES[i.dtype]) for i in made.inputs}
    if isinstance(model, nn.Module) and set(zeros) <= set(inspect.signature(model.forward).parameters):
        return zeros
    return tuple(zeros.values())
