# SPDX-License-Identifier: Apache-2.0
"""`qhw quantize`: apply a plan, measure, and write the result folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.lost import EpochsOption, Lost, TrainOption, WithinOption
from qhw.cli.options import (
    AsJson,
    CalibrationOption,
    EvaluateOption,
    Formats,
    KeepFloat,
    MetricOption,
    ModelArgument,
    OutOption,
    Pipeline,
    Prefer,
    Settings,
    Without,
    wishes,
)
from qhw.wording import argument, counted

if TYPE_CHECKING:
    from qhw.decisions import QuantPlan
    from qhw.engine import QuantizedModel, Score, WorkFolder
    from qhw.graph import Graph

TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        "-t",
        metavar="TARGET",
        help="A target's name (qhw target list), or a path to a .toml file. Absent: the target that --plan names.",
    ),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Replay this plan (qhw plan --out) instead of a new one.")
]
SamplesOption = Annotated[
    bool, typer.Option("--samples/--no-samples", help="Keep 8 calibration samples in the result, for 'qhw verify'.")
]
SeedOption = Annotated[int, typer.Option("--seed", metavar="NUMBER", help="For algorithms that draw random numbers.")]


def quantize(
    model: ModelArgument,
    out: OutOption,
    target: TargetOption = None,
    calibration: CalibrationOption = None,
    evaluate: EvaluateOption = None,
    metric: MetricOption = None,
    plan: PlanOption = None,
    seed: SeedOption = 0,
    samples: SamplesOption = True,
    train: TrainOption = None,
    within: WithinOption = None,
    epochs: EpochsOption = 3,
    pipeline: Pipeline = None,
    prefer: Prefer = None,
    without: Without = None,
    keep_float: KeepFloat = None,
    formats: Formats = None,
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Quantize a model for a target and write the result folder: plan, tensors, artefact, scores.

    Stopped before the end, the same command goes on behind the last layer that was done.

    Example: qhw quantize examples.digits:model --target espressif/esp32-p4 --calibration examples.digits:calibration
    --evaluate examples.digits:evaluation --out out/p4
    """
    import qhw
    from qhw.cli.sources import load_calibration, load_callable, load_data, load_model
    from qhw.engine.evaluate import check_labelled
    from qhw.errors import CalibrationError, PlanError
    from qhw.graph.saving import check_savable

    asked = wishes(pipeline, prefer, without, keep_float, formats, settings)
    replayed = None if plan is None else _read_plan(plan, asked)
    spec = None if target is None else qhw.load_target(target)
    source = replayed or spec
    if source is None:
        raise PlanError("--target: needed without --plan. Give a name (qhw target list), or a path to a .toml file.")
    graph = load_model(model)
    check_savable(graph)  # before the work, which would be lost
    data = load_calibration(calibration, graph)
    labelled = None if evaluate is None else load_data(evaluate)
    if labelled is not None:
        with _as_named(evaluate):  # before the work, at whose end it would be missed
            check_labelled(graph, labelled)
    score = None if metric is None else load_callable(metric, CalibrationError, "--metric")
    made = source if isinstance(source, qhw.QuantPlan) else qhw.plan(graph, source, calibration=data, **asked)
    lost = None
    if train is not None or within is not None:
        lost = Lost(within, train, None if train is None else load_data(train), epochs, seed)
        lost.check(graph, labelled)
    scores: list[Score] = []

    def measure(artefact: Path | None) -> Any:
        if labelled is not None:
            with _as_named(evaluate):
                scores.extend(qhw.evaluate(graph, result, labelled, artefact=artefact, metric=score))
        return [asdict(score) for score in scores]

    with _keeping(out) as folder:
        result = qhw.quantize(graph, made, calibration=data, target=spec, seed=seed, work_folder=folder)
        if lost is not None:
            result = lost.trained(graph, result, labelled, score, out)
        qhw.save(result, out, samples=samples, evaluate_artefact=measure)
    _report(graph, result, out, scores, as_json)


