# SPDX-License-Identifier: Apache-2.0
"""Calibration data as canonical micro-batches: the same bytes for any loader batch size.

A float forward pass differs in its last bits with the batch size, so statistics would, too. Whatever the loader's
batches are, they are cut and joined into micro-batches of 32 samples in one memory format, the tail last.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from os import PathLike
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qhw.engine.look import Look, remarks_on
from qhw.errors import CalibrationError, QhwError
from qhw.graph import Graph

__all__ = [
    "FIRST_SAMPLES",
    "MICRO_BATCH",
    "Calibration",
    "CalibrationData",
    "batches_of",
    "check_counts",
    "check_input",
    "cut",
    "has_labels",
    "running",
]

MICRO_BATCH = 32
FIRST_SAMPLES = 8  # of the calibration data that a result keeps, to verify it with

CalibrationData = Tensor | np.ndarray | Mapping[str, Any] | Iterable[Any]
"""Batches of a tensor, a tuple of inputs, or a dict by input name; or one tensor or dict that holds all samples."""

_FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}

_log = logging.getLogger("qhw")


class Calibration:
    """Samples for one graph, in canonical micro-batches; can be read as often as needed.

    A batch is a tensor, a tuple of inputs, or a dict by input name. A label is passed over where a batch is
    `(inputs, label)`, or holds one tensor more than the model has inputs.

    Args:
        data: Batches, or all samples at once. An iterator that can be read only once is kept in memory.
        graph: The model they are for; names, shapes and dtypes are checked against its inputs.
        name: What messages call the data.
    """

    def __init__(self, data: CalibrationData, graph: Graph, name: str = "calibration") -> None:
        self._graph = graph
        self._inputs = graph.inputs
        self._name = name
        self._data = _reusable(data, name)
        self._num_samples: int | None = None
        self._digest: str | None = None
        self._is_label_said = False
        self._first: dict[str, Tensor] = {}
        self._remarks: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """What makes the samples unfit to calibrate with, one line each: too few, or constant. Empty before a pass."""
        return self._remarks

    @property
    def first_samples(self) -> dict[str, Tensor]:
        """The first samples by input name, at most FIRST_SAMPLES; empty before the first pass."""
        return dict(self._first)

    @property
    def graph(self) -> Graph:
        """The model that the samples are for."""
        return self._graph

    @property
    def num_samples(self) -> int | None:
        """Samples in all; None before the first whole pass of data that comes in batches."""
        return _rows(self._data) if self._num_samples is None else self._num_samples

    @property
    def digest(self) -> str | None:
        """SHA-256 of all samples in order; None before the first whole pass."""
        return self._digest

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        """Micro-batches: tensors in the order of the graph's inputs, axis 0 the sample.

        Raises:
            CalibrationError: no sample at all, or one that does not fit; names the input and what it must be.
        """
        digest = hashlib.sha256() if self._digest is None else None
        looks = {name: Look() for name, dtype in self._graph.input_dtypes.items() if "float" in dtype}
        count = 0
        for batch in self._micro_batches():
            if not count and not self._first:
                firsts = zip(self._inputs, batch, strict=True)
                self._first = {name: t[:FIRST_SAMPLES].contiguous().clone() for name, t in firsts}
            count += batch[0].shape[0]
            if digest is not None:
                for name, tensor in zip(self._inputs, batch, strict=True):
                    if name in looks:
                        looks[name].add(tensor)
                    known = tensor.float() if tensor.dtype == torch.bfloat16 else tensor  # numpy has no bfloat16
                    digest.update(known.contiguous().numpy().data)
            yield batch
        if count == 0:
            raise CalibrationError(f"{self._name}: holds no sample. Pass at least one batch.")
        self._num_samples = count
        if digest is not None:
            self._digest = digest.hexdigest()
            self._remarks = tuple(remarks_on(self._name, count, looks))

    @property
    def has_labels(self) -> bool:
        """Whether batches bring a label, as far as the first one tells."""
        return _brings_labels(self._data, self._graph, self._name)

    def _micro_batches(self) -> Iterator[tuple[Tensor, ...]]:
        waiting: list[tuple[Tensor, ...]] = []
        size = 0
        for index, item in enumerate(self._items()):
            inputs = self._as_inputs(item, index)
            waiting.append(inputs)
            size += inputs[0].shape[0]
            while size >= MICRO_BATCH:
                joined = _join(waiting)
                yield tuple(_canonical(t[:MICRO_BATCH]) for t in joined)
                size -= MICRO_BATCH
                waiting = [tuple(t[MICRO_BATCH:] for t in joined)] if size else []
        if size:
            yield tuple(_canonical(t) for t in _join(waiting))

    def _items(self) -> Iterator[Any]:
        """Batches; a tensor, an array or a dict holds all samples and is cut into views."""
        data = self._data
        if isinstance(data, Tensor | np.ndarray):
            if len(self._inputs) != 1:
                raise CalibrationError(
                    f"{self._name}: one tensor fits a model with one input; this one has {len(self._inputs)} "
                    f"({', '.join(self._inputs)}). Pass a dict by input name."
                )
            yield from cut({next(iter(self._inputs)): data}, self._name)
        elif isinstance(data, Mapping):
            yield from cut({key: value for key, value in data.items() if key != "labels"}, self._name)
        else:
            yield from batches_of(data, self._name)

    def _as_inputs(self, item: Any, index: int) -> tuple[Tensor, ...]:
        # All samples at once have no batches that the user knows of: a sample is counted from the first one then.
        is_whole = isinstance(self._data, Tensor | np.ndarray | Mapping)
        where, first = (self._name, index * MICRO_BATCH) if is_whole else (f"{self._name}: batch {index}", 0)
        names = list(self._inputs)
        if _is_labelled(item, len(names)):
            item = item[0] if len(item) == 2 else item[:-1]
            if not self._is_label_said:
                _log.info("%s: batches are (inputs, label); the label is passed over.", self._name)
                self._is_label_said = True
        if isinstance(item, Mapping):
            missing = [name for name in names if name not in item]
            unknown = [name for name in item if name not in names and name != "labels"]
            if missing or unknown:
                wrong = f"no input '{unknown[0]}' in the model" if unknown else f"input '{missing[0]}' is missing"
                raise CalibrationError(f"{where}: {wrong}. Inputs of the model: {', '.join(names)}.")
            values = [item[name] for name in names]
        else:
            values = list(item) if isinstance(item, tuple | list) else [item]
        if len(values) != len(names):
            raise CalibrationError(
                f"{where}: the model takes {len(names)} inputs ({', '.join(names)}); got {len(values)}. "
                "Yield a tuple in that order, or a dict by name."
            )
        tensors = tuple(
            check_input(self._graph, name, value, where, first) for name, value in zip(names, values, strict=True)
        )
        check_counts({name: len(tensor) for name, tensor in zip(names, tensors, strict=True)}, where)
        return tensors


@contextmanager
def running(samples: int) -> Iterator[None]:
    """Run a model on a micro-batch; what torch raises says that the size does not fit.

    Raises:
        CalibrationError: the model was captured for another number of samples.
    """
    try:
        yield
    except RuntimeError as error:  # torch, on a shape that the graph was not captured for
        what = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise CalibrationError(
            f"calibration: the model fails on {samples} samples at once: {what}. "
            "Let axis 0 be free when it is captured (dynamic_batch=True)."
        ) from error


def has_labels(data: CalibrationData, graph: Graph) -> bool:
    """Whether batches bring a label, as far as the first one tells.

    False for all samples at once and for an iterator that can be read only once: looking would use its first batch up.
    """
    return data.has_labels if isinstance(data, Calibration) else _brings_labels(data, graph, "calibration")


def _brings_labels(data: CalibrationData, graph: Graph, name: str) -> bool:
    if isinstance(data, Tensor | np.ndarray | Mapping | Iterator):
        return False
    with torch.random.fork_rng(devices=[]):  # a loader that shuffles draws random numbers when it is looked at
        for item in batches_of(_reusable(data, name), name):
            return _is_labelled(item, len(graph.inputs))
    return False


def batches_of(data: Iterable[Any], where: str) -> Iterator[Any]:
    """The batches of a loader; what it raises becomes an error that says where.

    Raises:
        CalibrationError: the loader raised.
    """
    index = 0
    try:
        for item in data:
            yield item
            index += 1
    except QhwError:
        raise
    except Exception as error:  # the user's own code, which may raise anything
        text = " ".join(str(error).split())
        raise CalibrationError(
            f"{where}: batch {index} cannot be read: {type(error).__name__}: {text}. Repair the loader."
        ) from error


def check_counts(counts: Mapping[str, int], where: str) -> None:
    """Refuse inputs with different numbers of samples."""
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise CalibrationError(f"{where}: all must hold equally many samples; got {listed}.")


def _is_labelled(item: Any, num_inputs: int) -> bool:
    """One tensor more than the model has inputs, or (inputs, label) with the inputs in a container of their own."""
    if not isinstance(item, tuple | list):
        return False
    return len(item) == num_inputs + 1 or (len(item) == 2 and isinstance(item[0], tuple | list | Mapping))


def check_input(graph: Graph, name: str, value: Any, where: str, first: int = 0) -> Tensor:
    """One input of a batch as the graph takes it, on the CPU.

    Args:
        graph: Tells shape and dtype.
        name: The input.
        value: Its samples.
        where: What messages start with.
        first: Number of the first sample, for messages.

    Raises:
        CalibrationError: not a tensor, or of another shape or dtype than the model takes, or not finite.
    """
    tensor = _as_tensor(value, f"{where}: input '{name}'")
    shape, wanted = tuple(tensor.shape), graph.inputs[name]
    if len(shape) != len(wanted) or shape[1:] != wanted[1:]:
        expected = ", ".join(["batch", *map(str, wanted[1:])])
        raise CalibrationError(
            f"{where}: input '{name}' must have shape [{expected}]; got {list(shape)}. "
            "Give samples as the model takes them, or plan with other example inputs."
        )
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype != graph.input_dtypes[name]:
        raise CalibrationError(
            f"{where}: input '{name}' must be {graph.input_dtypes[name]}; got {dtype}. "
            "Convert it as your model's preprocessing does."
        )
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        sample = first + int(torch.isfinite(tensor).flatten(1).all(1).logical_not().nonzero()[0])
        raise CalibrationError(
            f"{where}: input '{name}' holds NaN or infinite values in sample {sample} (counted from 0). Remove such "
            "samples."
        )
    return tensor


def _as_tensor(value: Any, where: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    if not isinstance(value, np.ndarray):
        raise CalibrationError(f"{where} must be a tensor; got {type(value).__name__}.")
    try:
        # A copy: torch takes neither negative strides nor foreign byte order, and warns of read-only memory.
        return torch.from_numpy(np.array(value, dtype=value.dtype.newbyteorder("="), order="C"))
    except TypeError as error:
        raise CalibrationError(f"{where} must hold numbers; got an array of {value.dtype}. Convert it.") from error


def _rows(data: Any) -> int | None:
    """Number of samples where all are given at once."""
    if isinstance(data, Mapping):
        data = next((value for key, value in data.items() if key != "labels"), None)
    return len(data) if isinstance(data, Tensor | np.ndarray) and data.ndim else None


def _reusable(data: CalibrationData, name: str) -> Any:
    if isinstance(data, Tensor | np.ndarray | Mapping):
        return data
    if not isinstance(data, Iterable) or isinstance(data, str | bytes | PathLike):
        kind = type(data).__name__
        raise CalibrationError(f"{name}: must yield batches (a tensor, a tuple or a dict by name); got {kind}.")
    return list(batches_of(data, name)) if isinstance(data, Iterator) else data


def cut(data: Mapping[str, Any], name: str, size: int = MICRO_BATCH) -> Iterator[dict[str, Any]]:
    """All samples at once -> batches, by views.

    Raises:
        CalibrationError: not arrays, or with different numbers of samples.
    """
    for key, value in data.items():
        if not isinstance(value, Tensor | np.ndarray) or value.ndim == 0:
            got = "a single number" if hasattr(value, "ndim") else type(value).__name__
            raise CalibrationError(f"{name}: '{key}' must be an array with one row per sample; got {got}.")
    counts = {key: len(value) for key, value in data.items()}
    check_counts(counts, name)
    for start in range(0, max(counts.values(), default=0), size):
        yield {key: value[start : start + size] for key, value in data.items()}


def _join(batches: list[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    return batches[0] if len(batches) == 1 else tuple(torch.cat(parts) for parts in zip(*batches, strict=True))


def _canonical(batch: Tensor) -> Tensor:
    """A copy with the strides of its shape: a kernel is chosen by strides, and each rounds in its own way.

    Images lie channels-last, which convolutions read fastest (0.75 of the time of channels-first on MobileNetV2).
    """
    return batch.clone(memory_format=_FORMATS.get(batch.dim(), torch.contiguous_format))
