# SPDX-License-Identifier: Apache-2.0
"""Runs the command line in this process, as the installed script would."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from qhw.cli import main

NET = """
import torch
from torch import nn


def model():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )
    return net.eval(), torch.randn(1, 3, 8, 8)


def batches():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(64, 3, 8, 8, generator=generator).split(16)


def labelled():
    for batch in batches():
        yield batch, torch.zeros(len(batch), dtype=torch.int64)


def share_of_zero(outputs, labels):
    return 100.0 * float((outputs.argmax(1) == labels).float().mean())


def broken():
    raise RuntimeError("the disk is gone")


def nothing():
    return []


number = 3
"""

TINY = """
schema_version = 1
name = "acme/tiny"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
accumulators.acc = { bits = 32, overflow = "wrap" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "acc" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
"""


@dataclass
class Ran:
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model in `net.py` and a target in `tiny.toml`."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "tiny.toml").write_text(TINY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("net", None)
    return tmp_path


@pytest.fixture
def qhw_run(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `qhw ARGUMENTS` in the working folder."""

    def run(*arguments: str) -> Ran:
        monkeypatch.setattr(sys, "argv", ["qhw", *arguments])
        capsys.readouterr()
        status = 0
        try:
            main()
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    return run
