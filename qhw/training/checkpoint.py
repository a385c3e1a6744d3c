# SPDX-License-Identifier: Apache-2.0
"""Where a training stands, in one file: so that the same call goes on after a kill. No pickle: safetensors and JSON."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor

from qhw.errors import ResultError

__all__ = ["Checkpoint", "Epoch"]

FILE = "training.safetensors"


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
            handle, temporary = tempfile.mkstemp(prefix=".qhw-", suffix=".partial", dir=folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(content)
                Path(temporary).replace(folder / FILE)
            finally:
                Path(temporary).unlink(missing_ok=True)
        except OSError as error:
            raise ResultError(
                f"{folder}: cannot be written: {error.strerror}. Choose another work_folder=, or leave it out."
            ) from error

    @classmethod
    def read(cls, folder: Path, facts: Mapping[str, Any]) -> "Checkpoint | None":
        """What was written under the same facts; None where there is nothing, or something else."""
        try:
            with safe_open(folder / FILE, framework="pt") as file:
                plain = json.loads(file.metadata()["training"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            epochs = [Epoch(int(e["number"]), float(e["loss"]), float(e["score"])) for e in plain["epochs"]]
            numbers = {str(key): float(value) for key, value in plain["numbers"].items()}
            found = cls(plain["facts"], epochs, int(plain["best"]), tensors, numbers)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError, AttributeError):
            return None
        return found if found.facts == dict(facts) else None


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
