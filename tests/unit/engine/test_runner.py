# SPDX-License-Identifier: Apache-2.0
"""Applying a plan: scales against hand arithmetic, the user's model untouched, broken weights named."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qhw.engine import QuantizedModel
from qhw.errors import RangeError
from qhw.graph import Graph
from qhw.schema import TargetSpec, parse_target

ROOT = Path(__file__).parents[3]
Quantize = Callable[..., QuantizedModel]


def test_the_users_model_is_left_as_it_was(net: nn.Module, images: Tensor, quantize: Quantize) -> None:
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    result = quantize(net, images[:32])
    assert net.training and all(module.training for module in net.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert not result.training
    with torch.no_grad():
        result.module.fc.weight.add_(1)  # type: ignore[union-attr,operator]
    assert torch.equal(net.state_dict()["fc.weight"], before["fc.weight"])


def test_the_captured_graph_and_the_random_state_are_left_as_they_were(
    graph: Graph, images: Tensor, quantize: Quantize
) -> None:
    fingerprint = graph.fingerprint()
    torch.manual_seed(7)
    wanted = torch.rand(2)
    torch.manual_seed(7)
    quantize(graph, images[:32])
    assert torch.equal(torch.rand(2), wanted)
    assert graph.fingerprint() == fingerprint


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["conv1.weight", "conv2.bias", "bn1.running_var", "bn1.weight"])
def test_broken_weights_are_named(graph: Graph, images: Tensor, quantize: Quantize, name: str, value: float) -> None:
    broken = graph.copy()
    tensor = broken.tensor(name).detach().clone()
    tensor.view(-1)[0] = value
    broken.set_tensor(name, tensor)
    message = rf"^{name}: holds NaN or infinite values\. Repair the checkpoint before quantizing\.$"
    with pytest.raises(RangeError, match=message):
        quantize(broken, images[:32])


class Scale(nn.Module):
    """Multiplies its input; a stand-in for an overflow inside the model."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(x * 1000)


def test_values_that_overflow_inside_the_model_are_named(images: Tensor, quantize: Quantize) -> None:
    with pytest.raises(RangeError, match=r"^0\.exp: values must be finite; got inf in 1 of 1 ranges\."):
        quantize(nn.Sequential(Scale(), nn.Conv2d(3, 2, 1)).eval(), images[:32])


def test_a_mask_of_infinities_is_no_broken_weight(quantize: Quantize) -> None:
    class Masked(nn.Module):
        mask: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)
            self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -torch.inf]))

        def forward(self, x: Tensor) -> Tensor:
            return torch.softmax(self.fc(x) + self.mask, -1)

    assert torch.isfinite(quantize(Masked().eval(), torch.randn(8, 4))(torch.randn(8, 4))).all()


def test_dead_channels_and_constants_get_valid_scales(images: Tensor, quantize: Quantize) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0.0  # type: ignore[index]
        model[0].weight[2:] = 0.0  # type: ignore[index]
        model[0].bias.copy_(torch.tensor([-100.0, 0.0, 0.0, 0.0]))  # type: ignore[union-attr,arg-type]
    result = quantize(model, images[:40], prefer=["min_max_weights"])  # the first layer gives zeros alone
    for group, qparams in result.encodings().items():
        assert bool((qparams.scale > 0).all()) and bool(torch.isfinite(qparams.scale).all()), group
    assert torch.isfinite(result(images[:4])).all()
    scale = result.encodings()["0.weight"].scale
    assert torch.equal(scale[1:], scale[:1].expand(3))  # dead channels take the largest scale of the others


def test_bias_scales_are_the_float32_product_of_input_and_weight_scales(
    result: QuantizedModel,
) -> None:
    found = result.encodings()
    for layer, source in (("conv1", "x"), ("conv2", "conv1"), ("fc", "sin")):
        bias = found[f"{layer}.bias"]
        assert torch.equal(bias.scale, found[source].scale * found[f"{layer}.weight"].scale)
        assert (bias.quant_min, bias.quant_max) == (-(2**31), 2**31 - 1)
        assert not bias.zero_point.any()
        point = result.plan.point(f"{layer}.bias")
        real = dict(result.module.named_parameters())[f"{layer}.bias"].detach().double()
        assert torch.equal(result.codes(point).double(), (real.float() / bias.scale).double().round())


