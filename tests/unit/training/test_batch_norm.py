# SPDX-License-Identifier: Apache-2.0
"""Batch norm in training against torch's own: kept, folded at each step, at every rank, at the edges."""

import copy

import pytest
import torch
from torch import nn

from qhw.errors import TrainingError
from qhw.graph.switching import BatchNorm
from qhw.numerics import FakeQuantizer, PerTensor, QParams
from qhw.training import DoubleForward, KeptNorm
from qhw.training.batch_norm import OperatorCall, SyncedBatchNorm

aten = torch.ops.aten
# name -> operator and the arguments behind its bias, shapes of weight and input
OPERATORS = {
    "gemm": (aten.linear.default, (), (6, 4), (9, 4)),
    "conv1d": (aten.conv1d.default, ([1], [1]), (6, 4, 3), (5, 4, 7)),
    "conv2d": (aten.conv2d.default, ([2, 2], [1, 1]), (6, 4, 3, 3), (5, 4, 7, 6)),
    "grouped": (aten.conv2d.default, ([1, 1], [0, 0], [1, 1], 2), (6, 2, 3, 3), (5, 4, 7, 6)),
    "depthwise": (aten.conv2d.default, ([1, 1], [1, 1], [1, 1], 6), (6, 1, 3, 3), (5, 6, 7, 6)),
    "conv3d": (aten.conv3d.default, ([1, 1, 1],), (6, 4, 2, 2, 2), (3, 4, 4, 4, 3)),
}
TORCHS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
GAMMA = torch.tensor([0.7, -1.2, 0.0, 2.0, -0.01, 1.0])
OFF = QParams(torch.tensor(0.1), torch.tensor(0, dtype=torch.int32), -8, 7, PerTensor())


def norms(rank, momentum=0.1):
    """Torch's batch norm, and ours with equal tensors."""
    theirs = TORCHS[rank](6, momentum=momentum, eps=1e-3)
    ours = SyncedBatchNorm(momentum, 1e-3, "bn")
    with torch.no_grad():
        theirs.weight.copy_(GAMMA)
        theirs.bias.uniform_(-1, 1)
        theirs.running_mean.uniform_(-1, 1)
        theirs.running_var.uniform_(0.5, 2)
    ours.weight, ours.bias = copy.deepcopy(theirs.weight), copy.deepcopy(theirs.bias)
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        setattr(ours, name, getattr(theirs, name).clone())
    return theirs, ours


def case(name, momentum=0.1, seed=0):
    torch.manual_seed(seed)
    target, rest, weight_shape, shape = OPERATORS[name]
    theirs, ours = norms(len(shape), momentum)
    return OperatorCall(target, rest, {}), torch.randn(shape), torch.randn(weight_shape), theirs, ours


def double(call, norm, freeze_after=None, enabled=False):
    quantizer = FakeQuantizer(OFF)
    quantizer.enabled = enabled
    return DoubleForward(call, norm, quantizer, freeze_after)


