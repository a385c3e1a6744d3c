# SPDX-License-Identifier: Apache-2.0
"""Trains the digits network: `python -m examples.digits.train`, about a minute on two CPU cores.

Writes digits.safetensors and digits.json beside this file. The number of epochs is fixed and the last weights are
kept, so the test split chooses nothing: it is read once, after training.
"""

import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.digits import WEIGHTS
from examples.digits.data import Split, load_split
from examples.digits.network import DigitsNet
from qhw.errors import QhwError

__all__ = ["count_correct", "shift_randomly", "train"]

SEED = 0
EPOCHS = 60
BATCH = 64
LEARNING_RATE = 4e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
COMMAND = "python -m examples.digits.train"
RECORD = WEIGHTS.with_suffix(".json")


def shift_randomly(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image [batch, 1, 8, 8] moved by -1, 0 or 1 pixel in both directions; what enters is background, -1."""
    padded = nn.functional.pad(images, (1, 1, 1, 1), value=-1.0)
    top, left = torch.randint(0, 3, (2, len(images), 1), generator=generator)
    rows = (top + torch.arange(8))[:, :, None]
    columns = (left + torch.arange(8))[:, None, :]
    return padded[torch.arange(len(images))[:, None, None], 0, rows, columns].unsqueeze(1)


def train(split: Split, *, seed: int = SEED, epochs: int = EPOCHS, progress: bool = True) -> DigitsNet:
    """A network trained from scratch on one split, in eval mode; the same bits for the same seed, torch and CPU."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    network = DigitsNet().train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    # Whole batches only: batch norm over a short last batch is noisy. The permutation changes who is left out.
    steps = len(split.labels) // BATCH
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=epochs * steps)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(split.labels), generator=generator)[: steps * BATCH].split(BATCH):
            logits = network(shift_randomly(split.images[chosen], generator))
            loss = nn.functional.cross_entropy(logits, split.labels[chosen], label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        if progress and (epoch + 1) % 10 == 0:
            print(f"epoch {epoch + 1}/{epochs}  training loss {total / steps:.4f}", flush=True)
    return network.eval()


def count_correct(network: nn.Module, split: Split) -> int:
    """How many images of a split the network classifies correctly."""
    with torch.inference_mode():
        return int((network(split.images).argmax(1) == split.labels).sum())


def main() -> None:
    """Train, write the weights and their record, say what was reached."""
    start = time.perf_counter()
    training = load_split("train")
    network = train(training)
    seconds = time.perf_counter() - start
    test = load_split("test")
    correct, total = count_correct(network, test), len(test.labels)
    save_file({name: tensor.contiguous() for name, tensor in network.state_dict().items()}, WEIGHTS)
    record = {
        "command": COMMAND,
        "seed": SEED,
        "epochs": EPOCHS,
        "train_images": len(training.labels),
        "test_images": total,
        "test_correct": correct,
        "test_accuracy": correct / total,
        "train_correct": count_correct(network, training),
        "selection": "fixed epochs, last weights; the test split is read once, after training",
        "parameters": sum(p.numel() for p in network.parameters()),
        "seconds": round(seconds, 1),
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "numpy", "scikit-learn", "safetensors")},
        },
    }
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"held-out accuracy {correct / total:.1%} ({correct} of {total}) after {seconds:.0f} s")
    print(f"wrote {_shown(WEIGHTS)} ({WEIGHTS.stat().st_size / 1000:.0f} KB) and {_shown(RECORD)}")


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    try:
        main()
    except QhwError as error:
        sys.exit(f"error: {error}")
