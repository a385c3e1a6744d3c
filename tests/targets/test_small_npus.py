# SPDX-License-Identifier: Apache-2.0
"""What decides in the files of NPUs of which little is published: each clause is obeyed, and taken out it is missed.

Expected values are read off the vendors' quantizers and guides that the files cite, not off plans.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.graph import Graph
from qhw.schema import TargetSpec, parse_target


class Conv(nn.Module):
    """A convolution whose weights lie off 0, of any options."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        rank = nn.Conv1d if options.pop("flat", False) else nn.Conv2d
        self.conv = rank(options.pop("channels", 4), 8, options.pop("kernel", 3), **options)
        nn.init.uniform_(self.conv.weight, -0.1, 0.3)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.conv(x)
        return found


class Functions(nn.Module):
    """Functions with known ranges, a difference, a product of two activations, a maximum, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.fc(x)
        return torch.sigmoid(x), torch.tanh(x), F.softmax(x, -1), x - y, x @ y.transpose(1, 2), torch.maximum(x, y)


class Trunk(nn.Module):
    """A convolution, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.fc = nn.Conv2d(4, 8, 3), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.fc(self.conv(x).mean((2, 3)))
        return found


IMAGE = torch.rand(32, 4, 8, 8, generator=torch.Generator().manual_seed(0)) + 0.25
LINE = torch.rand(32, 4, 16, generator=torch.Generator().manual_seed(0))
WIDE = torch.rand(2, 4, 40, 40, generator=torch.Generator().manual_seed(0))
MANY = torch.rand(2, 1025, 8, 8, generator=torch.Generator().manual_seed(0))
ROWS = torch.randn(32, 4, 8, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "conv": (Conv, IMAGE),
    "small": (Conv, IMAGE * 1e-4),
    "flat": (lambda: Conv(flat=True), LINE),
    "kernel 17": (lambda: Conv(kernel=17), WIDE),
    "kernel 32": (lambda: Conv(kernel=32), WIDE),
    "stride 5": (lambda: Conv(stride=5), WIDE),
    "groups 2": (lambda: Conv(groups=2), IMAGE),
    "many": (lambda: Conv(channels=1025, padding=1), MANY),
    "padded": (lambda: Conv(padding=1), IMAGE),
    "narrow": (lambda: Conv(padding=1), IMAGE[..., :3]),
    "trunk": (Trunk, IMAGE),
    "functions": (Functions, ROWS),
}


@cache
def graph(model: str) -> Graph:
    make, x = MODELS[model]
    return qhw.capture(make().eval(), x[:2])


@dataclass(frozen=True)
class Case:
    """One clause of a file: what is seen with it, and what when its text is changed."""

    target: str
    fact: str
    model: str
    seen: Callable[[Any], Any]
    expected: Any
    change: tuple[str, str]
    then: Any
    formats: dict[str, str] | None = None
    quantized: bool = False


def where(name: str) -> Callable[[Any], str]:
    return lambda plan: str(next(op.where for op in plan.operators if op.name == name))


def form(name: str) -> Callable[[Any], str]:
    return lambda plan: str(plan.point(name).format)


def form_of_input(plan: Any) -> str:
    return str(next(point.format for point in plan.points if point.role == "input"))


def is_one_group(*names: str) -> Callable[[Any], bool]:
    def seen(plan: Any) -> bool:
        groups = {point.tensor: point.group for point in plan.points if point.role != "edge"}
        return len({groups[name] for name in names}) == 1

    return seen


def fixed(name: str) -> Callable[[Any], Any]:
    def seen(plan: Any) -> Any:
        found = next(point.fixed for point in plan.points if point.name == name)
        return None if found is None else (found.scale, found.zero_point)

    return seen


def weight(result: Any) -> Any:
    return result.encodings()["conv.weight"]


def has_zero_points(result: Any) -> bool:
    return bool((weight(result).zero_point != 0).any())


def input_grid(result: Any) -> Any:
    point = next(point for point in result.plan.points if point.role == "input")
    return result.encodings()[point.group]


def smallest_scale(result: Any) -> bool:
    return bool(input_grid(result).scale == 2.0**-12)


def is_power_of_two(scale: Tensor) -> bool:
    return bool((torch.frexp(scale).mantissa == 0.5).all())