class Shared(nn.Module):
    """One layer called twice; or two that share their weight, or their bias."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 3, 1)
        self.b = self.a if what == "layer" else nn.Conv2d(3, 3, 1)
        if what != "layer":
            setattr(self.b, what, getattr(self.a, what))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(torch.relu(self.a(x)) * 4.0)  # type: ignore[no-any-return]


@pytest.mark.parametrize("what", ["layer", "weight", "bias"])
def test_each_operator_has_its_own_bias_scale_where_parameters_are_shared(
    what: str, images: Tensor, quantize: Quantize
) -> None:
    result = quantize(Shared(what).eval(), images[:32])
    biases = [point for point in result.plan.points if point.role == "bias"]
    weights = {name: point for point in result.plan.points if point.role == "weight" for name in point.consumers}
    tensors = [point for point in result.plan.points if point.role in ("input", "activation")]
    inputs = {name: point for point in tensors for name in point.consumers}
    assert len(biases) == 2
    found = result.encodings()
    for bias in biases:
        (operator,) = bias.consumers
        wanted = found[inputs[operator].group].scale * found[weights[operator].group].scale
        assert torch.equal(found[bias.group].scale, wanted)
    assert not torch.equal(found[biases[0].group].scale, found[biases[1].group].scale)
    # Each bias goes through its own quantizer alone: once per operator in the code that runs.
    code = str(result.module.code)
    assert sum(code.count(f"{name}(") for name in ("bias",)) + code.count("bias_1(") == 2


def test_a_grouped_transposed_convolution_repeats_its_weight_scales(images: Tensor, quantize: Quantize) -> None:
    x = torch.cat([images, images], 1)[:32]
    result = quantize(nn.ConvTranspose2d(6, 4, 2, groups=2).eval(), x)
    found = result.encodings()
    assert found["weight"].scale.shape == (2,)  # weight [in = 6, out / groups = 2, 2, 2]
    assert torch.equal(found["bias"].scale, found["input"].scale * found["weight"].scale.repeat(2))


def test_a_bias_that_leaves_its_width_gets_coarser_weights(images: Tensor, quantize: Quantize) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).eval()
    with torch.no_grad():
        model[0].weight[1] *= 1e-9  # type: ignore[operator,union-attr,index]
        model[0].bias.copy_(torch.tensor([0.5, -3.0, 1.0]))  # type: ignore[union-attr,arg-type,operator]
    result = quantize(model, images[:32])
    found = result.encodings()
    codes = result.codes(result.plan.point("0.bias")).tolist()
    # The dead channel's bias takes (nearly) the whole 32 bits, the others keep the scale their weights ask for.
    assert -(2**31) < codes[1] < -(2**31) * 0.999
    assert found["0.weight"].scale[0].item() == pytest.approx(model[0].weight[0].abs().max().item() / 127, rel=0.2)  # type: ignore[operator,union-attr,index]
    with torch.no_grad():
        wrong = (result(images[:32]) - model(images[:32])).abs().amax((0, 2, 3))
    output = found["0"].scale.item()
    assert wrong[1].item() <= output / 2 * (1 + 1e-4)  # the rounding of the output alone


def test_a_bias_scale_of_its_own_is_the_finest_that_covers_it(
    images: Tensor, quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    own = target_with(('biases.b = { bits = 32, scale = "input*weight" }', 'biases.b = { bits = 16, scale = "own" }'))
    model = nn.Sequential(nn.Conv2d(3, 3, 1)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([0.5, -2.0, 1.0]))  # type: ignore[union-attr,arg-type,operator]
    found = quantize(model, images[:32], own).encodings()["0.bias"]
    assert found.scale.item() == pytest.approx(2.0 / 32767, rel=2**-24)


def test_weights_with_a_scale_per_group_of_inputs_have_no_integer_bias(
    quantize: Quantize, target_with: Callable[..., TargetSpec]
) -> None:
    groups = ('zero_point = 0, per = "out_channel" }', 'zero_point = 0, per = "group", group_size = 4 }')
    model, data = nn.Sequential(nn.Linear(8, 4)).eval(), torch.randn(32, 8)
    chosen = quantize(model, data, target_with(groups)).plan
    assert [point.format for point in chosen.points if point.role == "weight"] == ["w4"]
    (hosted,) = quantize(model, data, target_with(groups, ('["w8", "w4"]', '["w8"]'))).plan.operators
    assert (hosted.where, hosted.subject) == ("host", "kernels.mac16.weight")
    assert "sums have no one scale, and its bias is in units of it" in hosted.reason


FIXED = ", fixed_output = { a8 = { scale = 0.0078125, zero_point = 0 } }"
GROUP = """
schema_version = 1
name = "acme/group"
formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
biases.b = { bits = 32, scale = "input*weight" }
kernels.mac = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"] }
kernels.act = { input = ["a8"], output = ["a8"] }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Concat = { kernels = ["act"], same_scale = "all" }
operators.Sigmoid = { kernels = ["act"], fixed_output = { a8 = { scale = 0.0078125, zero_point = 0 } } }
"""


class Join(nn.Module):
    """Two branches with ranges 1 and 3, joined."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 1, 1)
        self.b = nn.Conv2d(1, 1, 1)
        self.last = nn.Conv2d(2, 1, 1)
        for layer, weight in ((self.a, 1.0), (self.b, -3.0)):
            nn.init.constant_(layer.weight, weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.last(torch.cat([torch.relu(self.a(x)), self.b(x)], 1)))


