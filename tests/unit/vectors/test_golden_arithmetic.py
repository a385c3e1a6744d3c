# SPDX-License-Identifier: Apache-2.0
"""The script recomputes sums by shifts, stages, constants, moves between two grids, and what facts say of the rest."""

import json
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
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import FLOAT32, FunctionOf, calibrated

POWER = f'{reference.S8}, scale = {{ kind = "power_of_two" }}'
ZERO = f"{POWER}, zero_point = 0"
ALIGN = 'align = { to = "SIDE", rounding = "half_even", shift = { min = -9, max = 9 } }'
SHIFT = f'kind = "shift", rounding = "floor", shift = {{ min = -20, max = 20 }}, {ALIGN}'
STAGES = (
    'kind = "fixed_point", multiplier_bits = 15, shift = { min = -40, max = 40 }, stages = [{ operation = "multiply", '
    'rounding = "floor" }, { operation = "add_zero_point" }, { operation = "shift", rounding = "half_even" }]'
)
DATA = torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(0)) + 0.4
OTHER = 3 * torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(1))


def checked(model: nn.Module, text: str, data: Any, folder: Path) -> list[dict[str, Any]]:
    """The layers of golden vectors that the script recomputed without a difference."""
    result = calibrated(model, parse_target(text), data)
    qhw.golden(result, folder, [data], samples=2)
    ran = subprocess.run(
        [sys.executable, "-I", str(folder / "check.py")], capture_output=True, text=True, cwd=folder, timeout=120
    )
    layers: list[dict[str, Any]] = json.loads((folder / "manifest.json").read_text())["operators"]
    assert ran.returncode == 0 and ran.stdout.startswith(f"{len(layers)} layers recomputed"), ran.stdout + ran.stderr
    return layers


@pytest.mark.parametrize("side", ["finer", "coarser"])
@pytest.mark.parametrize("accumulator", ['bits = 32, overflow = "wrap"', 'bits = 9, overflow = "saturate"'])
def test_sums_by_shifts_are_recomputed(side: str, accumulator: str, tmp_path: Path) -> None:
    text = reference.text(SHIFT.replace("SIDE", side), activation=POWER, weight=POWER, accumulator=accumulator)
    (layer,) = checked(FunctionOf(lambda x, y: x - y), text, (DATA, OTHER), tmp_path)
    assert layer["requantize.0"]["shift"] != layer["requantize.1"]["shift"]
    is_narrow = accumulator.startswith("bits = 9") and side == "finer"
    assert ("accumulator_bits" in layer["facts"]) == is_narrow or side == "coarser"


def test_a_product_in_a_narrow_register_is_recomputed(tmp_path: Path) -> None:
    text = reference.text(FLOAT32, accumulator='bits = 13, overflow = "wrap"')
    (layer,) = checked(FunctionOf(lambda x, y: x * y), text, (DATA, OTHER), tmp_path)
    assert layer["facts"] == {"accumulator_bits": 13, "accumulator_overflow": "wrap"}


def test_stages_are_recomputed(tmp_path: Path) -> None:
    (layer,) = checked(FunctionOf(lambda x, y: x * y), reference.text(STAGES), (DATA, OTHER), tmp_path)
    assert layer["requantize"]["steps"] == [["multiply", "floor"], ["add_zero_point", None], ["shift", "half_even"]]


@pytest.mark.parametrize("kind", [reference.fixed_point("half_even"), 'kind = "float64", rounding = "half_even"'])
def test_a_zero_point_before_rounding_is_recomputed(kind: str, tmp_path: Path) -> None:
    text = reference.text(kind, order="zero_point_before")
    (layer,) = checked(FunctionOf(lambda x, y: x * y), text, (DATA, OTHER), tmp_path)
    assert layer["requantize"]["zero_point_before"] == (layer["requantize"]["zero_point"] % 2 != 0 or "64" in kind)


FUNCTIONS = {"x + c": lambda x, c: x + c, "c - x": lambda x, c: c - x, "c * x": lambda x, c: c * x}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize(
    ("kind", "order"),
    [(FLOAT32, "zero_point_before"), (FLOAT32, "zero_point_after"), (reference.DOUBLE, "zero_point_after")],
)
def test_a_constant_is_shown_and_taken_in(kind: str, order: str, name: str, tmp_path: Path) -> None:
    model = FunctionOf(FUNCTIONS[name], torch.randn(5, 1, generator=torch.Generator().manual_seed(2)))
    (layer,) = checked(model, reference.text(kind, order=order), (DATA,), tmp_path)
    codes = np.load(tmp_path / "vectors.npz")[layer["weight"]["array"]]
    assert codes.shape == (5, 1) and layer["attributes"]["weight_operand"] == int(name.startswith("x"))


@pytest.mark.parametrize("regrid", ["ratio", "dequantize"])
def test_moves_between_two_grids_are_recomputed(regrid: str, tmp_path: Path) -> None:
    lines = reference.text(f'{FLOAT32}, regrid = "{regrid}"').splitlines()
    kept = [line for line in lines if not line.startswith(("operators.MaxPool ", "operators.Clip "))]
    more = 'kernels = ["two"], rounding_order = "zero_point_after" }'
    text = "\n".join([*kept, f"operators.MaxPool = {{ {more}", f"operators.Clip = {{ {more}"])

    class Moves(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool1d(x, 2).clamp(-0.2, 0.9)

    layers = checked(Moves(), text, (DATA,), tmp_path)
    assert [layer["kind"] for layer in layers] == ["MaxPool", "Clip"]


def test_clips_of_a_float_result_and_the_rounding_of_an_average_of_reals_are_shown(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU6()).eval()
    result = calibrated(model, reference.target(FLOAT32, outputs="float"), (DATA,))
    qhw.golden(result, tmp_path / "float", [(DATA,)])
    (layer,) = json.loads((tmp_path / "float" / "manifest.json").read_text())["operators"]
    assert layer["facts"]["clips"]["float32"] == [(0.0).hex(), (6.0).hex()]
    assert layer["facts"]["clips"]["shape"] == [1, 2]

    text = reference.text(FLOAT32, order="zero_point_before", accumulator='kind = "float", bits = 32')
    (layer,) = checked(nn.AvgPool1d(3, 2), text, (DATA,), tmp_path / "average")
    assert (layer["rule"], layer["facts"]["rounding"]) == ("real_average", "half_even")
