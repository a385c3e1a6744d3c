# SPDX-License-Identifier: Apache-2.0
"""`qhw.evaluate`: the float model, the simulation, the integer result and the artefact, scored on the same samples."""

from pathlib import Path
from typing import Any

import torch

from qhw.api import exporter_for
from qhw.engine import Metric, Progress, QuantizedModel, Runner, Score, blaming, default_progress
from qhw.engine import evaluate as score_all
from qhw.errors import IntegerError
from qhw.extension import Registry, default_registry
from qhw.graph import Graph
from qhw.integer import IntegerModel

__all__ = ["evaluate"]

ARTEFACT = "artefact in {executor}"


def evaluate(
    graph: Graph,
    result: QuantizedModel,
    data: Any,
    *,
    artefact: Path | None = None,
    metric: Metric | None = None,
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> tuple[Score, ...]:
    """Score a model in float, simulated, in exact integers, and as its artefact.

    The integers need a target that says how it computes, the artefact an executor that is installed: else they are left
    out.

    Args:
        graph: The float model, as `qhw.capture` gave it.
        result: The quantized model.
        data: A dict of arrays with `labels`, or batches of (inputs, labels).
        artefact: The exported file. It is run by the target's executor, or by the exporter's own.
        metric: Score of (outputs, labels), more is better; absent: top-1 in percent.
        progress: Where progress is shown; absent: a bar on a terminal.
        registry: Plugins to use; absent: all that are installed.

    Returns:
        One score each, `float` first, each with its paired agreement with the float model.
    """
    runners: dict[str, Runner] = {
        "float": lambda inputs: graph.module(*inputs),
        "simulated": lambda inputs: result(*inputs),
    }
    try:
        integer = IntegerModel(result)
        runners["integer"] = lambda inputs: integer(*inputs)
    except IntegerError:  # the target leaves open what decides; `qhw verify` says what
        pass
    found = None if artefact is None else _artefact_runner(result, artefact, registry or default_registry())
    if found is not None:
        runners[ARTEFACT.format(executor=found[0])] = found[1]
    return score_all(graph, runners, data, metric, progress or default_progress())


def _artefact_runner(result: QuantizedModel, artefact: Path, registry: Registry) -> tuple[str, Runner] | None:
    """The executor that runs an artefact, by name and as a function; None where there is none or it is missing here."""
    target = result.target
    own = target.artefact.executor if target.artefact is not None else None
    name = own or exporter_for(target, registry=registry).executor
    if name is None or name not in registry.executors:
        return None
    entry = registry.executors[name]
    with blaming(entry.record, f"executor '{name}'"):
        executor = entry.value()
        if executor.available() is not None:
            return None
        call = executor.load(artefact)
    names = result.input_names

    def run(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
        with blaming(entry.record, f"executor '{name}'"):
            outputs = call({n: tensor.numpy() for n, tensor in zip(names, inputs, strict=True)})
        return [torch.from_numpy(output) for output in outputs]

    return name, run
