# SPDX-License-Identifier: Apache-2.0
"""Range setting on CIFAR-10: top-1, agreement and cost, for W8A8 and W4A8, per tensor and per axis.

    python -m bench.cifar            # all rows, writes bench/RESULTS.md
    python -m bench.cifar --quick    # 500 test images, prints only

Protocol: calibration on the first 1,000 training images, test on all 10,000. Every tensor is quantized, the first and
last layers, the network's input and the logits too. Cost is CPU time of planning and quantizing an already captured
model over one eager float pass over the same images in the same process, one thread, the faster of two batch sizes;
the smallest of three runs of each. Capture is reported beside it.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qhw
from bench.data import load_models
from qhw.engine import SilentProgress, agreement, top1

HERE = Path(__file__).parent
TARGET = "whitepaper/generic-int8"
REPEATS = 3
RANGES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "min-max": (("min_max", "min_max_weights"), {}),
    "MSE": (("mse", "mse_weights"), {}),
    # A clipped weight's error counts three times, as AIMET's default (SQNR with gamma = 3) does.
    "MSE, clip x3": (("mse", "mse_weights"), {"mse_weights": {"clipping_weight": 3.0}}),
}
GOALS = {"min-max": 1.3, "MSE": 2.5}
WEIGHTS = {
    ("W8A8", "tensor"): "w8t",
    ("W8A8", "axis"): "w8",
    ("W4A8", "tensor"): "w4t",
    ("W4A8", "axis"): "w4",
}


@dataclass
class Row:
    """One line of the table."""

    model: str
    bits: str
    per: str
    ranges: str
    float_top1: float
    top1: float
    artefact_top1: float
    agree: str
    same: float
    ratio: float


def cpu_seconds(work: Callable[[], Any]) -> float:
    """CPU time of one call."""
    started = time.process_time()
    work()
    return time.process_time() - started


def float_pass(model: nn.Module, images: Tensor) -> float:
    """CPU seconds of one eager float pass over the images, at the batch size that is faster."""

    def run(size: int) -> None:
        with torch.inference_mode():
            for batch in images.split(size):
                model(batch)

    return min(cpu_seconds(lambda size=size: run(size)) for size in (32, 100))


def outputs(run: Callable[[Tensor], Any], images: Tensor) -> Tensor:
    """First output over all images."""
    with torch.inference_mode():
        return torch.cat([run(batch) for batch in images.split(100)])


def artefact_outputs(result: Any, images: Tensor) -> Tensor:
    """Output of the exported file in onnxruntime."""
    from qhw.extension import default_registry

    with tempfile.TemporaryDirectory() as folder:
        file = qhw.export(result, folder, exporter="onnx_qdq")[0]
        call = default_registry().executor("onnxruntime")().load(file)
        (name,) = result.input_names
        return outputs(lambda batch: torch.from_numpy(call({name: batch.numpy()})[0]), images)


def rows_of(name: str, model: nn.Module, images: Tensor, test: Tensor, labels: Tensor) -> Iterator[Row | str]:
    """All rows of one model, and a line on its capture."""
    captured: list[qhw.Graph] = []
    capture_seconds = cpu_seconds(lambda: captured.append(qhw.capture(model, images[:2])))
    graph = captured[0]
    reference = outputs(model, test)
    floats = top1(reference, labels)
    yield f"{name}: capture {capture_seconds:.2f} CPU s, float pass {float_pass(model, images):.2f} CPU s"
    for (bits, per), weights in WEIGHTS.items():
        for ranges, (prefer, options) in RANGES.items():
            results: list[Any] = []
            wishes = {"pipeline": "ranges-ptq", "prefer": prefer, "options": options, "formats": {"*.weight": weights}}

            def quantize(wishes: dict[str, Any] = wishes, results: list[Any] = results) -> None:
                plan = qhw.plan(graph, TARGET, calibration=images, **wishes)
                results.append(qhw.quantize(graph, plan, calibration=images, progress=SilentProgress()))

            pairs = [(cpu_seconds(quantize), float_pass(model, images)) for _ in range(REPEATS)]
            result = results[-1]
            simulated = outputs(result, test)
            artefact = artefact_outputs(result, test)
            same = agreement(simulated, reference)
            yield Row(
                model=name,
                bits=bits,
                per=per,
                ranges=ranges,
                float_top1=floats,
                top1=top1(simulated, labels),
                artefact_top1=top1(artefact, labels),
                agree=f"{100 * same.share:.2f} ({100 * same.low:.2f} to {100 * same.high:.2f})",
                same=100 * agreement(simulated, artefact).share,
                ratio=min(seconds for seconds, _ in pairs) / min(base for _, base in pairs),
            )


def markdown(rows: list[Row], captures: list[str], quick: bool) -> str:
    """The table and how it was made."""
    head = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# CIFAR-10: ranges and nearest rounding alone",
        "",
        "The pipeline `ranges-ptq`: no equalization, learned rounding, bias correction; those: `python -m bench.ptq`.",
        f"Made by `python -m bench.cifar{' --quick' if quick else ''}`; protocol in `bench/cifar.py`. Target {TARGET}.",
        f"qhw {qhw.__version__}, torch {torch.__version__}, {_versions()}, "
        f"{torch.backends.cpu.get_cpu_capability()}, one thread.",
        "",
        *[f"- {line}" for line in captures],
        "",
        "`agree`: predictions equal to the float model's, in %, with the 95 % interval. `same`: predictions of the "
        "simulation equal to those of the ONNX file in onnxruntime, in %. `x pass`: cost over one float pass.",
        "",
        "| model | bits | weights per | ranges | float | top-1 | drop | in onnxruntime | agree | same | x pass |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines = [
        f"| {r.model} | {r.bits} | {r.per} | {r.ranges} | {r.float_top1:.2f} | {r.top1:.2f} | "
        f"{r.float_top1 - r.top1:+.2f} | {r.artefact_top1:.2f} | {r.agree} | {r.same:.2f} | {r.ratio:.2f} |"
        for r in rows
    ]
    return "\n".join([*head, *lines, "", *goals(rows)]) + "\n"


def goals(rows: list[Row]) -> list[str]:
    """How far the goals are reached, said of the rows above."""
    found = []
    for ranges, limit in GOALS.items():
        mine = [row for row in rows if row.ranges == ranges]
        met = sum(row.ratio <= limit for row in mine)
        found.append(f"- Goal: {ranges} at most {limit} x a float pass: {met} of {len(mine)} rows.")
    met = sum(row.same >= 99.9 for row in rows)
    found.append(
        f"- Goal: simulation and ONNX file predict the same on 99.9 % of the images: {met} of {len(rows)} rows, lowest "
        f"{min(row.same for row in rows):.2f}. The simulation computes in float32, the runtime in integers; a code "
        "that differs by one near a tie spreads through the layers behind, and decides where the two highest logits, "
        "8-bit codes as well, are equal or next to each other."
    )
    return found


def _versions() -> str:
    import onnxruntime

    return f"onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="500 test images; print, write nothing")
    parser.add_argument("--model", choices=("resnet20", "mobilenetv2", "unbalanced"), help="only this one")
    parser.add_argument("--json", type=Path, help="also write the rows there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    models = load_models()
    images, _ = models.cifar10("train", 1000)
    test, labels = models.cifar10("test", 500 if arguments.quick else None)
    makers = {
        "resnet20": lambda: models.resnet(20),
        "mobilenetv2": models.mobilenet_v2,
        "unbalanced": lambda: models.mobilenet_v2(unbalanced=True),
    }
    rows: list[Row] = []
    captures: list[str] = []
    for name, make in makers.items():
        if arguments.model not in (None, name):
            continue
        for row in rows_of(name, make(), images, test, labels):
            print(row, file=sys.stderr, flush=True)
            (captures if isinstance(row, str) else rows).append(row)  # type: ignore[arg-type]
    text = markdown(rows, captures, arguments.quick)
    print(text)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([vars(row) for row in rows], indent=1), encoding="utf-8")
    if not arguments.quick and arguments.model is None:
        (HERE / "RESULTS.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
