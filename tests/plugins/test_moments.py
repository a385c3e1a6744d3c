# SPDX-License-Identifier: Apache-2.0
"""Propagated means and standard deviations: by hand, and against what random inputs give."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.graph import Graph
from qhw.numerics import ChannelNormal
from qhw.testing import MODELS, example
from qhw_plugins.moments import (
    Channels,
    InputOptions,
    after_weights,
    batch_norms,
    channel_moments,
    told_channels,
    why_untold,
)

MEAN, STD = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.5, 2.0, 0.0]).double()


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def told(function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (2, 4, 6, 6)) -> Channels | None:
    """What is told of a function's result for an input with four channels."""
    graph = qhw.capture(Apply(function).eval(), torch.randn(shape))
    (value,) = graph.output_values
    return told_channels(graph, {}, {"x": ChannelNormal(MEAN, STD)}).get(value)


def sampled(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Independent normal elements with the moments above along axis 1."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    columns = (-1, *(1,) * (len(shape) - 2))
    return MEAN.reshape(columns) + STD.reshape(columns) * noise


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3), (4, 12), 1),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 6), 1),
    "strided-dilated": (lambda: nn.Conv2d(4, 6, (3, 2), stride=2, dilation=(1, 2)), (4, 8, 8), 1),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 6, 6), 1),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 6, 6), 1),
    "no-bias": (lambda: nn.Conv2d(4, 6, 1, bias=False), (4, 3, 3), 1),
    "linear": (lambda: nn.Linear(4, 5), (4,), 1),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3), (4, 24, 24), 1),
    "transposed-grouped-strided": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2), (4, 24, 24), 1),
    "transposed-dilated": (lambda: nn.ConvTranspose1d(4, 6, 3, stride=3, dilation=2), (4, 60), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_have_the_moments_that_samples_have(name: str) -> None:
    make, shape, axis = LAYERS[name]
    torch.manual_seed(1)
    layer: Any = make()
    graph = qhw.capture(nn.Sequential(layer).eval(), torch.randn(2, *shape))
    found = channel_moments(graph, {}, {"input": ChannelNormal(MEAN, STD)})["0"]
    with torch.no_grad():
        y = layer.double()(sampled((4000 if len(shape) < 3 else 300, *shape)))
    if name.startswith("transposed"):  # away from the borders, where taps miss; whole periods of the stride
        y = y[(slice(None), slice(None), *(slice(12, 36 if y.dim() == 4 else 156) for _ in shape[1:]))]
        y = y if "strided" in name or "dilated" in name else y[:, :, :12, :12]
    y = y.movedim(axis, 0).flatten(1)
    # Standard errors: std / sqrt(n) of independent samples, n >= 4,000; outputs that share inputs count less.
    assert torch.allclose(found.mean, y.mean(1), atol=0.1 * float(y.std(1).max()))
    assert torch.allclose(found.std, y.std(1), rtol=0.06)


def test_a_linear_layer_by_hand() -> None:
    weight = torch.tensor([[1.0, 2.0, -1.0, 4.0], [0.0, 0.0, 0.0, 1.0]])
    layer = nn.Linear(4, 2)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.tensor([10.0, -1.0]))
    graph = qhw.capture(nn.Sequential(layer).eval(), torch.randn(2, 4))
    found = channel_moments(graph, {}, {"input": ChannelNormal(MEAN, STD)})["0"]
    # 0.5 - 2 - 2 + 0 + 10 = 6.5; 1 + 4 * 0.25 + 4 = 6
    assert found.mean.tolist() == [6.5, -1.0]
    assert found.std.tolist() == pytest.approx([math.sqrt(6.0), 0.0])


