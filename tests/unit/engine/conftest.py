# SPDX-License-Identifier: Apache-2.0
"""A small target, a small network with everything the engine meets, and a registry that needs no installation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.extension import PluginInfo, Registry, hookimpl, load_plugins
from qhw.graph import Graph
from qhw.schema import TargetSpec, parse_target
from qhw_plugins import batch_norm_folding, min_max, mse, nearest
from tests import pipelines

SHIPPED = [
    (module.__name__.rpartition(".")[2], module) for module in (batch_norm_folding, min_max, mse, nearest, pipelines)
]

TINY = """
schema_version = 1
name = "acme/tiny"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.w4 = { codes = [-7, 7], zero_point = 0, per = "tensor" }
biases.b = { bits = 32, scale = "input*weight" }
biases.wide = { bits = 40, scale = "input*weight" }
accumulators.acc = { bits = 32, overflow = "wrap" }
requantize.f32 = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a8"], weight = ["w8", "w4"], bias = "b", output = ["a8"] }
kernels.mac16 = { input = ["a16"], weight = ["w8"], bias = "wide", output = ["a16"] }
operators.Conv = { kernels = ["mac", "mac16"], fused = ["Relu"] }
operators.DepthwiseConv = { kernels = ["mac", "mac16"], fused = ["Relu"] }
operators.ConvTranspose = { kernels = ["mac", "mac16"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac", "mac16"], fused = ["Relu"] }
fallback = "host"
"""


class Net(nn.Module):
    """Convolution with batch norm, a host operator, a view, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 4, 3)
        self.drop = nn.Dropout(0.5)
        self.fc = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.sin(torch.relu(self.conv2(x)))
        y: Tensor = self.fc(self.drop(x.flatten(1)))
        return y


def make_net() -> Net:
    """Seeded, with batch-norm statistics that are not the identity."""
    torch.manual_seed(0)
    net = Net()
    for name, buffer in net.named_buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2.0) if "var" in name else buffer.normal_(0.0, 0.3)
    nn.init.uniform_(net.bn1.weight, -1.5, 1.5)
    return net.eval()


@pytest.fixture(scope="session")
def plugin() -> Callable[..., Any]:
    """A plugin that registers algorithms and pipelines."""

    def make(algorithms: tuple[Any, ...] = (), registered_pipelines: tuple[Any, ...] = ()) -> Any:
        class Stranger:
            @hookimpl
            def qhw_plugin_info(self) -> PluginInfo:
                return PluginInfo(api=1, summary="a stranger")

            @hookimpl
            def qhw_register_algorithms(self) -> list[Any]:
                return list(algorithms)

            @hookimpl
            def qhw_register_pipelines(self) -> list[Any]:
                return list(registered_pipelines)

        return Stranger()

    return make


@pytest.fixture(scope="session")
def load() -> Callable[..., Registry]:
    """The shipped plugins, but for those blocked, and more."""

    def make(*extra: tuple[str, Any], block: tuple[str, ...] = (), order: int = 1) -> Registry:
        return load_plugins(block=block, entry_points=(), extra=[*SHIPPED, *extra][::order])

    return make


@pytest.fixture(scope="session")
def registry(load: Callable[..., Registry]) -> Registry:
    return load()


@pytest.fixture(scope="session")
def target() -> TargetSpec:
    return parse_target(TINY)


@pytest.fixture(scope="session")
def target_with() -> Callable[..., TargetSpec]:
    """The small target with parts of its text replaced."""

    def make(*changes: tuple[str, str]) -> TargetSpec:
        text = TINY
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        return parse_target(text)

    return make


@pytest.fixture
def net() -> Net:
    return make_net()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(203, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def graph(images: Tensor) -> Graph:
    """The network, captured once; tests do not change it."""
    return qhw.capture(make_net(), images[:2])


@pytest.fixture(scope="session")
def quantize(target: TargetSpec, registry: Registry) -> Callable[..., QuantizedModel]:
    """`qhw.quantize` with the small target and the shipped plugins."""

    def make(model: Any, data: Any, spec: Any = target, **wishes: Any) -> QuantizedModel:
        first = data if isinstance(data, Tensor) else None
        example = wishes.pop("example_inputs", None if first is None else first[:2])
        return qhw.quantize(model, spec, example_inputs=example, calibration=data, registry=registry, **wishes)

    return make


@pytest.fixture(scope="session")
def result(graph: Graph, images: Tensor, quantize: Callable[..., QuantizedModel]) -> QuantizedModel:
    """The network quantized; tests that change it take a deep copy."""
    return quantize(graph, images[:64])
