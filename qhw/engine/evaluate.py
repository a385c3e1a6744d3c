# SPDX-License-Identifier: Apache-2.0
"""Scores of what was measured, and paired agreement with the float model.

A difference of two top-1 figures below the noise ranks nothing; the share of samples whose prediction equals the
float model's is tighter, since it is paired.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhw.engine.calibration import batches_of, check_counts, check_input, cut
from qhw.engine.progress import Progress, SilentProgress
from qhw.engine.result import flat_outputs
from qhw.errors import CalibrationError, QhwError
from qhw.graph import Graph

__all__ = [
    "Agreement",
    "Metric",
    "Runner",
    "Score",
    "agreement",
    "check_labelled",
    "evaluate",
    "labelled_batches",
    "top1",
]

Metric = Callable[[Tensor, Tensor], float]
"""Score of outputs [samples, ...] against labels [samples, ...]; more is better."""

Runner = Callable[[tuple[Tensor, ...]], Any]
"""A model: inputs in order -> outputs."""

_BATCH = 100  # samples at once, where the data does not come in batches
_Z95 = 1.959963984540054  # two-sided 95 %


@dataclass(frozen=True)
class Agreement:
    """Share of samples with the same prediction, with its 95 % confidence interval (Wilson score)."""

    share: float
    low: float
    high: float
    samples: int


@dataclass(frozen=True)
class Score:
    """One figure, and of what it is.

    Attributes:
        subject: What was run: `float`, `simulated`, `artefact in onnxruntime`.
        metric: Its name.
        value: Top-1 in percent, or what the user's metric gives.
        agreement: With the float model's predictions; None where outputs are no class scores: not
            [samples, classes] with two classes or more, or labels that are no class numbers.
        samples: How many.
    """

    subject: str
    metric: str
    value: float
    agreement: Agreement | None
    samples: int


def top1(outputs: Tensor, labels: Tensor) -> float:
    """Share of samples whose largest output is the label, in percent.

    Args:
        outputs: float [samples, classes].
        labels: integer [samples].

    Raises:
        CalibrationError: the shapes are others; a metric of the user's is needed then.
    """
    if outputs.dim() != 2 or labels.dim() != 1 or labels.is_floating_point() or len(outputs) != len(labels):
        raise CalibrationError(
            f"evaluation: top-1 needs outputs [samples, classes] and integer labels [samples]; got "
            f"{list(outputs.shape)} and {list(labels.shape)} {labels.dtype}. Pass --metric module:callable."
        )
    return 100.0 * float((outputs.argmax(1) == labels).double().mean())


def agreement(a: Tensor, b: Tensor) -> Agreement:
    """How often two models predict the same class.

    Args:
        a: float [samples, classes].
        b: float [samples, classes].

    Raises:
        CalibrationError: there is no sample.

    Reference:
        Wilson, 1927, "Probable inference", eq. for the score interval, z = 1.96.
    """
    samples = len(a)
    if samples == 0:
        raise CalibrationError("evaluation: agreement needs at least one sample.")
    same = int((a.argmax(1) == b.argmax(1)).sum())
    share = same / samples
    spread = _Z95 * math.sqrt(share * (1 - share) / samples + _Z95**2 / (4 * samples**2))
    centre = share + _Z95**2 / (2 * samples)
    scale = 1 + _Z95**2 / samples
    return Agreement(share, max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale), samples)


def evaluate(
    graph: Graph,
    runners: Mapping[str, Runner],
    data: Any,
    metric: Metric | None = None,
    progress: Progress | None = None,
) -> tuple[Score, ...]:
    """Score several forms of one model on the same labelled samples.

    Args:
        graph: Tells names, shapes and dtypes of the inputs.
        runners: What is measured -> how to run it; the first is the float model that agreement is paired with.
        data: A dict of arrays with `labels` that holds all samples, or batches of (inputs, labels), inputs being a
            tensor, a tuple, or a dict by name.
        metric: Score of (outputs, labels), more is better; absent: top-1 in percent. Of a model with several outputs
            the first is scored.
        progress: Where progress is shown.

    Raises:
        CalibrationError: the data is empty or does not fit.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in runners}
    labels: list[Tensor] = []
    batches = labelled_batches(data, graph)
    with torch.inference_mode():
        for inputs, wanted in (progress or SilentProgress()).track(batches, "evaluation"):
            labels.append(wanted)
            for name, run in runners.items():
                outputs[name].append(flat_outputs(run(inputs))[0].float())
    if not sum(map(len, labels)):
        raise CalibrationError("evaluation: holds no sample. Pass at least one batch.")
    wanted_all = torch.cat(labels)
    whole = {name: torch.cat(parts) for name, parts in outputs.items()}
    reference = next(iter(whole.values()))
    return tuple(
        Score(
            subject=name,
            metric="top-1" if metric is None else getattr(metric, "__name__", "metric"),
            value=top1(values, wanted_all) if metric is None else _measured(metric, values, wanted_all),
            agreement=agreement(values, reference) if _are_class_scores(reference, wanted_all) else None,
            samples=len(wanted_all),
        )
        for name, values in whole.items()
    )


