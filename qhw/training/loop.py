# SPDX-License-Identifier: Apache-2.0
"""`qhw.train`: a plain training loop for people without one."""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qhw.engine import Metric, Progress, QuantizedModel, RichProgress, default_progress, evaluate
from qhw.engine.result import flat_outputs
from qhw.errors import TrainingError
from qhw.training.batches import TrainingData, epoch_seed
from qhw.training.blame import check_finite, first_not_finite
from qhw.training.checkpoint import Checkpoint, Epoch, digest_of, load_optimizer, optimizer_state
from qhw.training.parameters import parameter_groups

__all__ = ["Loss", "Training", "train"]

Loss = Callable[[Any, Tensor], Tensor]
"""Outputs of the model and labels -> one number to make small."""


@dataclass(frozen=True)
class Training:
    """What a training came to.

    Attributes:
        epochs: Loss and score of each epoch done.
        best: Number of the epoch whose state the model is in.
    """

    epochs: tuple[Epoch, ...]
    best: int


def train(
    result: QuantizedModel,
    data: Any,
    *,
    epochs: int = 3,
    lr: float = 1e-4,
    batch_size: int = 128,
    loss: Loss | None = None,
    weight_decay: float = 0.0,
    quantizer_lr: float | None = None,
    evaluation: Any = None,
    metric: Metric | None = None,
    patience: int | None = None,
    work_folder: str | os.PathLike[str] | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Training:
    """Train a result that `qhw.trainable` made trainable: Adam, the learning rate falling to zero along a cosine.

    Ends in the state of the best epoch, in eval mode. `qhw.freeze` makes a result of it.

    Args:
        result: Trained in place.
        data: A dict of arrays by input name with `labels`, shuffled anew each epoch; or a loader of (inputs, labels).
        epochs: How often the data is gone through.
        lr: Learning rate at the start.
        batch_size: Of arrays.
        loss: (outputs, labels) -> loss; absent: cross-entropy of the first output.
        weight_decay: Of weights.
        quantizer_lr: Learning rate of scales and zero points; absent: `lr`.
        evaluation: Labelled data that says which epoch is best, scored behind each; absent: the training loss says.
        metric: Score of (outputs, labels), more is better; absent: top-1 in percent.
        patience: Epochs without a better score after which it stops; None: never.
        work_folder: Where the state is kept behind each epoch. The same call on the same start goes on from there after
            a kill, and ends the same, given arrays or a loader that repeats itself. Taken away when the training ends
            well; the state of another training is not used, and is replaced.
        seed: Of the order of arrays and of dropout.
        progress: Where progress is shown; absent: a bar on a terminal.

    Returns:
        Training: loss and score of each epoch.

    Raises:
        TrainingError: the result is not being trained, an argument is out of its range, or the loss or a parameter
            became NaN or infinite: the model is then in the state of the last good epoch.
        CalibrationError: the data does not fit the model.
        ResultError: the work folder cannot be written.
    """
    _check(epochs, lr, batch_size, weight_decay, quantizer_lr, patience)
    groups = parameter_groups(result, lr, weight_decay=weight_decay, quantizer_lr=quantizer_lr)
    batches = TrainingData(data, result.trained_form.origin, batch_size, seed)
    show = progress or default_progress()
    loop = _Loop(result, torch.optim.Adam(groups), batches, loss or _cross_entropy, epochs, seed, show)
    folder = None if work_folder is None else Path(work_folder)
    state = Checkpoint(
        {
            "plan": result.plan.model_dump_json(),
            "start": digest_of(result.state_dict()),
            "data": batches.digest(),
            "batches": batches.num_batches,
            "epochs": epochs,
            "lr": lr,
            "batch_size": batch_size,
            "weight_decay": weight_decay,
            "quantizer_lr": quantizer_lr,
            "loss": _name_of(loss),
            "metric": _name_of(metric),
            "evaluated": evaluation is not None,
            "seed": seed,
            "torch": str(torch.__version__),
        }
    )
    state = loop.begin(state, folder)
    try:
        while len(state.epochs) < epochs and not _is_enough(state, patience):
            number = len(state.epochs) + 1
            mean = loop.epoch(number)
            score = -mean if evaluation is None else _score(result, evaluation, metric, show)
            loop.end_epoch(state, Epoch(number, mean, score))
            if folder is not None:
                state.write(folder)
    finally:
        result.eval()
        if isinstance(show, RichProgress):
            show.stop()
    loop.load(state.part("best"))
    if folder is not None:
        Checkpoint.remove(folder)
    return Training(tuple(state.epochs), state.best)


def _check(
    epochs: int,
    lr: float,
    batch_size: int,
    weight_decay: float,
    quantizer_lr: float | None,
    patience: int | None,
) -> None:
    for name, count in (("epochs", epochs), ("batch_size", batch_size), ("patience", patience)):
        if count is not None and (not isinstance(count, int) or count < 1):
            raise TrainingError(f"train: {name} must be a whole number, 1 or more; got {count}. Raise it.")
    for name, rate in (("lr", lr), ("quantizer_lr", quantizer_lr)):
        if rate is not None and not (rate > 0 and math.isfinite(rate)):
            raise TrainingError(f"train: {name} must be above 0 and finite; got {rate}. Choose another, 1e-4 say.")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise TrainingError(f"train: weight_decay must be 0 or more and finite; got {weight_decay}. Choose another.")


def _is_enough(state: Checkpoint, patience: int | None) -> bool:
    """Whether the best score is so many epochs old."""
    return patience is not None and bool(state.best) and len(state.epochs) - state.best >= patience


def _name_of(function: Any) -> str | None:
    """What tells one loss or metric from another between two runs of a program."""
    return None if function is None else str(getattr(function, "__qualname__", type(function).__qualname__))


class _Loop:
    """One training: the model, its optimizer and its schedule."""

    def __init__(
        self,
        result: QuantizedModel,
        optimizer: torch.optim.Optimizer,
        batches: TrainingData,
        loss: Loss,
        epochs: int,
        seed: int,
        progress: Progress,
    ) -> None:
        self._result = result
        self._optimizer = optimizer
        self._batches = batches
        self._loss = loss
        self._epochs = epochs
        self._seed = seed
        self._progress = progress
        self._device = next(result.parameters()).device
        self._rates = [group["lr"] for group in optimizer.param_groups]
        self._good: dict[str, Tensor] = {}

    def begin(self, start: Checkpoint, folder: Path | None) -> Checkpoint:
        """Where an earlier call stopped, or the start."""
        found = None if folder is None else Checkpoint.read(folder, start.facts)
        if found is not None:
            self.load(found.part("model"))
            load_optimizer(self._optimizer, found.part("optimizer"), found.numbers)
        self._good = self._state()
        return found or start

    def epoch(self, number: int) -> float:
        """Go through the data once; the mean loss.

        Raises:
            TrainingError: the loss, or a parameter behind the last step, is no number; the model is in the state before
                the epoch.
        """
        self._result.train()
        total, count = 0.0, 0
        per_epoch = self._batches.num_batches
        label = f"training, epoch {number} of {self._epochs}"
        with torch.random.fork_rng(devices=[self._device] if self._device.type == "cuda" else []):
            torch.manual_seed(epoch_seed(self._seed, number))
            batches = self._progress.track(self._batches.epoch(number), label, per_epoch)
            for index, (inputs, labels) in enumerate(batches):
                done = number - 1 + (index / per_epoch if per_epoch else 0.0)
                self._set_rate(0.5 * (1 + math.cos(math.pi * done / self._epochs)))
                inputs = tuple(tensor.to(self._device) for tensor in inputs)
                total += self._step(inputs, labels.to(self._device), f"epoch {number}, batch {index}") * len(labels)
                count += len(labels)
        self._result.eval()
        try:
            check_finite(self._result)
        except TrainingError:
            self.load(self._good)
            raise
        return total / count

    def _set_rate(self, factor: float) -> None:
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor

    def _step(self, inputs: tuple[Tensor, ...], labels: Tensor, where: str) -> float:
        self._optimizer.zero_grad()
        loss = self._loss(self._result(*inputs), labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            culprit = first_not_finite(self._result, inputs)
            self.load(self._good)
            raise TrainingError(
                f"train: the loss became {value} at {where}, first seen at {culprit}. The model is in the state of the "
                "last good epoch; lower lr=, or quantizer_lr=."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        self._optimizer.step()
        return value

    def end_epoch(self, state: Checkpoint, epoch: Epoch) -> None:
        """Count an epoch; keep the model where it is the best so far."""
        state.epochs.append(epoch)
        self._good = self._state()
        tensors, state.numbers = optimizer_state(self._optimizer)
        best = state.part("best")
        if state.best == 0 or epoch.score > state.epochs[state.best - 1].score:
            state.best, best = epoch.number, self._good
        state.tensors = {
            **{f"model/{name}": tensor for name, tensor in self._good.items()},
            **{f"best/{name}": tensor for name, tensor in best.items()},
            **{f"optimizer/{name}": tensor for name, tensor in tensors.items()},
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Put the model into a state."""
        self._result.load_state_dict(state)
        self._result.eval()

    def _state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().clone() for name, tensor in self._result.state_dict().items()}


def _cross_entropy(outputs: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(flat_outputs(outputs)[0], labels)


def _score(result: QuantizedModel, data: Any, metric: Metric | None, progress: Progress) -> float:
    device = next(result.parameters()).device

    def run(inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [output.cpu() for output in flat_outputs(result(*(tensor.to(device) for tensor in inputs)))]

    return evaluate(result.trained_form.origin, {"trained": run}, data, metric, progress)[0].value
