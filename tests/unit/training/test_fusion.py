# SPDX-License-Identifier: Apache-2.0
"""Which clips a quantizer takes over, and that nothing changes by it."""

import copy
import math

import pytest
import torch
from torch import nn

import qhw
from qhw.numerics import LearnedQuantizer
from tests.training_support import images, network, trainable


def clips(result):
    return {m.name: m.clip for m in result.modules() if isinstance(m, LearnedQuantizer) and m.clip[1] != -m.clip[0]}


def relus(result):
    return sum("relu" in str(n.target) or "tanh" in str(n.target) for n in result.module.graph.nodes)


def test_a_relu_in_front_of_its_quantizer_is_taken_over_and_nothing_changes(monkeypatch):
    fused = trainable()
    assert clips(fused) == dict.fromkeys(("0", "3", "6"), (0.0, math.inf))
    assert relus(fused) == 0
    monkeypatch.setattr("qhw.training.form.fuse_clips", lambda graph: None)
    apart = trainable()
    assert relus(apart) == 3 and not clips(apart)
    for result in (fused, apart):
        result.train()
    x = images(64)
    y, expected = fused(x), apart(x)
    assert torch.equal(y, expected)
    y.square().sum().backward()
    expected.square().sum().backward()
    # A scale's gradient is a sum of up to 64 * 8 * 8 * 8 terms that is formed in another order.
    check_same_gradients(fused, apart, rtol=1e-4, atol=1e-3)
    frozen, other = qhw.freeze(fused), qhw.freeze(apart)
    with torch.no_grad():
        assert torch.equal(frozen(x), other(x))


def test_switched_off_the_clip_stays():
    model = network()
    result = trainable(model)
    result.set_enabled(False)
    torch.testing.assert_close(result(images()), model(images()), rtol=1e-4, atol=1e-5)


class Clips(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 1) for _ in range(6))

    def forward(self, x):
        x = nn.functional.relu6(self.convs[0](x))
        x = nn.functional.hardtanh(self.convs[1](x), -0.5, 0.75)
        x = self.convs[2](x).clamp(0.1, 0.9)  # its gradient passes at the bounds
        x = nn.functional.leaky_relu(self.convs[3](x))
        x = torch.relu(self.convs[4](x)) + x
        return self.convs[5](torch.relu(x)).mean((2, 3))


def test_only_clips_with_the_same_gradient_are_taken_over():
    torch.manual_seed(0)
    result = trainable(Clips().eval())
    found = sorted(clips(result).values())
    assert (0.0, 6.0) in found and (-0.5, 0.75) in found
    assert (0.1, 0.9) not in found
    x = images()
    with torch.no_grad():
        assert (
            torch.equal(result(x), qhw.freeze(result)(x))
            or float((result(x) - qhw.freeze(result)(x)).abs().max()) < 0.05
        )


def test_a_quantizer_that_looks_at_its_input_keeps_its_relu():
    result = trainable(train={"prefer": ["kept_batch_norm", "reestimated_ranges"]})
    assert relus(result) == 3
    result.train()
    result(images())
    assert float(result.quantizer("0").low) > -0.05  # the lowest of the ReLU's output is 0, at 0.1 of the average


