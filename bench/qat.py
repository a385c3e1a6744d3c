# SPDX-License-Identifier: Apache-2.0
"""Quantization-aware training on CIFAR-10: cost of a step, and the shape of the white paper's tables 7 to 10.

    python -m bench.qat                                   # all parts, writes bench/QAT.md
    python -m bench.qat --part step                       # one part, prints only
    python -m bench.qat --quick                           # 1,024 training and 500 test images, prints only

In several processes, each with `--part NAME --save FOLDER`, then once:

    python -m bench.qat --join FOLDER                     # writes bench/QAT.md, and names the parts that are missing

Protocol: the schedule is short: 12,800 training images, two epochs of batches of 128 (200 steps), flipped and shifted
by up to three pixels, Adam, learning rate 1e-3 falling to 0 along a cosine; seed 0. In table 10 ResNet-20, which
changes more, has four epochs (400 steps). The float model is fine-tuned by the same schedule and is the baseline, since
these images raise it by itself. Ranges start by MSE on the first 512 training images; top-1 on all 10,000 test images,
one seed. Every tensor is quantized, target whitepaper/generic-int8, one thread. With A4 the image keeps the 8 bits in
which it is stored; logits and sums have 4. The learning rates were chosen on training images alone.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from bench.cifar import TARGET, outputs
from bench.data import load_models
from bench.pieces import Piece, gather, load, measured
from bench.ptq import formats, made_with, table
from qhw.engine import SilentProgress, top1

HERE = Path(__file__).parent
LR, QUANTIZER_LR = 1e-3, 3e-3
EPOCHS, BATCH, IMAGES = 2, 128, 12_800
LONGER = {"resnet20": 4}  # epochs in table 10
REPEATS = 7
NETWORKS = ("resnet20", "mobilenetv2")
# Bits, weights per, formats of weights and activations, and the most that may be lost against the baseline.
ROWS = (
    ("W8A8", "tensor", "w8t", "a8", 0.3),
    ("W8A8", "axis", "w8", "a8", 0.3),
    ("W4A8", "tensor", "w4t", "a8", 0.3),
    ("W4A8", "axis", "w4", "a8", 0.3),
    ("W4A4", "tensor", "w4t", "a4", 1.5),
    ("W4A4", "axis", "w4", "a4", 1.5),
)
QAT = "whitepaper-qat"


def wanted(weight: str, activation: str) -> dict[str, str]:
    """--format wishes; an image has 8 bits at least."""
    return {**formats(weight, activation), "x": "a8"}


class Batches:
    """Batches of one training, another order and other shifts in each epoch."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self._images = images
        self._labels = labels
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self._images) // BATCH)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self._epoch)
        self._epoch += 1
        for part in torch.split(torch.randperm(len(self._images), generator=generator), BATCH):
            batch = self._images[part]
            if torch.rand((), generator=generator) < 0.5:
                batch = batch.flip(3)
            down, right = torch.randint(-3, 4, (2,), generator=generator).tolist()
            yield torch.roll(batch, (down, right), (2, 3)), self._labels[part]


