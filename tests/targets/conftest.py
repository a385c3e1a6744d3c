# SPDX-License-Identifier: Apache-2.0
"""Small models that the target tests plan, each of which shows one rule of a target file, and how they are planned."""

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qhw.decisions import Overrides, QuantPlan, Resources
from qhw.engine import select
from qhw.extension import Registry, default_registry
from qhw.graph import Graph, capture
from qhw.schema import TargetSpec, load_target_file

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"

Planner = Callable[..., QuantPlan]


class ConvBlock(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class DepthwiseBlock(nn.Module):
    """Depthwise convolution and ReLU6, then a grouped convolution that is not depthwise."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.relu6 = nn.ReLU6()
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.grouped(self.relu6(self.depthwise(x)))


class Residual(nn.Module):
    """A sum of two convolutions, then ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 4, 1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.left(x) + self.right(x))


class Branches(nn.Module):
    """Two convolutions joined along the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 1)
        self.right = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=1)


class Pools(nn.Module):
    """Convolution, maximum pool, average pool, mean over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.maximum = nn.MaxPool2d(2)
        self.average = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.average(self.maximum(self.conv(x))).mean(dim=(2, 3))


class Perceptron(nn.Module):
    """Two linear layers and a softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(8, 6)
        self.relu = nn.ReLU()
        self.logits = nn.Linear(6, 3)
        self.softmax = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.softmax(self.logits(self.relu(self.hidden(x))))


class Flat(nn.Module):
    """A convolution, flattened into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 2, 1)
        self.head = nn.Linear(128, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).flatten(1))


class Product(nn.Module):
    """A product of two activations, moved and cut."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(8, 8)
        self.key = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.query(x) @ self.key(x).transpose(1, 2)


IMAGE = (2, 3, 8, 8)
MODELS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "conv": (ConvBlock, IMAGE),
    "depthwise": (DepthwiseBlock, (2, 4, 8, 8)),
    "residual": (Residual, IMAGE),
    "branches": (Branches, IMAGE),
    "pools": (Pools, IMAGE),
    "perceptron": (Perceptron, (2, 8)),
    "flat": (Flat, IMAGE),
    "product": (Product, (2, 5, 8)),
}


@cache
def graph_of(model: str) -> Graph:
    torch.manual_seed(0)
    module, shape = MODELS[model]
    return capture(module().eval(), torch.randn(*shape))


@cache
def shipped_spec(file: Path) -> TargetSpec:
    """A shipped target, read once."""
    return load_target_file(file, find_base=default_registry().target_path)


@pytest.fixture(scope="session")
def registry() -> Registry:
    return default_registry()


@pytest.fixture(scope="session")
def targets_root() -> Path:
    return ROOT


@pytest.fixture
def spec(file: Path) -> TargetSpec:
    """The target of a test's `file`."""
    return shipped_spec(file)


@pytest.fixture(scope="session")
def graph() -> Callable[[str], Graph]:
    """A captured model by its name in `MODELS`."""
    return graph_of


@pytest.fixture(scope="session")
def plan(registry: Registry) -> Planner:
    """Plans a model, by its name, for a target."""

    def planned(target: TargetSpec, model: str, formats: Mapping[str, str] | None = None) -> QuantPlan:
        overrides = Overrides(formats=dict(formats or {}))
        return select(graph_of(model), target, registry, Resources(calibration=True), overrides)

    return planned
