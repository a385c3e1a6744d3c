# SPDX-License-Identifier: Apache-2.0
"""Tiny models for tests: each shows one thing that a quantizer meets. Seeded, in eval mode, with example inputs."""

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qhw.graph import ExampleInputs

__all__ = ["MODELS", "Example", "calibration_for", "example"]

Example = tuple[nn.Module, ExampleInputs]
"""A module in eval mode and one example batch of two samples."""


class _ConvChain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(8, 8, 3, stride=2, padding=1)
        self.bn2 = nn.BatchNorm2d(8)
        self.relu2 = nn.ReLU()
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu2(self.bn2(self.conv2(self.relu1(self.bn1(self.conv1(x))))))
        logits: Tensor = self.fc(x.mean((2, 3)))
        return logits


class _DepthwiseSeparable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.relu6 = nn.ReLU6()
        self.pointwise = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pointwise(self.relu6(self.norm(self.depthwise(self.stem(x)))))
        return y


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.left = nn.Conv2d(6, 6, 3, padding=1)
        self.right = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        y = self.left(x)
        y += self.right(x)
        y = F.relu(y, inplace=True)
        y = y + x
        return y.flatten(1)


class _Shared(nn.Module):
    """One convolution called twice, and a decoder tied to its encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.encoder = nn.Linear(4, 4, bias=False)
        self.decoder = nn.Linear(4, 4, bias=False)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(F.relu(self.conv(x))).mean((2, 3))
        y: Tensor = self.decoder(torch.tanh(self.encoder(x)))
        return y


class _Concat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Conv2d(3, 4, 3, padding=1)
        self.narrow = nn.Conv2d(3, 4, 1)
        self.pool = nn.MaxPool2d(3, stride=1, padding=1)
        self.last = nn.Conv2d(11, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        branches = [torch.relu(self.wide(x)), torch.sigmoid(self.narrow(x)), self.pool(x)]
        y: Tensor = self.last(torch.cat(branches, 1))
        return y


class _Convolutions(nn.Module):
    """Grouped, transposed and dilated convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(4, 8, 3, padding="same", groups=2)
        self.dilated = nn.Conv2d(8, 6, 3, dilation=2, padding=2)
        self.transposed = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1, output_padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.transposed(torch.relu(self.dilated(self.grouped(x))))
        return y


class _Signal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 5, padding=2)
        self.norm = nn.BatchNorm1d(4)
        self.pool = nn.AvgPool1d(2)
        self.last = nn.Conv1d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.pool(torch.relu(self.norm(self.conv(x)))))
        return y


class _Transformer(nn.Module):
    """One block on [batch, tokens, features], attention written out as matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(6, 8) * 0.1)
        self.norm1 = nn.LayerNorm(8)
        self.qkv = nn.Linear(8, 24)
        self.out = nn.Linear(8, 8)
        self.norm2 = nn.LayerNorm(8)
        self.up = nn.Linear(8, 16)
        self.down = nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.position
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        attention = torch.softmax(torch.matmul(q, k.transpose(1, 2)) / 8**0.5, -1)
        x = x + self.out(torch.matmul(attention, v))
        y: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return y


class _Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.fc = nn.Linear(8, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        y: Tensor = self.fc(self.embedding(tokens).mean(1))
        return y


class _Functional(nn.Module):
    """Batch norm and dropout as functions, with tensors under names of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.gamma = nn.Parameter(torch.rand(4) + 0.5)
        self.beta = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.register_buffer("var", torch.rand(4) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(self.conv(x), 0.2, self.training)
        x = F.batch_norm(x, self.mean, self.var, self.gamma, self.beta, self.training)  # type: ignore[arg-type]
        y: Tensor = F.dropout(x, 0.5, self.training)
        return y


class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 3)
        self.extra = nn.Linear(5, 4)

    def forward(self, image: Tensor, extra: Tensor) -> Tensor:
        y: Tensor = self.image(image).mean((2, 3)) * torch.sigmoid(self.extra(extra))
        return y


