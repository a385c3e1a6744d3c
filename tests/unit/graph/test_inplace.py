# SPDX-License-Identifier: Apache-2.0
"""In-place operators: rewritten where values tell all, refused where memory would matter."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qhw.errors import CaptureError
from qhw.graph import capture


def model_of(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    return Model()


def chain(x):
    x += 1
    x *= 2
    return x


def reader_between(x):
    y = x * 3.0
    x.relu_()
    return x + y


def read_before_and_after(x):
    y = torch.sigmoid(x)
    x.add_(y)
    z = torch.sigmoid(x)
    return x + y + z


def view_after(x):
    x.relu_()
    return x.view(-1) * 2.0


def view_chain_after(x):
    y = x.view(-1)
    y.add_(1.0)
    return y


def clone_before(x):
    y = x.clone()
    y.add_(1.0)
    return x * y


def last_reader_of_a_slice(x):
    part = x[:, 1:]
    return part.relu_()


@pytest.mark.parametrize(
    "function",
    [
        chain,
        reader_between,
        read_before_and_after,
        view_after,
        view_chain_after,
        clone_before,
        last_reader_of_a_slice,
        lambda x: F.hardswish(F.relu(x, inplace=True), inplace=True),
        lambda x: F.hardtanh_(F.leaky_relu_(x, 0.1)),
        lambda x: x.sub_(1.0).mul_(x.clone()),
        lambda x: x.copy_(x * 2.0),
        lambda x: x.clamp_(-0.5, 0.5).masked_fill_(x > 0.2, 7.0),
        lambda x: F.silu(x, inplace=True) + F.elu(x.clone(), inplace=True),
        lambda x: x.fill_(2.0) + 1.0,
    ],
)
def test_rewritten_to_the_same_function(function):
    model = model_of(function)
    example = torch.randn(4, 3)
    kept = example.clone()
    graph = capture(model, example)
    assert torch.equal(example, kept)
    x = torch.randn(5, 3)
    torch.testing.assert_close(graph.module(x), model(x.clone()), rtol=0, atol=0)
    for node in graph.module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            assert not node.target._schema.is_mutable


def base_read_later(x):
    y = x.view(-1)
    y.relu_()
    return x * 2.0


def view_read_later(x):
    y = x.transpose(0, 1)
    x.relu_()
    return y * 2.0


def sibling_read_later(x):
    a, b = x[:, :2], x[:, 1:]
    a.relu_()
    return b * 2.0


def part_assigned(x):
    x[:, 0] = 0.0
    return x * 2.0


def chunk_written(x):
    a, _ = x.chunk(2, 0)
    a.mul_(2.0)
    return x + 1.0


def expanded_base(x):
    y = x.expand_as(x)
    x.add_(1.0)
    return y + 0.0


def through_dropout(x):
    y = F.dropout(x, 0.5, False)  # in eval mode that is x itself
    y.add_(1.0)
    return x * y


@pytest.mark.parametrize(
    "function",
    [
        base_read_later,
        view_read_later,
        sibling_read_later,
        part_assigned,
        chunk_written,
        expanded_base,
        through_dropout,
    ],
)
def test_memory_that_is_read_under_another_name_is_refused(function):
    with pytest.raises(
        CaptureError,
        match=r"Model: .*: 'aten\..*' writes into '.*', which shares memory with '.*' that is read later\. Use",
    ):
        capture(model_of(function), torch.randn(4, 3))


def test_a_write_into_the_models_own_tensor_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(4, 3))

        def forward(self, x):
            self.table[0] = 1.0
            return x + self.table.sum()

    with pytest.raises(CaptureError, match=r"writes into the model's own tensor 'table'"):
        capture(Model(), torch.randn(2, 3))


def test_no_pure_form():
    with pytest.raises(CaptureError, match=r"'aten\.add\.out' writes into a tensor and has no pure form"):
        capture(model_of(lambda x: torch.add(x, 1.0, out=torch.empty_like(x))), torch.randn(2, 3))
