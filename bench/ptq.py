# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization on CIFAR-10: the white paper's tables on small networks, and the whole pipeline.

    python -m bench.ptq              # all parts, writes bench/PTQ.md (about 45 minutes on one core)
    python -m bench.ptq --part 5     # one part, prints only
    python -m bench.ptq --quick      # 500 test images, one seed, prints only

Protocol: calibration on the first 1,000 training images (AdaRound learns from the first 512), test on all 10,000,
every tensor quantized but where a table says otherwise, target whitepaper/generic-int8, one thread. Drops are against
the float model on the same images; the standard error of a paired drop is about sqrt(share that differs / 10,000), 0.2
at 96 % agreement. CPU seconds are of planning and quantizing a captured model.
"""

import argparse
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qhw
from bench.cifar import TARGET, cpu_seconds, float_pass, outputs
from bench.data import load_models
from qhw.engine import SilentProgress, agreement, top1

HERE = Path(__file__).parent
PLAIN = {"pipeline": "ranges-ptq"}
NETWORKS = ("resnet20", "unbalanced", "mobilenetv2", "resnet32")
FORMATS = {("W8", "tensor"): "w8t", ("W8", "axis"): "w8", ("W4", "tensor"): "w4t", ("W4", "axis"): "w4"}


@dataclass
class Network:
    """A float model, captured, with its outputs on the test images."""

    name: str
    graph: qhw.Graph
    reference: Tensor
    float_seconds: float


class Bench:
    """The data, the networks as they are asked for, and one quantization after the other."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        models = load_models()
        self.images, _ = models.cifar10("train", 1000)
        self.test, self.labels = models.cifar10("test", 500 if quick else None)
        self._makers: dict[str, Callable[[], Any]] = {
            "resnet20": lambda: models.resnet(20),
            "resnet32": lambda: models.resnet(32),
            "mobilenetv2": models.mobilenet_v2,
            "unbalanced": lambda: models.mobilenet_v2(unbalanced=True),
        }
        self._networks: dict[str, Network] = {}

    def network(self, name: str) -> Network:
        """One of NETWORKS."""
        if name not in self._networks:
            model = self._makers[name]()
            graph = qhw.capture(model, self.images[:2])
            seconds = float_pass(model, self.images)
            self._networks[name] = Network(name, graph, outputs(model, self.test), seconds)
        return self._networks[name]

    def float_top1(self, name: str) -> float:
        """Top-1 of the float model in percent."""
        return top1(self.network(name).reference, self.labels)

    def run(self, name: str, data: bool = True, seed: int = 0, **wishes: Any) -> tuple[Any, float]:
        """A quantized model and the CPU seconds that it took."""
        network = self.network(name)
        calibration = self.images if data else None
        made: list[Any] = []

        def work() -> None:
            plan = qhw.plan(network.graph, TARGET, calibration=calibration, **wishes)
            quantized = qhw.quantize(network.graph, plan, calibration=calibration, seed=seed, progress=SilentProgress())
            made.append(quantized)

        return made, cpu_seconds(work)

    def score(self, name: str, result: Any) -> tuple[float, float]:
        """Top-1 and agreement with the float model, in percent."""
        found = outputs(result, self.test)
        return top1(found, self.labels), 100 * agreement(found, self.network(name).reference).share

    def top1(self, name: str, only: str = "both", **wishes: Any) -> float:
        """Top-1 with `weights`, `activations` or both quantized."""
        (result,), _ = self.run(name, **wishes)
        if only != "both":
            is_weight = {p.group: p.role == "weight" for p in result.plan.points}
            result.set_enabled(False, [group for group, weight in is_weight.items() if weight != (only == "weights")])
        return self.score(name, result)[0]


