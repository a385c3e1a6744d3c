# SPDX-License-Identifier: Apache-2.0
"""Exact integer execution on CIFAR-10 networks: what it costs, what it equals, how much room the accumulators leave.

    python -m bench.integer          # writes bench/INTEGER.md (about 10 minutes on one core)
    python -m bench.integer --quick  # 100 images, prints only

Protocol: calibration on the first 1,000 training images, pipeline ranges-ptq, the target's default formats, 1,000 test
images in batches of 32, one thread. The time is that of running a lowered model over that of the float model with batch
norms folded on the same batches: median of the ratios of CPU times of five pairs of runs, one after the other. Narrow
accumulators and shifts: the integer result on the first 2,000 test images.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qhw
from bench.data import load_models
from bench.ptq import table
from qhw.engine import QuantizedModel, SilentProgress, agreement, top1
from qhw.errors import IntegerError
from qhw.extension import default_registry
from qhw.integer import IntegerModel, prove_accumulators
from qhw.verification import verify

HERE = Path(__file__).parent
SHIFTED = "google/litert-int8"  # one whose multipliers are integers with a shift
EXACT = "onnxruntime/cpu-x86-vnni"  # the target whose integers a runtime confirms here
NETWORKS = ("resnet20", "mobilenetv2")


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100 images; print, write nothing")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    models = load_models()
    images, _ = models.cifar10("train", 1000)
    test, _ = models.cifar10("test", 100 if quick else 1000)
    makers = {"resnet20": lambda: models.resnet(20), "mobilenetv2": models.mobilenet_v2}
    runs: list[list[str]] = []
    rooms: list[list[str]] = []
    narrow: list[list[str]] = []
    shifts: list[list[str]] = []
    scored, labels = models.cifar10("test", 100 if quick else 2000)
    for network in NETWORKS:
        graph = qhw.capture(makers[network](), images[:2])
        for target in default_registry().target_names():
            result = quantized(graph, target, images)
            if isinstance(result, str):
                runs.append([network, target, *[""] * 4, result])
                continue
            runs.append([network, target, *executed(result, test)])
            rooms.append([network, target, *room(result)])
            print(f"| {' | '.join(runs[-1])} |", flush=True)
        for bits in (32, 20, 18, 17, 16):
            narrow.append([network, str(bits), *fitted(graph, bits, images, scored, labels)])
            print(f"| {' | '.join(narrow[-1])} |", flush=True)
        for most in (14, 12, 10, 8, 6):
            shifts.append([network, str(most), *shifted(graph, most, images, scored, labels)])
            print(f"| {' | '.join(shifts[-1])} |", flush=True)
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# CIFAR-10: exact integer execution",
        "",
        "Made by `python -m bench.integer`; protocol in `bench/integer.py`.",
        f"qhw {qhw.__version__}, torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}, one thread.",
        "",
        *table(["network", "target", "time / float", "codes", "simulation differs", "runtime differs", "note"], runs),
        "The simulation rounds in float32: single codes differ near ties, and later layers pass that on. The runtime",
        "is the target's own, where it names one that can be run here: 0 is what is claimed, anything else a defect.",
        "No exporter writes LiteRT's files yet; `tests/integration/test_litert_networks.py` (slow) writes them by hand",
        "and holds the codes of google/litert-int8 against LiteRT's reference kernels, over the same 1,000 images.",
        "",
        "## Accumulators: bits that stay free in the worst case, layer by layer",
        "",
        *table(["network", "target", "bits", "tightest layer", "bits left", "layers by bits left"], rooms),
        "## Narrow accumulators: made to fit by `accumulator_projection`",
        "",
        f"Arithmetic of {EXACT}, another width of the accumulator; top-1 of the integer result. Without the step,",
        "channels of that many outputs can overflow; with it none can, proven.",
        "",
        *table(["network", "bits", "channels without", "channels with", "float", "top-1", "agree, %"], narrow),
        "## Narrow shifts: made legal by `requantization_fit`",
        "",
        f"Arithmetic of {SHIFTED}, another largest right shift; a channel past it is scaled by 0",
        '(`out_of_range = "zero_scale"`). Top-1 of the integer result without and with the step.',
        "",
        *table(["network", "largest shift", "float", "without", "with"], shifts),
    ]
    text = "\n".join(lines) + "\n"
    print(text)
    if not quick:
        (HERE / "INTEGER.md").write_text(text, encoding="utf-8")


def quantized(graph: qhw.Graph, target: str, images: Tensor) -> QuantizedModel | str:
    """The model by the plain pipeline, or why not."""
    try:
        plan = qhw.plan(graph, target, calibration=images, pipeline="ranges-ptq")
        return qhw.quantize(graph, plan, calibration=images, progress=SilentProgress())
    except qhw.QhwError as error:
        return f"not quantized: {str(error)[:120]}"


def executed(result: QuantizedModel, test: Tensor) -> list[str]:
    """Time over float, codes compared, and how many differ."""
    try:
        model = IntegerModel(result)
    except IntegerError as error:
        return ["", "", "", "", str(error).split(": its integer result cannot be computed: ")[-1].split(". State")[0]]
    batches = list(test.split(32))
    module = result.float_graph.module

    def floats() -> None:
        with torch.no_grad():
            for batch in batches:
                module(batch)

    def integers() -> None:
        for batch in batches:
            model(batch)

    ratio = relative_time(integers, floats)
    with tempfile.TemporaryDirectory() as folder:
        artefact = qhw.export(result, folder)[0]
        found = verify(result, test, artefact=artefact, progress=SilentProgress())
    codes = sum(one.codes for one in found.simulated)
    simulated = sum(one.differing for one in found.simulated)
    runtime = f"{sum(one.differing for one in found.artefact):,}" if found.artefact else ""
    versions = f"{' '.join(next(iter(found.runtime.items())))}" if found.artefact else found.not_run or ""
    return [f"{ratio:.2f}", f"{codes:,}", f"{100 * simulated / codes:.3f} %", runtime, versions]


def fitted(graph: qhw.Graph, bits: int, images: Tensor, test: Tensor, labels: Tensor) -> list[str]:
    """With an accumulator of so many bits: channels that can overflow without and with the step, and accuracy."""
    spec = qhw.load_target(EXACT)
    accumulators = {
        name: one.model_copy(update={"bits": bits, "overflow": "saturate"}) for name, one in spec.accumulators.items()
    }
    narrow = spec.model_copy(update={"accumulators": accumulators})
    counts = []
    for without in (("accumulator_projection",), ()):
        wishes: dict[str, Any] = {"calibration": images, "pipeline": "ranges-ptq", "without": without}
        result = qhw.quantize(graph, narrow, progress=SilentProgress(), **wishes)
        counts.append(str(sum(proof.overflowing_channels for proof in prove_accumulators(result, witnesses=False))))
    model = IntegerModel(result)
    with torch.no_grad():
        reference = torch.cat([graph.module(x) for x in test.split(32)])
    found = torch.cat([model(x) for x in test.split(32)])
    scores = [f"{top1(reference, labels):.2f}", f"{top1(found, labels):.2f}"]
    return [*counts, *scores, f"{100 * agreement(found, reference).share:.1f}"]


def shifted(graph: qhw.Graph, most: int, images: Tensor, test: Tensor, labels: Tensor) -> list[str]:
    """With right shifts of at most so many bits: top-1 in float, and of the integers without and with the step."""
    spec = qhw.load_target(SHIFTED)
    rule = spec.requantize["rescale"]
    assert rule.shift is not None and not isinstance(rule.shift, str)
    bounds = rule.shift.model_copy(update={"max": most})
    limited = rule.model_copy(update={"shift": bounds, "out_of_range": "zero_scale"})
    narrow = spec.model_copy(update={"requantize": {**spec.requantize, "rescale": limited}})
    with torch.no_grad():
        scores = [top1(torch.cat([graph.module(x) for x in test.split(32)]), labels)]
    for without in (("requantization_fit",), ()):
        wishes: dict[str, Any] = {"calibration": images, "pipeline": "ranges-ptq", "without": without}
        model = IntegerModel(qhw.quantize(graph, narrow, progress=SilentProgress(), **wishes))
        scores.append(top1(torch.cat([model(x) for x in test.split(32)]), labels))
    return [f"{score:.2f}" for score in scores]


def relative_time(run: Callable[[], Any], reference: Callable[[], Any], pairs: int = 5) -> float:
    """Median of the ratios of CPU seconds of both, run in turn, after one run each to warm up."""
    run()
    reference()
    return statistics.median(cpu_seconds(run) / cpu_seconds(reference) for _ in range(pairs))


def cpu_seconds(run: Callable[[], Any]) -> float:
    """Of one run."""
    start = time.process_time()
    run()
    return time.process_time() - start


def room(result: QuantizedModel) -> list[str]:
    """Width, the tightest layer, and a count of layers for each number of bits left."""
    proofs = list(prove_accumulators(result, witnesses=False))
    known = [proof for proof in proofs if proof.headroom is not None]
    if not known:
        return ["not known", "", "", ""]
    tightest = min(known, key=lambda proof: proof.headroom or 0)
    counts: dict[int, int] = {}
    for proof in known:
        counts[proof.headroom or 0] = counts.get(proof.headroom or 0, 0) + 1
    spread = ", ".join(f"{left}: {count}" for left, count in sorted(counts.items()))
    return [str(tightest.bits), tightest.operator, str(tightest.headroom), spread]


if __name__ == "__main__":
    main()