def run(function, x, weight, norm, upstream=None):
    """Output, and gradients of input, weight, gamma and beta."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight)
    upstream = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)) if upstream is None else upstream
    found = torch.autograd.grad(y, (x, weight, norm.weight, norm.bias), upstream)
    return y.detach(), found


def statistics(norm):
    return norm.running_mean, norm.running_var, norm.num_batches_tracked


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("name", OPERATORS)
def test_a_kept_batch_norm_is_torchs_to_the_bit(name, momentum):
    call, x, weight, theirs, ours = case(name, momentum)
    layer = KeptNorm(call, ours)
    for mode in (True, True, False):
        layer.train(mode)
        theirs.train(mode)
        y, found = run(layer, x, weight, ours)
        expected, wanted = run(lambda x, w: theirs(call(x, w)), x, weight, theirs)
        assert torch.equal(y, expected)
        assert all(map(torch.equal, found, wanted))
        assert all(map(torch.equal, statistics(ours), statistics(theirs)))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("name", OPERATORS)
def test_double_forward_without_quantizers_is_ordinary_batch_norm(name, momentum):
    call, x, weight, theirs, ours = case(name, momentum)
    layer = double(call, ours)
    for mode in (True, True, False):
        layer.train(mode)
        theirs.train(mode)
        y, found = run(layer, x, weight, ours)
        expected, wanted = run(lambda x, w: theirs(call(x, w)), x, weight, theirs)
        # The weight is scaled before the products instead of their sum behind: float32 rounding of sums of up to 100
        # products, gradients of sums over up to 200 values of them.
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        for mine, their in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-3, atol=2e-4)
        for mine, their in zip(statistics(ours), statistics(theirs), strict=True):
            torch.testing.assert_close(mine, their, rtol=1e-5, atol=1e-6)


def test_double_forward_quantizes_the_weight_with_the_running_deviation():
    call, x, weight, _, ours = case("conv2d")
    layer = double(call, ours, enabled=True).train()
    before = ours.running_var.clone(), ours.running_mean.clone()
    y = layer(x, weight)
    plain = call(x, weight)
    count = plain.numel() // 6
    var, mean = torch.var_mean(plain, (0, 2, 3), correction=0)
    running = 0.9 * before[0] + 0.1 * var * count / (count - 1)
    folded = weight * (GAMMA / (running + 1e-3).sqrt()).reshape(-1, 1, 1, 1)
    on_grid = 0.1 * (folded / 0.1).round().clamp(-8, 7)
    ratio = ((running + 1e-3) / (var + 1e-3)).sqrt().reshape(1, -1, 1, 1)
    shift = (ours.bias - GAMMA * mean / (var + 1e-3).sqrt()).reshape(1, -1, 1, 1)
    torch.testing.assert_close(y, call(x, on_grid) * ratio + shift, rtol=1e-4, atol=1e-5)


def test_double_forward_freezes_its_statistics_after_the_steps_it_was_given():
    call, x, weight, _, ours = case("conv2d")
    layer = double(call, ours, freeze_after=2).train()
    seen = []
    for _ in range(4):
        y = layer(x, weight)
        seen.append(ours.running_mean.clone())
    assert not torch.equal(seen[0], seen[1])
    assert torch.equal(seen[1], seen[2])
    assert torch.equal(seen[2], seen[3])
    assert torch.equal(y, layer.eval()(x, weight))  # frozen, training computes what eval does
    other = double(call, case("conv2d")[4], freeze_after=2)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other.train()(x, weight), y)  # the count of steps travels with the state


def test_double_forward_with_freeze_after_0_never_uses_the_batch():
    call, x, weight, _, ours = case("conv2d")
    before = ours.running_mean.clone()
    double(call, ours, freeze_after=0).train()(x, weight)
    assert torch.equal(ours.running_mean, before)


def test_what_eval_folds_is_told_to_the_bit():
    call, x, weight, _, ours = case("conv2d")
    layer = double(call, ours, enabled=True).eval()
    shift = ours.bias - ours.running_mean * torch.rsqrt(ours.running_var + 1e-3) * ours.weight
    expected = call(x, layer.quantizer(layer.folded(weight)))
    torch.testing.assert_close(layer(x, weight), expected + shift.reshape(1, -1, 1, 1), rtol=1e-5, atol=1e-6)
    assert not torch.equal(layer.folded(weight), weight)


@pytest.mark.parametrize("kind", [KeptNorm, double])
def test_one_value_per_channel_is_refused_by_the_name_of_the_layer(kind):
    call, x, weight, _, ours = case("gemm")
    layer = kind(call, ours).train()
    with pytest.raises(TrainingError, match=r"^bn: a batch in training must hold 2 values per channel or more; got 1"):
        layer(x[:1], weight)
    assert layer.eval()(x[:1], weight).shape == (1, 6)


def test_one_sample_with_several_values_per_channel_is_a_batch():
    call, x, weight, theirs, ours = case("conv2d")
    assert torch.equal(KeptNorm(call, ours).train()(x[:1], weight), theirs.train()(call(x[:1], weight)))


@pytest.mark.parametrize("kind", [KeptNorm, double])
def test_statistics_under_autocast_are_those_of_float32(kind):
    call, x, weight, _, ours = case("conv2d")
    started = copy.deepcopy(ours)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kind(call, ours).train()(x, weight)
        product = call(x, weight)
    assert product.dtype == torch.bfloat16
    var, mean = torch.var_mean(product.float(), (0, 2, 3))
    assert ours.running_mean.dtype == torch.float32
    torch.testing.assert_close(ours.running_mean, 0.9 * started.running_mean + 0.1 * mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.running_var, 0.9 * started.running_var + 0.1 * var, rtol=1e-5, atol=1e-6)


def test_it_takes_over_the_tensors_of_another():
    plain = BatchNorm(0.2, 1e-3)
    plain.weight, plain.running_mean = nn.Parameter(torch.ones(3)), torch.zeros(3)
    plain.running_var, plain.num_batches_tracked = torch.ones(3), torch.tensor(4)
    made = SyncedBatchNorm.taking(plain.eval(), "bn")
    assert made.weight is plain.weight and made.running_mean is plain.running_mean and made.bias is None
    assert (made.momentum, made.eps, made.training) == (0.2, 1e-3, False)
    assert list(made.state_dict()) == list(plain.state_dict())