def formats(weight: str, activation: str | None = None) -> dict[str, str]:
    """--format wishes for all weights, and all activations."""
    wanted = {"*.weight": weight}
    return wanted if activation is None else {"*": activation, **wanted}


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table."""
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)] + [""]


def part1(bench: Bench) -> Iterator[str]:
    """Paper, Table 1: weight ranges, activations in float."""
    yield "## Table 1: weight ranges, activations float, top-1"
    rows = []
    kinds = (("min-max", "min_max_weights", "t"), ("MSE", "mse_weights", "t"))
    axis = (("min-max, per channel", "min_max_weights", ""), ("MSE, per channel", "mse_weights", ""))
    names = ("resnet20", "unbalanced")
    for label, algorithm, suffix in (*kinds, *axis):
        row = [label]
        for name in names:
            for bits in (8, 4):
                wishes: dict[str, Any] = {"prefer": (algorithm,), "formats": {"*.weight": f"w{bits}{suffix}"}}
                if name == "unbalanced":  # the paper's MobileNetV2 columns are equalized, too
                    wishes |= {"without": ("bias_absorption", "adaround", *CORRECTIONS), "pipeline": "whitepaper-ptq"}
                else:
                    wishes |= PLAIN
                row.append(f"{bench.top1(name, 'weights', **wishes):.2f}")
        rows.append(row)
    heads = [f"{n} ({bench.float_top1(n):.2f}) W{b}" for n in names for b in (8, 4)]
    yield from table(["", *heads], rows)
    yield "The unbalanced MobileNetV2 is equalized first, as the paper's must have been (its Tables 1 and 3)."


CORRECTIONS = ("empirical_bias_correction", "analytic_bias_correction")


def part2(bench: Bench) -> Iterator[str]:
    """Paper, Table 2: activation ranges, weights in float."""
    yield "## Table 2: activation ranges, weights float, top-1"
    names = ("resnet20", "mobilenetv2")
    rows = []
    for label, prefer in (
        ("min-max", ("min_max",)),
        ("MSE", ("mse",)),
        ("MSE + cross-entropy (logits)", ("cross_entropy", "mse")),
        ("BN (alpha = 6), no data", ("batch_norm_ranges",)),
        ("percentile 99.99", ("percentile",)),
        ("moving average", ("moving_average",)),
    ):
        row = [label]
        for name in names:
            for activation in ("a8", "a4"):
                wishes = {**PLAIN, "prefer": prefer, "formats": formats("w8", activation)}
                row.append(f"{bench.top1(name, 'activations', **wishes):.2f}")
        rows.append(row)
    heads = [f"{n} ({bench.float_top1(n):.2f}) {a.upper()}" for n in names for a in ("a8", "a4")]
    yield from table(["", *heads], rows)


def part3(bench: Bench) -> Iterator[str]:
    """Paper, Tables 3 and 4: equalization, absorption, correction, without data."""
    yield "## Tables 3 and 4: unbalanced MobileNetV2, W8A8 per tensor, without data, top-1"
    steps = {
        "original": ("cross_layer_equalization", "bias_absorption", *CORRECTIONS),
        "+ bias correction": ("cross_layer_equalization", "bias_absorption"),
        "CLE": ("bias_absorption", *CORRECTIONS),
        "CLE + bias absorption": CORRECTIONS,
        "CLE + bias absorption + bias correction": (),
    }
    rows = []
    for label, without in steps.items():
        wishes = {"without": without, "prefer": ("min_max_weights",)}
        per_tensor = bench.top1("unbalanced", data=False, formats=formats("w8t"), **wishes)
        rows.append([label, f"{per_tensor:.2f}"])
    channel = {"without": ("cross_layer_equalization", "bias_absorption", *CORRECTIONS), "formats": formats("w8")}
    rows.append(["per channel, original", f"{bench.top1('unbalanced', data=False, **channel):.2f}"])
    yield from table([f"float {bench.float_top1('unbalanced'):.2f}", "INT8"], rows)


def part4(bench: Bench) -> Iterator[str]:
    """Paper, Table 5: roundings."""
    yield "## Table 5: ResNet-20, W4 per tensor, activations float, top-1"
    rows = []
    equalizing = ("cross_layer_equalization", "bias_absorption")
    for label, without in (
        ("nearest", (*equalizing, *CORRECTIONS, "adaround")),
        ("nearest, empirical bias correction", (*equalizing, "adaround")),
        ("AdaRound (eq. 35)", (*equalizing, *CORRECTIONS)),
    ):
        wishes = {"without": without, "formats": formats("w4t")}
        rows.append([label, f"{bench.top1('resnet20', 'weights', **wishes):.2f}"])
    yield from table([f"float {bench.float_top1('resnet20'):.2f}", "top-1"], rows)


def part5(bench: Bench) -> Iterator[str]:
    """The whole pipeline, as the paper's Table 6, three seeds where AdaRound takes part."""
    yield "## The whole pipeline (paper, Table 6)"
    rows = []
    for name in NETWORKS:
        for (bits, per), weight in FORMATS.items():
            for data in (True, False):
                if bits == "W4" and not data:
                    continue
                seeds = range(3 if bits == "W4" and name != "resnet32" and not bench.quick else 1)
                rows.append(_pipeline_row(bench, name, f"{bits}A8", per, data, list(seeds), formats=formats(weight)))
    for name in ("resnet20", "mobilenetv2"):
        wishes = {"formats": formats("w4", "a4")}
        rows.append(_pipeline_row(bench, name, "W4A4", "axis", True, [0], **wishes))
    head = ["network", "bits", "weights per", "data", "float", "top-1", "drop", "agree, %", "CPU s", "x float pass"]
    yield from table(head, rows)
    yield "Several figures in a cell: seeds 0, 1, 2. Without data: ranges and bias correction from batch norms."
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    yield f"Peak memory of the process, with all images: {peak:.1f} GB."


def _pipeline_row(
    bench: Bench, name: str, bits: str, per: str, data: bool, seeds: list[int], **wishes: Any
) -> list[str]:
    tops, shares, costs = [], [], []
    for seed in seeds:
        (result,), seconds = bench.run(name, data=data, seed=seed, **wishes)
        found, share = bench.score(name, result)
        tops.append(found)
        shares.append(share)
        costs.append(seconds)
    base = bench.float_top1(name)
    row = [
        name,
        bits,
        per,
        "yes" if data else "no",
        f"{base:.2f}",
        ", ".join(f"{t:.2f}" for t in tops),
        f"{base - sum(tops) / len(tops):+.2f}",
        ", ".join(f"{s:.1f}" for s in shares),
        f"{sum(costs) / len(costs):.1f}",
        f"{min(costs) / bench.network(name).float_seconds:.1f}",
    ]
    print(f"| {' | '.join(row)} |", file=sys.stderr, flush=True)
    return row


PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {"1": part1, "2": part2, "3": part3, "4": part4, "5": part5}


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="500 test images, one seed; print, write nothing")
    parser.add_argument("--part", choices=sorted(PARTS), help="only this one; print, write nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.quick)
    started = time.process_time()
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# CIFAR-10: post-training quantization",
        "",
        "Made by `python -m bench.ptq`; protocol in `bench/ptq.py`. Read the drops: the networks are small.",
        f"qhw {qhw.__version__}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread.",
        "",
    ]
    for key, part in PARTS.items():
        if arguments.part in (None, key):
            lines += [*part(bench), ""]
    lines.append(f"All of it: {(time.process_time() - started) / 60:.0f} CPU minutes.")
    text = "\n".join(lines) + "\n"
    print(text)
    if not arguments.quick and arguments.part is None:
        (HERE / "PTQ.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
