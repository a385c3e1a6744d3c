# SPDX-License-Identifier: Apache-2.0
"""`qhw compare`: one model on many targets, as one matrix."""

from typing import TYPE_CHECKING, Annotated

import typer

from qhw.cli.options import (
    AsJson,
    CalibrationOption,
    EvaluateOption,
    MetricOption,
    ModelArgument,
    Pipeline,
    Prefer,
    Without,
)

if TYPE_CHECKING:
    from qhw.comparison import Comparison

TargetsOption = Annotated[
    str,
    typer.Option(
        "--targets",
        "-t",
        metavar="TARGETS",
        help="Names, paths to .toml files or patterns as 'espressif/*', with commas between; 'all' for all of them.",
    ),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="NUMBER", help="For algorithms that draw random numbers.")]


def compare(
    model: ModelArgument,
    targets: TargetsOption,
    calibration: CalibrationOption = None,
    evaluate: EvaluateOption = None,
    metric: MetricOption = None,
    seed: SeedOption = 0,
    pipeline: Pipeline = None,
    prefer: Prefer = None,
    without: Without = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model for many targets; set side by side accuracy, size, what runs where, head-room, cost, reasons.

    Nothing is written. A target that cannot run the model is listed with the reason. Exit status 1 if none can.

    Example: qhw compare examples.digits:model --targets 'espressif/*,google/*' --calibration
    examples.digits:calibration --evaluate examples.digits:evaluation
    """
    import qhw
    from qhw.cli.console import print_json
    from qhw.cli.show_comparison import show_comparison
    from qhw.cli.sources import load_calibration, load_callable, load_data, load_model
    from qhw.comparison import target_names
    from qhw.engine.evaluate import check_labelled
    from qhw.errors import CalibrationError
    from qhw.extension import default_registry

    names = target_names(targets, default_registry())  # before the model is captured, which takes seconds
    graph = load_model(model)
    data = load_calibration(calibration, graph)
    labelled = None if evaluate is None else load_data(evaluate)
    if labelled is not None:
        check_labelled(graph, labelled, name=str(evaluate))
    score = None if metric is None else load_callable(metric, CalibrationError, "--metric")
    found: Comparison = qhw.compare(
        graph,
        names,
        calibration=data,
        evaluate=labelled,
        metric=score,
        pipeline=pipeline,
        prefer=tuple(prefer or ()),
        without=tuple(without or ()),
        seed=seed,
    )
    if as_json:
        print_json(found.to_data())
    else:
        show_comparison(found, model)
    raise typer.Exit(0 if any(row.ended is None for row in found.rows) else 1)
