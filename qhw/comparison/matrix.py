# SPDX-License-Identifier: Apache-2.0
"""`qhw.compare`: plan, quantize and score one model for many targets."""

import logging
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from qhw.api import Model, graph_of, load_target, plan, quantize
from qhw.comparison.names import target_names
from qhw.comparison.row import Comparison, Ended, Headroom, Row
from qhw.comparison.scoring import FloatModel
from qhw.engine import (
    Calibration,
    CalibrationData,
    Metric,
    Progress,
    QuantizedModel,
    RichProgress,
    default_progress,
    float_bytes,
    quantized_bytes,
)
from qhw.errors import QhwError
from qhw.extension import Registry, default_registry
from qhw.graph import ExampleInputs, Graph
from qhw.integer import prove_accumulators
from qhw.roofline import estimate
from qhw.schema import TargetSpec

__all__ = ["compare"]

_log = logging.getLogger("qhw")


def compare(
    model: Model,
    targets: str | os.PathLike[str] | TargetSpec | Iterable[str | os.PathLike[str] | TargetSpec],
    example_inputs: ExampleInputs | None = None,
    *,
    calibration: CalibrationData | None = None,
    evaluate: Any = None,
    metric: Metric | None = None,
    pipeline: str | None = None,
    prefer: Sequence[str] = (),
    without: Sequence[str] = (),
    seed: int = 0,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Comparison:
    """Quantize one model for many targets, and set side by side what each allows, costs and keeps.

    The model is captured once, and run once in float. A target that cannot run it, or that no plan can be made for, is
    a row with the reason; the others go on.

    Args:
        model: A module, or a captured graph; it is not changed.
        targets: Names, paths, patterns such as "espressif/*", "all", with commas between; or targets.
        example_inputs: One batch, where the model is not captured yet.
        calibration: As `qhw.quantize` takes it, the same for all targets.
        evaluate: Labelled samples, as `qhw.evaluate` takes them; absent: nothing is scored.
        metric: Score of (outputs, labels), more is better; absent: top-1 in percent.
        pipeline: As `qhw.plan` takes it; so do `prefer` and `without`.
        prefer: Algorithms that come first at their stage.
        without: Algorithms to leave out.
        seed: For algorithms that draw random numbers.
        progress: Where progress is shown; absent: bars on a terminal.
        registry: Plugins to use; absent: all that are installed.

    Raises:
        CaptureError: the model cannot be captured.
        TargetError: a name or pattern fits no target.
        CalibrationError: the data does not fit the model.
    """
    registry, progress = registry or default_registry(), progress or default_progress()
    listed = _targets(targets, registry)
    graph = graph_of(model, example_inputs)
    data = None if calibration is None else _calibration(calibration, graph)
    wishes = {"pipeline": pipeline, "prefer": prefer, "without": without}
    with _bars(progress):
        judge = None if evaluate is None else FloatModel(graph, evaluate, metric, progress)
        rows = []
        for target in progress.track(listed, "targets", len(listed)):
            name = target.name if isinstance(target, TargetSpec) else target
            for _ in progress.track([name], name, 1):
                rows.append(_Try(graph, data, wishes, seed, progress, registry, judge).row(target, name))
    return Comparison(
        rows=tuple(rows),
        float_score=None if judge is None else judge.score,
        float_bytes=float_bytes(graph),
        samples=None if data is None else data.num_samples,
    )


def _targets(wanted: Any, registry: Registry) -> tuple[str | TargetSpec, ...]:
    if isinstance(wanted, TargetSpec):
        return (wanted,)
    items = [wanted] if isinstance(wanted, str | os.PathLike) else list(wanted)
    found: dict[str, str | TargetSpec] = {}
    for item in items:
        if isinstance(item, TargetSpec):
            found.setdefault(item.name, item)
        else:
            found.update((name, name) for name in target_names(os.fspath(item), registry) if name not in found)
    return tuple(found.values()) or target_names((), registry)


def _calibration(data: CalibrationData, graph: Graph) -> Calibration:
    made = data if isinstance(data, Calibration) and data.graph is graph else Calibration(data, graph)
    for _ in made:  # before the work: a sample that does not fit the model stops all, not each target
        pass
    return made


@contextmanager
def _bars(progress: Progress) -> Iterator[None]:
    """Take bars away where work ends with an error or is interrupted: they would draw over the message."""
    try:
        yield
    finally:
        if isinstance(progress, RichProgress):
            progress.stop()


class _Try:
    """One target after the other, each as far as it comes."""

    def __init__(
        self,
        graph: Graph,
        data: Calibration | None,
        wishes: dict[str, Any],
        seed: int,
        progress: Progress,
        registry: Registry,
        judge: FloatModel | None,
    ) -> None:
        self._graph, self._data, self._wishes, self._seed = graph, data, wishes, seed
        self._progress, self._registry, self._judge = progress, registry, judge

    def row(self, target: str | TargetSpec, name: str) -> Row:
        """The target's row; its own failures are in it, those of the data are raised."""
        start = time.monotonic()
        row = self._tried(Row(target=name), target)
        return replace(row, seconds=round(time.monotonic() - start, 2))

    def _tried(self, row: Row, target: str | TargetSpec) -> Row:
        step: Ended = "load"
        try:
            spec = target if isinstance(target, TargetSpec) else load_target(target, registry=self._registry)
            row = replace(row, spec=spec, target=spec.name)
            step = "plan"
            made = plan(self._graph, spec, calibration=self._data, registry=self._registry, **self._wishes)
            row = replace(row, plan=made, cost=estimate(self._graph, made, spec))
            step = "quantize"
            result = quantize(
                self._graph,
                made,
                calibration=self._data,
                target=spec,
                seed=self._seed,
                progress=self._progress,
                registry=self._registry,
            )
            row = replace(row, bytes=quantized_bytes(result), headroom=_headroom(result))
        except QhwError as error:
            return replace(row, ended=step, reason=" ".join(str(error).split()))
        except Exception as error:  # one target's trouble must not cost the others their rows
            _log.debug("%s: stopped at %s", row.target, step, exc_info=True)  # where it happened, for the report
            text = " ".join(str(error).split())
            return replace(row, ended=step, reason=f"unexpected {type(error).__name__}: {text}. Please report it.")
        return row if self._judge is None else replace(row, simulated=self._judge.simulated(result))


def _headroom(result: QuantizedModel) -> Headroom:
    proofs = list(prove_accumulators(result, witnesses=False))
    left = [proof.headroom for proof in proofs if proof.headroom is not None]
    return Headroom(
        bits=min(left, default=None),
        overflowing=tuple(proof.operator for proof in proofs if proof.overflowing_channels),
        unknown=tuple(proof.operator for proof in proofs if proof.bits is None),
    )
