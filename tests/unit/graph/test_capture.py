# SPDX-License-Identifier: Apache-2.0
"""Capture: the same function at any batch size, in eval and in training, and the model left as it was."""

import copy
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qhw.errors import CaptureError
from qhw.graph import capture
from qhw.testing.models import MODELS, calibration_for, example

torch.manual_seed(0)
CLOSE = {"rtol": 0, "atol": 1e-5}  # the same float operators on values of order 1; sums may be reordered


def leaves(value):
    return torch.utils._pytree.tree_leaves(value)


def call(function, inputs):
    return function(**inputs) if isinstance(inputs, dict) else function(inputs)


def resized(inputs, batch):
    return torch.utils._pytree.tree_map(lambda t: t[:1].repeat(batch, *[1] * (t.dim() - 1)) + 0, inputs)


def assert_same(got, wanted):
    got, wanted = leaves(got), leaves(wanted)
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_a_captured_graph_computes_what_the_model_does(captured, name, batch):
    model, inputs = example(name)
    sample = next(iter(calibration_for(resized(inputs, batch))))
    assert_same(call(captured(name).module, sample), call(model, sample))


@pytest.mark.parametrize("name", MODELS)
def test_the_state_dict_has_the_models_names(captured, name):
    model, _ = example(name)
    moved = {"gamma", "beta", "mean", "var"}  # a functional batch norm becomes a submodule with names of its own
    here = {f"batch_norm.{n}" for n in ("weight", "bias", "running_mean", "running_var")}
    names = set(model.state_dict())
    found = {held for held in captured(name).module.state_dict() if not held.endswith("_number")}
    assert found == (names - moved | here if name == "functional" else names)


@pytest.mark.parametrize("name", ["conv_chain", "functional", "residual", "signal"])
def test_training_follows_the_model(captured, name):
    model, inputs = example(name)
    graph = captured(name).copy()
    model.train(), graph.module.train()
    for step in range(3):
        torch.manual_seed(step)
        wanted = call(model, inputs)
        torch.manual_seed(step)  # dropout draws the same numbers
        assert_same(call(graph.module, inputs), wanted)
    theirs, ours = model.state_dict(), graph.module.state_dict()
    for mine, other in (("batch_norm.running_mean", "mean"), ("batch_norm.running_var", "var")):
        ours = {other if key == mine else key: value for key, value in ours.items()}
    running = [key for key in theirs if "running" in key or key in ("mean", "var") or "tracked" in key]
    assert bool(running) == (name != "residual")
    for key in running:
        torch.testing.assert_close(ours[key], theirs[key], **CLOSE)


