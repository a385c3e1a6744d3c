# SPDX-License-Identifier: Apache-2.0
"""Where a training stands, in one file: so that the same call goes on after a kill. No pickle: safetensors and JSON."""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor

from qhw.errors import ResultError

__all__ = ["Checkpoint", "Epoch", "digest_of", "load_optimizer", "optimizer_state"]

_FILE = "training.safetensors"
_PARTIAL = (".qhw-", ".partial")
_log = logging.getLogger("qhw")


@dataclass(frozen=True)
class Epoch:
    """One epoch.

    Attributes:
        number: Counted from 1.
        loss: Mean training loss.
        score: Of the evaluation data, more is better; the negative loss where there is none.
    """

    number: int
    loss: float
    score: float


@dataclass
class Checkpoint:
    """State behind a whole epoch.

    Attributes:
        facts: What decides the training; another one is not gone on with.
        epochs: Those done.
        best: Number of the epoch with the best score.
        tensors: `model/...`, `best/...` and `optimizer/...`.
        numbers: Plain numbers of the optimizer's state.
    """

    facts: Mapping[str, Any]
    epochs: list[Epoch] = field(default_factory=list)
    best: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    numbers: dict[str, float] = field(default_factory=dict)

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors of one part, by their names there."""
        prefix = f"{name}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def write(self, folder: Path) -> None:
        """Replace the file, whole or not at all.

        Raises:
            ResultError: it cannot be written.
        """
        plain = {
            "facts": dict(self.facts),
            "epochs": [asdict(epoch) for epoch in self.epochs],
            "best": self.best,
            "numbers": self.numbers,
        }
        tensors = {key: value.detach().cpu().clone().contiguous() for key, value in self.tensors.items()}
        content = tensors_as_bytes(tensors, metadata={"training": json.dumps(plain)})
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_partial(folder)
            handle, temporary = tempfile.mkstemp(prefix=_PARTIAL[0], suffix=_PARTIAL[1], dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                Path(temporary).replace(folder / _FILE)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise ResultError(
                f"{folder}: cannot be written: {error.strerror}. Choose another work_folder=, or leave it out."
            ) from error

    @classmethod
    def read(cls, folder: Path, facts: Mapping[str, Any]) -> "Checkpoint | None":
        """What was written under the same facts; None where there is nothing, or something else, which is said."""
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                plain = json.loads(file.metadata()["training"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            epochs = [Epoch(int(e["number"]), float(e["loss"]), float(e["score"])) for e in plain["epochs"]]
            numbers = {str(key): float(value) for key, value in plain["numbers"].items()}
            found = cls(dict(plain["facts"]), epochs, int(plain["best"]), tensors, numbers)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError) as error:
            _log.warning("%s: is damaged (%s); training begins anew.", path, type(error).__name__)
            return None
        wrong = next((key for key in {**facts, **found.facts} if facts.get(key) != found.facts.get(key)), None)
        if wrong is not None:
            _log.warning("%s: is of another training (%s differs); training begins anew.", path, wrong)
            return None
        _log.info("%s: going on behind epoch %d.", path, len(epochs))
        return found

    @staticmethod
    def remove(folder: Path) -> None:
        """Take the file away, and the folder where nothing else lies in it."""
        with suppress(OSError):  # what stays does no harm: the next training has other facts, or ends at once
            (folder / _FILE).unlink(missing_ok=True)
            _remove_partial(folder)
            folder.rmdir()


def _remove_partial(folder: Path) -> None:
    """What a write left that was killed."""
    for path in folder.glob("*".join(_PARTIAL)):
        path.unlink(missing_ok=True)


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, Tensor], dict[str, float]]:
    """An optimizer's state by parameter number and field: tensors, and plain numbers."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if isinstance(value, Tensor):
                tensors[f"{index}/{key}"] = value
            elif value is not None:
                numbers[f"{index}/{key}"] = float(value)
    return tensors, numbers


def load_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], numbers: Mapping[str, float]
) -> None:
    """Put back what `optimizer_state` took."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in {**tensors, **numbers}.items():
        index, _, key = name.partition("/")
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
