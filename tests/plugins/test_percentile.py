# SPDX-License-Identifier: Apache-2.0
"""Percentile ranges against numpy's sort of everything the tensor held."""

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
from qhw_plugins import percentile
from tests.plugins.conftest import PLUGINS, TARGET, WORDS

Quantize = Callable[..., QuantizedModel]
PREFER = ["percentile", "percentile_weights"]
SHARED = """kernels.add = {{ input = ["a"], output = ["a"] }}
operators.Add = {{ kernels = ["add"], same_scale = "inputs" }}
fallback"""


@pytest.fixture(scope="module")
def plugins() -> Registry:
    modules = dict.fromkeys((*PLUGINS, percentile))
    extra = [(module.__name__.rpartition(".")[2], module) for module in modules]
    return load_plugins(block=(), entry_points=(), extra=extra)


@pytest.fixture(scope="module")
def quantize(plugins: Registry) -> Quantize:
    def make(model: nn.Module, data: Any, text: str = TARGET, **words: Any) -> QuantizedModel:
        options = words.pop("options", None)
        example = data[:2] if isinstance(data, Tensor) else data[0]
        wishes = {"calibration": data, "prefer": PREFER, "options": options, "registry": plugins}
        target = parse_target(text.format(**(WORDS | words)))
        return qhw.quantize(model, target, example_inputs=example, **wishes)

    return make


@pytest.fixture
def conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1)).eval()


def images(number: int = 203) -> Tensor:
    """Heavy tails."""
    return torch.from_numpy(np.float32(np.random.default_rng(5).standard_t(3, (number, 1, 8, 8))))


def quantiles(x: np.ndarray, left_out: int) -> tuple[float, float]:
    ordered = np.sort(x.reshape(-1))
    return float(ordered[left_out]), float(ordered[-1 - left_out])


def figures(result: QuantizedModel, algorithm: str = "percentile") -> Any:
    return next(step for step in result.steps if step.algorithm == algorithm).sites


@pytest.mark.parametrize(("kept", "left_out"), [(99.99, 1), (99.0, 129), (100.0, 0)])
def test_the_range_leaves_out_what_numpy_leaves_out(
    conv: nn.Module, quantize: Quantize, kept: float, left_out: int
) -> None:
    x = images()  # 203 * 64 = 12,992 values
    result = quantize(conv, x, options={"percentile": {"percentile": kept}})
    low, high = quantiles(x.numpy(), left_out)
    found = result.encodings()["input"]
    # A bin of the histogram is at least 1/8192 and at most 1/4096 of the largest magnitude, here at each end.
    width = float(x.abs().max()) / 4096
    assert -1e-5 <= found.scale.item() * 255 - (high - low) <= 2 * width + 1e-5  # the scale is a float32
    assert abs(int(found.zero_point) - np.rint(-low / found.scale.item())) <= np.ceil(width / found.scale.item())
    assert low - width <= figures(result)["input"]["low"] <= low
    assert high <= figures(result)["input"]["high"] <= high + width
    assert (figures(result)["input"]["min"], figures(result)["input"]["max"]) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("size", [1, 7, 64, 203])
def test_the_batch_size_of_the_loader_does_not_matter(conv: nn.Module, quantize: Quantize, size: int) -> None:
    whole = quantize(conv, images())
    # The first batch gives the example, which has its size.
    batches = list(images().split(size))
    assert quantize(conv, batches).encodings() == whole.encodings()
    assert figures(quantize(conv, batches)) == figures(whole)


def test_the_order_of_the_samples_does_not_matter(quantize: Quantize) -> None:
    # The input alone: what a convolution gives may depend on a sample's place in the micro-batch.
    model, x = nn.Sequential(nn.Conv2d(1, 2, 1)).eval(), images()
    assert quantize(model, x).encodings()["input"] == quantize(model, x.flip(0)).encodings()["input"]


def test_weights_per_channel_and_per_tensor_are_sorted_exactly(quantize: Quantize) -> None:
    layer: Any = nn.Linear(1000, 3)
    weight = np.float32(np.random.default_rng(1).standard_t(3, (3, 1000)) * [[1.0], [10.0], [0.1]])
    layer.weight.data = torch.from_numpy(weight)
    options = {"percentile_weights": {"percentile": 99.0}}
    result = quantize(nn.Sequential(layer).eval(), torch.randn(4, 1000), options=options)
    expected = [np.float32(max(abs(bound) for bound in quantiles(row, 10)) / 127) for row in np.float64(weight)]
    assert result.encodings()["0.weight"].scale.tolist() == expected
    assert figures(result, "percentile_weights") == {"0.weight": {"clipped": 3}}
    result = quantize(nn.Sequential(layer).eval(), torch.randn(4, 1000), options=options, per="tensor")
    assert result.encodings()["0.weight"].scale.item() == np.float32(max(map(abs, quantiles(weight, 30))) / 127)


