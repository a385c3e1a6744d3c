# SPDX-License-Identifier: Apache-2.0
"""Two processes that share the micro-batches and merge what they saw find what one process finds, to the bit.

The file is also the program that each process runs, with the environment that torchrun sets.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import qhw
from qhw.engine import Calibration, Context, SilentProgress, Work
from qhw.extension import load_plugins
from qhw.numerics import Histogram, MinMax, mse_qparams_from_histogram, qparams_from_range
from qhw.numerics.statistics import MinMaxSeries, running_average
from qhw.schema import parse_target
from qhw_plugins import batch_norm_folding, min_max, mse, nearest
from tests import pipelines

WORLD = 2
TARGET = """
schema_version = 1
name = "acme/plain"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""
KINDS = ("MinMax", "Histogram", "MinMaxSeries")


class Share:
    """The micro-batches of one process; stands in for a `Calibration`."""

    def __init__(self, calibration: Calibration, numbers: range) -> None:
        self._calibration = calibration
        self._numbers = numbers
        self.num_samples = calibration.num_samples

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return (batch for number, batch in enumerate(self._calibration) if number in self._numbers)


def shares(how: str, rank: int, world: int, num_batches: int) -> range:
    """Numbers of the micro-batches that a process sees: each its part, or in turns."""
    if how == "in turns":
        return range(rank, num_batches, world)
    size = -(-num_batches // world)
    return range(rank * size, min((rank + 1) * size, num_batches))


def observed(numbers: range) -> dict[str, dict[str, Any]]:
    """Kind -> group -> statistic of the micro-batches with these numbers of 203 images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(64, 5)).eval()
    data = torch.randn(203, 3, 8, 8) * torch.rand(203, 1, 1, 1).exp()
    modules = (batch_norm_folding, min_max, mse, nearest, pipelines)
    extra = [(module.__name__.rpartition(".")[2], module) for module in modules]
    registry = load_plugins(block=(), entry_points=(), extra=extra)
    target = parse_target(TARGET)
    plan = qhw.plan(model, target, data[:2], calibration=data, registry=registry)
    graph = qhw.capture(model, data[:2])
    work = Work(graph, target, plan)
    share: Any = Share(Calibration(data, graph), numbers)
    groups = tuple(dict.fromkeys(point.group for point in plan.points if point.role != "weight"))
    makers: dict[str, Callable[[str], Any]] = {
        "MinMax": lambda group: MinMax(name=group),
        "Histogram": Histogram,
        "MinMaxSeries": lambda group: MinMaxSeries(group, first=numbers.start, step=numbers.step),
    }
    return {kind: work.observe(groups, makers[kind], Context(share, SilentProgress(), 0)) for kind in KINDS}


def summary(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """All that the statistics say, and the ranges that follow, exact in JSON: floats as their hexadecimal form."""

    def exact(*tensors: Tensor) -> list[list[str]]:
        return [[float(value).hex() for value in tensor.double().reshape(-1)] for tensor in tensors]

    grid = qhw.numerics.Grid(0, 255)
    said: dict[str, Any] = {}
    for kind, by_group in found.items():
        for group, statistic in by_group.items():
            low, high = statistic.min, statistic.max
            said[f"{kind} {group}"] = exact(low, high)
            if kind == "MinMaxSeries":
                low, high = running_average(low, 0.9), running_average(high, 0.9)
                said[f"average {group}"] = exact(low, high)
            qparams = qparams_from_range(low, high, grid)
            if kind == "Histogram":
                said[f"counts {group}"] = [statistic.counts.tolist(), statistic.bin_width.hex(), statistic.count]
                qparams = mse_qparams_from_histogram(statistic, grid)
            said[f"{kind} qparams {group}"] = exact(qparams.scale, qparams.zero_point)
    return said


def run_rank(how: str, folder: Path) -> None:
    """What each process does: see its share, gather, merge; the first one writes what came out."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = dist.FileStore(str(folder / "store"), world)  # no port to find
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        gathered: list[Any] = [None] * world
        dist.all_gather_object(gathered, observed(shares(how, rank, world, 7)))
    finally:
        dist.destroy_process_group()
    merged, *others = reversed(gathered)  # the last process's first: the order does not count
    for other in others:
        for kind in KINDS:
            for group, statistic in merged[kind].items():
                statistic.merge(other[kind][group])
    (folder / f"rank{rank}.json").write_text(json.dumps(summary(merged)))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in parts", "in turns"])
def test_two_processes_find_what_one_finds(how: str, tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    paths = os.pathsep.join(str(root / name) for name in (".", "plugins", "targets"))
    environment = {
        **os.environ,
        "PYTHONPATH": paths,
        "WORLD_SIZE": str(WORLD),
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }
    command = [sys.executable, __file__, how, str(tmp_path)]
    started = [
        subprocess.Popen(command, env={**environment, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(WORLD)
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], errors
    alone = json.loads(json.dumps(summary(observed(range(7)))))
    assert len(alone) == 4 * 8  # input and three layers; three statistics, their qparams, the averages, the counts
    for rank in range(WORLD):
        assert json.loads((tmp_path / f"rank{rank}.json").read_text()) == alone, rank


if __name__ == "__main__":
    run_rank(sys.argv[1], Path(sys.argv[2]))
