# SPDX-License-Identifier: Apache-2.0
"""`qhw train`: quantization-aware training of a result, with the loop that qhw brings."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import paragraph, print_json, print_table
from qhw.cli.options import AsJson, EvaluateOption, MetricOption, OutOption, Prefer, ResultArgument, Settings, Without
from qhw.wording import argument, counted

if TYPE_CHECKING:
    from qhw.engine import Score
    from qhw.training import Training

TrainingDataOption = Annotated[
    str,
    typer.Option(
        "--data",
        "-d",
        metavar="DATA",
        help="Labelled samples to train on: an .npz file that also has 'labels', or module:callable that yields "
        "(inputs, labels).",
        show_default=False,
    ),
]
EpochsOption = Annotated[int, typer.Option("--epochs", metavar="NUMBER", help="How often the data is gone through.")]
RateOption = Annotated[float, typer.Option("--lr", metavar="RATE", help="Learning rate at the start.")]
QuantizerRateOption = Annotated[
    float | None,
    typer.Option("--quantizer-lr", metavar="RATE", help="Learning rate of scales and zero points. Absent: as --lr."),
]
BatchOption = Annotated[int, typer.Option("--batch-size", metavar="NUMBER", help="Of arrays.")]
PatienceOption = Annotated[
    int | None,
    typer.Option("--patience", metavar="NUMBER", help="Epochs without a better score after which it stops."),
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="NUMBER", help="Of the order of samples.")]
PipelineOption = Annotated[
    str | None, typer.Option("--pipeline", metavar="NAME", help="The pipeline that says how results are trained.")
]


def train(
    result: ResultArgument,
    data: TrainingDataOption,
    out: OutOption,
    epochs: EpochsOption = 3,
    lr: RateOption = 1e-4,
    quantizer_lr: QuantizerRateOption = None,
    batch_size: BatchOption = 128,
    patience: PatienceOption = None,
    evaluate: EvaluateOption = None,
    metric: MetricOption = None,
    seed: SeedOption = 0,
    pipeline: PipelineOption = None,
    prefer: Prefer = None,
    without: Without = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Train a result with cross-entropy, and write what comes of it as a result folder.

    Stopped before the end, the same command goes on behind the last epoch that was done. Another loss: qhw.trainable
    and your own loop (docs/training.md).

    Example: qhw train out/p4 --data examples.digits:training --evaluate examples.digits:evaluation --out out/trained
    """
    import qhw
    from qhw.cli.options import wishes
    from qhw.cli.sources import load_callable, load_data
    from qhw.engine import evaluate as score_all
    from qhw.engine.evaluate import check_labelled
    from qhw.errors import CalibrationError

    asked = wishes(None, prefer, without, None, None, settings)
    start = qhw.load(result)
    graph = start.float_graph.copy()
    samples = load_data(data)
    labelled = None if evaluate is None else load_data(evaluate)
    for name, given in ((data, samples), (str(evaluate), labelled)):
        if given is not None:  # before the work, which would be lost
            check_labelled(graph, given, name)
    score = None if metric is None else load_callable(metric, CalibrationError, "--metric")
    form = qhw.trainable(
        qhw.load(result), pipeline=pipeline, **{key: asked[key] for key in ("prefer", "without", "options")}
    )
    history = qhw.train(
        form,
        samples,
        epochs=epochs,
        lr=lr,
        batch_size=batch_size,
        quantizer_lr=quantizer_lr,
        evaluation=labelled,
        metric=score,
        patience=patience,
        work_folder=out.parent / f"{out.name}.work",
        seed=seed,
    )
    trained = qhw.freeze(form)
    scores: list[Score] = []
    if labelled is not None:
        runners = {"before": lambda inputs: start(*inputs), "trained": lambda inputs: trained(*inputs)}
        scores += score_all(graph, runners, labelled, score)
    qhw.save(trained, out)
    if as_json:
        print_json(_facts(history, scores, trained, out))
        return
    _show(history, scores, trained)
    print(f"Result in {out}")
    print(f"Next: 'qhw verify {argument(out)}' proves its integer result.")


def _facts(history: "Training", scores: "list[Score]", trained: Any, out: Path) -> dict[str, Any]:
    return {
        "out": str(out),
        "epochs": [asdict(epoch) for epoch in history.epochs],
        "best": history.best,
        "scores": [asdict(score) for score in scores],
        "steps": [step.model_dump(mode="json") for step in trained.steps if step.stage in ("train", "fit")],
    }


def _show(history: "Training", scores: "list[Score]", trained: Any) -> None:
    rows = [
        (str(epoch.number) + (" (kept)" if epoch.number == history.best else ""), f"{epoch.loss:.4f}")
        + ((f"{epoch.score:.2f}",) if scores else ())
        for epoch in history.epochs
    ]
    print_table(("epoch", "loss") + ((scores[0].metric,) if scores else ()), rows)
    print()
    for step in trained.steps:
        if step.stage in ("train", "fit"):
            paragraph(f"{step.stage:<18}{step.algorithm}", step.summary, left=46)
    if scores:
        before, after = scores
        words = f"{before.value:.2f} before, {after.value:.2f} trained, {counted(after.samples, 'sample')}"
        paragraph(before.metric, words)
