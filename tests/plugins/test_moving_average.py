# SPDX-License-Identifier: Apache-2.0
"""Moving-average ranges against numpy on micro-batches of 32 samples in the order of the data."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import PlanError
from qhw.extension import Registry, load_plugins
from qhw.schema import parse_target
from qhw_plugins import moving_average
from tests.plugins.conftest import PLUGINS, TARGET, WORDS

Quantize = Callable[..., QuantizedModel]


@pytest.fixture(scope="module")
def plugins() -> Registry:
    modules = dict.fromkeys((*PLUGINS, moving_average))
    extra = [(module.__name__.rpartition(".")[2], module) for module in modules]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="module")
def quantize(plugins: Registry) -> Quantize:
    def make(model: nn.Module, data: Any, text: str = TARGET, **words: Any) -> QuantizedModel:
        options = words.pop("options", None)
        example = data[:2] if isinstance(data, Tensor) else data[0]
        wishes = {"calibration": data, "prefer": ["moving_average"], "options": options, "registry": plugins}
        target = parse_target(text.format(**(WORDS | words)))
        return qhw.quantize(model, target, example_inputs=example, **wishes)

    return make


@pytest.fixture
def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1)).eval()


def images(number: int = 203) -> Tensor:
    """Each sample has a spread of its own, so that the ranges of the micro-batches differ."""
    rng = np.random.default_rng(5)
    return torch.from_numpy(np.float32(rng.normal(size=(number, 1, 4, 4)) * rng.exponential(size=(number, 1, 1, 1))))


def average(parts: list[np.ndarray], momentum: float = 0.9) -> tuple[float, float]:
    """Moving averages of the lowest and highest values, in float64."""
    low, high = float(parts[0].min()), float(parts[0].max())
    for part in parts[1:]:
        low = momentum * low + (1 - momentum) * float(part.min())
        high = momentum * high + (1 - momentum) * float(part.max())
    return low, high


def micro_batches(x: Tensor) -> list[np.ndarray]:
    return [x.numpy()[start : start + 32] for start in range(0, len(x), 32)]


def figures(result: QuantizedModel) -> Any:
    return next(step for step in result.steps if step.algorithm == "moving_average").sites


@pytest.mark.parametrize("momentum", [0.9, 0.0, 0.5])
def test_the_range_is_the_average_that_numpy_finds(conv: nn.Module, quantize: Quantize, momentum: float) -> None:
    x = images()
    result = quantize(conv, x, options={"moving_average": {"momentum": momentum}})
    low, high = average(micro_batches(x), momentum)
    found = result.encodings()["input"]
    # One float64 rounding more or less, and one to float32.
    assert found.scale.item() == pytest.approx((high - low) / 255, rel=1e-7)
    assert int(found.zero_point) == np.rint(-low / found.scale.item())
    assert figures(result)["input"] == {
        "min": float(x.min()),
        "max": float(x.max()),
        "low": pytest.approx(low, rel=1e-12),
        "high": pytest.approx(high, rel=1e-12),
    }


@pytest.mark.parametrize("size", [1, 7, 64, 203])
def test_the_batch_size_of_the_loader_does_not_matter(conv: nn.Module, quantize: Quantize, size: int) -> None:
    whole, batches = quantize(conv, images()), list(images().split(size))
    found = quantize(conv, batches)
    assert found.encodings() == whole.encodings()
    assert figures(found) == figures(whole)


def test_the_order_of_the_micro_batches_counts(conv: nn.Module, quantize: Quantize) -> None:
    x = images(192)
    backwards = torch.cat(x.split(32)[::-1])
    for data in (x, backwards):
        low, high = average(micro_batches(data))
        assert quantize(conv, data).encodings()["input"].scale.item() == pytest.approx((high - low) / 255, rel=1e-7)
    assert average(micro_batches(x)) != average(micro_batches(backwards))


def test_tensors_that_share_a_scale_count_as_one(quantize: Quantize) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
            self.first.weight.data.fill_(1.0)
            self.second.weight.data.fill_(1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x[:, :1]) + self.second(x[:, 1:])  # type: ignore[no-any-return]

    x = images(192).reshape(96, 2, 4, 4).clone()
    x[:32, 0] *= 10  # where one tensor is wider first, and the other one later
    x[32:, 1] *= 10
    text = TARGET.replace(
        "fallback",
        'kernels.add = {{ input = ["a"], output = ["a"] }}\n'
        'operators.Add = {{ kernels = ["add"], same_scale = "inputs" }}\nfallback',
    )
    result = quantize(Pair().eval(), x, text)
    groups = {p.name: p.group for p in result.plan.points}
    assert groups["first"] == groups["second"]
    low, high = average(micro_batches(x))
    # The weight 1.0 is 127 steps of the float32 nearest to 1/127.
    assert figures(result)[groups["first"]]["low"] == pytest.approx(low, rel=1e-6)
    assert figures(result)[groups["first"]]["high"] == pytest.approx(high, rel=1e-6)


def test_what_lies_beyond_a_stated_bound_counts_as_the_bound(quantize: Quantize) -> None:
    model: Any = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False))
    model[0].weight.data.fill_(1.0)
    text = TARGET.replace(
        'operators.Conv = {{ kernels = ["mac"]',
        'operators.Conv = {{ kernels = ["mac"], range = {{ min = -1.0, max = 1.0 }}',
    )
    x = images()
    x[96:] *= 0.01  # far beyond at first, within the bounds later
    found = figures(quantize(model.eval(), x, text))["0"]
    low, high = average([np.clip(part, -1.0, 1.0) for part in micro_batches(x)])
    cut_afterwards = np.clip(average(micro_batches(x)), -1.0, 1.0)
    assert (found["low"], found["high"]) == (pytest.approx(low, rel=1e-6), pytest.approx(high, rel=1e-6))
    assert not np.allclose((low, high), cut_afterwards)


@pytest.mark.parametrize(
    ("data", "low", "high"),
    [
        (torch.zeros(70, 1, 4, 4), 0.0, 255.0),  # all zero: the scale is 1
        (torch.full((1, 1, 4, 4), 3.0), 0.0, 3.0),
        (torch.full((70, 1, 4, 4), -0.1), float(np.float32(-0.1)), 0.0),
        (torch.full((70, 1, 4, 4), 0.7), 0.0, float(np.float32(0.7))),
        (-1.0 - torch.arange(32.0).reshape(2, 1, 4, 4), -32.0, 0.0),
    ],
    ids=["zeros", "one-image", "negative-constant", "constant", "negative"],
)
def test_edges(conv: nn.Module, quantize: Quantize, data: Tensor, low: float, high: float) -> None:
    found = quantize(conv, [data]).encodings()["input"]
    assert found.scale.item() == np.float32((high - low) / 255)
    assert int(found.zero_point) == np.rint(-low / ((high - low) / 255))


@pytest.mark.parametrize(
    ("clause", "signed", "wanted"),
    [
        (', zero_point = 0, scale = { kind = "power_of_two" }', "true", lambda s: 2.0 ** np.ceil(np.log2(s))),
        (', zero_point = 0, scale = { kind = "enumerated", values = [0.01, 0.1, 1.0] }', "true", lambda s: 0.1),
        (", zero_point = 0, scale = { min = 0.5 }", "true", lambda s: 0.5),
        (", zero_point = [0, 128]", "false", lambda s: s),
    ],
    ids=["power_of_two", "enumerated", "bounded", "several-zero-points"],
)
def test_only_legal_scales(
    conv: nn.Module, quantize: Quantize, clause: str, signed: str, wanted: Callable[[float], float]
) -> None:
    x = images()
    low, high = average(micro_batches(x))
    covering = max(high / 127, -low / 128)
    assert 0.01 < covering < 0.1
    found = quantize(conv, x, activation=clause, signed=signed).encodings()["input"]
    assert found.scale.item() == pytest.approx(wanted(covering), rel=1e-7)
    assert int(found.zero_point) == (128 if "[0, 128]" in clause else 0)


def test_it_asks_for_calibration_data(conv: nn.Module, plugins: Registry) -> None:
    target = parse_target(TARGET.format(**WORDS))
    with pytest.raises(PlanError, match=r"moving_average: needs calibration data \(resources\.calibration\)"):
        qhw.plan(conv, target, images(2), prefer=["moving_average"], registry=plugins)


def test_a_momentum_of_one_is_refused(conv: nn.Module, quantize: Quantize) -> None:
    with pytest.raises(PlanError, match=r"--set moving_average\.momentum: Input should be less than 1"):
        quantize(conv, images(4), options={"moving_average": {"momentum": 1.0}})