def test_a_transposed_convolution_with_stride_averages_over_the_taps_that_positions_meet() -> None:
    layer = nn.ConvTranspose1d(1, 1, 3, stride=2, bias=False)
    layer.weight = nn.Parameter(torch.tensor([[[1.0, 10.0, 100.0]]]))
    graph = qhw.capture(nn.Sequential(layer).eval(), torch.randn(2, 1, 8))
    x = ChannelNormal(torch.tensor([3.0]).double(), torch.tensor([0.0]).double())
    found = after_weights(graph.operator("0"), layer.weight.detach(), x)
    # Even positions meet taps 0 and 2, odd ones tap 1: 3 * 101 and 3 * 10.
    assert found.mean.tolist() == [(303 + 30) / 2]
    assert found.std.tolist() == [(303 - 30) / 2]


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        F.relu6,
        lambda x: F.hardtanh(x, -0.5, 0.75),
        lambda x: torch.clamp(x, min=0.25),
        lambda x: torch.clamp(x, max=1.5),
        lambda x: F.relu(F.hardtanh(x, -0.5, 0.75)),
        lambda x: x * 3 - 1,
        lambda x: F.relu6(x) * -2.0 + 0.5,
        lambda x: x / 4,
        lambda x: x + x,
        lambda x: x - x,
        lambda x: torch.clamp((F.relu(x) * 2)[:, :, 1:], max=1.0),
    ],
    ids=["relu", "relu6", "hardtanh", "lower", "upper", "clips", "affine", "flipped", "div", "twice", "zero", "moved"],
)
def test_functions_have_the_moments_that_samples_have(function: Callable[[Tensor], Tensor]) -> None:
    found = told(function)
    assert found is not None
    y = function(sampled((3000, 4, 6, 6))).movedim(1, 0).flatten(1)
    # 108,000 independent samples: the mean's standard error is 0.3 % of the deviation. Of the second channel 2.3 % are
    # above 0, some 2,500 samples: their deviation has a standard error of 1.4 %, or 0.1 % of the largest.
    assert torch.allclose(found.moments.mean, y.mean(1), atol=0.01 * max(1.0, float(y.std(1).max())))
    assert torch.allclose(found.moments.std, y.std(1), rtol=0.04, atol=0.002)
    low, high = found.reach(8.0)
    assert low - 1e-9 <= y.min() and y.max() <= high + 1e-9


