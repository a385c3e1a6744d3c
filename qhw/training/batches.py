# SPDX-License-Identifier: Apache-2.0
"""Labelled batches for training: arrays are shuffled anew each epoch, loaders are taken as they come."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qhw.engine import labelled_batches
from qhw.engine.calibration import cut
from qhw.errors import CalibrationError
from qhw.graph import Graph
from qhw.training.checkpoint import digest_of

__all__ = ["TrainingData", "epoch_seed"]


def epoch_seed(seed: int, number: int) -> int:
    """The seed of an epoch: of its order of arrays and of its dropout."""
    return seed * 1_000_003 + number


class TrainingData:
    """What an epoch goes through.

    Args:
        data: A dict of arrays with `labels`, or a loader of (inputs, labels) that can be read once per epoch.
        graph: The model they are for.
        batch_size: Of arrays.
        seed: Of the order of arrays.

    Raises:
        CalibrationError: an iterator that can be read only once, or arrays that do not fit each other.
    """

    def __init__(self, data: Any, graph: Graph, batch_size: int, seed: int) -> None:
        if isinstance(data, Iterator):
            raise CalibrationError(
                "training: must be read once per epoch; got an iterator that ends. Pass the loader, or arrays."
            )
        self._data = data
        self._graph = graph
        self._batch_size = batch_size
        self._seed = seed
        self.num_batches = self._count()

    def digest(self) -> str | None:
        """SHA-256 of arrays; None of a loader, which may yield anything."""
        if not isinstance(self._data, Mapping):
            return None
        return digest_of({key: torch.as_tensor(value) for key, value in self._data.items()})

    def _count(self) -> int | None:
        """Batches of an epoch; None where nobody knows."""
        if isinstance(self._data, Mapping):
            return len(self._cut(self._num_samples()))
        try:
            return len(self._data)
        except TypeError:  # no length, or a loader over a stream, which has the method and no answer
            return None

    def epoch(self, number: int) -> Iterator[tuple[tuple[Tensor, ...], Tensor]]:
        """Batches of one epoch, counted from 0: inputs and labels.

        Raises:
            CalibrationError: a batch does not fit, or there is none.
        """
        data = self._shuffled(number) if isinstance(self._data, Mapping) else self._data
        count = 0
        for batch in labelled_batches(data, self._graph, "training"):
            yield batch
            count += 1
        if not count:
            raise CalibrationError("training: holds no sample. Pass at least one batch.")

    def _num_samples(self) -> int:
        if "labels" not in self._data:
            raise CalibrationError("training: holds no 'labels'. Add the array.")
        return sum(len(part["labels"]) for part in cut(self._data, "training", self._batch_size))

    def _cut(self, count: int) -> list[int]:
        """Sizes of the batches. A last one of a single sample joins the one before it: it has no variance."""
        sizes = [min(self._batch_size, count - start) for start in range(0, count, self._batch_size)]
        return [*sizes[:-2], sizes[-2] + 1] if len(sizes) > 1 and sizes[-1] == 1 < self._batch_size else sizes

    def _shuffled(self, number: int) -> Iterator[tuple[dict[str, Any], Any]]:
        arrays = {key: torch.as_tensor(value) for key, value in self._data.items()}
        labels = arrays.pop("labels")
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(epoch_seed(self._seed, number)))
        for part in torch.split(order, self._cut(len(labels))):
            yield {key: value[part] for key, value in arrays.items()}, labels[part]
