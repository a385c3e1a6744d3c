# SPDX-License-Identifier: Apache-2.0
"""A result that trains is a plain module: state dicts, copies, compilation, autocast, accumulation, schedulers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qhw
from qhw.engine.result import flat_outputs
from qhw.numerics import LearnedQuantizer
from qhw.testing import MODELS, calibration_for, example
from tests.training_support import images, labels, network, steps, trainable

WAYS = {
    "static": {"per": "tensor"},
    "kept": {},
    "double": {"train": {"prefer": ["double_forward"]}},
    "frozen double": {"train": {"prefer": ["double_forward"], "options": {"double_forward": {"freeze_after": 2}}}},
    "lsq+": {"train": {"prefer": ["lsq_plus"]}},
    "re-estimated": {"train": {"prefer": ["kept_batch_norm", "reestimated_ranges"]}},
}


def gradients(result):
    return {name: p.grad for name, p in result.named_parameters() if p.grad is not None}


def assert_alike(one, other, *, rtol, atol):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=rtol, atol=atol, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_a_state_dict_brings_a_second_result_to_the_same_state(way):
    one, other = trainable(**WAYS[way]), trainable(network(5), images(seed=8), **WAYS[way])
    steps(one, 3)
    assert not torch.equal(one(images()), other(images()))
    found = other.load_state_dict(one.state_dict())
    assert not found.missing_keys and not found.unexpected_keys
    assert torch.equal(one(images()), other(images()))
    assert steps(one, 2) == steps(other, 2)
    assert torch.equal(qhw.freeze(one)(images()), qhw.freeze(other)(images()))


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_in_the_midst_of_training_goes_its_own_way(way):
    one = trainable(**WAYS[way])
    steps(one, 2)
    other = copy.deepcopy(one)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    steps(one, 2, lr=0.01)
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
    steps(other, 2, lr=0.01)
    assert all(torch.equal(value, one.state_dict()[name]) for name, value in other.state_dict().items())


COMPILED = [(way, mode) for way in ("static", "kept", "double", "lsq+") for mode in ("train", "eval")]


# In training a count of steps, as `freeze_after` has it, breaks the graph in two.
@pytest.mark.parametrize(
    ("way", "mode"),
    [
        pytest.param(*case, marks=() if case == ("kept", "train") else pytest.mark.slow)
        for case in (*COMPILED, ("frozen double", "eval"))
    ],
)
def test_it_compiles_in_one_graph(way, mode):
    torch._dynamo.reset()
    one = trainable(**WAYS[way])
    one.train(mode == "train")
    other = copy.deepcopy(one)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for number in range(3):
        x = images(seed=number)
        expected, y = one(x), compiled(x)
        # Compiled, the quantizers run whole and the ReLUs apart: the values are equal to the bit.
        assert torch.equal(y, expected)
        expected.square().sum().backward()
        y.square().sum().backward()
        # Scales' gradients are summed in another order: up to 24 * 512 terms.
        assert_alike(gradients(other), gradients(one), rtol=1e-3, atol=2e-3)
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, msg=name)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_it_trains_under_autocast(way):
    result = trainable(**WAYS[way])
    result.train()
    exact = copy.deepcopy(result)
    optimizer = torch.optim.Adam(qhw.parameter_groups(result, 1e-3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = result(images())
        loss = F.cross_entropy(y, labels())
    loss.backward()
    assert all(bool(torch.isfinite(grad).all()) and grad.dtype == torch.float32 for grad in gradients(result).values())
    optimizer.step()
    # bfloat16 has 8 bits: products of codes up to 8 bits are rounded to them.
    expected = exact(images())
    assert float((y.float() - expected).detach().abs().max()) < 0.15 * float(expected.detach().abs().max())
    qhw.freeze(result.eval())


@pytest.mark.parametrize("way", ["static", "lsq+"])
@pytest.mark.slow
def test_accumulated_gradients_are_those_of_one_batch(way):
    words = dict(WAYS[way])
    words["train"] = {**words.get("train", {}), "without": ["kept_batch_norm"]}
    one, other = trainable(**words), trainable(**words)
    x, y = images(32), labels(32)
    F.cross_entropy(one(x), y).backward()
    for part in range(4):
        (F.cross_entropy(other(x[part * 8 : part * 8 + 8]), y[part * 8 : part * 8 + 8]) / 4).backward()
    # Sums over 32 samples in another order.
    assert_alike(gradients(other), gradients(one), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_optimizers_and_schedulers_take_its_groups(name):
    result = trainable()
    groups = qhw.parameter_groups(result, 1e-2, optimizer="sgd" if name == "SGD" else "adam")
    optimizer = getattr(torch.optim, name)(groups)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    start = [group["lr"] for group in optimizer.param_groups]
    result.train()
    x, y = images(48), labels(48)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = F.cross_entropy(result(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert all(group["lr"] < lr for group, lr in zip(optimizer.param_groups, start, strict=True))


def test_scales_get_the_gradient_of_every_tensor_that_shares_them():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)

        def forward(self, x):
            return self.c(self.a(x) + self.b(x)).mean((2, 3))

    torch.manual_seed(0)
    from tests.training_support import TARGET, WORDS, parse_target

    text = TARGET.format(**WORDS).replace(
        'operators.Add = { kernels = ["pair"] }', 'operators.Add = { kernels = ["pair"], same_scale = "inputs" }'
    )
    result = trainable(Sum().eval(), accelerator=parse_target(text))
    one, other = result.quantizer("a"), result.quantizer("b")
    assert one is other
    result.train()
    seen = []
    one.register_forward_hook(lambda module, given, output: seen.append((given[0].detach(), output)))
    y = result(images())
    assert len(seen) == 2
    upstream = torch.autograd.grad(y.sum(), [output for _, output in seen], retain_graph=True)
    y.sum().backward()
    by_hand = 0.0
    for (x, output), grad in zip(seen, upstream, strict=True):
        scale, zero = float(one.scale.detach()), round(float(one.zero_point.detach()))
        code = (x.double() / scale).round() + zero
        inside = (code >= 0) & (code <= 255)
        error = torch.where(inside, output.double() / scale - x.double() / scale, code.clamp(0, 255) - zero)
        by_hand += float((grad.double() * error).detach().sum())
    factor = float(one.scale.detach()) * 0.6931471805599453 if one.domain == "log2" else 1.0
    assert float(one.scale_parameter.grad) == pytest.approx(by_hand * factor, rel=1e-3, abs=1e-4)


def test_it_moves_to_another_device():
    result = trainable()
    result.to("meta")
    assert {tensor.device.type for tensor in (*result.parameters(), *result.buffers())} == {"meta"}


@pytest.mark.parametrize("name", MODELS)
def test_every_tiny_model_trains_a_step_and_freezes(name):
    model, inputs = example(name)
    result = qhw.quantize(
        model,
        "whitepaper/generic-int8",
        example_inputs=inputs,
        calibration=list(calibration_for(inputs)),
        pipeline="whitepaper-qat",
    )
    try:
        qhw.trainable(result)
    except qhw.QhwError as error:
        assert "scale is free" in str(error) or "trains nothing" in str(error)
        return
    named = inputs if isinstance(inputs, dict) else None
    given = inputs if isinstance(inputs, tuple) else (inputs,)
    given = tuple(named[name] for name in result.input_names) if named else given
    result.train()
    groups = qhw.parameter_groups(result, 1e-3)
    optimizer = torch.optim.Adam(groups)
    before = {n: p.detach().clone() for n, p in result.named_parameters()}
    sum(leaf.float().square().sum() for leaf in flat_outputs(result(*given))).backward()
    optimizer.step()
    learned = [module for module in result.modules() if isinstance(module, LearnedQuantizer)]
    assert learned
    assert all(m.scale_parameter.grad is not None for m in learned)
    moved = [n for n, p in result.named_parameters() if not torch.equal(p.detach(), before[n])]
    assert any("scale_parameter" in n for n in moved) and any("scale_parameter" not in n for n in moved)
    result.eval()
    with torch.no_grad():
        expected = flat_outputs(result(*given))
        frozen = qhw.freeze(result)
        found = flat_outputs(frozen(*given))
    for one, other in zip(found, expected, strict=True):
        # Merged batch norms and rounded biases move a tie here and there: a few codes of 8 bits at most.
        assert float((one - other).abs().max()) <= 0.1 * float(other.abs().max()) + 1e-6
