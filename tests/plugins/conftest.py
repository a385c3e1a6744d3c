# SPDX-License-Identifier: Apache-2.0
"""The shipped range and folding plugins on a target given as text."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.extension import Registry, load_plugins
from qhw.schema import parse_target
from qhw_plugins import batch_norm_folding, min_max, mse, nearest
from tests import pipelines

PLUGINS = (batch_norm_folding, min_max, mse, nearest, pipelines)

TARGET = """
schema_version = 1
name = "acme/plain"
formats.a = {{ bits = {bits}, signed = {signed}, per = "tensor"{activation} }}
formats.w = {{ codes = [-127, 127], zero_point = 0, per = "{per}"{weight} }}
kernels.mac = {{ input = ["a"], weight = ["w"], output = ["a"] }}
operators.Conv = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.DepthwiseConv = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.ConvTranspose = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.Gemm = {{ kernels = ["mac"], fused = ["Relu"] }}
fallback = "host"
"""
WORDS = {"bits": 8, "signed": "false", "per": "out_channel", "activation": "", "weight": ""}

Quantize = Callable[..., QuantizedModel]


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The plugins above, without any installation."""
    extra = [(module.__name__.rpartition(".")[2], module) for module in PLUGINS]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="session")
def quantize(registry: Registry) -> Quantize:
    """Quantize a module for a plain target: `bits`, `signed`, `per` and scale clauses as words of its text."""

    def make(model: nn.Module, data: Tensor | None, example: Tensor | None = None, **words: Any) -> QuantizedModel:
        wishes = {key: words.pop(key) for key in ("prefer", "without", "options") if key in words}
        target = parse_target(TARGET.format(**(WORDS | words)))
        inputs = example if data is None else data[:2]
        return qhw.quantize(model, target, example_inputs=inputs, calibration=data, registry=registry, **wishes)

    return make


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(70, 3, 8, 8, generator=torch.Generator().manual_seed(2))