def test_gradients_reach_every_parameter(captured):
    graph = captured("conv_chain").copy()
    graph.module.train()
    graph.module(torch.randn(4, 3, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in graph.module.named_parameters() if n != "b")


def test_a_deep_copy_is_independent(captured):
    graph = captured("shared").copy()
    other = copy.deepcopy(graph.module)
    with torch.no_grad():
        other.encoder.weight.mul_(2.0)
    assert other.decoder.weight is other.encoder.weight
    assert not torch.equal(graph.module.encoder.weight, other.encoder.weight)


def test_the_graph_compiles(captured):
    module = captured("conv_chain").copy().module
    x = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(torch.compile(module, backend="aot_eager")(x), module(x), **CLOSE)


def test_shared_parameters_stay_one(captured):
    module = captured("shared").module
    assert module.decoder.weight is module.encoder.weight
    assert len(list(module.parameters())) == 3  # conv weight, conv bias, the tied matrix


def test_the_users_model_is_untouched():
    model, inputs = example("conv_chain")
    model.train()
    model.fc.eval()
    before = [(name, id(t), t.clone()) for name, t in model.state_dict(keep_vars=True).items()]
    flags = [module.training for module in model.modules()]
    graph = capture(model, inputs)
    assert [module.training for module in model.modules()] == flags
    for (name, t), (old_name, identity, value) in zip(model.state_dict(keep_vars=True).items(), before, strict=True):
        assert (name, id(t)) == (old_name, identity)
        assert torch.equal(t, value)
    graph.set_tensor("fc.weight", torch.zeros(5, 8))
    assert model.fc.weight.abs().sum() > 0


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(3, affine=False),
        nn.BatchNorm2d(3, track_running_stats=False),
        nn.BatchNorm2d(3, affine=False, track_running_stats=False),
        nn.BatchNorm2d(3, momentum=None),
        nn.BatchNorm2d(3, momentum=0.3, eps=0.1),
        nn.SyncBatchNorm(3),
    ],
    ids=["no-affine", "no-running-statistics", "neither", "cumulative-average", "own-momentum", "synchronized"],
)
def test_every_batch_norm_switches(norm):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), norm).eval()
    graph = capture(model, torch.randn(4, 3, 4, 4))
    assert set(graph.module.state_dict()) == set(model.state_dict())
    if not isinstance(norm, nn.SyncBatchNorm):  # it trains on an accelerator only
        model.train(), graph.module.train()
        for _ in range(3):
            x = torch.randn(4, 3, 4, 4) * 2 + 1
            torch.testing.assert_close(graph.module(x), model(x), **CLOSE)
        for key, value in model.state_dict().items():
            torch.testing.assert_close(graph.module.state_dict()[key], value, **CLOSE)
    model.eval(), graph.module.eval()
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(graph.module(x), model(x), **CLOSE)


