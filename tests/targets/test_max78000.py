# SPDX-License-Identifier: Apache-2.0
"""analog/max78000 obeyed from plan to integers, against the vendor's simulator written down in numpy.

ai8x-synthesis computes floor(0.5 + (sum + 128 bias) / (128 / 2^s)), clipped, for the layer's shift s from -15 to 15.
Each clause of the file that decides something is taken out once, and what it decided changes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.errors import RangeError
from qhw.integer import IntegerModel
from qhw.schema import TargetSpec, parse_target
from tests.integer_support import convolution

Changed = Callable[..., TargetSpec]
SHIFTS = ("shift = { min = -8, max = 22 }", "shift = { min = -128, max = 128 }")
SHIFT_SOURCE = (', shift = "derived: 7 - s, with s from -15 to 15"', ', shift = "memory"')


class Network(nn.Module):
    """Two layers, a sum of two pools, an average, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = torch.max_pool2d(self.second(x), 2) + torch.max_pool2d(x, 2)
        found: Tensor = self.fc(torch.nn.functional.avg_pool2d(x, 2).flatten(1))
        return found


class Layer(nn.Module):
    """One convolution, its weights given a size."""

    def __init__(self, size: float, bias: float = 0.0, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(4, 4, options.pop("kernel", 3), **options)
        with torch.no_grad():
            self.conv.weight.mul_(size / self.conv.weight.abs().max())
            self.conv.bias.fill_(bias)  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


def image(channels: int) -> Tensor:
    return torch.rand(4, channels, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def changed(targets_root: Path) -> Changed:
    """The shipped file with pieces of its text replaced; each must be there."""
    text = (targets_root / "analog" / "max78000.toml").read_text()

    def target(*changes: tuple[str, str]) -> TargetSpec:
        found = text
        for old, new in changes:
            assert old in found, old
            found = found.replace(old, new)
        return parse_target(found)

    return target


def quantized(module: nn.Module, target: TargetSpec, x: Tensor, **options: Any) -> Any:
    return qhw.quantize(module.eval(), target, example_inputs=x, calibration=x, pipeline="ranges-ptq", **options)


def exponent(scale: Any) -> int:
    found = np.log2(np.asarray(scale, np.float64))
    assert found.ndim == 0 and found == np.rint(found)
    return int(found)


def layer(codes: Any, weight: Any, bias: Any, shift: int, padding: int, low: int) -> Any:
    """What the simulator gives for one convolution."""
    sums = convolution(codes, weight, [1, 1], [(padding, padding)] * 2, [1, 1], 1) + 128 * bias.reshape(-1, 1, 1)
    return np.clip(np.floor(0.5 + sums / (128 / 2.0**shift)), low, 127)


@pytest.mark.parametrize("weights", ["w8", "w4", "w2"])
def test_a_network_in_codes(changed: Changed, weights: str) -> None:
    x = image(3)
    torch.manual_seed(0)
    result = quantized(Network(), changed(), x, formats={"*.weight": weights})
    assert {op.where for op in result.plan.operators} == {"accelerator"}
    found = {name: values.numpy().astype(np.int64) for name, values in IntegerModel(result).codes(x).items()}
    grids = result.encodings()
    stored = {
        point.name: result.codes(point).numpy().astype(np.int64)
        for point in result.plan.points
        if point.role in ("weight", "bias")
    }
    low = {"w8": -128, "w4": -8, "w2": -2}[weights]
    assert all(low <= stored[f"{name}.weight"].min() for name in ("first", "second", "fc"))

    def shift(name: str) -> int:
        s = exponent(grids[f"{name}.weight"].scale) + 7
        assert -15 <= s <= 15
        return s

    def run(name: str, source: str, padding: int, low: int = -128) -> Any:
        weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
        codes = found[source].reshape(len(x), -1, 1, 1) if name == "fc" else found[source]
        return layer(
            codes, weight.reshape(*weight.shape[:2], *weight.shape[2:] or (1, 1)), bias, shift(name), padding, low
        )

    np.testing.assert_array_equal(found["relu"], run("first", "x", 1, low=0))
    np.testing.assert_array_equal(found["second"], run("second", "relu", 0))
    pools = {name: found[name].reshape(4, 8, 4, 2, 4, 2).max((3, 5)) for name in ("second", "relu")}
    np.testing.assert_array_equal(found["add"], np.clip(pools["second"] + pools["relu"], -128, 127))
    sums = found["add"].reshape(4, 8, 2, 2, 2, 2).sum((3, 5))
    np.testing.assert_array_equal(found["averagepool"], np.trunc(sums / 4))
    np.testing.assert_array_equal(found["fc"].reshape(4, 5, 1, 1), run("fc", "averagepool", 0))


def test_data_are_codes_over_128_whatever_they_hold(changed: Changed) -> None:
    free = ('scale = { kind = "fixed", values = [0.0078125] }', 'scale = { kind = "power_of_two" }')
    for size, wanted in ((0.01, -13), (1.0, -7), (4.0, -5)):
        x = size * image(4)
        for target, expected in ((changed(), -7), (changed(free), wanted)):
            result = quantized(Layer(0.3), target, x)
            assert exponent(result.encodings()["x"].scale) == expected


def test_a_shift_ends_at_15_to_the_right(changed: Changed) -> None:
    tiny, x = Layer(2.0**-20), image(4)
    assert exponent(quantized(tiny, changed(), x).encodings()["conv.weight"].scale) == -22  # 7 - 22 = -15
    without = changed(SHIFTS, SHIFT_SOURCE)
    assert exponent(quantized(tiny, without, x).encodings()["conv.weight"].scale) == -27


def test_a_shift_ends_at_15_to_the_left(changed: Changed) -> None:
    x = image(4)
    result = quantized(Layer(2.0**15 * 0.99), changed(), x)
    assert exponent(result.encodings()["conv.weight"].scale) == 8  # 7 + 8 = 15
    with pytest.raises(RangeError, match=r"^conv: .*must be at most 2\^8 \(requantize\.layer\.shift\.min\); got 512"):
        quantized(Layer(2.0**16 * 0.99), changed(), x)
    assert quantized(Layer(2.0**16 * 0.99), changed(SHIFTS, SHIFT_SOURCE), x)


def test_a_bias_is_shifted_left_by_7_and_has_8_bits(changed: Changed) -> None:
    x = image(4)
    without = (("shift = { min = -7, max = -7 }\n", ""), (', shift = "AI8X-SIM"', ""))
    for bias, free in ((0.001, -15), (0.2, -9), (0.9, -7)):
        result = quantized(Layer(0.3, bias), changed(), x)
        found = result.encodings()
        assert exponent(found["conv.bias"].scale) == exponent(found["conv.weight"].scale)
        assert result.codes(result.plan.point("conv.bias")).abs().max() <= 127
        alone = quantized(Layer(0.3, bias), changed(*without), x).encodings()
        assert exponent(alone["conv.weight"].scale) == -8
        assert exponent(alone["conv.bias"].scale) == free
    # Twice what 8 bits hold at the weights' own scale: the layer's shift makes room for it.
    assert exponent(quantized(Layer(0.3, 0.9), changed(), x).encodings()["conv.weight"].scale) == -7


LIMITS = [
    (
        {"kernel": 5},
        "kernel = [[1, 1], [3, 3], [1], [2], [3], [4], [5], [6], [7], [8], [9]]\n",
        "operators.Conv.limits.kernel",
    ),
    ({"stride": 2}, "stride = [1]\n", "operators.Conv.limits.stride"),
    ({"dilation": 2}, "dilation = [1]\n", "operators.Conv.limits.dilation"),
    ({"groups": 4}, 'groups = ["1"]\n', "operators.Conv.limits.groups"),
    ({"padding": 3}, "padding = [0, 1, 2]\n", "operators.Conv.limits.padding"),
]


@pytest.mark.parametrize(("options", "clause", "subject"), LIMITS, ids=[case[2].split(".")[-1] for case in LIMITS])
def test_what_the_hardware_cannot_is_left_to_software(
    changed: Changed, options: dict[str, int], clause: str, subject: str
) -> None:
    graph = qhw.capture(Layer(0.3, **options).eval(), image(4))
    for target, where in ((changed(), "host"), (changed((clause, "")), "accelerator")):
        found = qhw.plan(graph, target, calibration=image(4)).operators[0]
        assert (found.where, found.subject == subject) == (where, where == "host")


def test_the_max78002_has_depthwise_and_dilated_layers(targets_root: Path) -> None:
    places = {}
    for chip in ("max78000", "max78002"):
        target = qhw.load_target(targets_root / "analog" / f"{chip}.toml")
        for options in ({"groups": 4}, {"dilation": 16}, {"dilation": 17}, {"groups": 2}):
            wide = torch.zeros(1, 4, 48, 48)
            found = qhw.plan(qhw.capture(Layer(0.3, **options).eval(), wide), target, calibration=wide)
            places[chip, *options.items()] = found.operators[0].where
    assert {key[1] for key, where in places.items() if key[0] == "max78000" and where != "host"} == set()
    assert {key[1] for key, where in places.items() if key[0] == "max78002" and where != "host"} == {
        ("groups", 4),
        ("dilation", 16),
    }


def test_the_max78002_has_weights_of_one_bit(targets_root: Path) -> None:
    x = image(4)
    target = qhw.load_target(targets_root / "analog" / "max78002.toml")
    result = quantized(Layer(0.3), target, x, formats={"*.weight": "w1"})
    assert result.codes(result.plan.point("conv.weight")).unique().tolist() == [-1, 1]
    assert -22 <= exponent(result.encodings()["conv.weight"].scale) <= 8
