# SPDX-License-Identifier: Apache-2.0
"""espressif/esp32-p4 in integers, operator by operator, against ESP-DL's C functions written down in numpy.

shift_and_round, truncate and round are those of esp-dl/dl/tool at the commit that the target names; accumulators start
from the bias, and shifts are output exponent - weight exponent - input exponent.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.integer import IntegerModel
from tests.integer_support import convolution


class Residual(nn.Module):
    """A layer, a sum with it, a product, a clip of its own, a mean of the image, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.relu(self.second(x) + x)
        x = (x * x).clamp(0.0, 3.0)
        found: Tensor = self.fc(x.mean((2, 3)))
        return found


def shift_and_round(values: Any, shift: Any) -> Any:
    """Half to even, on the remainder of an arithmetic shift."""
    shift = np.broadcast_to(shift, values.shape)
    assert (shift >= 0).all()
    whole, rest, half = values >> shift, values & ((1 << shift) - 1), (1 << shift) >> 1
    up = (rest > half) | ((rest == half) & (whole & 1 == 1))
    return np.where(shift == 0, values, whole + up)


def truncate(values: Any) -> Any:
    return np.clip(values, -128, 127)


def exponent(scale: Any) -> Any:
    found = np.log2(np.asarray(scale, np.float64))
    assert (found == np.rint(found)).all()
    return found.astype(np.int64)


@pytest.fixture(scope="module")
def ran(targets_root: Path) -> tuple[Any, Any, Any]:
    """The model's codes, its encodings, and its weight codes by name."""
    torch.manual_seed(0)
    x = torch.randn(8, 3, 9, 8)
    target = qhw.load_target(targets_root / "espressif" / "esp32-p4.toml")
    result = qhw.quantize(Residual().eval(), target, example_inputs=x, calibration=x, pipeline="ranges-ptq")
    assert {op.where for op in result.plan.operators} == {"accelerator"}
    codes = {name: values.numpy().astype(np.int64) for name, values in IntegerModel(result).codes(x).items()}
    grids = {name: exponent(q.scale) for name, q in result.encodings().items()}
    stored = {
        point.name: result.codes(point).numpy().astype(np.int64)
        for point in result.plan.points
        if point.role in ("weight", "bias")
    }
    return codes, (grids, {point.tensor: point.group for point in result.plan.points}), stored


def test_layers_shift_their_sums_per_channel(ran: Any) -> None:
    codes, (grids, groups), stored = ran
    for layer, source, written in (("first", "x", "relu"), ("second", "relu", "second")):
        w = stored[f"{layer}.weight"]
        acc = convolution(codes[source], w, [1, 1], [(1, 1), (1, 1)], [1, 1], 1)
        acc = acc + stored[f"{layer}.bias"].reshape(-1, 1, 1)
        shift = grids[groups[written]] - grids[f"{layer}.weight"] - grids[groups[source]]
        found = shift_and_round(acc, shift.reshape(-1, 1, 1))
        expected = truncate(np.maximum(found, 0) if written == "relu" else found)
        np.testing.assert_array_equal(codes[written], expected)


def test_sums_add_codes_and_saturate(ran: Any) -> None:
    codes, (grids, groups), _ = ran
    assert len({int(grids[groups[name]]) for name in ("second", "relu", "add")}) == 1
    np.testing.assert_array_equal(codes["add"], truncate(codes["second"] + codes["relu"]))
    assert (codes["add"] == 127).any() or (np.abs(codes["add"]) < 127).all()


def test_products_shift_by_the_exponents(ran: Any) -> None:
    codes, (grids, groups), _ = ran
    source = "relu_1"
    shift = grids[groups["mul"]] - 2 * grids[groups[source]]
    np.testing.assert_array_equal(codes["mul"], truncate(shift_and_round(codes[source] ** 2, shift)))


def test_activations_of_their_own_are_tables(ran: Any) -> None:
    codes, (grids, groups), _ = ran
    for source, written, limit in (("add", "relu_1", np.inf), ("mul", "clip", 3.0)):
        reals = np.clip(codes[source] * 2.0 ** grids[groups[source]], 0.0, limit)
        np.testing.assert_array_equal(codes[written], truncate(np.rint(reals / 2.0 ** grids[groups[written]])))


def test_a_mean_of_the_image_is_rescaled_in_float32(ran: Any) -> None:
    codes, (grids, groups), _ = ran
    inverse = np.float32(1.0) / np.float32(72)
    power = np.float32(2.0) ** np.float32(grids[groups["clip"]])
    scale = power * inverse * np.float32(2.0) ** np.float32(-grids[groups["reducemean"]])
    total = codes["clip"].sum((2, 3)).astype(np.float32)
    np.testing.assert_array_equal(codes["reducemean"], truncate(np.rint(total * scale)))
