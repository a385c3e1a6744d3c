# SPDX-License-Identifier: Apache-2.0
"""MSE ranges: no scale on a fine grid of numpy's has a smaller squared error, beyond what bins and steps allow."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qhw.engine import QuantizedModel
from qhw.errors import PlanError

Quantize = Callable[..., QuantizedModel]


def squared_error(x: np.ndarray, scale: float, zero_point: int, low: int, high: int) -> float:
    codes = np.clip(np.rint(x / scale) + zero_point, low, high)
    return float(((scale * (codes - zero_point) - x) ** 2).sum())


@pytest.fixture(scope="module")
def data() -> Tensor:
    """Heavy tails: clipping pays."""
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(96, 1, 4, 4, generator=generator)
    return x * torch.exp(torch.randn(96, 1, 1, 1, generator=generator))


@pytest.fixture
def conv() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 1, 1)).eval()


@pytest.mark.parametrize("bits", [4, 8])
def test_symmetric_activations_have_the_least_error(
    conv: nn.Module, data: Tensor, quantize: Quantize, bits: int
) -> None:
    found = quantize(conv, data, bits=bits, signed="true", activation=", zero_point = 0").encodings()["input"]
    x, low, high = data.numpy().astype(np.float64), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    mine = squared_error(x, found.scale.item(), 0, low, high)
    covering = max(x.max() / high, x.min() / low)
    best = min(squared_error(x, covering * i / 2000, 0, low, high) for i in range(1, 2001))
    assert mine <= best * 1.01  # values count as the centre of one of 8,192 bins
    if bits == 4:
        assert mine < 0.8 * squared_error(x, covering, 0, low, high)


def test_asymmetric_activations_have_the_least_error(conv: nn.Module, data: Tensor, quantize: Quantize) -> None:
    x = torch.where(data < 0, data / 4, data)
    values = x.numpy().astype(np.float64)
    errors = {}
    for prefer in ("mse", "min_max"):
        found = quantize(conv, x, bits=4, prefer=[prefer]).encodings()["input"]
        errors[prefer] = squared_error(values, found.scale.item(), int(found.zero_point), 0, 15)
    covering = (values.max() - values.min()) / 15
    best = min(
        squared_error(values, covering * i / 300, zero_point, 0, 15) for i in range(1, 301) for zero_point in range(16)
    )
    assert errors["mse"] <= best * 1.02  # the search ends at steps of 1/320 of each end of the range
    assert errors["mse"] < errors["min_max"]


def test_each_channel_of_weights_is_searched_by_itself(quantize: Quantize) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight.mul_(torch.tensor([[1.0], [10.0], [0.1]]))
        layer.weight[0, 0] = 2.0
    found = quantize(nn.Sequential(layer).eval(), torch.randn(32, 64)).encodings()["0.weight"]
    weight = layer.weight.detach().numpy().astype(np.float64)
    for channel in range(3):
        covering = np.abs(weight[channel]).max() / 127
        mine = squared_error(weight[channel], found.scale[channel].item(), 0, -127, 127)
        best = min(squared_error(weight[channel], covering * i / 1000, 0, -127, 127) for i in range(1, 1001))
        assert mine <= best * 1.02, channel  # steps of a thousandth of the range


def test_powers_of_two_are_tried_and_nothing_else(conv: nn.Module, data: Tensor, quantize: Quantize) -> None:
    clause = ', zero_point = 0, scale = { kind = "power_of_two" }'
    found = quantize(conv, data, bits=4, signed="true", activation=clause).encodings()["input"].scale.item()
    x = data.numpy().astype(np.float64)
    errors = {e: squared_error(x, 2.0**e, 0, -8, 7) for e in range(-12, 6)}
    assert np.log2(found) == min(errors, key=lambda e: errors[e])


@pytest.mark.parametrize("bits", [4, 8])
def test_a_golden_section_is_within_a_hundredth_of_the_grid(
    conv: nn.Module, data: Tensor, quantize: Quantize, bits: int
) -> None:
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scales, errors = {}, {}
    for search in ("grid", "golden"):
        words = {"bits": bits, "signed": "true", "activation": ", zero_point = 0"}
        scale = quantize(conv, data, options={"mse": {"search": search}}, **words).encodings()["input"].scale.item()
        scales[search], errors[search] = scale, squared_error(data.numpy().astype(np.float64), scale, 0, low, high)
    assert errors["golden"] <= 1.01 * errors["grid"]
    assert scales["golden"] != scales["grid"]  # the section does not stop at hundredths or thousandths of the range


def test_a_golden_section_over_weights_is_within_a_hundredth_of_the_grid(quantize: Quantize) -> None:
    torch.manual_seed(0)
    layer: Any = nn.Linear(64, 3)
    with torch.no_grad():
        layer.weight[0, 0] = 2.0
    weight, scales = layer.weight.detach().numpy().astype(np.float64), {}
    for search in ("grid", "golden"):
        options = {"mse_weights": {"search": search}}
        scales[search] = (
            quantize(nn.Sequential(layer), torch.randn(8, 64), options=options).encodings()["0.weight"].scale
        )
    assert not torch.equal(scales["grid"], scales["golden"])
    for channel in range(3):
        grid, golden = (squared_error(weight[channel], s[channel].item(), 0, -127, 127) for s in scales.values())
        assert golden <= 1.01 * grid, channel


def test_a_free_zero_point_is_searched_by_grid_either_way(conv: nn.Module, data: Tensor, quantize: Quantize) -> None:
    found = [quantize(conv, data, options={"mse": {"search": s}}).encodings()["input"] for s in ("grid", "golden")]
    assert found[0] == found[1]


@pytest.mark.parametrize("algorithm", ["mse", "mse_weights"])
def test_another_search_is_an_error(conv: nn.Module, data: Tensor, quantize: Quantize, algorithm: str) -> None:
    message = rf"^--set {algorithm}\.search: Input should be 'grid' or 'golden'; options of '{algorithm}': .*search"
    with pytest.raises(PlanError, match=message):
        quantize(conv, data, options={algorithm: {"search": "foo"}})


def test_the_report_says_what_was_seen(conv: nn.Module, data: Tensor, quantize: Quantize) -> None:
    report = next(step for step in quantize(conv, data).steps if step.algorithm == "mse")
    assert report.summary == "2 activation ranges from 96 samples"
    assert report.sites["input"] == {"min": float(data.min()), "max": float(data.max())}
