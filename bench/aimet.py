# SPDX-License-Identifier: Apache-2.0
"""AdaRound of qhw and of AIMET side by side: CPU time, memory, accuracy.

    python3 -m venv /tmp/aimet-env
    /tmp/aimet-env/bin/pip install torch==2.13.0 aimet-torch==2.42.0
    python -m bench.aimet --python /tmp/aimet-env/bin/python            # writes bench/AIMET.md, 20 to 30 minutes
    python -m bench.aimet --python /tmp/aimet-env/bin/python --quick    # 500 test images, 50 iterations, prints only

AIMET is no dependency: it stays in that environment, and `bench/aimet_worker.py` runs there. Linux only.

Protocol: every quantization in a process of its own, one thread each, in turn and never two at once. W4A8, weights
symmetric on [-8, 7], activations 8 bits with a zero point. 1,000 training images for ranges, AdaRound from the first
512 of them and with at most 1,000 iterations a layer on both sides; everything else as each tool has it by default, but
for AIMET's equalization, which is called for the unbalanced network as its user would. Test on all 10,000 images.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qhw
from bench.aimet_worker import CALIBRATION, NETWORKS, SAMPLES, Case, Done, measure, stopwatch
from bench.cifar import TARGET
from bench.data import load_models
from bench.ptq import formats, table
from qhw.engine import SilentProgress
from qhw_plugins.adaround import AdaRound

HERE = Path(__file__).parent
CASES = (("resnet20", "axis"), ("resnet20", "tensor"), ("mobilenetv2", "axis"), ("unbalanced", "axis"))
TITLES = {"resnet20": "ResNet-20", "mobilenetv2": "MobileNetV2", "unbalanced": "unbalanced MobileNetV2"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
SIDES = ("qhw", "AIMET")


@dataclass(frozen=True)
class Figure:
    """One line of a table: how it reads from the measurements of one process."""

    label: str
    key: str
    digits: int
    has_ratio: bool = True

    def of(self, run: dict[str, Any]) -> float:
        """Its value."""
        derived = {
            "drop": run["float"] - run["top1"],
            "per_layer": run["adaround"] / max(1, run["steps"]) * 1000,
            "steps_each": run["steps"] / run["layers"],
            "rise": run["peak"] - run["before"],
        }
        return float(derived[self.key] if self.key in derived else run[self.key])


FIGURES = (
    Figure("AdaRound alone, CPU s", "adaround", 1),
    Figure("whole PTQ, CPU s", "whole", 1),
    Figure("AdaRound, CPU s per layer per 1,000 iterations taken", "per_layer", 2),
    Figure("iterations taken, mean of the layers", "steps_each", 0),
    Figure("peak RSS, MiB", "peak", 0),
    Figure("of it above the process before PTQ, MiB", "rise", 0),
    Figure("float top-1", "float", 2, has_ratio=False),
    Figure("top-1", "top1", 2, has_ratio=False),
    Figure("drop", "drop", 2, has_ratio=False),
)


def quantize(model: nn.Module, images: Tensor, case: Case) -> Done:
    """Ours, from the float module on: capture, plan, quantize."""
    seconds = stopwatch(AdaRound, "apply")
    graph = qhw.capture(model, images[:2])
    wishes: dict[str, Any] = {
        "formats": formats("w4" if case.per == "axis" else "w4t"),
        "options": {"adaround": {"samples": SAMPLES, "iterations": case.iterations}},
    }
    plan = qhw.plan(graph, TARGET, calibration=images, **wishes)
    result = qhw.quantize(graph, plan, calibration=images, seed=case.seed, progress=SilentProgress())
    (report,) = (step for step in result.steps if step.algorithm == "adaround")
    return Done(result, sum(seconds), [int(str(site["steps"])) for site in report.sites.values()])


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine used since it started."""
    user, nice, system, _, _, irq, soft, *_ = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, soft))) / os.sysconf("SC_CLK_TCK")


