# SPDX-License-Identifier: Apache-2.0
"""Golden vectors of Softmax, LogSoftmax, HardSwish, Gelu and Resize: recomputed without qhw, named where changed."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.extension import default_registry
from qhw.schema import parse_target
from qhw.vectors.script import check_script


class Functions(nn.Module):
    """Every function with a rule of its own, between convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.interpolate(F.hardswish(self.first(x)), scale_factor=2)
        x = F.interpolate(F.gelu(self.second(x)), size=(11, 7), mode="bilinear")
        x = F.interpolate(x, size=(5, 9), mode="bilinear", align_corners=True)
        logits = self.last(x.mean((2, 3)))
        return logits.softmax(1), F.log_softmax(logits, 1)


BY_TABLE = """
schema_version = 1
name = "acme/reals"
extends = "google/litert-int8"
operators.Softmax = { approximation = { kind = "table", quotient = "QUOTIENT" }, source = "memory" }
"""


def written(folder: Path, spec: Any) -> Path:
    torch.manual_seed(0)
    data = torch.randn(8, 3, 6, 6)
    result = qhw.quantize(
        Functions().eval(), spec, example_inputs=data, calibration=data, pipeline="ranges-ptq"
    )  # fmt: skip
    found = qhw.verify(result, data=[data])
    assert {one.tensor for one in found.simulated} >= {"hardswish", "resize", "gelu", "softmax", "logsoftmax"}
    assert max(one.largest for one in found.simulated) <= 3
    return qhw.golden(result, folder / "vectors", [data], samples=3).folder


def check(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-I", str(folder / "check.py")], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("golden"), "google/litert-int8")


def test_a_script_without_qhw_recomputes_every_layer(shipped: Path) -> None:
    ran = check(shipped)
    assert (ran.returncode, ran.stdout) == (0, "11 layers recomputed, 3 sample(s): nothing differs\n"), ran.stderr
    assert "import qhw" not in (shipped / "check.py").read_text() and "from qhw" not in check_script()


@pytest.mark.parametrize("quotient", ["division", "reciprocal"])
def test_a_softmax_of_reals_is_recomputed_too(tmp_path: Path, quotient: str) -> None:
    text = BY_TABLE.replace("QUOTIENT", quotient)
    folder = written(tmp_path, parse_target(text, find_base=default_registry().target_path))
    ran = check(folder)
    assert (ran.returncode, ran.stdout) == (0, "11 layers recomputed, 3 sample(s): nothing differs\n"), ran.stderr


@pytest.mark.parametrize(
    ("layer", "part"),
    [
        ("softmax", "exponentials"), ("softmax", "output"), ("logsoftmax", "scaled"), ("logsoftmax", "output"),
        ("hardswish", "table"), ("resize", "index"), ("resize_1", "row.fraction"), ("resize_1", "column.upper"),
        ("resize_2", "output"),
    ],
)  # fmt: skip
def test_an_array_that_is_changed_is_named_with_its_layer(shipped: Path, tmp_path: Path, layer: str, part: str) -> None:
    folder = Path(shutil.copytree(shipped, tmp_path / "vectors"))
    arrays = dict(np.load(folder / "vectors.npz"))
    arrays[f"{layer}/{part}"].flat[-1] ^= 1
    np.savez(folder / "vectors.npz", **arrays)
    ran = check(folder)
    assert ran.returncode == 1
    assert ran.stdout.startswith(f"DIFFERS {layer} ("), ran.stdout
