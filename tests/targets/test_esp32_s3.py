# SPDX-License-Identifier: Apache-2.0
"""espressif/esp32-s3 obeyed: its 20-bit sums, product by product as the vector instructions add them, and its ties.

EE.VSMULAS.S8.QACC adds one product to each of 16 lanes of 20 bits and saturates; a lane starts from the bias, and takes
all input channels of a kernel position before the next one.
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

LOW, HIGH = -(2**19), 2**19 - 1
ORDER = ('order = "channel_fastest"', 'order = "kernel_fastest"')
FIRST = ('bias_added = "first"', 'bias_added = "last"')
ROUNDING = ('rounding = "half_to_plus_infinity"', 'rounding = "half_even"')

Changed = Callable[..., TargetSpec]


class Wide(nn.Module):
    """A convolution with 144 products to a sum, most of one sign; later ones of some channels of the other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3)
        with torch.no_grad():
            weight = 0.5 + 0.5 * torch.rand(16, 16, 3, 3, generator=torch.Generator().manual_seed(1))
            weight[8:, :, 2] *= -1
            weight[12:, 8:] *= -1
            self.conv.weight.copy_(weight)
            self.conv.bias.copy_(torch.linspace(-1.0, 1.0, 16))  # type: ignore[union-attr]

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


class Halves(nn.Module):
    """x and x / 2, on one scale that holds x: every other half is a tie."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, 0.5]).reshape(2, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


@pytest.fixture(scope="module")
def x() -> Tensor:
    return 0.6 + 0.4 * torch.rand(4, 16, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def changed(targets_root: Path) -> Changed:
    """The shipped file with pieces of its text replaced wherever they are; each must be there."""
    text = (targets_root / "espressif" / "esp32-s3.toml").read_text()

    def target(*changes: tuple[str, str]) -> TargetSpec:
        found = text
        for old, new in changes:
            assert old in found, old
            found = found.replace(old, new)
        return parse_target(found, find_base=lambda name: targets_root / f"{name}.toml")

    return target


def exponent(scale: Any) -> Any:
    found = np.log2(np.asarray(scale, np.float64))
    assert (found == np.rint(found)).all()
    return found.astype(np.int64)


def run(target: TargetSpec, x: Tensor, **options: Any) -> tuple[Any, Any, Any, Any, int]:
    """Codes of input, result, weight and bias, and the right shift of the sums."""
    result = qhw.quantize(Wide().eval(), target, example_inputs=x, calibration=x, **options)
    grids = result.encodings()
    found = {name: values.numpy().astype(np.int64) for name, values in IntegerModel(result).codes(x).items()}
    weight, bias = (
        result.codes(result.plan.point(f"conv.{name}")).numpy().astype(np.int64) for name in ("weight", "bias")
    )
    shift = exponent(grids["conv"].scale) - exponent(grids["x"].scale) - exponent(grids["conv.weight"].scale)
    assert shift.ndim == 0  # one exponent for all channels
    return found["x"], found["conv"], weight, bias, int(shift)


def saturating(codes: Any, weight: Any, bias: Any, *, kernel_fastest: bool = False, bias_last: bool = False) -> Any:
    """Sums of 20 bits, one product at a time."""
    batch, channels, height, width = codes.shape
    start = np.zeros_like(bias) if bias_last else bias
    acc = np.broadcast_to(start.reshape(1, -1, 1, 1), (batch, len(weight), height - 2, width - 2)).copy()
    steps = [(c, i, j) for i in range(3) for j in range(3) for c in range(channels)]
    if kernel_fastest:
        steps = [(c, i, j) for c in range(channels) for i in range(3) for j in range(3)]
    for c, i, j in steps:
        window = codes[:, c, None, i : i + height - 2, j : j + width - 2]
        acc = np.clip(acc + window * weight[None, :, c, i, j, None, None], LOW, HIGH)
    return np.clip(acc + bias.reshape(-1, 1, 1), LOW, HIGH) if bias_last else acc


def shifted(acc: Any, shift: int) -> Any:
    """As the kernel does it: by all bits but one, 1 added, by the last one."""
    return np.clip(((acc >> (shift - 1)) + 1) >> 1, -128, 127)


def worst(weight: Any, bias: Any) -> int:
    """Largest magnitude that any input of int8 can give."""
    rows = weight.reshape(len(weight), -1)
    positive, negative = rows.clip(min=0).sum(1), (-rows.clip(max=0)).sum(1)
    return int(max((positive * 127 + negative * 128 + bias).max(), (positive * 128 + negative * 127 - bias).max()))


@pytest.mark.parametrize(
    ("change", "how"), [(None, {}), (ORDER, {"kernel_fastest": True}), (FIRST, {"bias_last": True})]
)
def test_sums_that_overflow_saturate_product_by_product(changed: Changed, x: Tensor, change: Any, how: Any) -> None:
    left = {"without": ["accumulator_projection", "requantization_fit"]}
    source, found, weight, bias, shift = run(changed(*[change] if change else []), x, **left)
    acc = saturating(source, weight, bias, **how)
    np.testing.assert_array_equal(found, shifted(acc, shift))
    exact = convolution(source, weight, [1, 1], [(0, 0), (0, 0)], [1, 1], 1) + bias.reshape(-1, 1, 1)
    assert (exact > HIGH).any() and (found != shifted(exact, shift)).any()
    other = saturating(source, weight, bias, kernel_fastest="kernel_fastest" not in how)
    assert (shifted(other, shift) != found).any()


def test_weights_are_repaired_until_no_input_overflows(changed: Changed, x: Tensor) -> None:
    source, found, weight, bias, shift = run(changed(), x)
    assert worst(weight, bias) <= HIGH
    exact = convolution(source, weight, [1, 1], [(0, 0), (0, 0)], [1, 1], 1) + bias.reshape(-1, 1, 1)
    np.testing.assert_array_equal(found, shifted(exact, shift))
    _, _, wide, wide_bias, _ = run(changed(("bits = 20", "bits = 32")), x)
    assert worst(wide, wide_bias) > 2 * HIGH  # with 32 bits there is nothing to repair
    assert np.abs(wide).max() > np.abs(weight).max()


def test_a_bias_has_20_bits(changed: Changed, x: Tensor) -> None:
    model = Wide().eval()
    with torch.no_grad():
        model.conv.weight.mul_(2.0**-20)
    room = ("bits = 20\noverflow", "bits = 32\noverflow")  # the accumulator does not decide here
    for bits, expected in ((20, -11), (32, -23)):
        target = changed(room, ("bits = 20\napplied", f"bits = {bits}\napplied"))
        result = qhw.quantize(model, target, example_inputs=x, calibration=x)
        grids = result.encodings()
        assert exponent(grids["x"].scale) == -7
        # 1.0 is 2^18 steps of 2^(-7 - 11), and 2^19 of half of them would be one too many for 20 bits.
        assert exponent(grids["conv.weight"].scale) == expected
        assert result.codes(result.plan.point("conv.bias")).max() == 2.0 ** (7 - expected)


def test_ties_go_up(changed: Changed) -> None:
    x = torch.arange(-127.0, 128.0).reshape(-1, 1, 1, 1) / 4
    codes = np.arange(-127, 128)
    for target, halves in ((changed(), np.floor(codes / 2 + 0.5)), (changed(ROUNDING), np.rint(codes / 2))):
        result = qhw.quantize(Halves().eval(), target, example_inputs=x, calibration=x, pipeline="ranges-ptq")
        found = IntegerModel(result).codes(x)
        np.testing.assert_array_equal(found["x"].flatten().numpy(), codes)
        np.testing.assert_array_equal(found["conv"][:, 0].flatten().numpy(), codes)
        np.testing.assert_array_equal(found["conv"][:, 1].flatten().numpy(), halves)


def test_chips_without_vectors_sum_in_32_bits(targets_root: Path, x: Tensor) -> None:
    target = qhw.load_target(targets_root / "espressif" / "esp32-c.toml")
    source, found, weight, bias, shift = run(target, x)
    exact = convolution(source, weight, [1, 1], [(0, 0), (0, 0)], [1, 1], 1) + bias.reshape(-1, 1, 1)
    assert worst(weight, bias) > 2 * HIGH and (exact > HIGH).any()
    np.testing.assert_array_equal(found, shifted(exact, shift))