def run(side: str, python: str, case: Case, models: Path) -> dict[str, Any]:
    """Measure one case in a new process; exits with its last lines where it fails."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "figures.json")
        ours = [sys.executable, "-m", "bench.aimet", "--ours"]
        theirs = [python, "-P", str(HERE / "aimet_worker.py"), "--models", str(models)]
        command = [*(ours if side == "qhw" else theirs), "--network", case.network, "--per", case.per]
        command += ["--seed", str(case.seed), "--iterations", str(case.iterations), "--out", str(out)]
        if case.test_images is not None:
            command += ["--test-images", str(case.test_images)]
        done = subprocess.run(
            command, cwd=HERE.parent, env={**os.environ, **ONE_THREAD}, capture_output=True, text=True
        )
        if done.returncode != 0:
            tail = "\n".join(done.stderr.splitlines()[-15:])
            sys.exit(f"error: {side} on {case.network} per {case.per} ended with {done.returncode}:\n{tail}")
        return {"side": side, **json.loads(out.read_text(encoding="utf-8"))}


def section(runs: list[dict[str, Any]]) -> Iterator[str]:
    """The table of one network and granularity; several seeds: the mean of each figure."""
    first = runs[0]
    yield f"## {TITLES[first['network']]}, W4A8, weights per {first['per']} ({first['layers']} layers)"
    yield ""
    rows = []
    for figure in FIGURES:
        values = [[figure.of(run) for run in runs if run["side"] == side] for side in SIDES]
        means = [sum(v) / len(v) for v in values]
        cells = [
            f"{mean:+.{figure.digits}f}" if figure.key == "drop" else f"{mean:.{figure.digits}f}" for mean in means
        ]
        ratio = f"{means[1] / means[0]:.2f}" if figure.has_ratio else ""
        rows.append([figure.label, *cells, ratio])
    yield from table(["", "qhw", "AIMET", "AIMET / qhw"], rows)


def markdown(runs: list[dict[str, Any]], command: str, other: float) -> str:
    """The tables and how they were made."""
    theirs = next(run["versions"] for run in runs if run["side"] == "AIMET")
    seeds = sorted({run["seed"] for run in runs})
    lines = [
        "<!-- SPDX-License-Identifier: Apache-2.0 -->",
        "# AdaRound: qhw and AIMET side by side",
        "",
        f"Made by `{command}`; protocol and how to make AIMET's environment: `bench/aimet.py`. Figures as measured.",
        f"qhw {qhw.__version__} with torch {torch.__version__}; {', '.join(f'{k} {v}' for k, v in theirs.items())}; "
        f"Python {platform.python_version()}, {torch.backends.cpu.get_cpu_capability()}, "
        f"{os.cpu_count()} cores, one thread each, in turn. Seeds: {', '.join(map(str, seeds))}.",
        f"Other processes of the machine used {other:.2f} of a core meanwhile, on average"
        f"{'.' if other < 0.1 else ': the figures are noisier than on an idle machine.'}",
        "",
        f"AdaRound learns from {SAMPLES} images of the {CALIBRATION:,} on both sides. The algorithm is the same, a "
        "step of it is not: AIMET's takes the whole output maps of 32 images, with Adam's rate 1e-3; qhw's takes at "
        "most 1,024 sampled output positions, with rate 1e-2, and a layer ends early once every weight has decided. So "
        "the ratio per 1,000 iterations is of two unlike steps, and the top-1 says what they are worth.",
        "AdaRound alone: both tools' walk through the layers and the learning, without weight ranges before it. Whole "
        "PTQ: from the float module to the quantized one, with capture (AIMET: `prepare_model`), folding, equalization "
        "(qhw: where it applies; AIMET: on the unbalanced network), ranges of weights and activations. Peak RSS is "
        "read before the test images are loaded; the imports are in it, hence the line below it.",
        "",
    ]
    for network, per in CASES:
        mine = [run for run in runs if (run["network"], run["per"]) == (network, per)]
        if mine:
            lines += section(mine)
    lines.append("The standard error of a drop is about 0.2 points; differences below half a point rank nobody.")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="python -m bench.aimet"
    )
    parser.add_argument("--python", help="interpreter of the environment with aimet-torch, made as above")
    parser.add_argument("--quick", action="store_true", help="500 test images, 50 iterations; print, write nothing")
    parser.add_argument("--network", choices=sorted(NETWORKS), help="only this one; print, write nothing")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds, each a run of both (default 1)")
    parser.add_argument("--json", type=Path, help="also write the figures of every process there")
    one = parser.add_argument_group("one measurement of qhw, as this program starts it itself")
    one.add_argument("--ours", action="store_true", help=argparse.SUPPRESS)
    for name, kind in (("per", str), ("seed", int), ("iterations", int), ("test-images", int), ("out", Path)):
        one.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    a = parser.parse_args()
    torch.set_num_threads(1)
    models = load_models()
    if a.ours:
        case = Case(a.network, a.per, a.seed, a.iterations, a.test_images)
        a.out.write_text(json.dumps(measure(models, case, quantize)), encoding="utf-8")
        return
    if a.python is None:
        parser.error("--python is missing. Make the environment as above and give its bin/python.")
    runs: list[dict[str, Any]] = []
    started, busy, own = time.perf_counter(), busy_seconds(), _own_seconds()
    for network, per in CASES:
        if a.network not in (None, network):
            continue
        for seed in range(a.seeds):
            case = Case(network, per, seed, 50 if a.quick else 1000, 500 if a.quick else None)
            for side in SIDES:
                runs.append(run(side, a.python, case, Path(str(models.__file__))))
                print(runs[-1], file=sys.stderr, flush=True)
    other = (busy_seconds() - busy - (_own_seconds() - own)) / (time.perf_counter() - started)
    given = " ".join(sys.argv[1:])
    text = markdown(runs, f"python -m bench.aimet {given}", max(0.0, other))
    print(text)
    if a.json is not None:
        a.json.write_text(json.dumps(runs, indent=1), encoding="utf-8")
    if not a.quick and a.network is None:
        (HERE / "AIMET.md").write_text(text, encoding="utf-8")


def _own_seconds() -> float:
    """CPU seconds of this process and of those that it started and that ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


if __name__ == "__main__":
    main()