class _TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(3, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        features = torch.relu(self.trunk(x))
        return {"features": features, "heads": (self.head(features), features.mean((2, 3)))}


class _Activations(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.functions = nn.ModuleList(
            [
                nn.PReLU(4),
                nn.LeakyReLU(0.1),
                nn.Hardswish(),
                nn.Hardsigmoid(),
                nn.SiLU(),
                nn.Sigmoid(),
                nn.Tanh(),
                nn.GELU(),
                nn.Hardtanh(-0.5, 0.5),
            ]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for function in self.functions:
            x = function(x)
        return x


class _Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 1)
        self.max = nn.MaxPool2d(2)
        self.average = nn.AvgPool2d(2)
        self.all = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.all(self.average(self.max(self.first(x)))).flatten(1)
        return y


class _Movement(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(4, 4, 1)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = F.pad(self.first(x), (1, 1, 1, 1)).chunk(2, 1)
        x = torch.cat([b, a], 1)[:, :, 1:, 1:]
        y: Tensor = self.last(x.permute(0, 2, 3, 1))
        return y


class _Stranger(nn.Module):
    """An operator that no table knows, between two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Conv2d(3, 4, 1)
        self.after = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.after(torch.cumsum(self.before(x), 2) * 0.1)
        return y


def _image(channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(2, channels, 8, 8)


_MAKERS: Mapping[str, tuple[type[nn.Module], Callable[[], ExampleInputs]]] = MappingProxyType(
    {
        "conv_chain": (_ConvChain, _image()),
        "depthwise_separable": (_DepthwiseSeparable, _image()),
        "residual": (_Residual, _image()),
        "shared": (_Shared, _image(4)),
        "concat": (_Concat, _image()),
        "convolutions": (_Convolutions, _image(4)),
        "signal": (_Signal, lambda: torch.randn(2, 2, 16)),
        "transformer": (_Transformer, lambda: torch.randn(2, 6, 8)),
        "tokens": (_Tokens, lambda: torch.randint(0, 20, (2, 5))),
        "functional": (_Functional, _image()),
        "two_inputs": (_TwoInputs, lambda: {"extra": torch.randn(2, 5), "image": torch.randn(2, 3, 8, 8)}),
        "two_outputs": (_TwoOutputs, _image()),
        "activations": (_Activations, _image()),
        "pools": (_Pools, _image()),
        "movement": (_Movement, _image(4)),
        "stranger": (_Stranger, _image()),
    }
)

MODELS: tuple[str, ...] = tuple(_MAKERS)
"""Names of all tiny models."""


def example(name: str, seed: int = 0) -> Example:
    """A tiny model and its example inputs: the same tensors for the same seed.

    Statistics and scales of batch norms are random too, so that folding them changes something.

    Args:
        name: One of MODELS.
        seed: Of parameters and inputs; torch's own random state is left as it was.

    Example:
        >>> model, inputs = example("conv_chain")
        >>> model(inputs).shape
        torch.Size([2, 5])
    """
    kind, make_inputs = _MAKERS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                _randomize(module)
        return model.eval(), make_inputs()


def _randomize(norm: nn.Module) -> None:
    for name, tensor in (*norm.named_parameters(), *norm.named_buffers()):
        if tensor.is_floating_point():
            positive = name in ("weight", "running_var")
            tensor.data.copy_(torch.rand_like(tensor) + 0.5 if positive else torch.randn_like(tensor) * 0.3)


def calibration_for(example_inputs: ExampleInputs, num_batches: int = 4, seed: int = 1) -> Iterator[Any]:
    """Random batches shaped like example inputs: normal floats, integers in the range of the example's.

    Args:
        example_inputs: A tensor, a tuple, or a dict by input name.
        num_batches: How many.
        seed: Of the values; torch's own random state is left as it was.
    """
    generator = torch.Generator().manual_seed(seed)

    def alike(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.is_floating_point():
            return torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)
        low, high = int(leaf.min()), int(leaf.max())
        return torch.randint(low, high + 1, leaf.shape, generator=generator).to(leaf.dtype)

    for _ in range(num_batches):
        yield torch.utils._pytree.tree_map(alike, example_inputs)
