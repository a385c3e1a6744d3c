# SPDX-License-Identifier: Apache-2.0
"""Small networks, a small target whose clauses are words, and results on them, for tests of training."""

from typing import Any

import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.schema import TargetSpec, parse_target

TARGET = """
schema_version = 1
name = "acme/trained"
formats.a = {{ bits = {bits}, signed = false, per = "tensor"{activation} }}
formats.w = {{ codes = [{low}, {high}], zero_point = 0, per = "{per}"{weight} }}
biases.sum = {{ bits = {bias}, scale = "input*weight"{rule} }}
kernels.mac = {{ input = ["a"], weight = ["w"], output = ["a"], bias = "sum" }}
kernels.pair = {{ input = ["a"], output = ["a"] }}
operators.Conv = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.DepthwiseConv = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.ConvTranspose = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.Gemm = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.Add = {{ kernels = ["pair"] }}
fallback = "host"
"""
WORDS = {
    "bits": 8,
    "low": -8,
    "high": 7,
    "per": "out_channel",
    "bias": 32,
    "activation": "",
    "weight": "",
    "rule": "",
}


def target(**words: Any) -> TargetSpec:
    """A target of 4-bit weights and 8-bit activations, with other words where given."""
    return parse_target(TARGET.format(**(WORDS | words)))


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """The same module with random batch norms: statistics, scales of either sign, offsets."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            with torch.no_grad():
                sign = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
                module.weight.copy_((torch.rand(size, generator=generator) + 0.5) * sign)
                module.bias.copy_(torch.randn(size, generator=generator) * 0.3)
                module.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
                module.running_var.copy_(torch.rand(size, generator=generator) + 0.5)
    return model.eval()


def network(seed: int = 0, dropout: float = 0.0, momentum: float | None = 0.1) -> nn.Module:
    """Convolutions, a depthwise one among them, each with its batch norm, and a linear layer: 3 x 8 x 8 -> 5."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8),
            nn.BatchNorm2d(8, momentum=momentum),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2),
            nn.BatchNorm2d(6, momentum=momentum),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Flatten(),
            nn.Linear(54, 5),
        )
    return randomize(model, seed)


def images(count: int = 24, seed: int = 1) -> Tensor:
    """float32 [count, 3, 8, 8]."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 24, classes: int = 5, seed: int = 2) -> Tensor:
    """int64 [count]."""
    return torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(seed))


def quantized(
    model: nn.Module | None = None, data: Tensor | None = None, *, pipeline: str = "ranges-ptq", **words: Any
) -> QuantizedModel:
    """A result on the target of these words; `prefer`, `without` and `options` are wishes."""
    wishes = {key: words.pop(key) for key in ("prefer", "without", "options", "keep_float") if key in words}
    data = images() if data is None else data
    model = network() if model is None else model
    accelerator = words.pop("accelerator", None) or target(**words)
    return qhw.quantize(model, accelerator, example_inputs=data[:2], calibration=data, pipeline=pipeline, **wishes)


def trainable(*arguments: Any, train: dict[str, Any] | None = None, **words: Any) -> QuantizedModel:
    """A result that is ready to train; `train` are arguments of `qhw.trainable`."""
    return qhw.trainable(quantized(*arguments, **words), **(train or {}))


def steps(result: nn.Module, count: int = 3, lr: float = 1e-3, *, size: int = 24, seed: int = 1) -> list[float]:
    """Train for some steps of Adam; the losses."""
    inner = result if isinstance(result, QuantizedModel) else result.module
    optimizer = torch.optim.Adam(qhw.parameter_groups(inner, lr))
    losses = []
    result.train()
    for number in range(count):
        x, y = images(size, seed + number), labels(size, seed=seed + number)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(result(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    result.eval()
    return losses


def without_quantizers(result: QuantizedModel) -> QuantizedModel:
    """The same result, in float."""
    result.set_enabled(False)
    return result
