# SPDX-License-Identifier: Apache-2.0
"""Post-training quantization on CIFAR-10: the white paper's tables on small networks, and the whole pipeline.

    python -m bench.ptq                                   # all parts, writes bench/PTQ.md
    python -m bench.ptq --part 3                          # one part, prints only
    python -m bench.ptq --part 5 --networks resnet20      # the whole pipeline on one network, prints only
    python -m bench.ptq --quick                           # 500 test images, one seed, prints only

In several processes, each with `--save FOLDER` (and `--part`, `--networks`), then once:

    python -m bench.ptq --join FOLDER                     # writes bench/PTQ.md

Protocol: calibration on the first 1,000 training images (AdaRound learns from the first 512), test on all 10,000,
every tensor quantized but where a table says otherwise, target whitepaper/generic-int8, one thread. Drops are against
the float model on the same images; the standard error of a paired drop is about sqrt(share that differs / 10,000), 0.2
at 96 % agreement. CPU seconds and memory are of planning and quantizing a captured model.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qhw
from bench.cifar import TARGET, cpu_seconds, float_pass, outputs
from bench.data import load_models
from bench.memory import peak_gib
from bench.pieces import Piece, gather, load, measured
from qhw.engine import SilentProgress, agreement, top1

HERE = Path(__file__).parent
PLAIN = {"pipeline": "ranges-ptq"}
NETWORKS = ("resnet20", "unbalanced", "mobilenetv2", "resnet32")
# Rows of the whole pipeline: bits, weights per, with data, formats of weights and activations.
ROWS = (
    ("W8A8", "tensor", True, "w8t", "a8"),
    ("W8A8", "tensor", False, "w8t", "a8"),
    ("W8A8", "axis", True, "w8", "a8"),
    ("W8A8", "axis", False, "w8", "a8"),
    ("W4A8", "tensor", True, "w4t", "a8"),
    ("W4A8", "axis", True, "w4", "a8"),
    ("W3A8", "tensor", True, "w3t", "a8"),
    ("W3A8", "axis", True, "w3", "a8"),
    ("W4A4", "axis", True, "w4", "a4"),
)


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


def pipeline_rows(bench: Bench, name: str) -> Iterator[str]:
    """The whole pipeline on one network, as the paper's Table 6; three seeds of W4A8, where AdaRound draws."""
    for bits, per, data, weight, activation in ROWS:
        if bits == "W3A8" and name == "resnet32":
            continue
        seeds = 3 if bits == "W4A8" and name != "resnet32" and not bench.quick else 1
        wishes = {"formats": formats(weight, activation)}
        row = _pipeline_row(bench, name, bits, per, data, list(range(seeds)), **wishes)
        line = f"| {' | '.join(row)} |"
        print(line, file=sys.stderr, flush=True)
        yield line


HEAD5 = ("network", "bits", "weights per", "data", "float", "top-1", "drop", "agree, %", "CPU s", "x float pass", "GiB")
TEXT5 = """Several figures in a cell: seeds 0, 1, 2. Without data: ranges and bias correction from batch norms. GiB: the
largest resident memory of the process while it plans and quantizes; the interpreter, torch and all images are in it."""


def part5(rows: list[str]) -> list[str]:
    """The whole pipeline, from the rows of its networks."""
    return ["## The whole pipeline (paper, Table 6)", *table(list(HEAD5), [])[:-1], *rows, "", TEXT5]


def _pipeline_row(
    bench: Bench, name: str, bits: str, per: str, data: bool, seeds: list[int], **wishes: Any
) -> list[str]:
    tops, shares, costs, peaks = [], [], [], []
    for seed in seeds:
        bench.network(name)
        with peak_gib() as peak:
            (result,), seconds = bench.run(name, data=data, seed=seed, **wishes)
        peaks += peak
        found, share = bench.score(name, result)
        tops.append(found)
        shares.append(share)
        costs.append(seconds)
    base = bench.float_top1(name)
    return [
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
        f"{max(peaks):.2f}",
    ]


PARTS: dict[str, Callable[[Bench], Iterator[str]]] = {"1": part1, "2": part2, "3": part3, "4": part4}
KEYS = [*PARTS, *(f"5-{name}" for name in NETWORKS)]
"""What the page is made of: a piece for each part, of part 5 for each network."""


def made_with() -> str:
    """Versions and CPU."""
    return f"qhw {qhw.__version__}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread"


def measure(bench: Bench, key: str) -> Piece:
    """One of KEYS."""
    part, _, name = key.partition("-")
    return measured(key, pipeline_rows(bench, name) if name else PARTS[part](bench), made_with())


def page(pieces: list[Piece]) -> str:
    """The Markdown of some pieces."""
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# CIFAR-10: post-training quantization",
        "",
        "Made by `python -m bench.ptq`; protocol in `bench/ptq.py`. Read the drops: the networks are small.",
        f"{pieces[0].made_with}.",
        "",
    ]
    for piece in pieces:
        if not piece.key.startswith("5-"):
            lines += [*piece.lines, ""]
    rows = [line for piece in pieces if piece.key.startswith("5-") for line in piece.lines]
    lines += [*part5(rows), ""] if rows else []
    lines.append(f"All of it: {sum(piece.cpu_seconds for piece in pieces) / 60:.0f} CPU minutes.")
    return "\n".join(lines) + "\n"


def networks(text: str) -> list[str]:
    """The networks of a list with commas."""
    unknown = [name for name in text.split(",") if name not in NETWORKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"no network {unknown[0]!r}; known are {', '.join(NETWORKS)}")
    return text.split(",")


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="500 test images, one seed; print, write no page")
    parser.add_argument("--part", choices=[*PARTS, "5"], help="only this one; print, write no page")
    parser.add_argument("--networks", type=networks, metavar="NAME,...", help="part 5 for these only")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="keep there what is measured")
    parser.add_argument(
        "--join", type=Path, metavar="FOLDER", help="write the page from what was kept; measure nothing"
    )
    arguments = parser.parse_args()
    if arguments.networks and arguments.part != "5":
        parser.error("--networks chooses among the rows of part 5; give --part 5 as well")
    if arguments.quick and arguments.save:
        parser.error("--quick measures nothing worth keeping; leave --save out")
    keys = [key for key in KEYS if arguments.part in (None, key[0])]
    if arguments.networks:
        keys = [f"5-{name}" for name in arguments.networks]
    if arguments.join:
        pieces = load(arguments.join, KEYS)
    else:
        torch.set_num_threads(1)
        bench = Bench(arguments.quick)
        pieces = gather(keys, lambda key: measure(bench, key), arguments.save)
    text = page(pieces)
    print(text)
    if not arguments.quick and keys == KEYS:
        (HERE / "PTQ.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
