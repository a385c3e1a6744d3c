# SPDX-License-Identifier: Apache-2.0
"""Operators as matrix products: rows times patches equal what torch computes, for every operator with weights."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.engine import MatrixForm

LAYERS = {
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1, stride=2), (4, 9)),
    "conv2d": (nn.Conv2d(3, 5, (3, 2), padding=(1, 0), stride=(2, 1)), (3, 8, 7)),
    "conv2d-without-bias": (nn.Conv2d(3, 5, 1, bias=False), (3, 4, 4)),
    "conv2d-same": (nn.Conv2d(3, 5, (3, 5), padding="same", dilation=(1, 2)), (3, 6, 6)),
    "conv2d-valid": (nn.Conv2d(3, 5, 3, padding="valid"), (3, 6, 6)),
    "conv2d-dilated-grouped": (nn.Conv2d(4, 6, 3, dilation=2, groups=2, padding=2), (4, 7, 7)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4, padding=1), (4, 5, 5)),
    "depthwise-multiplier-2": (nn.Conv2d(4, 8, 3, groups=4), (4, 5, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2, stride=(1, 2, 1)), (2, 4, 5, 3)),
    "transposed": (nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1), (3, 5, 4)),
    "transposed-grouped-dilated": (nn.ConvTranspose2d(4, 6, 2, groups=2, dilation=2), (4, 5, 5)),
    "transposed1d": (nn.ConvTranspose1d(3, 2, 4, stride=3), (3, 6)),
    "linear": (nn.Linear(7, 3), (7,)),
    "linear-rank-3": (nn.Linear(7, 3), (5, 7)),
}


def form_of(layer: nn.Module, x: Tensor) -> tuple[Any, MatrixForm]:
    graph = qhw.capture(layer.eval(), x)
    operator = next(o for o in graph.operators if o.weight is not None)
    return operator, MatrixForm(operator, tuple(graph.tensor(operator.weight).shape))


def check(layer: Any, x: Tensor, per_sample: int) -> None:
    _, form = form_of(layer, x)
    y = layer(x)
    rows, index = form.patches(x, per_sample, torch.Generator().manual_seed(0))
    product = rows @ form.weight_rows(layer.weight).transpose(1, 2) + form.bias_rows(layer.bias)
    # Sums of up to a few dozen float32 products in another order.
    torch.testing.assert_close(product, form.output_rows(y, index), rtol=1e-4, atol=1e-5)
    assert torch.equal(form.weight_of(form.weight_rows(layer.weight)), layer.weight)
    assert len(index.unique()) == len(index)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("per_sample", [4, 1000], ids=["some-positions", "all-positions"])
def test_rows_times_patches_are_the_output(name: str, per_sample: int) -> None:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    check(layer, torch.randn(3, *shape), per_sample)


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_convolution(data: st.DataObject) -> None:
    draw = data.draw
    groups, rank = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    spatial = st.integers(1, 3)
    kernel, stride, dilation, padding = (tuple(draw(spatial) for _ in range(rank)) for _ in range(4))
    kind = [nn.Conv1d, nn.Conv2d][rank - 1]
    layer = kind(2 * groups, 3 * groups, kernel, stride, padding, dilation, groups)
    size = [d * (k - 1) + draw(st.integers(1, 4)) for k, d in zip(kernel, dilation, strict=True)]
    check(layer, torch.randn(2, 2 * groups, *size), draw(st.integers(1, 6)))


def test_channels_last_input_gives_the_same_rows() -> None:
    layer = nn.Conv2d(3, 5, 3, padding=1)
    x = torch.randn(2, 3, 6, 6)
    _, form = form_of(layer, x)
    rows, _ = form.patches(x, 5, torch.Generator().manual_seed(0))
    last, _ = form.patches(x.to(memory_format=torch.channels_last), 5, torch.Generator().manual_seed(0))
    assert torch.equal(rows, last)