W8T = (
    '[formats.w8t]\nbits = 8\nsigned = true\nzero_point = "free"',
    "[formats.w8t]\nbits = 8\nsigned = true\nzero_point = 0",
)
PER_CHANNEL = ('zero_point = 0\nper = "out_channel"', 'zero_point = "free"\nper = "out_channel"')
FLOOR = ("scale = { min = 0.000244140625 }\nsource", "source")
TENSOR = {"*.weight": "w8t"}
CASES = [
    Case("samsung/exynos", "per tensor: asymmetric", "conv", has_zero_points, True, W8T, False, TENSOR, True),
    Case("samsung/exynos", "per channel: symmetric", "conv", has_zero_points, False, PER_CHANNEL, True, None, True),
    Case("samsung/exynos", "scales from 2^-12", "small", smallest_scale, True, FLOOR, False, None, True),
    Case(
        "samsung/exynos",
        "a difference on one scale",
        "functions",
        is_one_group("x", "fc", "sub"),
        True,
        (
            'Sub = { kernels = ["elementwise"], same_scale = "all"',
            'Sub = { kernels = ["elementwise"], same_scale = "none"',
        ),
        False,
    ),
    Case("nxp/neutron", "scales from 2^-12", "small", smallest_scale, True, FLOOR, False, None, True),
    Case(
        "nxp/neutron",
        "sigmoid",
        "functions",
        fixed("sigmoid"),
        (1 / 256, -128),
        (
            'Sigmoid = { kernels = ["elementwise"], fixed_output.a8 = { scale = 0.00390625, zero_point = -128 }',
            'Sigmoid = { kernels = ["elementwise"]',
        ),
        None,
    ),
    Case(
        "nxp/neutron",
        "tanh",
        "functions",
        fixed("tanh"),
        (1 / 128, 0),
        (", fixed_output.a8 = { scale = 0.0078125, zero_point = 0 }", ""),
        None,
    ),
    Case(
        "nxp/neutron",
        "linear layers per tensor",
        "trunk",
        form("fc.weight"),
        "w8t",
        ('input = ["a8"]\nweight = ["w8t"]', 'input = ["a8"]\nweight = ["w8"]'),
        "w8",
    ),
    Case(
        "nxp/neutron",
        "convolutions per channel",
        "trunk",
        form("conv.weight"),
        "w8",
        ('weight = ["w8", "w8t"]', 'weight = ["w8t"]'),
        "w8t",
    ),
    Case(
        "nxp/neutron",
        "maxima on one scale",
        "functions",
        is_one_group("x", "fc", "max"),
        True,
        (
            'Max = { kernels = ["elementwise"], same_scale = "all"',
            'Max = { kernels = ["elementwise"], same_scale = "none"',
        ),
        False,
    ),
    Case(
        "nxp/imx8mp",
        "weights per tensor first",
        "conv",
        form("conv.weight"),
        "w8t",
        ('weight = ["w8t", "w8"]', 'weight = ["w8", "w8t"]'),
        "w8",
    ),
    Case(
        "mediatek/mdla-1.5",
        "unsigned first",
        "conv",
        form_of_input,
        "u8",
        ('input = ["u8", "a8"]', 'input = ["a8", "u8"]'),
        "a8",
    ),
    Case(
        "mediatek/mdla-2.0",
        "kernels up to 16",
        "kernel 17",
        where("conv"),
        "host",
        ("kernel = { max = 16 }", "kernel = { max = 17 }"),
        "accelerator",
    ),
    Case(
        "mediatek/mdla-2.0",
        "strides",
        "stride 5",
        where("conv"),
        "host",
        ("stride = [1, 2, 3, 4, 8]", "stride = [5]"),
        "accelerator",
    ),
    Case(
        "mediatek/mdla-2.0",
        "no groups",
        "groups 2",
        where("conv"),
        "host",
        ('groups = ["1"]', "groups = [2]"),
        "accelerator",
    ),
    Case(
        "ti/tda4vm",
        "no difference of two tensors",
        "functions",
        where("sub"),
        "host",
        ("Sub = { kernels = []", 'Sub = { kernels = ["elementwise8"]'),
        "accelerator",
    ),
    Case(
        "ti/tda4vm",
        "maps on powers of two",
        "conv",
        lambda r: is_power_of_two(input_grid(r).scale),
        True,
        ('scale = { kind = "power_of_two" }', 'scale = { kind = "float32" }'),
        False,
        None,
        True,
    ),
    Case(
        "ti/tda4vm",
        "no zero points",
        "conv",
        lambda r: int(input_grid(r).zero_point),
        0,
        (
            "[formats.s8]\nbits = 8\nsigned = true\nzero_point = 0",
            "[formats.s8]\nbits = 8\nsigned = true\nzero_point = [-128]",
        ),
        -128,
        None,
        True,
    ),
    Case(
        "ti/am62a",
        "weights per channel",
        "conv",
        form("conv.weight"),
        "w8",
        ('weight = ["w8", "w8t"]', 'weight = ["w8t", "w8"]'),
        "w8t",
    ),
    Case(
        "ti/am62a",
        "zero points",
        "conv",
        form_of_input,
        "a8",
        ('input = ["a8", "s8", "u8"]', 'input = ["s8", "u8", "a8"]'),
        "s8",
    ),
    Case(
        "hailo/hailo-8",
        "no 4 bits beside 16",
        "conv",
        lambda plan: plan.point("conv.weight").legal,
        ("w8t", "w16t"),
        ('weight = ["w16t", "w8t"]', 'weight = ["w16t"]'),
        ("w16t",),
        {"x": "a16"},
    ),
    Case(
        "rockchip/rk3588",
        "kernels up to 31",
        "kernel 32",
        where("conv"),
        "host",
        ("kernel = { min = 1, max = 31 }", "kernel = { min = 1, max = 32 }"),
        "accelerator",
    ),
    Case(
        "kendryte/k210",
        "weights have a zero point",
        "padded",
        lambda r: 50 < int(weight(r).zero_point) < 80,  # 0.1 of 0.4 below 0
        True,
        ('zero_point = "free"\nzero_point_bits', "zero_point = 128\nzero_point_bits"),
        False,
        None,
        True,
    ),
    Case(
        "kendryte/k210",
        "1024 channels",
        "many",
        where("conv"),
        "host",
        ("in_channels = { max = 1024 }, out_channels = { max = 1024 }, height", "height"),
        "accelerator",
    ),
    Case(
        "kendryte/k210",
        "4 columns",
        "narrow",
        where("conv"),
        "host",
        ("width = { min = 4, max = 512 }", "width = { max = 512 }"),
        "accelerator",
    ),
    Case(
        "kendryte/k210",
        "padding keeps the size",
        "conv",
        where("conv"),
        "host",
        ('padding = ["same"], ', ""),
        "accelerator",
    ),
    Case(
        "sony/imx500",
        "maps on powers of two",
        "conv",
        lambda r: is_power_of_two(input_grid(r).scale),
        True,
        ('scale = { kind = "power_of_two", quantity = "threshold" }', 'scale = { kind = "float32" }'),
        False,
        None,
        True,
    ),
    Case(
        "sony/imx500",
        "weights on any scale",
        "conv",
        lambda r: is_power_of_two(weight(r).scale),
        False,
        ('scale = { kind = "float32", quantity = "threshold" }', 'scale = { kind = "power_of_two" }'),
        True,
        None,
        True,
    ),
    Case(
        "huawei/ascend",
        "linear layers per tensor",
        "trunk",
        form("fc.weight"),
        "w8t",
        ('weight = ["w8t"]', 'weight = ["w8"]'),
        "w8",
    ),
    Case(
        "huawei/ascend",
        "two dimensions",
        "flat",
        where("conv"),
        "host",
        ("limits = { rank = [4] }, weight_axis = 0", "weight_axis = 0"),
        "accelerator",
    ),
]


@pytest.fixture(scope="module")
def targets(targets_root: Path) -> Callable[[str, tuple[str, str] | None], TargetSpec]:
    """A shipped file, perhaps with a piece of its text replaced wherever it is."""

    def target(name: str, change: tuple[str, str] | None) -> TargetSpec:
        text = (targets_root / f"{name}.toml").read_text()
        if change is not None:
            assert change[0] in text, change[0]
            text = text.replace(*change)
        return parse_target(text, find_base=lambda base: targets_root / f"{base}.toml")

    return target


@pytest.mark.parametrize("case", CASES, ids=[f"{case.target}: {case.fact}" for case in CASES])
def test_a_clause_is_obeyed(case: Case, targets: Callable[..., TargetSpec]) -> None:
    x = MODELS[case.model][1]
    for change, expected in ((None, case.expected), (case.change, case.then)):
        target = targets(case.target, change)
        if case.quantized:
            found = qhw.quantize(
                graph(case.model).copy(), target, calibration=x, formats=case.formats, pipeline="ranges-ptq"
            )
        else:
            found = qhw.plan(graph(case.model), target, calibration=x, formats=case.formats)
        assert case.seen(found) == expected