def kept_bytes(result, x):
    """Bytes that the gradient of one step needs, each storage once."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        return result(x).square().sum(), sum(storages.values())


def check_same_gradients(mine, theirs, **tolerances):
    """Parameter by parameter; without tolerances to the bit."""
    for (name, one), (other, two) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
        assert name == other and (one.grad is None) == (two.grad is None)
        if one.grad is not None and tolerances:
            torch.testing.assert_close(one.grad, two.grad, **tolerances)
        elif one.grad is not None:
            assert torch.equal(one.grad, two.grad)


def test_the_output_of_a_kept_batch_norm_is_made_again_for_the_gradient_and_nothing_changes(monkeypatch):
    kept = {"prefer": ["kept_batch_norm"]}
    remade = trainable(train=kept)
    monkeypatch.setattr("qhw.training.form.fuse_norms", lambda graph: None)
    stored = trainable(train=kept)
    x = images(64)
    for result in (remade, stored):
        result.train()
    (loss, bytes_remade), (expected, bytes_stored) = kept_bytes(remade, x), kept_bytes(stored, x)
    assert torch.equal(loss, expected)
    # float32 of 64 images: 8 x 8 x 8 behind two of the layers; the last, 6 x 3 x 3 values, is too small for pieces.
    assert bytes_stored - bytes_remade > 2 * 4 * 64 * 8 * 8 * 8 * 0.95
    loss.backward()
    expected.backward()
    check_same_gradients(remade, stored, rtol=1e-4, atol=2e-3)
    for name, value in remade.state_dict().items():
        assert torch.equal(value, stored.state_dict()[name]), name


def test_a_step_that_stops_between_batch_norm_and_quantizer_leaves_nothing_behind():
    result, untouched = (trainable(train={"prefer": ["kept_batch_norm"]}) for _ in range(2))

    def stop(*_):
        raise KeyboardInterrupt

    hook = result.quantizer("0").register_forward_pre_hook(stop)
    result.train()
    with pytest.raises(KeyboardInterrupt):
        result(images(64, seed=9))
    hook.remove()
    stopped = copy.deepcopy(result)  # no module holds a tensor of the step: those cannot be copied
    stopped.load_state_dict(untouched.state_dict())
    for other in (stopped, untouched):
        other.eval()(images(64)).square().sum().backward()
    check_same_gradients(stopped, untouched)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return torch.relu(self.second(y) + y).mean((2, 3))


def test_what_only_a_sum_reads_is_computed_again_for_the_gradient_and_nothing_changes(monkeypatch):
    torch.manual_seed(0)
    model, x = Residual().eval(), images(64)
    again = trainable(model)
    monkeypatch.setattr("qhw.training.form.drop_results", lambda graph: None)
    kept = trainable(model)
    (loss, bytes_again), (expected, bytes_kept) = kept_bytes(again, x), kept_bytes(kept, x)
    assert torch.equal(loss, expected)
    # float32 of 64 images, 8 x 8 x 8: the second convolution's result; the first one's is kept by the second.
    assert bytes_kept - bytes_again >= 4 * 64 * 8 * 8 * 8
    loss.backward()
    expected.backward()
    check_same_gradients(again, kept)


GENERIC = "whitepaper/generic-int8"  # lists what moves values


class Shortcut(nn.Module):
    """As the shortcut of a ResNet for CIFAR-10: every second pixel, and channels of zeros."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = value
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)

    def forward(self, x):
        y = torch.relu(self.first(x))
        moved = nn.functional.pad(y[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4), value=self.value)
        return torch.relu(self.second(y) + moved).mean((2, 3))


def calls(result):
    """How often each quantizer is called."""
    modules = (result.module.get_submodule(str(n.target)) for n in result.module.graph.nodes if n.op == "call_module")
    names = [module.name for module in modules if isinstance(module, LearnedQuantizer)]
    return {name: names.count(name) for name in names}


def test_values_that_were_only_moved_are_not_quantized_again_and_nothing_changes(monkeypatch):
    torch.manual_seed(0)
    model, x = Shortcut().eval(), images(64)
    once = trainable(model, accelerator=GENERIC)
    monkeypatch.setattr("qhw.training.form.drop_repeats", lambda graph: None)
    again = trainable(model, accelerator=GENERIC)
    assert calls(once)["first"] == 1 < calls(again)["first"]
    (loss, bytes_once), (expected, bytes_again) = kept_bytes(once, x), kept_bytes(again, x)
    assert torch.equal(loss, expected)
    # float32 of 64 images: what the slices and the pad give, 8 x 4 x 4 and 16 x 4 x 4 values at least.
    assert bytes_again - bytes_once >= 4 * 64 * 24 * 4 * 4
    loss.backward()
    expected.backward()
    check_same_gradients(once, again, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("value", "expected"), [(0.0, 1), (0.3, 2)])
def test_values_that_a_pad_adds_are_quantized_unless_they_are_zeros(value, expected):
    torch.manual_seed(0)
    result = trainable(Shortcut(value).eval(), accelerator=GENERIC)
    assert calls(result)["first"] == expected