class OwnNorm(nn.Module):
    """A batch norm in all but class."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))
        self.register_buffer("running_mean", torch.tensor([0.5, 1.0]))
        self.register_buffer("running_var", torch.tensor([4.0, 9.0]))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, None, self.training)


def test_a_home_made_batch_norm_keeps_its_names():
    model = nn.Sequential(nn.Conv1d(2, 2, 1), OwnNorm()).eval()
    graph = capture(model, torch.randn(4, 2, 5))
    assert set(graph.module.state_dict()) == set(model.state_dict())
    assert [o.kind for o in graph.operators] == ["Conv", "BatchNormalization"]


def test_a_batch_norm_whose_scale_is_computed_stays_an_operator():
    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("m", torch.zeros(2))
            self.register_buffer("v", torch.ones(2))

        def forward(self, x, g):
            return F.batch_norm(x, self.m, self.v, g[0] * 2, None, False)

    graph = capture(Conditional().eval(), (torch.randn(4, 2, 5), torch.ones(4, 2)))
    assert graph.operators[-1].kind == "Unknown"


def test_a_model_that_is_a_batch_norm():
    graph = capture(nn.BatchNorm2d(3).eval(), torch.randn(2, 3, 4, 4))
    assert [o.kind for o in graph.operators] == ["BatchNormalization"]


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.4),
        nn.Dropout2d(0.4),
        nn.AlphaDropout(0.4),
        nn.FeatureAlphaDropout(0.4),
        nn.Dropout(0.4, inplace=True),
    ],
    ids=["elements", "channels", "alpha", "alpha-channels", "in-place"],
)
def test_every_dropout_switches(layer):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), layer).eval()
    graph = capture(model, torch.randn(4, 3, 4, 4))
    x = torch.randn(4, 3, 4, 4)
    torch.testing.assert_close(graph.module(x), model(x), **CLOSE)
    model.train(), graph.module.train()
    torch.manual_seed(3)
    wanted = model(x)
    torch.manual_seed(3)
    torch.testing.assert_close(graph.module(x), wanted, **CLOSE)
    assert not torch.allclose(wanted, model.eval()(x))


def test_two_functional_dropouts_keep_their_probabilities():
    class Two(nn.Module):
        def forward(self, x):
            return F.dropout(x, 0.25, self.training) + F.dropout(x, 0.75, self.training)

    graph = capture(Two().eval(), torch.randn(2, 3))
    assert [m.p for m in graph.module.modules() if hasattr(m, "p")] == [0.25, 0.75]


def test_a_dropout_inside_attention_leaves_the_layers_beside_it_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.dropout = nn.Linear(4, 4)  # a name that a functional dropout would like to have

        def forward(self, x):
            return F.dropout(self.dropout(x), 0.5, self.training)

    model = Block().eval()
    graph = capture(model, torch.randn(2, 4))
    assert set(graph.module.state_dict()) == set(model.state_dict())
    assert [o.name for o in graph.operators] == ["dropout", "dropout_1"]


def test_named_inputs_come_in_any_order():
    model, inputs = example("two_inputs")
    assert list(inputs) == ["extra", "image"]
    graph = capture(model, inputs)
    assert list(graph.inputs) == ["image", "extra"]
    torch.testing.assert_close(graph.module(**inputs), model(**inputs), **CLOSE)
    torch.testing.assert_close(graph.module(inputs["image"], inputs["extra"]), model(**inputs), **CLOSE)


def test_an_input_named_as_pytorch_names_it_keeps_its_name():
    graph = capture(nn.Linear(3, 2), {"input": torch.randn(2, 3)})
    assert list(graph.inputs) == ["input"]


def test_a_positional_tuple():
    model, inputs = example("two_inputs")
    assert list(capture(model, (inputs["image"], inputs["extra"])).inputs) == ["image", "extra"]


def test_any_number_of_inputs():
    class Sum(nn.Module):
        def forward(self, first, *others):
            return first + others[0] * others[1]

    x = torch.randn(3, 2)
    graph = capture(Sum(), (x, x, x))
    assert len(graph.inputs) == 3
    torch.testing.assert_close(graph.module(x[:1], x[:1], x[:1]), x[:1] + x[:1] * x[:1])


def test_a_batch_of_one_is_enough():
    model, inputs = example("conv_chain")
    graph = capture(model, inputs[:1])
    assert graph.batch == 2
    x = torch.randn(7, 3, 8, 8)
    torch.testing.assert_close(graph.module(x), model(x), **CLOSE)


def test_only_a_batch_of_one_is_repeated():
    class Mask(nn.Module):
        def forward(self, x, mask):
            return x * mask

    graph = capture(Mask(), (torch.randn(4, 3), torch.ones(1, 3)))
    assert graph.inputs == {"x": (4, 3), "mask": (1, 3)}


def test_integer_inputs_are_named_with_their_type(captured):
    graph = captured("tokens")
    assert graph.inputs == {"tokens": (2, 5)}
    assert graph.input_dtypes == {"tokens": "int64"}


@dataclass
class Answer:
    a: torch.Tensor
    b: torch.Tensor


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize("kind", ["dict", "tuple", "list", "named", "nested"])
def test_outputs_keep_their_structure(kind):
    class Model(nn.Module):
        def forward(self, x):
            a, b = x + 1.0, x * 2.0
            return {
                "dict": {"a": a, "b": b},
                "tuple": (a, b),
                "list": [a, b],
                "named": Pair(a, b),
                "nested": {"z": (a, [b, None]), "n": 3},
            }[kind]

    x = torch.tensor([[1.0], [3.0]])
    got = capture(Model(), x).module(x)
    a, b = torch.tensor([[2.0], [4.0]]), torch.tensor([[2.0], [6.0]])
    wanted = {
        "dict": {"a": a, "b": b},
        "tuple": (a, b),
        "list": (a, b),
        "named": (a, b),
        "nested": {"z": (a, (b, None)), "n": 3},
    }[kind]
    assert_same(got, wanted)
    assert str(got) == str(wanted)


def test_an_output_that_is_an_input_or_a_parameter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            return x, x.flatten(1), self.w, x + self.w

    graph = capture(Model(), torch.randn(2, 3, 1).squeeze(-1).unsqueeze(1))
    assert graph.output_values == ("x", "flatten", "add")


def test_unbatched_convolutions_count_as_one_sample():
    graph = capture(nn.Conv2d(3, 4, 3), torch.randn(3, 8, 8), dynamic_batch=False)
    assert graph.operators[0].macs == 4 * 6 * 6 * 3 * 9
    assert graph.batch == 1


def test_a_fixed_batch_is_the_way_out_where_the_model_bakes_it():
    class Baked(nn.Module):
        def forward(self, x):
            return x.reshape(4, -1) * 2.0

    with pytest.raises(CaptureError, match=r"Baked: .*Keep axis 0 free .* or pass dynamic_batch=False"):
        capture(Baked(), torch.randn(4, 3, 2))
    x = torch.randn(4, 3, 2)
    torch.testing.assert_close(capture(Baked(), x, dynamic_batch=False).module(x), x.reshape(4, 6) * 2.0)


class Decides(nn.Module):
    def forward(self, x):
        if x.sum() > 0:
            return x + 1.0
        return x - 1.0


def test_a_model_of_one_sample_at_a_time_is_told_so():
    class One(nn.Module):
        def forward(self, x):
            return x.reshape(1, 6) * 2.0

    message = r"One: takes one sample, but not two at once: .*Keep axis 0 free .*x\.flatten\(1\)"
    with pytest.raises(CaptureError, match=message):
        capture(One(), torch.randn(1, 2, 3))
    with pytest.raises(CaptureError, match=r"One: fails on example_inputs: shape '\[1, 6\]' is invalid .* of size 5"):
        capture(One(), torch.randn(1, 5))


def test_a_decision_on_values_names_the_line_and_the_way_out(capfd):
    line = Decides.forward.__code__.co_firstlineno + 1
    with pytest.raises(CaptureError, match=rf"Decides: .*test_capture\.py:{line}: if x\.sum.*torch\.where"):
        capture(Decides(), torch.randn(2, 3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.randn(2, 4, 8, 8), r"_ConvChain: fails on example_inputs: .*channels.*Pass inputs of the shape"),
        (
            {"image": torch.randn(2, 3, 8, 8)},
            r"example_inputs: no input 'image'\. Inputs of the model: x\. A dict gives",
        ),
        (3.0, r"example_inputs: must be a tensor, a tuple of tensors or a dict by input name; got float"),
        ((1, "a"), r"example_inputs: no tensor among them"),
        ((), r"example_inputs: no tensor among them"),
        (torch.randn(0, 3, 8, 8), r"example_inputs: the batch \(axis 0\) is empty"),
        (
            (torch.randn(2, 3, 8, 8), 2.0),
            r"example_inputs: input 1 must be a tensor; got float\. Give it a default in forward and leave it out",
        ),
        ({"x": torch.randn(2, 3, 8, 8), "mask": None}, r"example_inputs: 'mask' must be a tensor; got NoneType\. Give"),
        (
            (torch.randn(2, 3), {"x": torch.randn(2, 3)}),
            r"example_inputs: input 1 is a dict, and nested inputs are not supported\. Let forward take each of its",
        ),
        ({"d": [torch.randn(2, 3)]}, r"example_inputs: 'd' is a list, and nested inputs are not supported\."),
        ((torch.randn(2, 3, 8, 8),) * 2, r"_ConvChain: fails on example_inputs: .*positional arguments"),
    ],
    ids=[
        "shape",
        "name",
        "number",
        "no-tensor",
        "nothing",
        "empty-batch",
        "number-beside",
        "none-beside",
        "dict-inside",
        "list-inside",
        "too-many",
    ],
)
def test_wrong_example_inputs(inputs, message):
    model, _ = example("conv_chain")
    with pytest.raises(CaptureError, match=message):
        capture(model, inputs)


def test_a_dict_that_forward_takes_whole_says_what_to_do():
    class Reads(nn.Module):
        def forward(self, d):
            return d["x"] + 1

    with pytest.raises(CaptureError, match=r"no input 'x'\. Inputs of the model: d\. .* let it take each tensor as an"):
        capture(Reads(), {"x": torch.randn(2, 3)})


@pytest.mark.parametrize(
    ("layer", "path"), [(nn.LazyLinear(4), r"0\.weight"), (nn.LazyBatchNorm1d(), r"0\.running_mean|0\.weight")]
)
def test_a_lazy_layer_is_refused_until_it_has_seen_a_batch(layer, path):
    model = nn.Sequential(layer).eval()
    with pytest.raises(
        CaptureError, match=rf"Sequential: ({path}) has no shape yet, as its layer is lazy\. Run the model on one batch"
    ):
        capture(model, torch.randn(2, 3))
    model(torch.randn(2, 3))
    assert capture(model, torch.randn(2, 3)).inputs == {"input": (2, 3)}


def test_not_a_module():
    with pytest.raises(CaptureError, match=r"model: must be a torch\.nn\.Module; got function"):
        capture(lambda x: x, torch.randn(2, 3))


class Uncopyable(nn.Linear):
    def __deepcopy__(self, memo):
        raise TypeError("holds a lock")


def test_a_model_that_cannot_be_copied():
    with pytest.raises(CaptureError, match=r"Uncopyable: cannot be copied: holds a lock\. Capture works on a copy"):
        capture(Uncopyable(3, 3), torch.randn(2, 3))


def returns(function):
    class Model(nn.Module):
        def forward(self, x):
            return function(x)

    return Model()


def test_no_tensor_comes_out():
    with pytest.raises(CaptureError, match=r"Model: returns no tensor, so there is nothing to quantize"):
        capture(returns(lambda x: 3), torch.randn(2, 3))


def test_something_random():
    with pytest.raises(CaptureError, match=r"output 0 of the captured graph differs from the model's\. Is something"):
        capture(returns(lambda x: x + torch.rand_like(x)), torch.randn(2, 3))


def test_dropout_that_never_stops():
    with pytest.raises(CaptureError, match=r"output 0 of the captured graph differs.*random"):
        capture(returns(lambda x: F.dropout(x, 0.5, True)), torch.randn(20, 3))


def test_a_batch_norm_that_always_trains_is_named():
    class Trains(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            return F.batch_norm(x, self.bn.running_mean, self.bn.running_var, training=True)

    message = (
        r"differs from the model's\. 'batch_norm' is a batch norm that trains in eval mode, too\. Give it training="
    )
    with pytest.raises(CaptureError, match=message):
        capture(Trains().eval(), torch.randn(5, 3) + 2)


def test_a_dataclass_of_outputs_is_refused_with_the_way_out():
    with pytest.raises(CaptureError, match=r"not a known type.* Return tensors in a tuple or a dict"):
        capture(returns(lambda x: Answer(x + 1, x)), torch.randn(2, 3))


def test_state_kept_by_forward_is_refused():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(3))

        def forward(self, x):
            self.seen.add_(1)
            return x + self.seen

    with pytest.raises(CaptureError, match=r"Counts: .*writes into the model's own tensor 'seen', so forward keeps"):
        capture(Counts(), torch.randn(2, 3))


def test_a_region_is_refused():
    def with_region(x):
        with torch.no_grad():
            y = x * 2
        return y + x

    with pytest.raises(CaptureError, match=r"Model: forward holds a region .*torch\.no_grad.*Take it out of forward"):
        capture(returns(with_region), torch.randn(2, 3))


def test_a_view_takes_channels_last_tensors_too() -> None:
    class Viewed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x).view(-1, 4 * 36)

    model, x = Viewed().eval(), torch.randn(4, 3, 8, 8)
    graph = capture(model, x)
    last = graph(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, model(x))
