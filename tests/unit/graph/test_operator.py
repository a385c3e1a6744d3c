# SPDX-License-Identifier: Apache-2.0
"""Kinds, attributes and MACs of every operator in the table's main list; MACs by hand, per sample."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qhw.graph import ATEN_KINDS, KNOWN_KINDS, MOVEMENT_KINDS, VIEW_KINDS, capture

IMAGE = (3, 4, 6, 8)  # batch of 3


def function_model(function, **parameters):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in parameters.items():
                setattr(self, name, nn.Parameter(value))

        def forward(self, *inputs):
            return function(self, *inputs)

    return Model()


def last(model, *shapes, index=-1):
    graph = capture(model.eval(), tuple(torch.randn(shape) for shape in shapes))
    return graph.operators[index]


CONVOLUTIONS = {
    # module, input, kind, MACs: outputs x taps x input channels / groups
    "1d": (nn.Conv1d(4, 5, 3), (3, 4, 9), "Conv", 5 * 7 * 3 * 4),
    "2d": (nn.Conv2d(4, 5, (3, 1), padding=(1, 0)), IMAGE, "Conv", 5 * 6 * 8 * 3 * 4),
    "3d": (nn.Conv3d(2, 3, 2, stride=2), (3, 2, 4, 4, 6), "Conv", 3 * 2 * 2 * 3 * 8 * 2),
    "same": (nn.Conv2d(4, 5, 3, padding="same"), IMAGE, "Conv", 5 * 48 * 9 * 4),
    "grouped": (nn.Conv2d(4, 6, 3, padding=1, groups=2), IMAGE, "Conv", 6 * 48 * 9 * 2),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), IMAGE, "DepthwiseConv", 4 * 48 * 9),
    "depthwise-multiplied": (nn.Conv2d(4, 8, 3, padding=1, groups=4), IMAGE, "DepthwiseConv", 8 * 48 * 9),
    "one-channel": (nn.Conv2d(1, 4, 3, padding=1), (3, 1, 6, 8), "Conv", 4 * 48 * 9),
    "transposed": (nn.ConvTranspose2d(4, 5, 3, stride=2), IMAGE, "ConvTranspose", 4 * 48 * 9 * 5),
    "transposed-grouped": (nn.ConvTranspose2d(4, 6, 2, groups=2), IMAGE, "ConvTranspose", 4 * 48 * 4 * 3),
    "transposed-1d": (nn.ConvTranspose1d(4, 5, 3), (3, 4, 9), "ConvTranspose", 4 * 9 * 3 * 5),
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions(case):
    module, shape, kind, macs = CONVOLUTIONS[case]
    operator = last(nn.Sequential(module), shape)
    assert (operator.kind, operator.macs) == (kind, macs)
    assert (operator.weight, operator.bias) == ("0.weight", "0.bias")
    assert operator.weight_axis == (1 if kind == "ConvTranspose" else 0)
    assert operator.attributes["kernel"] == list(module.kernel_size)
    assert operator.attributes["stride"] == list(module.stride)
    assert operator.attributes["dilation"] == list(module.dilation)
    assert operator.attributes["groups"] == module.groups
    assert operator.attributes["in_channels"] == module.in_channels
    assert operator.attributes["out_channels"] == module.out_channels
    assert operator.attributes["rank"] == len(shape)
    wanted = module.padding if isinstance(module.padding, str) else list(module.padding)
    assert operator.attributes["padding"] == wanted


@pytest.mark.parametrize(("shape", "outputs"), [((3, 4), 5), ((3, 7, 4), 35), ((3, 2, 7, 4), 70)], ids=["2", "3", "4"])
def test_a_linear_layer_is_a_gemm_at_any_rank(shape, outputs):
    operator = last(nn.Sequential(nn.Linear(4, 5)), shape)
    assert (operator.kind, operator.macs, operator.weight_axis) == ("Gemm", outputs * 4, 0)
    assert operator.attributes["in_channels"] == 4
    assert operator.attributes["out_channels"] == 5


W = torch.randn(4, 5)
PRODUCTS = {
    # function of (module, inputs), shapes, kind, weight, axis, MACs
    "matmul-constant-right": (lambda m, x: x @ m.w, [(3, 7, 4)], "Gemm", "w", 1, 7 * 5 * 4),
    "mm-constant-right": (lambda m, x: torch.mm(x, m.w), [(3, 4)], "Gemm", "w", 1, 5 * 4),
    "addmm": (lambda m, x: torch.addmm(m.b, x, m.w), [(3, 4)], "Gemm", "w", 1, 5 * 4),
    "constant-left": (lambda m, x: m.w @ x, [(3, 5, 6)], "MatMul", "w", None, 4 * 6 * 5),
    "constant-vector": (lambda m, x: x @ m.v, [(3, 7, 4)], "MatMul", "v", None, 7 * 4),
    "constant-stack": (lambda m, x: x @ m.s, [(3, 2, 7, 4)], "MatMul", "s", None, 2 * 7 * 5 * 4),
    "two-activations": (lambda m, x, y: x @ y, [(3, 7, 4), (3, 4, 6)], "MatMul", None, None, 7 * 6 * 4),
    "bmm": (lambda m, x, y: torch.bmm(x, y), [(3, 7, 4), (3, 4, 6)], "MatMul", None, None, 7 * 6 * 4),
    "itself": (lambda m, x: torch.bmm(x, x), [(3, 4, 4)], "MatMul", None, None, 4 * 4 * 4),
    "scaled-addmm": (lambda m, x: torch.addmm(m.b, x, m.w, alpha=2), [(3, 4)], "Unknown", None, None, 0),
}


@pytest.mark.parametrize("case", PRODUCTS)
def test_matrix_products(case):
    function, shapes, kind, weight, axis, macs = PRODUCTS[case]
    parameters = {"w": W, "b": torch.randn(5), "v": torch.randn(4), "s": torch.randn(2, 4, 5)}
    operator = last(function_model(function, **parameters), *shapes)
    assert (operator.kind, operator.weight, operator.weight_axis, operator.macs) == (kind, weight, axis, macs)
    assert operator.bias == ("b" if case == "addmm" else None)


def test_attention_counts_both_products():
    def attend(m, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    operator = last(function_model(attend), (3, 2, 7, 4), (3, 2, 5, 4), (3, 2, 5, 6))
    assert (operator.kind, len(operator.inputs)) == ("Attention", 3)
    assert operator.macs == 2 * (7 * 5 * 4 + 7 * 5 * 6)


RECURRENT = {
    # module, shape of one input, MACs: steps times every matrix, [gates * hidden, input] and [gates * hidden, hidden]
    "lstm-both-directions": (nn.LSTM(6, 5, batch_first=True, bidirectional=True), (3, 7, 6), 7 * 2 * 4 * 5 * (6 + 5)),
    "lstm-two-layers": (nn.LSTM(6, 5, 2, batch_first=True), (3, 7, 6), 7 * 4 * 5 * ((6 + 5) + (5 + 5))),
    "gru": (nn.GRU(6, 5, batch_first=True, bias=False), (3, 7, 6), 7 * 3 * 5 * (6 + 5)),
    "rnn": (nn.RNN(6, 5, batch_first=True), (3, 7, 6), 7 * 5 * (6 + 5)),
    "lstm-cell": (nn.LSTMCell(6, 5), (3, 6), 4 * 5 * (6 + 5)),
    "gru-cell": (nn.GRUCell(6, 5), (3, 6), 3 * 5 * (6 + 5)),
}


@pytest.mark.parametrize("case", RECURRENT)
def test_recurrent_layers_are_unknown_and_their_products_are_counted(case):
    module, shape, macs = RECURRENT[case]

    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = module

        def forward(self, x):
            found = self.layer(x)
            return found[0] if isinstance(found, tuple) else found

    operators = capture(First().eval(), torch.randn(shape)).operators
    assert [(operator.kind, operator.macs) for operator in operators if operator.macs] == [("Unknown", macs)]


X = (3, 4, 6, 8)
ONE = {
    # function, kind, some attributes
    "relu": (F.relu, "Relu", {"minimum": 0.0}),
    "relu6": (F.relu6, "Clip", {"minimum": 0.0, "maximum": 6.0}),
    "hardtanh": (lambda x: F.hardtanh(x, -2, 3), "Clip", {"minimum": -2.0, "maximum": 3.0}),
    "clamp": (lambda x: x.clamp(-1, 1), "Clip", {"minimum": -1.0, "maximum": 1.0}),
    "clamp-max": (lambda x: x.clamp(max=4), "Clip", {"minimum": None, "maximum": 4.0}),
    "clamp-min": (lambda x: x.clamp_min(-3), "Clip", {"minimum": -3.0, "maximum": None}),
    "clamp-min-0": (lambda x: x.clamp(min=0), "Relu", {"minimum": 0.0}),
    "clamp-to-infinity": (lambda x: x.clamp(0, float("inf")), "Relu", {"minimum": 0.0}),
    "leaky": (lambda x: F.leaky_relu(x, 0.2), "LeakyRelu", {"slope": 0.2}),
    "elu": (lambda x: F.elu(x, 0.5), "Elu", {"alpha": 0.5}),
    "sigmoid": (torch.sigmoid, "Sigmoid", {}),
    "tanh": (torch.tanh, "Tanh", {}),
    "hardsigmoid": (F.hardsigmoid, "HardSigmoid", {}),
    "hardswish": (F.hardswish, "HardSwish", {}),
    "silu": (F.silu, "Silu", {}),
    "mish": (F.mish, "Mish", {}),
    "gelu": (F.gelu, "Gelu", {"approximate": "none"}),
    "gelu-tanh": (lambda x: F.gelu(x, approximate="tanh"), "Gelu", {"approximate": "tanh"}),
    "softmax": (lambda x: F.softmax(x, -1), "Softmax", {"axis": 3}),
    "log-softmax": (lambda x: F.log_softmax(x, 1), "LogSoftmax", {"axis": 1}),
    "max-pool": (
        lambda x: F.max_pool2d(x, 3, 2, 1),
        "MaxPool",
        {"kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "dilation": [1, 1], "ceil_mode": False},
    ),
    "average-pool": (
        lambda x: F.avg_pool2d(x, (2, 4), count_include_pad=False),
        "AveragePool",
        {"kernel": [2, 4], "stride": [2, 4], "padding": [0, 0], "count_include_pad": False, "reduced_elements": 8},
    ),
    "adaptive-global": (
        lambda x: F.adaptive_avg_pool2d(x, 1),
        "GlobalAveragePool",
        {"reduced_elements": 48, "kernel": [6, 8], "keepdim": True},
    ),
    "adaptive-even": (lambda x: F.adaptive_avg_pool2d(x, (3, 2)), "AveragePool", {"kernel": [2, 4], "stride": [2, 4]}),
    "adaptive-uneven": (lambda x: F.adaptive_avg_pool2d(x, (4, 3)), "Unknown", {}),
    "mean-image": (
        lambda x: x.mean((-1, -2)),
        "GlobalAveragePool",
        {"axes": [2, 3], "keepdim": False, "reduced_elements": 48, "kernel": [6, 8]},
    ),
    "mean-one-axis": (lambda x: x.mean(1, keepdim=True), "ReduceMean", {"axes": [1], "keepdim": True}),
    "max-image": (lambda x: x.amax((2, 3), True), "GlobalMaxPool", {"axes": [2, 3], "keepdim": True}),
    "sum": (lambda x: x.sum((1, 3)), "ReduceSum", {"axes": [1, 3], "reduced_elements": 32}),
    "pad": (lambda x: F.pad(x, (1, 2), value=3.0), "Pad", {"padding": [1, 2], "mode": "constant", "value": 3.0}),
    "permute": (lambda x: x.permute(0, 2, 3, 1), "Transpose", {}),
    "transpose": (lambda x: x.transpose(1, 2), "Transpose", {}),
    "swap-axes": (lambda x: x.swapaxes(1, 2), "Transpose", {}),
    "slice": (lambda x: x[:, 1:3], "Slice", {}),
    "select": (lambda x: x[:, 0], "Gather", {}),
    "flatten": (lambda x: x.flatten(1), "Flatten", {}),
    "reshape": (lambda x: x.reshape(x.shape[0], -1), "Reshape", {}),
    "view": (lambda x: x.view(x.shape[0], 4, 48), "Reshape", {}),
    "unsqueeze": (lambda x: x.unsqueeze(1), "Unsqueeze", {}),
    "expand": (lambda x: x[:, :1].expand(-1, 5, -1, -1), "Expand", {}),
    "repeat": (lambda x: x.repeat(1, 2, 1, 1), "Tile", {}),
    "pixel-shuffle": (lambda x: F.pixel_shuffle(x, 2), "DepthToSpace", {}),
    "channel-shuffle": (lambda x: torch.channel_shuffle(x, 2), "ChannelShuffle", {}),
    "upsample": (lambda x: F.interpolate(x, scale_factor=2.0), "Resize", {"mode": "nearest"}),
    "cumsum": (lambda x: torch.cumsum(x, 1), "Unknown", {}),
    "spectrum": (torch.fft.fft, "Unknown", {}),
    "mask-by-number": (lambda x: x * -1e9, "Mul", {"scalar": True}),
    "divide-number": (lambda x: torch.div(x, 0.0), "Div", {"scalar": True}),
    "dropout": (lambda x: F.dropout(x, 0.5, False), "Dropout", {}),
}


@pytest.mark.parametrize("case", ONE)
def test_operators_of_one_tensor(case):
    function, kind, attributes = ONE[case]
    operator = last(function_model(lambda m, x: function(x)), X)
    assert operator.kind == kind
    assert {key: operator.attributes.get(key) for key in attributes} == attributes
    assert operator.macs == 0


TWO = {
    "add": (torch.add, "Add"),
    "sub": (torch.sub, "Sub"),
    "mul": (torch.mul, "Mul"),
    "div": (torch.div, "Div"),
    "maximum": (torch.maximum, "Max"),
    "minimum": (torch.minimum, "Min"),
    "concat": (lambda a, b: torch.cat([a, b], -1), "Concat"),
    "stack": (lambda a, b: torch.stack([a, b], 1), "Concat"),
    "scaled-add": (lambda a, b: torch.add(a, b, alpha=2), "Unknown"),
}


@pytest.mark.parametrize("case", TWO)
def test_operators_of_two_tensors(case):
    function, kind = TWO[case]
    operator = last(function_model(lambda m, x: function(x, torch.sigmoid(x))), X)
    assert operator.kind == kind
    assert len(operator.inputs) == 2
    assert operator.inputs[1] == "sigmoid"
    assert operator.attributes["inputs"] == 2


def test_concat_and_stack_name_their_axis():
    concat = last(function_model(lambda m, x: torch.cat([x, x, x], -3)), X)
    assert (concat.attributes["axis"], concat.attributes["inputs"], len(set(concat.inputs))) == (1, 3, 1)
    assert last(function_model(lambda m, x: torch.stack([x, x], 1)), X).attributes["stacked"]


@pytest.mark.parametrize(
    ("function", "operand"),
    [(lambda m, x: x + m.c, 1), (lambda m, x: m.c + x, 0), (lambda m, x: m.c - x, 0), (lambda m, x: x * m.c, 1)],
)
def test_a_constant_operand_is_a_weight_and_keeps_its_place(function, operand):
    operator = last(function_model(function, c=torch.randn(4, 1, 1)), X)
    assert (operator.weight, operator.weight_axis, len(operator.inputs)) == ("c", None, 1)
    assert operator.attributes["weight_operand"] == operand


def test_layer_norm_and_prelu_have_parameters():
    norm = last(nn.Sequential(nn.LayerNorm(8, eps=0.1)), X)
    assert (norm.kind, norm.weight, norm.bias) == ("LayerNormalization", "0.weight", "0.bias")
    assert norm.attributes["normalized_shape"] == [8]
    assert norm.attributes["eps"] == 0.1
    prelu = last(nn.Sequential(nn.PReLU(4)), X)
    assert (prelu.kind, prelu.weight) == ("PRelu", "0.weight")


def test_embedding():
    graph = capture(nn.Sequential(nn.Embedding(9, 5)), torch.randint(0, 9, (3, 7)))
    (operator,) = graph.operators
    assert (operator.kind, operator.weight, operator.inputs, operator.macs) == ("Embedding", "0.weight", ("input",), 0)
    assert operator.is_float
    assert operator.shape == (3, 7, 5)


def test_integers_are_no_float():
    graph = capture(function_model(lambda m, x: (x + 1, x > 2, x.float())), torch.randint(0, 9, (3, 7)))
    assert [o.is_float for o in graph.operators] == [False, False, True]


@pytest.mark.parametrize(
    "function",
    [lambda x: x.chunk(2, 1)[1], lambda x: x.split([1, 3], 1)[1], lambda x: x.split(2, 1)[0], lambda x: x.unbind(1)[2]],
    ids=["chunk", "split-sizes", "split", "unbind"],
)
def test_parts_of_a_split_are_views(function):
    graph = capture(function_model(lambda m, x: function(x) * 2.0), torch.randn(X))
    split, part, _ = graph.operators
    assert (split.kind, part.kind) == ("Split", "Identity")
    assert split.is_view
    assert part.is_view


def test_one_of_several_results_is_no_view():
    graph = capture(function_model(lambda m, x: x.sort(1)[0] * 2.0), torch.randn(X))
    _, picked, _ = graph.operators
    assert (picked.kind, picked.is_view, picked.attributes["of_tuple"]) == ("Identity", False, True)


def test_what_depends_on_no_input_is_no_operator():
    def positions(m, x):
        return x + m.table[torch.arange(x.shape[1])]

    graph = capture(function_model(positions, table=torch.randn(9, 4)), torch.randn(3, 7, 4))
    (operator,) = graph.operators
    assert (operator.kind, operator.inputs, operator.weight) == ("Add", ("inputs_0",), "index")


def test_what_only_the_batch_decides_is_an_operator_without_inputs():
    def spread(m, x):
        return x * (m.table * torch.ones(x.shape[0], 1, 1))

    graph = capture(function_model(spread, table=torch.randn(7, 4)), torch.randn(3, 7, 4))
    assert [(o.kind, o.inputs) for o in graph.operators] == [
        ("Unknown", ()),
        ("Mul", ("ones",)),
        ("Mul", ("inputs_0", "mul")),
    ]


def test_a_weight_that_is_computed_is_no_weight():
    def hyper(m, x, w):
        return F.linear(x, torch.tanh(w))

    graph = capture(function_model(hyper), (torch.randn(3, 4), torch.randn(5, 4)), dynamic_batch=False)
    gemm = graph.operators[-1]
    assert (gemm.kind, gemm.weight, gemm.weight_axis) == ("Gemm", None, None)
    assert gemm.inputs[1] == "tanh"


def test_names_that_collide_with_inputs():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.x = nn.Linear(3, 3)
            self.relu = nn.Linear(3, 3)

        def forward(self, x, relu):
            return F.relu(self.relu(self.x(x))) + relu

    graph = capture(Model(), (torch.randn(2, 3), torch.randn(2, 3)))
    names = [*graph.inputs, *(o.name for o in graph.operators)]
    assert len(set(names)) == len(names)
    x, relu = torch.randn(5, 3), torch.randn(5, 3)
    torch.testing.assert_close(graph.module(x=x, relu=relu), graph.module(x, relu))


def test_a_layer_called_twice_has_two_names_and_one_weight(captured):
    graph = captured("shared")
    assert [o.name for o in graph.weight_users("conv.weight")] == ["conv", "conv_1"]
    assert [o.name for o in graph.weight_users("encoder.weight")] == ["encoder", "decoder"]


def test_the_table_is_consistent():
    assert {rule.kind for rule in ATEN_KINDS.values()} <= set(KNOWN_KINDS)
    assert set(VIEW_KINDS) | set(MOVEMENT_KINDS) <= set(KNOWN_KINDS)
    assert not set(VIEW_KINDS) & set(MOVEMENT_KINDS)
    for name in ATEN_KINDS:
        space, packet, overload = name.split(".") if name != "operator.getitem" else ("operator", "", "")
        assert space == "operator" or getattr(getattr(torch.ops.aten, packet), overload), name
