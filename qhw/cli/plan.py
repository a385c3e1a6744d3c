# SPDX-License-Identifier: Apache-2.0
"""`qhw plan`: what would be done to a model for a target, and why."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qhw.cli.options import (
    AsJson,
    CalibrationOption,
    Formats,
    KeepFloat,
    ModelArgument,
    Pipeline,
    Prefer,
    Settings,
    TargetOption,
    Without,
    wishes,
)

if TYPE_CHECKING:
    from qhw.decisions import QuantPlan
    from qhw.graph import Graph

OutOption = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="Also write the plan as JSON, to edit and replay.")
]


def plan(
    model: ModelArgument,
    target: TargetOption,
    calibration: CalibrationOption = None,
    out: OutOption = None,
    pipeline: Pipeline = None,
    prefer: Prefer = None,
    without: Without = None,
    keep_float: KeepFloat = None,
    formats: Formats = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Explain how a model would be quantized for a target: algorithms taken and refused, formats, what is unknown.

    Example: qhw plan examples.digits:model --target espressif/esp32-p4 --calibration examples.digits:calibration
    """
    import qhw
    from qhw.cli.console import print_document
    from qhw.cli.show_plan import show_plan
    from qhw.cli.sources import load_calibration, load_model
    from qhw.roofline import estimate

    spec = qhw.load_target(target)
    graph = load_model(model)
    data = load_calibration(calibration, graph)
    asked = wishes(pipeline, prefer, without, keep_float, formats, settings)
    made: QuantPlan = qhw.plan(graph, spec, calibration=data, **asked)
    if out is not None:
        _write(out, made.to_json())
    if as_json:
        print_document(made.to_json())
    else:
        _warn_unsavable(graph)
        show_plan(made, spec, model, None if data is None else data.num_samples, estimate(graph, made, spec))


def _warn_unsavable(graph: "Graph") -> None:
    """A plan is made of any model; the result of some cannot be kept, which is better known now."""
    from qhw.cli.console import warn
    from qhw.errors import CaptureError
    from qhw.graph.saving import check_savable

    try:
        check_savable(graph)
    except CaptureError as error:
        warn(f"warning: 'qhw quantize' will refuse this model: {error}")


def _write(path: Path, text: str) -> None:
    from qhw.engine.folder import why_not_written
    from qhw.errors import ResultError

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ResultError(
            f"{path}: cannot be written: {why_not_written(path, error)}. Choose another --out."
        ) from error
