# SPDX-License-Identifier: Apache-2.0
"""The quantized model as an nn.Module: trains, copies, compiles, switches off, and holds its weights once."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import ResultError
from qhw.graph import Graph
from qhw.schema import parse_target

Quantize = Callable[..., QuantizedModel]


@pytest.fixture
def mine(result: QuantizedModel) -> QuantizedModel:
    """A copy that a test may change."""
    return copy.deepcopy(result)


def test_every_point_has_its_quantizer_and_it_is_called(result: QuantizedModel) -> None:
    nodes = [node for node in result.module.graph.nodes if node.op == "call_module"]
    called = [node.target for node in nodes if str(node.target).startswith("quantizers.")]
    assert len(called) == len(set(called)) == len(result.plan.points)
    for point in result.plan.points:
        assert result.quantizer(point.name) is result.quantizer(point.group)


def test_it_computes_what_its_encodings_say(result: QuantizedModel, images: Tensor) -> None:
    """Layer by layer in float64 from the codes, as the target would."""
    x, found, parameters = images[:8], result.encodings(), dict(result.module.named_parameters())

    def snap(value: Tensor, name: str) -> Tensor:
        q = found[name]
        shape = [-1] + [1] * (value.dim() - 1) if q.scale.dim() else []
        scale, zero = q.scale.reshape(shape), q.zero_point.reshape(shape)
        return scale * (torch.clamp((value / scale).round() + zero, q.quant_min, q.quant_max) - zero)

    def layer(name: str) -> tuple[Tensor, Tensor]:
        weight, bias = parameters[f"{name}.weight"].detach(), parameters[f"{name}.bias"].detach()
        return snap(weight, f"{name}.weight"), snap(bias, f"{name}.bias")

    y = snap(F.relu(F.conv2d(snap(x, "x"), *layer("conv1"))), "conv1")
    y = snap(torch.sin(snap(F.relu(F.conv2d(y, *layer("conv2"))), "conv2")), "sin")
    y = snap(F.linear(y.flatten(1), *layer("fc")), "fc")
    # Sums round differently: at most one code apart, and only where a value lay on a tie.
    assert (result(x) - y).abs().max() <= found["fc"].scale * 1.01
    assert ((result(x) - y).abs() < 1e-5).float().mean() > 0.95


def test_switched_off_it_is_the_folded_float_model_exactly(mine: QuantizedModel, images: Tensor) -> None:
    mine.set_enabled(False)
    assert torch.equal(mine(images), mine.float_graph(images))
    mine.set_enabled(True)
    assert not torch.equal(mine(images), mine.float_graph(images))


def test_one_point_can_be_switched_alone(mine: QuantizedModel, result: QuantizedModel, images: Tensor) -> None:
    mine.set_enabled(False, ["fc"])
    enabled = [mine.quantizer(point.name).enabled for point in mine.plan.points]
    assert enabled.count(False) == 1
    assert not torch.equal(mine(images), result(images))
    mine.set_enabled(True, ["fc"])
    assert torch.equal(mine(images), result(images))


def test_unknown_points_are_refused(mine: QuantizedModel) -> None:
    with pytest.raises(ResultError, match=r"^result: no quantizer at 'fcc'\. Points: x, conv1\.weight"):
        mine.quantizer("fcc")
    with pytest.raises(ResultError, match=r"^result: no quantizer at 'fcc'"):
        mine.set_enabled(False, ["fcc"])


def test_a_copy_is_equal_and_independent(result: QuantizedModel, images: Tensor) -> None:
    other = copy.deepcopy(result)
    assert torch.equal(other(images), result(images))
    with torch.no_grad():
        other.module.fc.weight.zero_()  # type: ignore[union-attr,operator]
    assert result.float_graph.tensor("fc.weight").abs().sum() > 0
    assert other.float_graph.tensor("fc.weight").abs().sum() == 0


def test_a_state_dict_makes_another_result_equal(
    graph: Graph, result: QuantizedModel, images: Tensor, quantize: Quantize
) -> None:
    other = quantize(graph, images[64:128] * 2)
    assert not torch.equal(other(images), result(images))
    other.load_state_dict(result.state_dict())
    assert torch.equal(other(images), result(images))
    assert other.encodings() == result.encodings()


def test_gradients_reach_every_parameter_straight_through(mine: QuantizedModel, images: Tensor) -> None:
    mine.train()
    x = images[:16].clone().requires_grad_()
    mine(x).square().sum().backward()
    for name, parameter in mine.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    assert x.grad is not None and x.grad.abs().sum() > 0


def test_the_gradient_of_an_unclipped_layer_is_that_of_the_quantized_product(quantize: Quantize) -> None:
    """d/dw of sum(w_fq * x_fq + b) is the quantized input: straight through, as if rounding were the identity."""
    x = torch.linspace(-1, 1, 64).reshape(32, 2)
    result = quantize(nn.Sequential(nn.Linear(2, 1)).eval(), x, prefer=["min_max", "min_max_weights"])
    result(x[:3]).sum().backward()
    weight = dict(result.module.named_parameters())["0.weight"]
    x_fq = result.quantizer("input")(x[:3])
    assert weight.grad is not None
    assert torch.allclose(weight.grad, x_fq.sum(0, keepdim=True), atol=1e-6)


def test_training_lowers_the_loss_and_the_float_graph_follows(mine: QuantizedModel, images: Tensor) -> None:
    labels = torch.arange(64) % 5
    optimizer = torch.optim.SGD(mine.parameters(), lr=0.02)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(mine(images[:64]), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    own = dict(mine.module.named_parameters())
    for name in ("conv1.weight", "fc.bias"):
        assert torch.equal(mine.float_graph.tensor(name), own[name])


def test_it_compiles(result: QuantizedModel, images: Tensor) -> None:
    compiled = torch.compile(copy.deepcopy(result), backend="aot_eager")
    assert torch.equal(compiled(images[:4]), result(images[:4]))


def test_inputs_by_name(result: QuantizedModel, images: Tensor) -> None:
    assert result.input_names == ("x",)
    assert torch.equal(result(x=images[:4]), result(images[:4]))
    for args, kwargs in (((), {}), ((), {"y": images}), ((images,), {"x": images}), ((images, images), {})):
        with pytest.raises(ResultError, match=r"^result: the model takes x; got .*\. Pass each once\.$"):
            result(*args, **kwargs)


def test_dropout_and_kept_batch_norm_switch_with_train_and_eval(
    graph: Graph, images: Tensor, quantize: Quantize
) -> None:
    result = quantize(graph, images[:64], without=["batch_norm_folding"])
    before = result.float_graph.tensor("bn1.running_mean").clone()
    still = result(images)
    assert torch.equal(result(images), still)
    result.train()
    torch.manual_seed(0)
    moving = result(images)
    assert not torch.equal(moving, still)
    assert not torch.equal(result(images), moving)  # dropout draws anew
    assert not torch.equal(result.float_graph.tensor("bn1.running_mean"), before)
    result.eval()
    assert torch.equal(result(images), result(images))
    assert torch.equal(result.module.get_submodule("bn1").running_mean, result.float_graph.tensor("bn1.running_mean"))


def test_weights_are_held_once(result: QuantizedModel, images: Tensor) -> None:
    for each in (result, copy.deepcopy(result)):
        own = {tensor.data_ptr() for tensor in each.parameters()}
        assert {tensor.data_ptr() for tensor in each.float_graph.module.parameters()} == own


def test_the_float_graph_follows_a_conversion(mine: QuantizedModel) -> None:
    mine.double()
    assert {tensor.dtype for tensor in mine.float_graph.module.parameters()} == {torch.float64}
    assert mine.float_graph.tensor("fc.weight") is dict(mine.module.named_parameters())["fc.weight"]


class Awkward(nn.Module):
    """Names that collide with the quantizers' own: a layer called `quantizers`, and `a.b` beside `a_b`."""

    def __init__(self) -> None:
        super().__init__()
        self.quantizers = nn.Conv2d(3, 3, 1)
        self.a_b = nn.Conv2d(3, 3, 1)
        self.a = nn.Module()
        self.a.b = nn.Conv2d(3, 3, 1)
        nn.init.constant_(self.a.b.weight, 7.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.a.b(self.a_b(self.quantizers(x)))  # type: ignore[no-any-return]


def test_names_that_collide_are_kept_apart(images: Tensor, quantize: Quantize) -> None:
    model = Awkward().eval()
    result = quantize(model, images[:32], prefer=["min_max_weights"])
    found = result.encodings()
    for layer in ("quantizers", "a_b", "a.b"):
        weight = model.get_submodule(layer).weight
        # Scale per output channel: largest magnitude over 127.
        wanted = weight.detach().abs().amax((1, 2, 3)).double() / 127
        assert torch.equal(found[f"{layer}.weight"].scale, wanted.float())
    result.set_enabled(False)
    assert torch.allclose(result(images), model(images), rtol=1e-5, atol=1e-5)


class HostBetween(nn.Module):
    """A host tensor with readers of both kinds, directly and through views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)
        self.fc = nn.Linear(192, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = torch.sin(x).flatten(1)
        return self.fc(flat), torch.cos(flat)


def test_a_host_tensor_is_quantized_for_the_accelerator_alone(images: Tensor, quantize: Quantize) -> None:
    model = HostBetween().eval()
    result = quantize(model, images[:32])
    assert [point.name for point in result.plan.points] == ["sin", "fc.weight", "fc.bias", "fc"]
    on_chip, on_host = result(images)
    assert torch.equal(on_host, model(images)[1])
    assert not torch.equal(on_chip, model(images)[0])


def test_an_edge_that_is_requantized_reads_codes_of_both_formats(images: Tensor, quantize: Quantize) -> None:
    text = """
    schema_version = 1
    name = "acme/edges"
    formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
    formats.a4 = { bits = 4, signed = true, zero_point = 0, per = "tensor" }
    formats.w8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
    kernels.wide = { input = ["a8"], weight = ["w8"], output = ["a8"] }
    kernels.narrow = { input = ["a4"], weight = ["w8"], output = ["a8"] }
    operators.Conv = { kernels = ["wide"] }
    operators.Gemm = { kernels = ["narrow"] }
    """
    layers = (nn.Conv2d(3, 2, 1), nn.Flatten(), nn.Linear(128, 2))
    result = quantize(nn.Sequential(*layers).eval(), images[:32], parse_target(text), prefer=["min_max"])
    roles = {point.name: (point.role, point.format) for point in result.plan.points}
    assert roles["2.input.0"] == ("edge", "a4")
    # Symmetric, so each scale is the largest magnitude over the largest code; both saw the same float tensor.
    found = result.encodings()
    assert found["2.input.0"].scale.item() * 7 == pytest.approx(found["0"].scale.item() * 127, rel=0.2)
    seen: list[Tensor] = []
    result.quantizer("2.input.0").register_forward_hook(lambda module, args, output: seen.append(args[0]))
    result(images[:4])
    codes = seen[0] / found["0"].scale
    assert torch.allclose(codes, codes.round(), atol=1e-3)


def test_a_group_without_qparams_is_refused(result: QuantizedModel) -> None:
    qparams = result.encodings()
    del qparams["fc"]
    with pytest.raises(ResultError, match=r"^result: no scale for 'fc'\. Quantize again\.$"):
        QuantizedModel(result.float_graph, result.plan, result.target, qparams)


def test_shared_weights_stay_shared(quantize: Quantize) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(torch.tanh(self.a(x)))  # type: ignore[no-any-return]

    result = quantize(qhw.capture(Tied().eval(), torch.randn(2, 4)), torch.randn(32, 4))
    assert len(list(result.parameters())) == 1
    assert [point.name for point in result.plan.points if point.role == "weight"] == ["a.weight"]
    twin = copy.deepcopy(result)
    assert twin.module.b.weight is twin.module.a.weight  # type: ignore[union-attr]
