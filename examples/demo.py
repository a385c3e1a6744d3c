# SPDX-License-Identifier: Apache-2.0
"""`make demo`: one real model, quantized for four accelerators that differ in kind."""

import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import torch

import qhw
from examples import digits
from qhw.cli.words import accumulator_words
from qhw.engine import SilentProgress, float_bytes, quantized_bytes
from qhw.errors import QhwError
from qhw.extension import default_registry

RUNTIMES = ("onnxruntime/cpu-x86-vnni", "onnxruntime/cpu-x86-avx2")
COLUMNS = ("target", "weights", "activations", "acc", "float", "sim", "in onnxruntime*", "agree", "on chip", "size, KB")
LEFT_ALIGNED = 3
WIDTH = 118

LEGEND = """
Top-1 in % on {samples} held-out scans: the float model, its simulation, and its ONNX artefact in onnxruntime on this
machine (* a portability check, not the chip, except for {runtime} itself). agree: predictions of the
simulation equal to the float model's. on chip: multiply-accumulates there. size: parameters, float -> codes.
{saturates}One result folder per target in out/; {seconds:.0f} s.
Next: qhw plan examples.digits:model --target espressif/esp32-p4 --calibration examples.digits:calibration
Your own chip in a dozen lines: README, "Declare an accelerator"."""

SATURATES = """This CPU has no VNNI: onnxruntime adds pairs of uint8 and int8 products in 16 bits here, which saturate.
{runtime} says so, and its weights are made to fit; artefacts for targets that do not may lose.
"""


def runtime_here() -> str:
    """The first of RUNTIMES whose arithmetic this machine has; the first of all where the system does not tell."""
    flags = set(default_registry().executor("onnxruntime")().versions()["cpu"].split())
    wanted = {name: qhw.load_target(name).artefact.host_cpu_flags for name in RUNTIMES}
    return next((name for name in RUNTIMES if flags.intersection(wanted[name])), RUNTIMES[0])


def main() -> None:
    """Quantize the digits model for every target, print one row each, write one result folder each."""
    torch.set_num_threads(1)  # the tensors are small: two threads would mostly wait for each other
    started = time.perf_counter()
    model, example_inputs = digits.model()
    graph = qhw.capture(model, example_inputs)
    rows: list[tuple[str, ...]] = []
    algorithms: list[str] = []
    samples = 0
    runtime = runtime_here()
    for name in ("whitepaper/generic-int8", runtime, "google/litert-int8", "espressif/esp32-p4"):
        print(f"{name} ...", file=sys.stderr)
        target = qhw.load_target(name)
        plan = qhw.plan(graph, target, calibration=digits.calibration())
        result = qhw.quantize(graph, plan, calibration=digits.calibration(), progress=SilentProgress())
        scores: dict[str, Any] = {}

        def measure(artefact: Path, result: Any = result, scores: dict[str, Any] = scores) -> list[Any]:
            found = qhw.evaluate(graph, result, digits.evaluation(), artefact=artefact, progress=SilentProgress())
            scores.update({score.subject: score for score in found})
            return [{"subject": score.subject, "top1": score.value, "samples": score.samples} for score in found]

        qhw.save(result, Path("out") / name.replace("/", "-"), evaluate_artefact=measure)
        samples = scores["float"].samples
        algorithms.append(", ".join(step.algorithm for step in plan.steps))
        rows.append(_row(graph, target, plan, result, scores))
    _print(rows, algorithms)
    saturates = "" if runtime == RUNTIMES[0] else SATURATES.format(runtime=runtime)
    seconds = time.perf_counter() - started
    print(LEGEND.format(samples=samples, seconds=seconds, runtime=runtime, saturates=saturates))


def _print(rows: list[tuple[str, ...]], algorithms: list[str]) -> None:
    """The table, and under each row the algorithms that the plan chose."""
    widths = [max(len(row[index]) for row in [COLUMNS, *rows]) for index in range(len(COLUMNS))]
    for row, chosen in zip([COLUMNS, *rows], ["", *algorithms], strict=True):
        pairs = enumerate(zip(row, widths, strict=True))
        cells = [cell.ljust(width) if i < LEFT_ALIGNED else cell.rjust(width) for i, (cell, width) in pairs]
        print("  ".join(cells).rstrip())
        if chosen:
            print(textwrap.fill(chosen, WIDTH, initial_indent="    ", subsequent_indent="    "))


def _row(graph: Any, target: Any, plan: Any, result: Any, scores: dict[str, Any]) -> tuple[str, ...]:
    weight = next(point for point in plan.points if point.role == "weight")
    activation = next(point for point in plan.points if point.role == "activation")
    kernel = next(op.kernel for op in plan.operators if op.kernel and op.macs)
    artefact = scores.get("artefact in onnxruntime")
    return (
        target.name,
        _short(target.formats[weight.format]),
        _short(target.formats[activation.format]),
        accumulator_words(target, target.kernels[kernel].accumulator).split(" ")[0].rstrip(","),
        f"{scores['float'].value:.1f}",
        f"{scores['simulated'].value:.1f}",
        "-" if artefact is None else f"{artefact.value:.1f}",
        f"{100 * scores['simulated'].agreement.share:.1f} %",
        f"{100 * plan.accelerator_macs / plan.total_macs:.0f} %",
        f"{float_bytes(graph) / 1e3:.1f} -> {quantized_bytes(result) / 1e3:.1f}",
    )


def _short(spec: Any) -> str:
    """As `s8/channel`, `u8/tensor`, `s8/tensor 2^k`."""
    power = " 2^k" if spec.scale is not None and spec.scale.kind == "power_of_two" else ""
    return f"{'s' if spec.is_signed else 'u'}{spec.element_bits}/{spec.per.replace('out_', '')}{power}"


if __name__ == "__main__":
    try:
        main()
    except QhwError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: finished result folders are in out/, nothing half-written.")
