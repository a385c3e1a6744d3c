# SPDX-License-Identifier: Apache-2.0
"""analog/max78000 obeyed from plan to integers, against the vendor's simulator written down in numpy.

ai8x-synthesis computes floor(0.5 + (sum + 128 bias) / (128 / 2^s)), clipped, for the layer's shift s from -15 to 15.
Each clause of the file that decides something is taken out once, and what it decided changes. That codes may stand for
code * 2^k, and not for code / 128 alone, is shown by a network that a user brings into [-1, 1) by hand: the same codes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.integer import IntegerModel
from qhw.schema import TargetSpec, parse_target
from tests.integer_support import convolution

Changed = Callable[..., TargetSpec]
SHIFTS = ("shift = { min = -8, max = 22 }", "shift = { min = -128, max = 128 }")
SHIFT_SOURCE = (', shift = "derived: 7 - s, with s from -15 to 15"', ', shift = "memory"')
Q7 = (
    'scale = { kind = "power_of_two" }\nsource = { "*" = "AI8X", scale = ["AI8X-SIM"',
    'scale = { kind = "fixed", values = [0.0078125] }\nsource = { "*" = "AI8X", scale = ["AI8X-SIM"',
)


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


def exponents(result: Any) -> dict[str, int]:
    """Point -> exponent of its scale."""
    grids = result.encodings()
    return {point.name: exponent(grids[point.group].scale) for point in result.plan.points}


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
    scales = exponents(result)
    stored = {
        point.name: result.codes(point).numpy().astype(np.int64)
        for point in result.plan.points
        if point.role in ("weight", "bias")
    }
    low = {"w8": -128, "w4": -8, "w2": -2}[weights]
    assert all(low <= stored[f"{name}.weight"].min() for name in ("first", "second", "fc"))

    def run(name: str, source: str, padding: int, low: int = -128) -> Any:
        weight, bias = stored[f"{name}.weight"], stored[f"{name}.bias"]
        codes = found[source].reshape(len(x), -1, 1, 1) if name == "fc" else found[source]
        shift = 7 + scales["first" if source == "relu" else source] + scales[f"{name}.weight"] - scales[name]
        assert -15 <= shift <= 15
        return layer(codes, weight.reshape(*weight.shape[:2], *weight.shape[2:] or (1, 1)), bias, shift, padding, low)

    assert scales["first"] == scales["second"] == scales["add"] == scales["averagepool"]  # no shift in between
    np.testing.assert_array_equal(found["relu"], run("first", "x", 1, low=0))
    np.testing.assert_array_equal(found["second"], run("second", "relu", 0))
    pools = {name: found[name].reshape(4, 8, 4, 2, 4, 2).max((3, 5)) for name in ("second", "relu")}
    np.testing.assert_array_equal(found["add"], np.clip(pools["second"] + pools["relu"], -128, 127))
    sums = found["add"].reshape(4, 8, 2, 2, 2, 2).sum((3, 5))
    np.testing.assert_array_equal(found["averagepool"], np.trunc(sums / 4))
    np.testing.assert_array_equal(found["fc"].reshape(4, 5, 1, 1), run("fc", "averagepool", 0))


def test_a_network_brought_into_q7_by_hand_has_the_same_codes(changed: Changed) -> None:
    """W' = W so / si and b' = b so, by powers of two: what users do whose data clip at 127 / 128."""
    x = 5 * image(3)
    torch.manual_seed(0)
    network = Network()
    found = quantized(network, changed(), x)
    factors = {name: 2.0 ** (-7 - scale) for name, scale in exponents(found).items()}
    assert factors["x"] == 1 / 8 and 1 not in (factors["first"], factors["fc"])
    with torch.no_grad():
        for name, source in (("first", "x"), ("second", "first"), ("fc", "add")):
            getattr(network, name).weight.mul_(factors[name] / factors[source])
            getattr(network, name).bias.mul_(factors[name])
    by_hand = quantized(network, changed(Q7), factors["x"] * x)
    scales = exponents(by_hand)
    assert {scales[point.name] for point in by_hand.plan.points if point.role in ("input", "activation")} == {-7}
    for point in found.plan.points:
        if point.role in ("weight", "bias"):
            assert torch.equal(found.codes(point), by_hand.codes(point)), point.name
    codes, expected = IntegerModel(found).codes(x), IntegerModel(by_hand).codes(factors["x"] * x)
    for name in codes:
        assert torch.equal(codes[name], expected[name]), name


def test_data_are_not_clipped_at_one(changed: Changed) -> None:
    """Values to 8 in steps of 1/16: 8 - 1/16 is the largest. In Q7, all above 127 / 128 would be one value."""
    x = 8 * image(4)
    for target, scale in ((changed(), -4), (changed(Q7), -7)):
        result = quantized(Layer(0.3), target, x)
        assert exponent(result.encodings()["x"].scale) == scale
        codes = IntegerModel(result).codes(x)["x"]
        assert torch.equal(codes.double(), (x.double() * 2.0**-scale).round().clamp(-128, 127))


class Residual(nn.Module):
    """A layer whose result meets its input: the sum has no shift, so that all three have one scale."""

    def __init__(self, size: float) -> None:
        super().__init__()
        self.layer = Layer(size, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.layer(x) + x
        return found


def test_a_shift_ends_at_15_to_the_right(changed: Changed) -> None:
    tiny, x = Residual(2.0**-20), image(4)

    for target, expected in ((changed(), -22), (changed(SHIFTS, SHIFT_SOURCE), -27)):  # 7 - 22 = -15
        scales = exponents(quantized(tiny, target, x))
        assert scales["x"] + scales["layer.conv.weight"] - scales["layer.conv"] == expected


def test_a_shift_ends_at_15_to_the_left(changed: Changed) -> None:
    """Two inputs that nearly cancel: data and weights in steps of 2^-7 have a result of 2^-17, in steps of 2^-24."""
    close = Layer(0.5, kernel=1)
    with torch.no_grad():
        close.conv.weight[:, :2] = torch.tensor([0.5, -0.5])[None, :, None, None]
        close.conv.weight[:, 2:] = 0
    x = image(4)
    x[:, 1] = x[:, 0] * (1 - 2.0**-16)

    for target, expected in ((changed(), 8), (changed(SHIFTS, SHIFT_SOURCE), 10)):  # 7 + 8 = 15
        scales = exponents(quantized(close, target, x))
        assert scales["x"] + scales["conv.weight"] - scales["conv"] == expected


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
