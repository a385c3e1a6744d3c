# SPDX-License-Identifier: Apache-2.0
"""Scores of many models against one float model that is run once."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from qhw.engine import Metric, Progress, QuantizedModel, Score
from qhw.engine import evaluate as score_all
from qhw.errors import CalibrationError
from qhw.graph import Graph

__all__ = ["FloatModel"]


class FloatModel:
    """The float model's outputs on labelled samples, kept to pair others with them.

    Only the outputs are kept, so that large data is read anew for each target instead of lying in memory.

    Args:
        graph: The captured model.
        data: Labelled samples, as `qhw.evaluate` takes them; an iterator that can be read only once is kept whole.
        metric: As there.
        progress: Where progress is shown.

    Raises:
        CalibrationError: the data does not fit.
    """

    def __init__(self, graph: Graph, data: Any, metric: Metric | None, progress: Progress) -> None:
        self._graph, self._metric, self._progress = graph, metric, progress
        self._data = list(data) if isinstance(data, Iterator) else data
        self._outputs: list[tuple[float, Any]] = []
        (self.score,) = score_all(graph, {"float": self._run}, self._data, metric, progress)

    def simulated(self, result: QuantizedModel) -> Score:
        """The score of a quantized model on the same samples.

        Raises:
            CalibrationError: the data gives other samples than before.
        """
        kept = iter(self._outputs)
        runners = {"float": lambda inputs: self._again(kept, inputs), "simulated": lambda inputs: result(*inputs)}
        scores = score_all(self._graph, runners, self._data, self._metric, self._progress)
        if next(kept, None) is not None:
            raise _other_samples()
        return scores[1]

    def _run(self, inputs: tuple[Tensor, ...]) -> Any:
        output = self._graph.module(*inputs)
        self._outputs.append((_sum(inputs), output))
        return output

    @staticmethod
    def _again(kept: Iterator[tuple[float, Any]], inputs: tuple[Tensor, ...]) -> Any:
        found = next(kept, None)
        if found is None or found[0] != _sum(inputs):
            raise _other_samples()
        return found[1]


def _sum(inputs: tuple[Tensor, ...]) -> float:
    return sum(float(tensor.double().sum()) for tensor in inputs)


def _other_samples() -> CalibrationError:
    return CalibrationError(
        "evaluation: must give the same samples in the same order each time it is read. Turn shuffling off, or pass a "
        "list."
    )