def test_a_channel_of_few_weights_is_covered_whole_and_so_is_a_sparse_one(quantize: Quantize) -> None:
    layer: Any = nn.Linear(200, 3)
    layer.weight.data[1] = 0.0
    layer.weight.data[1, 7] = 0.5
    layer.weight.data[2] = 0.0
    weight = layer.weight.detach().double().numpy()
    options = {"percentile_weights": {"percentile": 99.0}}
    scale = quantize(nn.Sequential(layer).eval(), torch.randn(4, 200), options=options).encodings()["0.weight"].scale
    first = np.float32(max(map(abs, quantiles(weight[0], 2))) / 127)
    # The dead channel takes the largest scale of the others.
    assert scale.tolist() == [first, np.float32(0.5 / 127), max(first, np.float32(0.5 / 127))]
    scale = quantize(nn.Sequential(layer).eval(), torch.randn(4, 200)).encodings()["0.weight"].scale
    assert scale[0].item() == np.float32(np.abs(weight[0]).max() / 127)  # 200 weights: floor(0.02) are left out


@pytest.mark.parametrize(
    ("data", "low", "high"),
    [
        (torch.zeros(40, 1, 8, 8), 0.0, 255.0),  # all zero: the scale is 1
        (torch.full((1, 1, 8, 8), 3.0), 0.0, 3.0),
        (torch.full((40, 1, 8, 8), -2.0), -2.0, 0.0),
        (-1.0 - torch.arange(64.0).reshape(1, 1, 8, 8), -64.0, 0.0),
    ],
    ids=["zeros", "one-image", "constant", "negative"],
)
def test_edges(conv: nn.Module, quantize: Quantize, data: Tensor, low: float, high: float) -> None:
    example = data if len(data) > 1 else data.expand(2, -1, -1, -1)[:1]
    found = quantize(conv, [example]).encodings()["input"]
    assert found.scale.item() == np.float32((high - low) / 255)
    assert int(found.zero_point) == np.rint(-low / ((high - low) / 255))


def test_tensors_that_share_a_scale_are_counted_together(quantize: Quantize) -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small, self.large = nn.Conv2d(1, 1, 1, bias=False), nn.Conv2d(1, 1, 1, bias=False)
            self.small.weight.data.fill_(0.5)
            self.large.weight.data.fill_(127 / 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.small(x) + self.large(x)  # type: ignore[no-any-return]

    x = images()
    text = TARGET.replace("fallback", SHARED)
    result = quantize(Pair().eval(), x, text, options={"percentile": {"percentile": 99.0}})
    group = next(point.group for point in result.plan.points if point.name == "large")
    assert sum(point.group == group for point in result.plan.points) == 2
    values = np.concatenate([x.numpy().reshape(-1) * np.float32(0.5), x.numpy().reshape(-1) * np.float32(127 / 16)])
    low, high = quantiles(values, int(2 * x.numel() * 0.01))
    width = float(np.abs(values).max()) / 4096
    assert low - width <= figures(result)[group]["low"] <= low * (1 - 1e-6)  # sums of one product, rounded
    assert high * (1 - 1e-6) <= figures(result)[group]["high"] <= high + width


@pytest.mark.parametrize(
    ("clause", "signed", "wanted"),
    [
        (', zero_point = 0, scale = { kind = "power_of_two" }', "true", lambda s: 2.0 ** np.ceil(np.log2(s))),
        (', scale = { kind = "enumerated", values = [0.01, 0.1, 1.0] }', "true", lambda s: np.float32(0.1)),
        (", zero_point = 0, scale = { min = 0.5 }", "true", lambda s: 0.5),
        (", zero_point = [0, 128]", "false", lambda s: s),
    ],
    ids=["power_of_two", "enumerated", "bounded", "several-zero-points"],
)
def test_only_legal_scales(
    conv: nn.Module, quantize: Quantize, clause: str, signed: str, wanted: Callable[[float], float]
) -> None:
    x = images()
    found = quantize(conv, x, activation=clause, signed=signed, options={"percentile": {"percentile": 99.0}})
    low, high = quantiles(x.numpy(), 129)
    covering = max(high / 127, -low / 128)
    if "enumerated" in clause:  # its zero point is free
        assert 0.01 < (high - low) / 255 < 0.1
    encoding = found.encodings()["input"]
    # The ends of the range are edges of bins: 2 * 30 / 8192 of a bin against a range of 9, and 127 codes.
    assert encoding.scale.item() == pytest.approx(wanted(covering), rel=0.01)
    if "[0, 128]" in clause:
        assert int(encoding.zero_point) == 128


@pytest.mark.parametrize("wrong", [50.0, 100.1])
def test_a_percentile_that_is_none_is_refused(conv: nn.Module, quantize: Quantize, wrong: float) -> None:
    with pytest.raises(PlanError, match=r"--set percentile\.percentile: Input should be (greater|less) than"):
        quantize(conv, images(4), options={"percentile": {"percentile": wrong}})


def test_it_asks_for_calibration_data(conv: nn.Module, plugins: Registry) -> None:
    with pytest.raises(PlanError, match=r"percentile: needs calibration data \(resources\.calibration\)"):
        qhw.plan(conv, parse_target(TARGET.format(**WORDS)), images(2), prefer=["percentile"], registry=plugins)