class Sums(nn.Module):
    """Two layers of one kind of input each, joined."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.join = join

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.join(x, y)


def joined(
    join: Callable[[Tensor, Tensor], Tensor], other: ChannelNormal, shape: tuple[int, ...] = (2, 4, 6, 6)
) -> Any:
    graph = qhw.capture(Sums(join).eval(), (torch.randn(2, 4, 6, 6), torch.randn(shape)))
    (value,) = graph.output_values
    return told_channels(graph, {}, {"x": ChannelNormal(MEAN, STD), "y": other}).get(value)


def test_a_residual_sum_adds_means_and_variances() -> None:
    other = ChannelNormal(torch.tensor([1.0, 1.0, 1.0, 1.0]).double(), torch.tensor([0.0, 1.2, 1.5, 3.0]).double())
    found = joined(lambda x, y: x + y, other).moments
    assert found.mean.tolist() == [1.5, 0.0, 3.0, 1.0]
    assert found.std.tolist() == pytest.approx([1.0, 1.3, 2.5, 3.0])
    assert joined(lambda x, y: x - y, other).moments.mean.tolist() == [-0.5, -2.0, 1.0, -1.0]


def test_a_sum_of_rectified_values_is_not_negative() -> None:
    other = ChannelNormal(MEAN, STD)
    low, high = joined(lambda x, y: F.relu(x) + F.relu6(y), other).reach(6.0)
    assert low == 0.0
    assert high > 6.0
    assert joined(lambda x, y: F.relu(x) - F.relu6(y), other).low.tolist() == [-6.0] * 4


def test_one_value_for_all_channels_joins_any() -> None:
    one = ChannelNormal(torch.tensor([2.0]).double(), torch.tensor([0.0]).double())
    assert joined(lambda x, y: x + y, one).moments.mean.tolist() == (MEAN + 2).tolist()
    assert (
        joined(lambda x, y: torch.cat([y, x], 1), one, (2, 3, 6, 6)).moments.mean.tolist() == [2.0] * 3 + MEAN.tolist()
    )


@pytest.mark.parametrize(
    "join",
    [lambda x, y: x * y, lambda x, y: torch.maximum(x, y), lambda x, y: torch.stack([x, y]), lambda x, y: x / y],
    ids=["product", "maximum", "stack", "quotient"],
)
def test_what_depends_on_both_in_another_way_is_not_told(join: Callable[[Tensor, Tensor], Tensor]) -> None:
    assert joined(join, ChannelNormal(MEAN, STD)) is None


MOVES: dict[str, tuple[Callable[[Tensor], Tensor], list[int], int]] = {
    "flatten-pooled": (lambda x: F.adaptive_avg_pool2d(x, 1).flatten(1), [0, 1, 2, 3], 1),
    "flatten-image": (lambda x: x[:, :, :1, :2].flatten(1), [0, 0, 1, 1, 2, 2, 3, 3], 1),
    "permute": (lambda x: x.permute(0, 2, 3, 1), [0, 1, 2, 3], 3),
    "reshape-with-batch-size": (lambda x: x.reshape(x.shape[0], 4, -1), [0, 1, 2, 3], 1),
    "slice-of-channels": (lambda x: x[:, 1:3], [1, 2], 1),
    "every-other": (lambda x: x[:, ::2, ::2], [0, 2], 1),
    "split": (lambda x: x.chunk(2, 1)[1], [2, 3], 1),
    "split-of-unequal-sizes": (lambda x: torch.split(x, [1, 3], 1)[1], [1, 2, 3], 1),
    "split-of-rows": (lambda x: x.chunk(2, 2)[1], [0, 1, 2, 3], 1),
    "swapped-halves": (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), [2, 3, 0, 1], 1),
    "shuffled": (lambda x: F.channel_shuffle(x, 2), [0, 2, 1, 3], 1),
    "mean-kept": (lambda x: x.mean((2, 3), keepdim=True), [0, 1, 2, 3], 1),
    "mean-of-rows": (lambda x: x.permute(0, 2, 3, 1).mean(1), [0, 1, 2, 3], 2),
    "max-pool": (lambda x: F.max_pool2d(x, 2), [0, 1, 2, 3], 1),
    "average-pool": (lambda x: F.avg_pool2d(x, 2), [0, 1, 2, 3], 1),
    "padded-image": (lambda x: F.pad(x, (1, 1, 1, 1)), [0, 1, 2, 3], 1),
    "reflected": (lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"), [0, 1, 2, 3], 1),
    "one-channel": (lambda x: x[:, 2], [2], -1),
}


@pytest.mark.parametrize("name", MOVES)
def test_movements_carry_channels_along(name: str) -> None:
    function, channels, axis = MOVES[name]
    found = told(function)
    assert found is not None
    assert found.normal.mean.tolist() == MEAN[channels].tolist()
    assert found.normal.std.tolist() == STD[channels].tolist()
    assert found.axis == (None if axis == -1 else axis)


def test_padded_channels_are_constant() -> None:
    found = told(lambda x: F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2), value=7.0))
    assert found is not None
    assert found.moments.mean.tolist() == [7.0, *MEAN.tolist(), 7.0, 7.0]
    assert found.moments.std.tolist() == [0.0, *STD.tolist(), 0.0, 0.0]


def test_padding_widens_bounds() -> None:
    found = told(lambda x: F.pad(torch.clamp(x, 1.0, 2.0), (1, 1, 1, 1)))
    assert found is not None
    assert (found.low.tolist(), found.high.tolist()) == ([0.0] * 4, [2.0] * 4)
    pooled = told(lambda x: F.avg_pool2d(torch.clamp(x, 1.0, 2.0), 3, 1, 1))
    assert pooled is not None and pooled.low.tolist() == [0.0] * 4


@pytest.mark.parametrize(
    "function",
    [
        torch.sigmoid,
        lambda x: torch.cumsum(x, 2),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: x.mean(1),
        lambda x: x.flatten(0, 1),
        lambda x: x.view(-1, 2, 2, 6, 6),
        lambda x: 1 / x,
        lambda x: x / 0,
        lambda x: x + torch.arange(6.0),
    ],
    ids=[
        "sigmoid",
        "cumsum",
        "depth-to-space",
        "mean-of-channels",
        "batch-merged",
        "two-axes",
        "inverse",
        "by-zero",
        "computed",
    ],
)
def test_what_mixes_channels_or_bends_them_is_not_told(function: Callable[[Tensor], Tensor]) -> None:
    assert told(function) is None


class Constants(nn.Module):
    def __init__(self, shape: tuple[int, ...], join: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.constant = nn.Parameter(torch.arange(1.0, 1 + math.prod(shape)).reshape(shape))
        self.join = join

    def forward(self, x: Tensor) -> Tensor:
        return self.join(x, self.constant)


@pytest.mark.parametrize(
    ("join", "expected"),
    [
        (lambda x, c: x + c, [1.5, 1.0, 5.0, 4.0]),
        (lambda x, c: c - x, [0.5, 3.0, 1.0, 4.0]),
        (lambda x, c: x * c, [0.5, -2.0, 6.0, 0.0]),
        (lambda x, c: x / c, [0.5, -0.5, 2 / 3, 0.0]),
    ],
    ids=["add", "subtract-from", "scale", "divide"],
)
def test_a_constant_per_channel(join: Callable[[Tensor, Tensor], Tensor], expected: list[float]) -> None:
    graph = qhw.capture(Constants((4, 1, 1), join).eval(), torch.randn(2, 4, 6, 6))
    found = channel_moments(graph, {}, {"x": ChannelNormal(MEAN, STD)})[graph.output_values[0]]
    assert found.mean.tolist() == pytest.approx(expected)


def test_a_cap_per_channel_clips() -> None:
    graph = qhw.capture(Constants((4, 1, 1), lambda x, c: torch.minimum(F.relu(x), c)).eval(), torch.randn(2, 4, 6, 6))
    found = told_channels(graph, {}, {"x": ChannelNormal(MEAN, STD)})[graph.output_values[0]]
    assert found.high.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert found.low.tolist() == [0.0] * 4


def test_a_constant_that_differs_within_channels_is_not_told() -> None:
    graph = qhw.capture(Constants((4, 6, 1), lambda x, c: x + c).eval(), torch.randn(2, 4, 6, 6))
    assert graph.output_values[0] not in told_channels(graph, {}, {"x": ChannelNormal(MEAN, STD)})


def test_a_batch_norm_tells_whatever_lies_before_it() -> None:
    model, x = example("conv_chain")
    graph = qhw.capture(model, x)
    found = channel_moments(graph, {}, {})
    norm: Any = model.get_submodule("bn2")
    assert "conv1" not in found  # nothing is said of the input
    assert found["bn2"].mean.tolist() == norm.bias.double().tolist()
    assert found["bn2"].std.tolist() == norm.weight.double().abs().tolist()
    assert found["relu2"].mean.tolist() == found["bn2"].clipped(0.0).mean.tolist()
    fc: Any = model.get_submodule("fc")
    by_hand = fc.weight.double() @ found["relu2"].mean + fc.bias.double()
    assert torch.allclose(found["fc"].mean, by_hand.detach(), atol=1e-12)


def test_normals_replace_what_would_be_propagated() -> None:
    model, x = example("pools")
    graph = qhw.capture(model, x)
    normal = ChannelNormal(MEAN, STD)
    assert channel_moments(graph, {"first": normal}, {})["max"] is normal


def test_two_bridges_of_one_network_against_its_own_samples() -> None:
    """Residual branches with normal inputs: propagated moments against a million outputs."""
    torch.manual_seed(3)
    layers = nn.ModuleList([nn.Conv2d(4, 4, 1) for _ in range(2)])
    model = Apply(lambda x: F.relu(layers[0](x)) + layers[1](x))
    model.layers = layers
    graph = qhw.capture(model.eval(), torch.randn(2, 4, 6, 6))
    found = channel_moments(graph, {}, {"x": ChannelNormal(MEAN, STD)})[graph.output_values[0]]
    with torch.no_grad():
        y = model.double()(sampled((3000, 4, 6, 6))).movedim(1, 0).flatten(1)
    assert torch.allclose(found.mean, y.mean(1), atol=0.02)  # exact but for the sample: three standard errors


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_can_be_walked(name: str) -> None:
    graph = qhw.capture(*example(name))
    found = told_channels(graph, {}, InputOptions().inputs(graph))
    for value, channels in found.items():
        if value in graph.inputs or graph.operator(value).kind == "Split":  # several tensors: the whole is told
            continue
        shape = graph.node(value).meta["shape"]
        assert len(channels.low) == (1 if channels.axis is None else shape[channels.axis]), value
        assert bool((channels.low <= channels.high).all())
    untold = [operator.name for operator in graph.operators if operator.name not in found]
    assert all(why_untold(graph, found, value).sentence() for value in untold)


def reason_of(function: Callable[[Tensor], Tensor]) -> str:
    graph: Graph = qhw.capture(Apply(function).eval(), torch.randn(2, 4, 6, 6))
    found = told_channels(graph, {}, InputOptions().inputs(graph))
    return why_untold(graph, found, graph.output_values[0]).sentence()


def test_the_reason_names_the_first_operator_that_nothing_is_known_of() -> None:
    assert reason_of(lambda x: torch.relu(torch.sigmoid(x) * 2)) == (
        "behind Sigmoid (sigmoid) nothing is known of the channels without data (graph.sigmoid.kind)"
    )
    assert reason_of(lambda x: torch.cumsum(x, 2) + x) == (
        "behind aten.cumsum.default (cumsum) nothing is known of the channels without data (graph.cumsum.kind)"
    )


def test_a_batch_norm_without_statistics_tells_nothing() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x))  # type: ignore[no-any-return]

    graph = qhw.capture(Plain().eval(), torch.randn(2, 4, 6, 6))
    found = told_channels(graph, {}, InputOptions().inputs(graph))
    assert batch_norms(graph) == []
    assert "norm" not in found and "conv" in found
    sentence = why_untold(graph, found, graph.output_values[0]).sentence()
    assert sentence == (
        "behind BatchNormalization without finite running statistics (norm) nothing is known of the channels "
        "without data (graph.norm.kind)"
    )


def test_integer_inputs_are_not_told() -> None:
    graph = qhw.capture(*example("tokens"))
    assert InputOptions().inputs(graph) == {}
    assert why_untold(graph, {}, "fc").value == "Embedding"


def test_inputs_are_taken_as_the_options_say() -> None:
    graph = qhw.capture(*example("two_inputs"))
    found = InputOptions(input_mean=0.5, input_std=2.0).inputs(graph)
    assert sorted(found) == ["extra", "image"]
    assert (found["image"].mean.tolist(), found["image"].std.tolist()) == ([0.5], [2.0])


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.weight", "fc.bias"])
def test_what_is_not_a_number_tells_nothing(name: str) -> None:
    model, x = example("conv_chain")
    graph = qhw.capture(model, x)
    graph.set_tensor(name, torch.full_like(graph.tensor(name), torch.nan))
    found = told_channels(graph, {}, InputOptions().inputs(graph))
    assert name.partition(".")[0] not in found
    assert "bn2" in found