def _are_class_scores(outputs: Tensor, labels: Tensor) -> bool:
    is_table = outputs.dim() == 2 and outputs.shape[1] > 1 and len(outputs) == len(labels)
    return is_table and labels.dim() == 1 and not labels.is_floating_point()


def _measured(metric: Metric, outputs: Tensor, labels: Tensor) -> float:
    name = getattr(metric, "__name__", "metric")
    try:
        return float(metric(outputs, labels))
    except QhwError:
        raise
    except Exception as error:  # the user's own code, which may raise anything
        text = " ".join(str(error).split())
        raise CalibrationError(
            f"evaluation: metric '{name}' fails on outputs {list(outputs.shape)} and labels {list(labels.shape)}: "
            f"{type(error).__name__}: {text}. It must return one number."
        ) from error


def check_labelled(graph: Graph, data: Any, name: str = "evaluation") -> None:
    """Look at the first batch, before long work whose end would need it.

    Raises:
        CalibrationError: it has no labels, or does not fit the model.
    """
    if next(labelled_batches(data, graph, name), None) is None:
        raise CalibrationError(f"{name}: holds no sample. Pass at least one batch.")


def labelled_batches(data: Any, graph: Graph, name: str = "evaluation") -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
    """Batches of inputs, in the model's order, and labels.

    Args:
        data: A dict of arrays with `labels` that holds all samples, or batches of (inputs, labels).
        graph: Tells names, shapes and dtypes of the inputs.
        name: What messages call the data.

    Raises:
        CalibrationError: a batch does not fit.
    """
    names = tuple(graph.inputs)
    for index, (inputs, labels) in enumerate(_batches(data, name)):
        where = f"{name}: batch {index}"
        if isinstance(inputs, Mapping):
            missing = [name for name in names if name not in inputs]
            unknown = [name for name in inputs if name not in names]
            if missing or unknown:
                wrong = f"no input '{unknown[0]}' in the model" if unknown else f"input '{missing[0]}' is missing"
                raise CalibrationError(f"{where}: {wrong}. Inputs of the model: {', '.join(names)}.")
            inputs = tuple(inputs[name] for name in names)
        elif not isinstance(inputs, tuple | list):
            inputs = (inputs,)
        if len(inputs) != len(names):
            raise CalibrationError(
                f"{where}: the model takes {len(names)} inputs ({', '.join(names)}); got {len(inputs)}."
            )
        checked = tuple(check_input(graph, name, value, where) for name, value in zip(names, inputs, strict=True))
        check_counts({name: len(tensor) for name, tensor in zip(names, checked, strict=True)}, where)
        yield checked, _labels(labels, len(checked[0]), where)


def _labels(labels: Any, samples: int, where: str) -> Tensor:
    try:
        wanted = torch.as_tensor(np.array(labels) if isinstance(labels, np.ndarray) else labels).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise CalibrationError(
            f"{where}: labels must be numbers; got {type(labels).__name__}. Convert them."
        ) from error
    if wanted.dim() == 0 or len(wanted) != samples:
        count = 0 if wanted.dim() == 0 else len(wanted)
        raise CalibrationError(f"{where}: {samples} samples need as many labels; got {count}.")
    return wanted


def _batches(data: Any, name: str) -> Iterator[tuple[Any, Any]]:
    if isinstance(data, Mapping):
        if "labels" not in data:
            raise CalibrationError(f"{name}: holds no 'labels'. Add the array, or leave the data out.")
        arrays = {key: value for key, value in data.items() if key != "labels"}
        for part in cut({**arrays, "labels": data["labels"]}, name, _BATCH):
            yield {key: value for key, value in part.items() if key != "labels"}, part["labels"]
        return
    if not isinstance(data, Iterable) or isinstance(data, Tensor | np.ndarray | str | bytes):
        kind = type(data).__name__
        raise CalibrationError(f"{name}: must be a dict of arrays with 'labels', or batches; got {kind}.")
    for item in batches_of(data, name):
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise CalibrationError(f"{name}: every batch must be (inputs, labels). Check what the loader yields.")
        yield item[0], item[1]
