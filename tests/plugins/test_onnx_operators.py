# SPDX-License-Identifier: Apache-2.0
"""Every operator kind on shipped targets: what onnxruntime computes from the artefact is what the simulation computes.

Models have one operator, so that no error of one code is carried on into another. `assert_within_one_code` gives the
reason for its tolerance.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qhw import load_target
from qhw.graph.kinds import ATEN_KINDS, FALLBACK_KINDS, MODULE_KINDS
from qhw_plugins.onnx_qdq import OnnxQdq
from qhw_plugins.onnxruntime_executor import OnnxRuntime
from tests.machine import onnxruntime_here
from tests.plugins import onnx_support as support

TARGETS = (onnxruntime_here(), "google/litert-int8", "espressif/esp32-p4")
IMAGE, LINE, ROWS, TOKENS = (2, 4, 8, 8), (2, 4, 9), (2, 12), (2, 5, 8)


class Of(nn.Module):
    """A function as a model; its parameters, if it has some, as `inner`."""

    def __init__(self, function: Callable[..., Tensor], inner: nn.Module | None = None) -> None:
        super().__init__()
        self.function = function
        self.inner = inner

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs) if self.inner is None else self.function(self.inner, *inputs)


class Normalized(nn.Module):
    """A convolution and a batch norm that cannot be folded, because the convolution has a second reader."""

    def __init__(self, track: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4, track_running_stats=track)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.conv(x)
        return self.norm(y), y


def of(function: Callable[..., Tensor]) -> Callable[[], nn.Module]:
    return lambda: Of(function)


def attention(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, y, z, enable_gqa=True)


# What it is, beginning with its kind -> the model, its input shapes.
CASES: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "Conv of images": (lambda: nn.Conv2d(4, 6, 3, padding=1), [IMAGE]),
    "Conv with a stride, no bias": (lambda: nn.Conv2d(4, 6, 3, stride=2, bias=False), [IMAGE]),
    "Conv in groups": (lambda: nn.Conv2d(4, 6, 3, groups=2), [IMAGE]),
    "Conv of sequences": (lambda: nn.Conv1d(4, 6, 3, padding="same"), [LINE]),
    "Conv with a Relu": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU()), [IMAGE]),
    "Conv with a Clip": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU6()), [IMAGE]),
    "DepthwiseConv": (lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), [IMAGE]),
    "DepthwiseConv, wide and dilated": (lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4), [IMAGE]),
    "ConvTranspose": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), [IMAGE]),
    "ConvTranspose in groups": (lambda: nn.ConvTranspose2d(4, 6, 3, groups=2), [IMAGE]),
    "ConvTranspose of sequences": (lambda: nn.ConvTranspose1d(4, 6, 3), [LINE]),
    "Gemm": (lambda: nn.Linear(12, 5), [ROWS]),
    "Gemm of tokens": (lambda: nn.Linear(8, 5), [TOKENS]),
    "Gemm behind a Flatten": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(256, 5)), [IMAGE]),
    "MatMul": (of(torch.matmul), [(2, 5, 8), (2, 8, 3)]),
    "Attention": (of(attention), [(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)]),
    "Add": (of(torch.add), [IMAGE, IMAGE]),
    "Add with a Relu": (of(lambda x, y: torch.relu(x + y)), [IMAGE, IMAGE]),
    "Add of a broadcast": (of(torch.add), [IMAGE, (2, 4, 1, 1)]),
    "Add of a Relu": (of(lambda x, y: torch.relu(x) + y), [IMAGE, IMAGE]),
    "Sub": (of(torch.sub), [IMAGE, IMAGE]),
    "Mul": (of(torch.mul), [IMAGE, IMAGE]),
    "Div": (of(lambda x, y: x / (y.abs() + 1)), [IMAGE, IMAGE]),
    "Max": (of(torch.maximum), [IMAGE, IMAGE]),
    "Min": (of(torch.minimum), [IMAGE, IMAGE]),
    "Pow": (of(lambda x: x**3), [IMAGE]),
    "Sqrt": (of(lambda x: torch.sqrt(torch.abs(x))), [IMAGE]),
    "Rsqrt": (of(lambda x: torch.rsqrt(torch.abs(x) + 1)), [IMAGE]),
    "Exp": (of(torch.exp), [IMAGE]),
    "Log": (of(lambda x: torch.log(torch.abs(x) + 1)), [IMAGE]),
    "Neg": (of(torch.neg), [IMAGE]),
    "Abs": (of(torch.abs), [IMAGE]),
    "Concat": (of(lambda x, y: torch.cat([x, y], 1)), [IMAGE, IMAGE]),
    "Concat of a stack": (of(lambda x, y: torch.stack([x, y], 1)), [IMAGE, IMAGE]),
    "MaxPool": (lambda: nn.MaxPool2d(2), [IMAGE]),
    "MaxPool with padding": (lambda: nn.MaxPool2d(3, 2, 1), [IMAGE]),
    "MaxPool in ceil mode": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), [IMAGE]),
    "MaxPool, dilated past its kernel in ceil mode": (lambda: nn.MaxPool2d(2, 3, dilation=4, ceil_mode=True), [IMAGE]),
    "MaxPool of sequences": (lambda: nn.MaxPool1d(2), [LINE]),
    "AveragePool": (lambda: nn.AvgPool2d(2), [IMAGE]),
    "AveragePool with padding": (lambda: nn.AvgPool2d(3, 2, 1), [IMAGE]),
    "AveragePool with uncounted padding": (lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), [IMAGE]),
    "AveragePool in ceil mode": (lambda: nn.AvgPool2d(3, 2, ceil_mode=True), [IMAGE]),
    "AveragePool with padding in ceil mode": (lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True), [IMAGE]),
    "AveragePool with its own divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), [IMAGE]),
    "AveragePool, padded, in ceil mode, with its own divisor": (
        lambda: nn.AvgPool2d(3, 2, 1, ceil_mode=True, divisor_override=5),
        [IMAGE],
    ),
    "AveragePool of sequences": (lambda: nn.AvgPool1d(2, ceil_mode=True), [LINE]),
    "AveragePool to a given size": (lambda: nn.AdaptiveAvgPool2d(4), [IMAGE]),
    "GlobalAveragePool": (lambda: nn.AdaptiveAvgPool2d(1), [IMAGE]),
    "GlobalAveragePool as a mean": (of(lambda x: x.mean((2, 3))), [IMAGE]),
    "GlobalMaxPool": (of(lambda x: x.amax((2, 3))), [IMAGE]),
    "ReduceMean": (of(lambda x: x.mean(1)), [IMAGE]),
    "ReduceMean of tokens": (of(lambda x: x.mean(-1, keepdim=True)), [TOKENS]),
    "ReduceSum": (of(lambda x: x.sum((1,))), [IMAGE]),
    "ReduceMax": (of(lambda x: x.amax(1)), [IMAGE]),
    "ReduceMin": (of(lambda x: x.amin(1)), [IMAGE]),
    "Relu": (nn.ReLU, [IMAGE]),
    "Clip": (lambda: nn.Hardtanh(-0.5, 0.75), [IMAGE]),
    "Clip from below": (of(lambda x: x.clamp_min(-0.5)), [IMAGE]),
    "LeakyRelu": (nn.LeakyReLU, [IMAGE]),
    "PRelu": (lambda: nn.PReLU(4), [IMAGE]),
    "Elu": (nn.ELU, [IMAGE]),
    "Sigmoid": (nn.Sigmoid, [IMAGE]),
    "Tanh": (nn.Tanh, [IMAGE]),
    "HardSigmoid": (nn.Hardsigmoid, [IMAGE]),
    "HardSwish": (nn.Hardswish, [IMAGE]),
    "Silu": (nn.SiLU, [IMAGE]),
    "Mish": (nn.Mish, [IMAGE]),
    "Softplus": (nn.Softplus, [IMAGE]),
    "Gelu": (nn.GELU, [IMAGE]),
    "Gelu by tanh": (lambda: nn.GELU("tanh"), [IMAGE]),
    "Softmax": (lambda: nn.Softmax(-1), [ROWS]),
    "LogSoftmax": (lambda: nn.LogSoftmax(-1), [ROWS]),
    "LayerNormalization": (lambda: nn.LayerNorm(8), [TOKENS]),
    "GroupNormalization": (lambda: nn.GroupNorm(2, 4), [IMAGE]),
    "InstanceNormalization": (lambda: nn.InstanceNorm2d(4, affine=True), [IMAGE]),
    "BatchNormalization": (Normalized, [IMAGE]),
    "BatchNormalization on the batch's statistics": (lambda: Normalized(track=False), [IMAGE]),
    "Embedding": (lambda: Of(lambda e, x: e(x.abs().long().clamp(0, 5)), nn.Embedding(6, 8)), [TOKENS]),
    "Gather of one": (of(lambda x: x[:, 1]), [IMAGE]),
    "Gather of several": (of(lambda x: torch.index_select(x, 1, torch.tensor([2, 0]))), [IMAGE]),
    "Slice": (of(lambda x: x[:, 1:3, ::2]), [IMAGE]),
    "Pad": (of(lambda x: F.pad(x, (1, 2))), [IMAGE]),
    "Pad by reflection": (of(lambda x: F.pad(x, (1, 2, 0, 1), mode="reflect")), [IMAGE]),
    "Transpose": (of(lambda x: x.permute(0, 2, 3, 1)), [IMAGE]),
    "Transpose of two axes": (of(lambda x: x.transpose(1, 2)), [TOKENS]),
    "DepthToSpace": (lambda: nn.PixelShuffle(2), [IMAGE]),
    "Transpose by moving an axis": (of(lambda x: x.movedim(1, 2)), [IMAGE]),
    "Transpose by swapping axes": (of(lambda x: x.swapaxes(1, 3)), [IMAGE]),
    "SpaceToDepth": (lambda: nn.PixelUnshuffle(2), [IMAGE]),
    "ChannelShuffle": (lambda: nn.ChannelShuffle(2), [IMAGE]),
    "Resize by nearest neighbours": (lambda: nn.Upsample(scale_factor=2), [IMAGE]),
    "Resize bilinearly": (lambda: nn.Upsample(size=(5, 13), mode="bilinear"), [IMAGE]),
    "Split": (of(lambda x: x.chunk(2, 1)[1]), [IMAGE]),
    "Split into given sizes": (of(lambda x: x.split([1, 3], 1)), [IMAGE]),
    "Expand": (of(lambda x: x.expand(-1, 4, -1, -1)), [(2, 1, 8, 8)]),
    "Tile": (of(lambda x: x.repeat(1, 1, 2, 1)), [IMAGE]),
    "Tile of the last axes": (of(lambda x: x.tile(3, 1)), [IMAGE]),
    "Expand as another": (of(lambda x, y: x.expand_as(y) * y), [(2, 1, 8, 8), IMAGE]),
    "Reshape": (of(lambda x: x.reshape(x.shape[0], 8, -1)), [IMAGE]),
    "Flatten": (nn.Flatten, [IMAGE]),
    "Squeeze": (of(lambda x: x.squeeze(1)), [(2, 1, 8)]),
    "Unsqueeze": (of(lambda x: x.unsqueeze(1)), [ROWS]),
    "Identity": (of(lambda x: x.contiguous()), [IMAGE]),
    "Dropout": (nn.Dropout, [IMAGE]),
}


def inputs(shapes: list[tuple[int, ...]], batch: int) -> tuple[Tensor, ...]:
    """Normal values, others for each batch size."""
    generator = torch.Generator().manual_seed(batch)
    return tuple(torch.randn((batch, *shape[1:]), generator=generator) for shape in shapes)


def kind_of(case: str) -> str:
    """The first word."""
    return case.replace(",", "").split()[0]


def pairs() -> list[Any]:
    """Every case on the first target, and on the others the first case of each kind that they list."""
    firsts = {kind_of(case): case for case in reversed(CASES)}
    found = []
    for target in TARGETS:
        listed = load_target(target).operators
        for case in CASES:
            kind = kind_of(case)
            if target == TARGETS[0] or (kind in listed and firsts[kind] == case):
                found.append(pytest.param(case, target, id=f"{case} on {target}"))
    return found


@pytest.mark.parametrize(("case", "target"), pairs())
def test_the_artefact_computes_the_simulation_at_any_batch_size(case: str, target: str, tmp_path: Path) -> None:
    make, shapes = CASES[case]
    torch.manual_seed(0)
    result = support.quantized(make(), inputs(shapes, 2), target)
    assert OnnxQdq().check(result) == ()
    path = support.exported(result, tmp_path)
    run = OnnxRuntime().load(path)
    for batch in (1, 5):
        given = inputs(shapes, batch)
        expected, by_name = support.simulated(result, given), support.as_inputs(result, given)
        support.assert_within_one_code(result, run(by_name), expected)
        support.assert_within_one_code(result, support.run_plain(path, by_name), expected)


def test_every_kind_has_a_case() -> None:
    kinds = {rule.kind for rule in ATEN_KINDS.values()} | set(MODULE_KINDS.values()) | set(FALLBACK_KINDS)
    assert sorted(kinds) == sorted({kind_of(case) for case in CASES})