@contextmanager
def _as_named(data: str | None) -> Iterator[None]:
    """Messages about the evaluation data call it as the command line did."""
    from qhw.errors import CalibrationError

    try:
        yield
    except CalibrationError as error:
        raise CalibrationError(str(error).replace("evaluation: ", f"{data}: ", 1)) from error


@contextmanager
def _keeping(out: Path) -> "Iterator[WorkFolder]":
    """Layers that are done lie beside the result until it is written; what stops the work before says so."""
    from qhw.cli.console import warn
    from qhw.cli.stopped import Interrupted
    from qhw.engine import WorkFolder
    from qhw.errors import QhwError

    folder = WorkFolder(out.parent / f"{out.name}.work")

    def words() -> str:
        return f"{counted(folder.kept, 'finished layer')} {'is' if folder.kept == 1 else 'are'} kept in {folder.path}"

    try:
        with folder:
            yield folder
            if folder.read:
                warn(f"{counted(folder.read, 'finished layer')} read back from {folder.path}")
    except KeyboardInterrupt:
        if folder.kept:
            raise Interrupted(f"{words()}. Run the same command again to go on.") from None
        raise
    except QhwError:
        if folder.kept:
            warn(f"{words()}, for when the command is run again.")
        raise


def _read_plan(path: Path, asked: dict[str, Any]) -> "QuantPlan":
    from qhw.decisions import QuantPlan
    from qhw.errors import PlanError

    given = [name for name, value in asked.items() if value]
    if given:
        raise PlanError(f"--plan: the plan decides '{given[0]}' already. Edit the plan, or leave --plan out.")
    try:
        return QuantPlan.from_json(path.read_text(encoding="utf-8"), where=str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise PlanError(f"{path}: cannot be read: {error}. Write it with 'qhw plan --out'.") from error


def _report(graph: "Graph", result: "QuantizedModel", out: Path, scores: "list[Score]", as_json: bool) -> None:
    from qhw.cli.console import paragraph, print_json, print_table
    from qhw.cli.words import bytes_words, share_words
    from qhw.engine import float_bytes, quantized_bytes

    made = result.plan
    before, after = float_bytes(graph), quantized_bytes(result)
    if as_json:
        facts = {
            "target": made.target,
            "out": str(out),
            "steps": [step.model_dump(mode="json") for step in result.steps],
            "scores": [asdict(score) for score in scores],
            "float_bytes": before,
            "quantized_bytes": after,
            "accelerator_macs": made.accelerator_macs,
            "total_macs": made.total_macs,
            "calibration_remarks": list(result.provenance.get("calibration_remarks", ())),
        }
        print_json(facts)
        return
    for step in result.steps:
        paragraph(f"{step.stage:<18}{step.algorithm}", step.summary, left=46)
    if scores:
        print()
        rows = []
        for score in scores:
            same = score.agreement
            words = "" if same is None else f"{100 * same.share:.2f} % ({100 * same.low:.2f} to {100 * same.high:.2f})"
            rows.append((score.subject, f"{score.value:.2f}", words, str(score.samples)))
        print_table(("model", scores[0].metric, "agrees with float (95 %)", "samples"), rows)
        if all(score.subject != "integer" for score in scores):
            print(
                f"In exact integers it cannot be scored: 'qhw verify {argument(out)}' says what the target leaves open."
            )
    print()
    hosted = sum(operator.where == "host" for operator in made.operators)
    host = f"; {counted(hosted, 'operator')} on the host" if hosted else ""  # most of them multiply nothing
    print(f"{bytes_words(before)} -> {bytes_words(after)}; on the accelerator {share_words(made)}{host}")
    print(f"Result in {out}")
    where = f"the artefact is in {out / 'artefacts'}; " if (out / "artefacts").is_dir() else ""
    print(f"Next: {where}every decision and its reason in {out / 'plan.json'}")
