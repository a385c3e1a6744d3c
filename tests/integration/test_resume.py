# SPDX-License-Identifier: Apache-2.0
"""Killed or stopped by Ctrl-C in the middle, the same command goes on and writes the same bytes."""

import importlib.util
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import qhw
from qhw.cli import main
from qhw.engine import QuantizedModel, SilentProgress, WorkFolder
from qhw.errors import ExportError
from qhw.graph import Graph
from qhw.schema import TargetSpec, parse_target

NET = """
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 16, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)
    )
    return net.eval(), torch.randn(1, 3, 8, 8)


def batches():
    return torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16)
"""
TARGET = """
schema_version = 1
name = "acme/four"
formats.a8 = { bits = 8, signed = false, per = "tensor" }
formats.w4 = { codes = [-7, 7], zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight" }
kernels.mac = { input = ["a8"], weight = ["w4"], bias = "b", output = ["a8"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"] }
fallback = "host"
"""
LAYERS = 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a model and a target."""
    folder = tmp_path_factory.mktemp("resume")
    (folder / "net.py").write_text(NET)
    (folder / "four.toml").write_text(TARGET)
    return folder


@pytest.fixture(scope="module")
def graph(place: Path) -> Graph:
    spec = importlib.util.spec_from_file_location("resumed_net", place / "net.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return qhw.capture(*module.model())


@pytest.fixture(scope="module")
def target() -> TargetSpec:
    return parse_target(TARGET)


class Stopping(SilentProgress):
    """Ctrl-C before an item of a bar."""

    def __init__(self, label: str, at: int) -> None:
        self._label = label
        self._at = at

    def track(self, items: Any, label: str, total: int | None = None) -> Iterator[Any]:
        for index, item in enumerate(items):
            if (label, index) == (self._label, self._at):
                raise KeyboardInterrupt
            yield item


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("prefer", "label", "earlier"),
    [
        (("adaround",), "adaround", 0),
        (("gptq",), "gptq", 0),
        (("sequential_mse", "nearest"), "sequential MSE", 0),
        (("sequential_mse", "gptq"), "gptq", LAYERS),
    ],
    ids=["adaround", "gptq", "sequential_mse", "gptq-behind-sequential_mse"],
)
def test_every_layerwise_algorithm_goes_on(
    graph: Graph, target: TargetSpec, tmp_path: Path, prefer: tuple[str, ...], label: str, earlier: int
) -> None:
    images = torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    options = {"adaround": {"iterations": 60}} if "adaround" in prefer else {}
    plan = qhw.plan(graph, target, calibration=images, prefer=prefer, options=options)

    def quantized(**more: Any) -> QuantizedModel:
        return qhw.quantize(graph, plan, calibration=images, **more)

    qhw.save(quantized(), tmp_path / "whole")
    work = tmp_path / "net.work"
    with pytest.raises(KeyboardInterrupt):
        quantized(work_folder=work, progress=Stopping(label, 2))
    assert len(list(work.iterdir())) == earlier + 2
    with WorkFolder(work) as folder:
        qhw.save(quantized(work_folder=folder), tmp_path / "resumed")
    assert (folder.read, folder.written) == (earlier + 2, LAYERS - 2)
    assert contents(tmp_path / "resumed") == contents(tmp_path / "whole")
    assert not work.exists()


def start(place: Path, out: str) -> "subprocess.Popen[str]":
    command = f"quantize net:model --target four.toml --calibration net:batches --out {out} --prefer adaround"
    slow = "--set adaround.iterations=3000 --set adaround.warm_start=0.99"  # decided layers would end early
    return subprocess.Popen(
        [sys.executable, "-m", "qhw", *command.split(), *slow.split()],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def stop_behind(layers: int, place: Path, out: str, how: signal.Signals) -> tuple[int, str, str]:
    """Status and output of a run that gets a signal once so many layers are kept."""
    process = start(place, out)
    until = time.monotonic() + 120
    while len(list(place.glob(f"{out}.work/*.layer.safetensors"))) < layers:
        assert process.poll() is None and time.monotonic() < until, process.communicate()
        time.sleep(0.002)
    process.send_signal(how)
    printed, said = process.communicate(timeout=60)
    assert not (place / out).exists()
    return process.returncode, printed, said


@pytest.mark.slow
def test_killed_and_then_stopped_by_ctrl_c_the_same_command_goes_on(place: Path) -> None:
    assert start(place, "whole").wait(120) == 0
    assert not (place / "whole.work").exists()

    assert stop_behind(1, place, "net", signal.SIGKILL)[0] == -signal.SIGKILL
    status, printed, said = stop_behind(2, place, "net", signal.SIGINT)
    assert (status, printed, len(said.splitlines())) == (130, "", 1), said
    assert said.startswith("interrupted: ")
    assert said.endswith("finished layers are kept in net.work. Run the same command again to go on.\n"), said

    process = start(place, "net")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0
    assert said.splitlines()[0].endswith("finished layers read back from net.work"), said
    assert contents(place / "net") == contents(place / "whole")
    assert not (place / "net.work").exists()


@pytest.fixture
def command(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[[str], Any]:
    """Runs `qhw quantize` in this process: status and lines on standard error."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(str(place))
    sys.modules.pop("net", None)

    def run(out: str) -> tuple[Any, list[str]]:
        words = f"qhw quantize net:model -t four.toml -c net:batches --prefer gptq -o {out}"
        monkeypatch.setattr(sys, "argv", words.split())
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().err.splitlines()

    return run


def test_a_file_in_place_of_the_work_folder_is_an_error_in_one_line(command: Any, place: Path) -> None:
    (place / "taken.work").write_text("mine")
    assert command("taken") == (
        1,
        [
            "error: taken.work: must be a folder that can be written, for layers that are done; 'taken.work' is a "
            "file, not a folder. Move it, or choose another place (--out, in Python work_folder=)."
        ],
    )
    assert (place / "taken.work").read_text() == "mine"


def failing(error: BaseException) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


def test_what_ends_the_command_behind_the_work_leaves_the_layers_and_says_so(
    command: Any, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qhw.api, "_written", failing(ExportError("x: no.")))
    kept = f"{LAYERS} finished layers are kept in late.work"
    assert command("late") == (1, [f"{kept}, for when the command is run again.", "error: x: no."])
    assert len(list((place / "late.work").iterdir())) == LAYERS
    monkeypatch.setattr(qhw.api, "_written", failing(KeyboardInterrupt()))
    assert command("late") == (130, [f"interrupted: {kept}. Run the same command again to go on."])
