# SPDX-License-Identifier: Apache-2.0
"""Min-max ranges against plain numpy on what the original modules give out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qhw.engine import QuantizedModel
from qhw.errors import PlanError

Quantize = Callable[..., QuantizedModel]
MIN_MAX = ["min_max", "min_max_weights"]


class Net(nn.Module):
    """Two convolutions, the first with a batch norm and a ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn, self.relu = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU()
        self.conv2 = nn.Conv2d(6, 4, 3, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.relu(self.bn(self.conv1(x))))  # type: ignore[no-any-return]


@pytest.fixture
def net() -> Any:
    torch.manual_seed(3)
    made: Any = Net()
    made.bn.running_mean.normal_()
    made.bn.running_var.uniform_(0.5, 2.0)
    return made.eval()


def scale_of(low: float, high: float, steps: int) -> np.float32:
    """The range widened to contain 0, over the number of steps; rounded to float32 once."""
    return np.float32((np.float64(max(high, 0.0)) - np.float64(min(low, 0.0))) / steps)


def seen_by_the_modules(net: Any, x: Tensor) -> dict[str, np.ndarray]:
    """Outputs of the original modules, with weights folded and fake-quantized here by numpy."""

    def snap(weight: np.ndarray) -> Tensor:
        scale = (np.abs(weight).max((1, 2, 3), keepdims=True).astype(np.float64) / 127).astype(np.float32)
        return torch.from_numpy(scale * np.clip(np.rint(weight / scale), -127, 127).astype(np.float32))

    factor = net.bn.weight.detach().double() / (net.bn.running_var.double() + net.bn.eps).sqrt()
    folded = (net.conv1.weight.detach().double() * factor[:, None, None, None]).float()
    bias = net.bn.bias.detach().double() + factor * (net.conv1.bias.detach().double() - net.bn.running_mean.double())
    net.conv1.weight.data, net.conv1.bias.data = snap(folded.numpy()), bias.float()
    net.conv2.weight.data = snap(net.conv2.weight.detach().numpy())
    net.bn = nn.Identity()
    seen: dict[str, list[np.ndarray]] = {"relu": [], "conv2": []}
    for name, values in seen.items():
        net.get_submodule(name).register_forward_hook(lambda m, a, out, v=values: v.append(out.numpy()))
    with torch.no_grad():
        for start in range(0, len(x), 32):
            net(x[start : start + 32])
    return {"x": x.numpy(), "conv1": np.concatenate(seen["relu"]), "conv2": np.concatenate(seen["conv2"])}


def test_activation_ranges_are_those_that_numpy_sees(net: Any, images: Tensor, quantize: Quantize) -> None:
    result = quantize(net, images, prefer=MIN_MAX)
    found = result.encodings()
    report = next(step for step in result.steps if step.algorithm == "min_max")
    for name, values in seen_by_the_modules(net, images).items():
        low, high = float(values.min()), float(values.max())
        # Other kernels may sum in another order: a few units in the last place.
        assert found[name].scale.item() == pytest.approx(scale_of(low, high, 255), rel=1e-6), name
        assert found[name].zero_point.item() == np.clip(-np.rint(min(low, 0.0) / found[name].scale.item()), 0, 255)
        assert report.sites[name] == {"min": pytest.approx(low, rel=1e-6), "max": pytest.approx(high, rel=1e-6)}
    assert found["x"].scale.item() == scale_of(images.min().item(), images.max().item(), 255)
    assert report.summary == "3 activation ranges from 70 samples"


def test_weight_ranges_per_channel(net: Any, images: Tensor, quantize: Quantize) -> None:
    found = quantize(net, images, prefer=MIN_MAX).encodings()["conv2.weight"]
    weight = net.conv2.weight.detach().numpy().astype(np.float64)
    assert np.array_equal(found.scale.numpy(), (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32))
    assert not found.zero_point.any()


def test_weight_ranges_per_tensor_on_powers_of_two(net: Any, images: Tensor, quantize: Quantize) -> None:
    power = ', scale = { kind = "power_of_two" }'
    found = quantize(net, images, prefer=MIN_MAX, per="tensor", weight=power).encodings()["conv2.weight"]
    largest = np.abs(net.conv2.weight.detach().numpy()).max().astype(np.float64)
    assert found.scale.item() == 2.0 ** np.ceil(np.log2(largest / 127))


def test_every_weight_and_every_value_seen_is_covered(net: Any, images: Tensor, quantize: Quantize) -> None:
    """No clipping: no value is further than half a step from its code."""
    result = quantize(net, images, prefer=MIN_MAX)
    for name in ("conv1.weight", "conv2.weight"):
        weight, quantizer = result.float_graph.tensor(name).detach(), result.quantizer(name)
        error = (quantizer(weight) - weight).abs()
        assert bool((error <= quantizer.scale[:, None, None, None] * 0.5001).all())
    # A free zero point is rounded, which moves the range by up to half a step more.
    error = (result.quantizer("x")(images) - images).abs()
    assert error.max() <= result.quantizer("x").scale * 1.0001


def test_it_asks_for_calibration_data(net: Any, images: Tensor, quantize: Quantize) -> None:
    with pytest.raises(PlanError, match=r"min_max: needs calibration data \(resources\.calibration\)\. Pass"):
        quantize(net, None, images[:2])