def kept_mib(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """What a step keeps for its gradient, in MiB: each storage once, parameters and buffers included."""
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        F.cross_entropy(model(images), labels)
    return sum(storage.nbytes() for storage in storages.values()) / 2**20


class Bench:
    """The data, the networks as they are asked for, and one training after the other."""

    def __init__(self, quick: bool) -> None:
        models = load_models()
        self.images, self.labels = models.cifar10("train", 1024 if quick else IMAGES)
        self.test, self.answers = models.cifar10("test", 500 if quick else None)
        self._makers: dict[str, Callable[[], nn.Module]] = {
            "resnet20": lambda: models.resnet(20),
            "mobilenetv2": models.mobilenet_v2,
            "unbalanced": lambda: models.mobilenet_v2(unbalanced=True),
        }

    def network(self, name: str) -> nn.Module:
        """A float model with its trained weights."""
        return self._makers[name]()

    def score(self, model: Callable[[Tensor], Any]) -> float:
        """Top-1 in percent."""
        return top1(outputs(model, self.test), self.answers)

    def tuned(self, name: str, epochs: int) -> float:
        """Top-1 of the float model after the schedule."""
        model, batches = self.network(name).train(), Batches(self.images, self.labels)
        optimizer = torch.optim.Adam(model.parameters(), LR)
        total = epochs * len(batches)
        for step, (images, labels) in enumerate(pair for _ in range(epochs) for pair in batches):
            optimizer.param_groups[0]["lr"] = LR * 0.5 * (1 + math.cos(math.pi * step / total))
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
        return self.score(model.eval())

    def start(self, name: str, **wishes: Any) -> Any:
        """A result to train."""
        wishes = {"pipeline": QAT, **wishes}
        return qhw.quantize(
            self.network(name), TARGET, example_inputs=self.images[:2], calibration=self.images[:512],
            progress=SilentProgress(), **wishes,
        )  # fmt: skip

    def trained(self, result: Any, epochs: int = EPOCHS, **how: Any) -> tuple[float, float]:
        """Top-1 before and after training; after, of the frozen result."""
        before = self.score(result)
        qhw.trainable(result, **how)
        qhw.train(
            result, Batches(self.images, self.labels), epochs=epochs, lr=LR, quantizer_lr=QUANTIZER_LR,
            progress=SilentProgress(),
        )  # fmt: skip
        return before, self.score(qhw.freeze(result))


def step(bench: Bench) -> Iterator[str]:
    """Cost of one training step, against one of the float model, taken in turns."""
    yield "## One training step, batch 128"
    rows = []
    images, labels = bench.images[:BATCH].clone(), bench.labels[:BATCH]  # memory of its own, which is counted
    for name in NETWORKS:
        for norm, weight in (("folded", "w4t"), ("kept", "w4")):
            float_model = bench.network(name).train()
            result = qhw.trainable(bench.start(name, formats=formats(weight))).train()
            models = (
                (float_model, torch.optim.SGD(float_model.parameters(), 1e-4)),
                (
                    result,
                    torch.optim.SGD(qhw.parameter_groups(result, 1e-4, optimizer="sgd")),
                ),
            )

            def once(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
                started = time.process_time()
                optimizer.zero_grad()
                F.cross_entropy(model(images), labels).backward()
                optimizer.step()
                return time.process_time() - started

            pairs = [[once(*model) for model in models] for _ in range(REPEATS + 1)][1:]
            ratios = sorted(theirs / ours for ours, theirs in pairs)
            memory = kept_mib(result, images, labels) / kept_mib(float_model, images, labels)
            seconds = sorted(ours for ours, _ in pairs)[len(pairs) // 2]
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            rows.append([name, norm, f"{seconds:.3f}", f"{ratios[len(ratios) // 2]:.2f}", spread, f"{memory:.2f}"])
    yield from table(["network", "batch norm", "float step, CPU s", "x float", "range", "memory, x float"], rows)
    yield "Medians. Memory: what a step keeps for its gradient. Goals: 1.3 folded, 1.45 kept, memory 1.3."


def main_table(bench: Bench, name: str) -> Iterator[str]:
    """Rows of the paper's table 10 for one network."""
    epochs = LONGER.get(name, EPOCHS)
    base = bench.tuned(name, epochs)
    yield f"| {name} | float | | {bench.score(bench.network(name)):.2f} | {base:.2f} | | |"
    for bits, per, weight, activation, most in ROWS:
        before, after = bench.trained(bench.start(name, formats=wanted(weight, activation)), epochs)
        yield f"| {name} | {bits} | {per} | {before:.2f} | {after:.2f} | {base - after:+.2f} | {most} |"


def table7(bench: Bench) -> Iterator[str]:
    """Batch norm in training."""
    yield "## Batch norm (paper, table 7), MobileNetV2, W4A8"
    forms = (
        ("static folding, per tensor", "w4t", {}),
        ("double forward, per tensor", "w4t", {"prefer": ("double_forward",)}),
        ("static folding, per axis", "w4", {"without": ("kept_batch_norm",)}),
        ("kept, per axis", "w4", {}),
    )
    rows = []
    for label, weight, how in forms:
        before, after = bench.trained(bench.start("mobilenetv2", formats=wanted(weight, "a8")), **how)
        rows.append([label, f"{before:.2f}", f"{after:.2f}"])
    yield from table(["batch norm", "start", "trained"], rows)


def table8(bench: Bench) -> Iterator[str]:
    """Ranges to start from."""
    yield "## Ranges to start from (paper, table 8), ResNet-20, per tensor"
    rows = []
    starts = (
        ("W4A8", "min-max weights", "a8", {"prefer": ("min_max_weights",)}),
        ("W4A8", "MSE weights", "a8", {}),
        ("W4A4", "min-max activations", "a4", {"prefer": ("min_max",)}),
        ("W4A4", "MSE activations", "a4", {}),
    )
    for bits, label, activation, wishes in starts:
        before, after = bench.trained(bench.start("resnet20", formats=wanted("w4t", activation), **wishes))
        rows.append([bits, label, f"{before:.2f}", f"{after:.2f}"])
    yield from table(["bits", "start", "start", "trained"], rows)


def table9(bench: Bench) -> Iterator[str]:
    """What equalization does for training."""
    yield "## Equalization before training (paper, table 9), unbalanced MobileNetV2, W4A8 per tensor"
    starts = (
        ("none", {"without": ("cross_layer_equalization",)}),
        ("CLE", {}),
        ("CLE and bias correction", {"prefer": ("empirical_bias_correction",)}),
    )
    rows = []
    for label, wishes in starts:
        before, after = bench.trained(bench.start("unbalanced", formats=wanted("w4t", "a8"), **wishes))
        rows.append([label, f"{before:.2f}", f"{after:.2f}"])
    yield from table(["before", "start", "trained"], rows)


PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {
    "step": step,
    **{name: lambda bench, name=name: main_table(bench, name) for name in NETWORKS},  # type: ignore[misc]
    "table7": table7,
    "table8": table8,
    "table9": table9,
}
HEAD = [
    "## All of it (paper, table 10)",
    "",
    "| network | bits | weights per | start | trained | lost | goal |",
    "| --- | --- | --- | --- | --- | --- | --- |",
]


def measure(bench: Bench, key: str) -> Piece:
    """One of PARTS; its lines are shown as they are made."""

    def shown() -> Iterator[str]:
        for line in PARTS[key](bench):
            print(line, file=sys.stderr, flush=True)
            yield line

    return measured(key, shown(), made_with())


def page(pieces: list[Piece]) -> str:
    """The Markdown of some pieces."""
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# CIFAR-10: quantization-aware training",
        "",
        "Made by `python -m bench.qat`; protocol in `bench/qat.py`.",
        f"{pieces[0].made_with}; {sum(piece.cpu_seconds for piece in pieces) / 60:.0f} CPU minutes.",
        "",
    ]
    missing = [key for key in PARTS if key not in {piece.key for piece in pieces}]
    if missing:
        lines += [f"Not measured: {', '.join(missing)}.", ""]
    is_open = False
    for piece in pieces:
        if piece.key in NETWORKS and not is_open:
            lines += HEAD
        if is_open and piece.key not in NETWORKS:
            lines.append("")
        is_open = piece.key in NETWORKS
        lines += piece.lines if is_open else [*piece.lines, ""]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images; print, write no page")
    parser.add_argument("--part", choices=list(PARTS), help="only this one; print, write no page")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep there what is measured")
    parser.add_argument("--join", type=Path, metavar="FOLDER", help="write the page from what was kept")
    arguments = parser.parse_args()
    if arguments.quick and arguments.save:
        parser.error("--quick measures nothing worth keeping; leave --save out")
    keys = [arguments.part] if arguments.part else list(PARTS)
    if arguments.join:
        pieces = load(arguments.join, keys, may_miss=not arguments.part)
    else:
        torch.set_num_threads(1)
        bench = Bench(arguments.quick)
        pieces = gather(keys, lambda key: measure(bench, key), arguments.save)
    text = page(pieces)
    print(text)
    if not arguments.quick and not arguments.part:
        (HERE / "QAT.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