@pytest.mark.parametrize("prefer", ["min_max", "mse"])
def test_tensors_on_one_scale_get_one_that_covers_all_of_them(quantize: Quantize, prefer: str) -> None:
    x = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x[0, 0, 0, 0] = 1.0
    result = quantize(Join().eval(), x, parse_target(GROUP), prefer=prefer)
    groups = {point.name: point.group for point in result.plan.points}
    assert len({groups["a"], groups["b"], groups["concat"]}) == 1
    # Union of [0, 1] and [-3, 0] is [-3, 1]; 3 / 128 rounds up to 2**-5. MSE may clip, by whole powers of two.
    scale = result.encodings()[groups["a"]].scale.item()
    assert scale == 2.0**-5 if prefer == "min_max" else scale in (2.0**-5, 2.0**-6)
    assert result.quantizer("a") is result.quantizer("concat")


def test_a_prescribed_encoding_is_used_as_it_stands(quantize: Quantize) -> None:
    result = quantize(Join().eval(), torch.rand(32, 1, 4, 4), parse_target(GROUP))
    encoding = result.encodings()["sigmoid"]
    assert (encoding.scale.item(), encoding.zero_point.item()) == (2.0**-7, 0)


@pytest.mark.parametrize("prefer", ["min_max", "mse"])
def test_a_range_that_the_target_states_cuts_what_calibration_saw(quantize: Quantize, prefer: str) -> None:
    """Values beyond saturate on the chip, so no code is spent on them."""
    text = GROUP.replace('fused = ["Relu"] }', "range = { min = -1.0, max = 1.0 } }")
    text = text.replace(', zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }', ', per = "tensor" }')
    model = nn.Sequential(nn.Conv2d(1, 1, 1)).eval()
    with torch.no_grad():
        model[0].weight.fill_(10.0)  # type: ignore[operator,union-attr]
    x = torch.linspace(-1, 1, 64 * 16).reshape(64, 1, 4, 4)
    encoding = quantize(model, x, parse_target(text), prefer=prefer).encodings()["0"]
    wanted = 2.0 / 255
    assert encoding.scale.item() <= wanted * (1 + 2**-23)
    if prefer == "min_max":
        assert encoding.scale.item() == pytest.approx(wanted, rel=2**-23)


def test_bounds_of_a_group_are_those_of_its_widest_member(quantize: Quantize) -> None:
    """A result in [0, 1] and one without bounds share a scale: nothing is cut."""
    text = GROUP.replace(FIXED, "")

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return torch.cat([torch.sigmoid(y), y], 1)

    model = Mixed().eval()
    with torch.no_grad():
        model.conv.weight.fill_(100.0)
    result = quantize(model, torch.ones(32, 1, 2, 2), parse_target(text), prefer="min_max")
    group = result.plan.point("sigmoid").group
    assert group == result.plan.point("conv").group
    assert result.encodings()[group].scale.item() == 1.0  # 100 / 127, up to a power of two


SCRIPT = """
import hashlib, sys, torch, qhw
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
x = torch.randn(50, 3, 8, 8)
result = qhw.quantize(net, "whitepaper/generic-int8", example_inputs=x[:2], calibration=x.split(int(sys.argv[1])))
digest = hashlib.sha256(result.plan.to_json().encode())
for name, tensor in sorted(result.state_dict().items()):
    digest.update(name.encode() + tensor.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.mark.slow
def test_fresh_processes_give_the_same_bytes() -> None:
    def once(size: int, **variables: str) -> str:
        paths = ":".join(str(ROOT / place) for place in (".", "plugins", "targets"))
        environment: dict[str, Any] = {"PYTHONPATH": paths, "PATH": "/usr/bin:/bin", **variables}
        command = [sys.executable, "-c", SCRIPT, str(size)]
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True).stdout

    assert once(7, PYTHONHASHSEED="1") == once(50, PYTHONHASHSEED="2")
