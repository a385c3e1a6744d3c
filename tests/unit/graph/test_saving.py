# SPDX-License-Identifier: Apache-2.0
"""The saved form: the same function bit for bit, and a file that was tampered with is refused before anything runs."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from qhw.errors import CaptureError
from qhw.graph import capture, graph_from_json, graph_to_json
from qhw.graph.forms import ALLOWED_ATEN
from qhw.testing.models import MODELS, example


def call(function, inputs):
    return function(**inputs) if isinstance(inputs, dict) else function(inputs)


@pytest.mark.parametrize("name", MODELS)
def test_a_reloaded_graph_is_the_same(captured, name):
    graph = captured(name)
    text = graph_to_json(graph)
    reloaded = graph_from_json(text, {k: v.clone() for k, v in graph.module.state_dict().items()})
    _, inputs = example(name)
    wanted = torch.utils._pytree.tree_leaves(call(graph.module, inputs))
    got = torch.utils._pytree.tree_leaves(call(reloaded.module, inputs))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert reloaded.fingerprint() == graph.fingerprint()
    assert graph_to_json(reloaded) == text
    assert reloaded.operators == graph.operators
    assert reloaded.inputs == graph.inputs
    assert [n for n, _ in reloaded.module.named_parameters()] == [n for n, _ in graph.module.named_parameters()]
    assert {n for n, _ in reloaded.module.named_buffers()} == {n for n, _ in graph.module.named_buffers()}


def test_a_reloaded_graph_trains_alike(captured):
    graph = captured("conv_chain").copy()
    reloaded = graph_from_json(graph_to_json(graph), {k: v.clone() for k, v in graph.module.state_dict().items()})
    x = torch.randn(4, 3, 8, 8)
    graph.module.train(), reloaded.module.train()
    assert torch.equal(graph.module(x), reloaded.module(x))
    assert torch.equal(graph.module.bn1.running_mean, reloaded.module.bn1.running_mean)


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm2d(3, momentum=None), nn.Dropout2d(0.3), nn.AlphaDropout(0.3), nn.Hardtanh(0.0, float("inf"))],
    ids=["cumulative-average", "channels", "alpha", "infinity"],
)
def test_every_setting_survives(layer):
    graph = capture(nn.Sequential(nn.Conv2d(3, 3, 1), layer).eval(), torch.randn(2, 3, 4, 4))
    reloaded = graph_from_json(graph_to_json(graph), graph.module.state_dict())
    assert [repr(m) for m in reloaded.module.children()] == [repr(m) for m in graph.module.children()]
    assert graph_to_json(reloaded) == graph_to_json(graph)


def test_shared_tensors_need_one_name_only(captured):
    graph = captured("shared")
    tensors = dict(graph.module.state_dict())
    for dropped in ("decoder.weight", "encoder.weight"):
        fewer = {name: tensor for name, tensor in tensors.items() if name != dropped}
        reloaded = graph_from_json(graph_to_json(graph), fewer)
        assert reloaded.module.decoder.weight is reloaded.module.encoder.weight
        assert reloaded.fingerprint() == graph.fingerprint()


def test_other_tensors_in_the_file_are_passed_over(captured):
    graph = captured("pools")
    more = {**graph.module.state_dict(), "qparams/first/scale": torch.ones(())}
    assert graph_from_json(graph_to_json(graph), more).fingerprint() == graph.fingerprint()


def test_the_fingerprint_sees_every_difference(captured):
    def with_(change):
        graph = captured("conv_chain").copy()
        change(graph)
        return graph.fingerprint()

    def tensor(graph):
        graph.tensor("fc.bias").data[0] += 1e-3

    def setting(graph):
        graph.module.bn1.eps = 1e-3

    prints = [captured("conv_chain").fingerprint(), with_(tensor), with_(setting), captured("residual").fingerprint()]
    assert len(set(prints)) == 4
    assert with_(lambda graph: None) == prints[0]
    assert capture(*example("conv_chain")).fingerprint() == prints[0]


def test_an_operator_that_is_not_allowed_cannot_be_saved():
    class Model(nn.Module):
        def forward(self, x):
            return torch.linalg.svdvals(x)

    graph = capture(Model(), torch.randn(2, 3, 3))
    with pytest.raises(CaptureError, match=r"operator 'aten\.linalg_svdvals\.default' is not on the list of operators"):
        graph_to_json(graph)


class Recurrent(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Applied(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.function(self.fc(x))


@pytest.mark.parametrize(
    "model",
    [
        Recurrent(nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True, dropout=0.3)),
        Recurrent(nn.LSTM(6, 5, batch_first=True, proj_size=3)),
        Recurrent(nn.GRU(6, 5, batch_first=True)),
        Recurrent(nn.RNN(6, 5, batch_first=True)),
        nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
        Applied(lambda x: torch.fft.fft2(x).abs()),
        Applied(lambda x: torch.fft.irfft(torch.fft.rfft(x, norm="ortho"), 6)),
        Applied(lambda x: torch.meshgrid(x[0, 0], x[0, 1], indexing="ij")[1] * x.std()),
    ],
    ids=["lstm", "lstm-projected", "gru", "rnn", "weight-norm", "fft", "rfft", "meshgrid"],
)
def test_operators_that_stay_in_float_are_saved(model):
    x = torch.randn(3, 7, 6)
    graph = capture(model.eval(), x)
    reloaded = graph_from_json(graph_to_json(graph), graph.module.state_dict())
    assert torch.equal(reloaded(x), graph(x))


WORDS = {
    "approximate",
    "assert_msg",
    "equation",
    "indexing",
    "mode",
    "norm",
    "pad_mode",
    "padding",
    "reduce",
    "rounding_mode",
    "side",
}


def test_every_allowed_operator_is_a_function_of_tensors_and_numbers():
    """None writes into its arguments, and text is a mode, never a place."""
    for name in sorted(ALLOWED_ATEN):
        _, packet, overload = name.split(".")
        schema = getattr(getattr(torch.ops.aten, packet), overload)._schema
        assert not schema.is_mutable, name
        assert {a.name for a in schema.arguments if "str" in str(a.type)} <= WORDS, name


class Named(nn.Module):
    def __init__(self, name):
        super().__init__()
        self.layers = nn.ModuleDict({name: nn.Linear(3, 3)})

    def forward(self, x):
        return next(iter(self.layers.values()))(x)


def test_a_name_that_could_be_code_is_not_captured():
    with pytest.raises(
        CaptureError, match=r"Named: 'layers\.a\"b' cannot be captured: names of modules and tensors hold"
    ):
        capture(Named('a"b'), torch.randn(2, 3))
    assert graph_to_json(capture(Named("conv-1_x"), torch.randn(2, 3)))


# Tampered files. The target of every attack is this file; a test fails when it comes to exist.
@pytest.fixture
def witness(tmp_path, monkeypatch):
    path = tmp_path / "witness"
    monkeypatch.chdir(tmp_path)
    yield path
    assert not path.exists(), "code from a file ran"


CODE = "__import__('os').system('touch witness')"


def parsed(captured, name="conv_chain"):
    graph = captured(name)
    return json.loads(graph_to_json(graph)), graph.module.state_dict()


def refused(data, tensors, match=r"graph\.json: "):
    text = data if isinstance(data, str) else json.dumps(data)
    with pytest.raises(CaptureError, match=match):
        graph_from_json(text, tensors)


def node(data, op):
    return next(item for item in data["nodes"] if item["op"] == op)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "aten.from_file.default",
        "operator.attrgetter",
        "operator.methodcaller",
        "operator.__import__",
        "builtins.eval",
        "aten.relu_.default",
        "aten.set_.source_Tensor",
        "prims.device_put.default",
        "operator.getitem.__class__",
        "aten.relu.default.__globals__",
        "",
    ],
)
def test_only_listed_operators_are_called(captured, witness, target):
    data, tensors = parsed(captured)
    node(data, "call_function")["target"] = target
    refused(data, tensors, match=r"calls '.*', which is not on the list of operators .* Do not use this file")


def poison_keyword(data):
    node(data, "call_function")["kwargs"] = {f"a={CODE}, b": 1}


def poison_keyword_word(data):
    node(data, "call_function")["kwargs"] = {"lambda": 1}


def poison_tensor_name(data):
    name = f'x", {CODE}) or getattr(self, "x'
    node(data, "get_attr")["target"] = name
    data["parameters"].append(name)


def poison_module_name(data):
    name = f'x", {CODE}) or getattr(self, "x'
    data["modules"][name] = data["modules"].pop("bn1")
    node(data, "call_module")["target"] = name


def poison_input(data):
    node(data, "placeholder")["target"] = f"x={CODE}"


def poison_input_keyword(data):
    node(data, "placeholder")["target"] = "class"


def poison_node_name(data):
    node(data, "placeholder")["name"] = f"x\n    {CODE}"


def poison_default(data):
    node(data, "placeholder")["args"] = [CODE]


def poison_meta(data):
    node(data, "call_function")["meta"]["stack_trace"] = f"x\n{CODE}"


def poison_dtype(data):
    node(data, "call_function")["meta"]["dtype"] = CODE


def poison_argument(data):
    node(data, "call_function")["args"].append(CODE)


def poison_dict_word(data):
    node(data, "call_function")["args"].append({"eval": CODE})


def poison_dunder(data):
    node(data, "get_attr")["target"] = "__class__.__init__"
    data["parameters"].append("__class__.__init__")


@pytest.mark.parametrize("poison", [value for name, value in globals().items() if name.startswith("poison_")])
def test_no_code_hides_in_names_and_arguments(captured, witness, poison):
    data, tensors = parsed(captured)
    poison(data)
    refused(data, {**tensors, **dict.fromkeys(data["parameters"], torch.ones(1)), **tensors})


def edit(path, value):
    def change(data):
        here = data
        for part in path[:-1]:
            here = here[part]
        if value is None:
            del here[path[-1]]
        else:
            here[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (edit(["graph_version"], 2), r"graph_version must be 1; got 2"),
        (edit(["graph_version"], True), r"graph_version must be 1; got True"),
        (edit(["graph_version"], None), r"graph_version must be 1; got None"),
        (edit(["nodes"], None), r"is not a saved graph: nodes: Field required"),
        (edit(["nodes"], []), r"graph\.json: is not a saved graph: a graph has one output, which is its last node"),
        (edit(["nodes"], {}), r"nodes: Input should be a valid list"),
        (edit(["batch"], "2"), r"batch: Input should be a valid integer"),
        (edit(["batch"], 0), r"batch: Input should be greater than or equal to 1"),
        (edit(["more"], 1), r"more: Extra inputs are not permitted"),
        (edit(["modules", "bn1", "type"], "Linear"), r"modules\.bn1\.type: Input should be 'BatchNorm' or 'Dropout'"),
        (edit(["modules", "bn1", "eps"], "x"), r"modules\.bn1\.eps"),
        (edit(["modules", "bn1"], None), r"bn1 uses 'bn1', which the file does not describe"),
        (edit(["parameters"], []), r"uses 'conv1\.weight', which the file does not describe"),
        (edit(["shared"], [["conv1.weight", "fc.weight"]]), r"the first name of shared tensors, and no other"),
        (edit(["shared"], [["nothing", "else"]]), r"the first name of shared tensors, and no other"),
        (edit(["nodes", 0, "op"], "call_method"), r"nodes\.0\.op"),
        (edit(["nodes", 0, "name"], 3), r"nodes\.0\.name"),
        (edit(["nodes", -1, "args"], []), r"'output' takes one argument"),
        (edit(["nodes", -2, "args"], [{"node": "nobody"}]), r"refers to 'nobody', which is no node before it"),
        (edit(["nodes", -2, "args"], [{"node": "fc"}]), r"refers to 'fc', which is no node before it"),
        (edit(["nodes", -2, "args"], [{"node": 3}]), r"refers to '3', which is no node before it"),
        (edit(["nodes", -2, "args"], [{}]), r"is not a saved graph: ValueError"),
        (edit(["nodes", -2, "args"], [{"float": "7"}]), r"is not a saved graph: KeyError '7'"),
        (edit(["nodes", -2, "args"], [{"dtype": "float31"}]), r"is not a saved graph: KeyError 'float31'"),
        (edit(["nodes", -2, "args"], []), r"fc cannot compute on its arguments"),
        (edit(["nodes", -2, "args"], ["text"]), r"fc cannot compute on its arguments"),
        (edit(["nodes", -2, "kwargs"], {"surprise": 1}), r"fc cannot compute on its arguments"),
        (edit(["nodes", -2, "meta", "shape"], [2, 6]), r"fc is stated as float32 \[2, 6\] and gives float32 \[2, 5\]"),
        (edit(["nodes", -2, "meta", "dtype"], "int8"), r"fc is stated as int8 \[2, 5\] and gives float32 \[2, 5\]"),
        (edit(["nodes", -2, "meta", "shape"], [2, -5]), r"nodes\.\d+\.meta\.shape\.1"),
        (edit(["nodes", -2, "meta", "shape"], [2**70]), r"nodes\.\d+\.meta\.shape\.0"),
        (edit(["nodes", -2, "meta", "shape"], "25"), r"nodes\.\d+\.meta\.shape"),
        (edit(["nodes", -2, "meta", "name"], None), r"'fc' has no meta\.name"),
        (edit(["nodes", -2, "meta", "name"], "relu2"), r"two values are named 'relu2'"),
        (edit(["nodes", -2, "name"], "relu2"), r"two nodes are named 'relu2'|two values"),
    ],
)
def test_a_damaged_file_names_what_is_wrong(captured, witness, change, match):
    data, tensors = parsed(captured)
    change(data)
    refused(data, tensors, match=match)


def test_arguments_that_no_longer_fit_are_found(captured):
    data, tensors = parsed(captured)
    pool = next(item for item in data["nodes"] if item["target"] == "aten.mean.dim")
    pool["args"][1] = [2, 9]
    refused(data, tensors, r"reducemean cannot compute on its arguments: Dimension out of range")


def test_torch_logs_nothing_beside_the_message(captured, capfd):
    data, tensors = parsed(captured)
    pool = next(item for item in data["nodes"] if item["target"] == "aten.mean.dim")
    pool.update(target="aten.bmm.default", args=[pool["args"][0], pool["args"][0]])
    refused(data, tensors, r"reducemean cannot compute on its arguments: batch1 must be a 3D tensor\. Quantize again")
    assert capfd.readouterr() == ("", "")


def test_a_huge_shape_allocates_nothing(captured):
    data, tensors = parsed(captured)
    node(data, "placeholder")["meta"]["shape"] = [2, 3, 2**30, 2**30]
    refused(data, tensors, match=r"graph\.json: ")


def test_a_missing_tensor_is_named(captured):
    data, tensors = parsed(captured)
    refused(data, {k: v for k, v in tensors.items() if k != "fc.bias"}, r"reads tensor 'fc\.bias', which tensors\.saf")


def test_a_tensor_of_another_shape_is_found(captured):
    data, tensors = parsed(captured)
    refused(data, {**tensors, "fc.weight": torch.zeros(5, 9)}, r"fc_weight is stated as float32 \[5, 8\] and gives")
    refused(data, {**tensors, "fc.weight": torch.zeros(6, 8)}, r"fc")


def test_two_outputs_are_refused(captured):
    data, tensors = parsed(captured)
    data["nodes"].append(data["nodes"][-1])
    refused(data, tensors, r"a graph has one output, which is its last node")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", "3", '"text"', "[" * 100_000, '{"a":' * 100_000, "\x00", "1e999", "9" * 5000, "{}", "NaN"],
    ids=[
        "empty",
        "cut",
        "list",
        "null",
        "number",
        "string",
        "deep-list",
        "deep-dict",
        "nul",
        "inf",
        "digits",
        "{}",
        "nan",
    ],
)
def test_text_that_is_no_graph(text):
    refused(text, {})


def test_deep_arguments_are_refused(captured):
    data, tensors = parsed(captured)
    deep = json.dumps(data).replace('"args": [', '"args": [' + "[" * 900 + "]" * 900 + ", ", 1)
    refused(deep, tensors)


def test_a_truncated_file_is_refused_at_any_length(captured):
    graph = captured("pools")
    text = graph_to_json(graph)
    for length in range(0, len(text) - 2, 97):
        refused(text[:length], graph.module.state_dict())


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        [CODE, "", "os.system", "aten.from_file.default", "node", "__class__", 'a"b', "x\ny", "fc", "conv1"]
    )
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["node", "tuple", "dict", "float", "dtype", "device", CODE, "a"]), inner, max_size=2
        )
    ),
    max_leaves=4,
)


def places(value, path=()):
    yield path
    if isinstance(value, dict):
        for key, item in value.items():
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_change_loads_or_is_refused_and_runs_nothing(captured, witness, data):
    form, tensors = parsed(captured, "two_outputs")
    path = data.draw(st.sampled_from([p for p in places(form) if p]))
    here = form
    for part in path[:-1]:
        here = here[part]
    action = data.draw(st.sampled_from(["replace", "delete", "repeat", "rename"]))
    if action == "replace":
        here[path[-1]] = data.draw(VALUES)
    elif action == "delete":
        del here[path[-1]]
    elif action == "repeat" and isinstance(here, list):
        here.insert(path[-1], here[path[-1]])
    elif action == "rename" and isinstance(here, dict):
        here[data.draw(st.sampled_from([CODE, "lambda", "a b", "out"]))] = here.pop(path[-1])
    try:
        graph = graph_from_json(json.dumps(form), tensors)
    except CaptureError as error:
        assert str(error).startswith("graph.json: ")
        assert "\n" not in str(error)
    else:
        assert graph.operators is not None
        assert graph.module.graph is not None
    assert not witness.exists()
