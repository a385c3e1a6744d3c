# SPDX-License-Identifier: Apache-2.0
"""Placement: points where the accelerator computes, chains as the target fuses them, formats that kernels hold."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qhw.errors import PlanError
from qhw.graph import capture, place
from qhw.schema import parse_target

BASE = """
schema_version = 1
name = "test/npu"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.t8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
biases.b32 = { bits = 32, scale = "input*weight" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "b32" }
kernels.wide = { input = ["a16"], weight = ["w8"], output = ["a16"] }
kernels.ew = { input = ["a8"], output = ["a8"] }
kernels.ew16 = { input = ["a16"], output = ["a16"] }
"""
CONV = 'operators.Conv = { kernels = ["mac"], fused = ["Relu"] }\n'


def target(*lines):
    return parse_target(BASE + "\n".join(lines))


def net(function, **layers):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            for name, layer in layers.items():
                setattr(self, name, layer)

        def forward(self, x):
            return function(self, x)

    torch.manual_seed(0)
    return Net().eval()


def graph_of(function, shape=(2, 4, 6, 6), **layers):
    return capture(net(function, **layers), torch.randn(shape))


def conv(channels=4, out=4, kernel=1, **options):
    return nn.Conv2d(channels, out, kernel, **options)


def summary(placement):
    return [(p.name, p.role, p.format) for p in placement.points]


def by_name(placement):
    return {p.name: p for p in placement.points}


def where(placement):
    return {o.name: o.where for o in placement.operators}


def reason(placement, name):
    operator = placement.operator(name)
    return f"{operator.subject}: {operator.reason}"


# Where points are


def test_points_before_the_weights_and_after_the_chain(captured):
    everything = target(
        CONV,
        'operators.Gemm = { kernels = ["mac"] }',
        'operators.GlobalAveragePool = { kernels = ["ew"] }',
    )
    placement = place(captured("conv_chain"), everything, absorbed=("bn1", "bn2"))
    assert summary(placement) == [
        ("x", "input", "a8"),
        ("conv1.weight", "weight", "w8"),
        ("conv1.bias", "bias", "b32"),  # it gets one when the batch norm is folded
        ("conv1", "activation", "a8"),
        ("conv2.weight", "weight", "w8"),
        ("conv2.bias", "bias", "b32"),
        ("conv2", "activation", "a8"),
        ("reducemean", "activation", "a8"),
        ("fc.weight", "weight", "w8"),
        ("fc.bias", "bias", "b32"),
        ("fc", "activation", "a8"),
    ]
    points = by_name(placement)
    assert points["conv1"].tensor == "relu1"
    assert (points["conv1"].minimum, points["conv1"].maximum) == (0.0, None)
    assert points["conv1"].consumers == ("conv2",)
    assert points["x"].consumers == ("conv1",)
    assert points["conv1.weight"].consumers == ("conv1",)
    assert (points["conv1.weight"].axis, points["conv1.bias"].axis, points["conv1"].axis) == (0, 0, None)
    assert where(placement)["bn1"] == "folded"
    assert placement.operator("conv1").members == ("conv1", "relu1")
    assert placement.operator("relu1").fused_into == "conv1"
    assert placement.operator("conv1").kernel == "mac"


def test_a_batch_norm_that_is_not_folded_stays_on_the_host(captured):
    placement = place(captured("conv_chain"), target(CONV))
    assert reason(placement, "bn1") == "operators.BatchNormalization: the target does not list it"
    assert [p.name for p in placement.points if p.role == "input"] == ["x", "relu1"]
    assert by_name(placement)["relu1"].minimum == 0.0
    assert by_name(placement)["conv1"].consumers == ()


def test_an_absorbed_batch_norm_that_two_operators_read():
    graph = graph_of(
        lambda m, x: (lambda y: m.a(y) + m.b(y))(m.n(m.c(x))), c=conv(), n=nn.BatchNorm2d(4), a=conv(), b=conv()
    )
    points = by_name(place(graph, target(CONV), absorbed=("n",)))
    assert points["c"].tensor == "c"
    assert points["c"].consumers == ("a", "b")


def test_the_longest_chain_is_fused():
    relu_and_pool = target('operators.Conv = { kernels = ["mac"], fused = ["Relu", ["Relu", "MaxPool"], "Clip"] }')
    graph = graph_of(lambda m, x: F.max_pool2d(F.relu(m.c(x)), 2), c=conv())
    placement = place(graph, relu_and_pool)
    assert placement.operator("c").members == ("c", "relu", "maxpool")
    assert summary(placement)[-1] == ("c", "activation", "a8")
    assert by_name(placement)["c"].tensor == "maxpool"


def test_no_chain_across_a_branch():
    graph = graph_of(lambda m, x: (lambda y: F.relu(y) + m.d(y))(m.c(x)), c=conv(), d=conv())
    placement = place(graph, target(CONV))
    assert placement.operator("c").members == ("c",)
    assert by_name(placement)["c"].tensor == "c"
    assert where(placement)["relu"] == "host"


def test_no_chain_past_a_graph_output():
    graph = graph_of(lambda m, x: (lambda y: (y, F.relu(y)))(m.c(x)), c=conv())
    assert place(graph, target(CONV)).operator("c").members == ("c",)


def test_no_chain_past_an_output_seen_otherwise():
    graph = graph_of(lambda m, x: (lambda y: (y.flatten(1), F.relu(y)))(m.c(x)), c=conv())
    assert place(graph, target(CONV)).operator("c").members == ("c",)


def test_dropout_inside_a_chain_is_nothing():
    graph = graph_of(lambda m, x: F.relu(F.dropout(m.c(x), 0.5, m.training)), c=conv())
    placement = place(graph, target(CONV))
    assert placement.operator("c").members == ("c", "relu")
    assert placement.operator("dropout").where == "accelerator"


def test_what_the_user_keeps_in_float_is_not_fused():
    graph = graph_of(lambda m, x: F.relu(m.c(x)), c=conv())
    placement = place(graph, target(CONV), keep_float=("relu",))
    assert reason(placement, "relu") == "--keep-float: kept in float by request"
    assert placement.operator("c").members == ("c",)


def test_keep_float_takes_patterns(captured):
    placement = place(captured("conv_chain"), target(CONV), keep_float=("conv*",))
    assert where(placement)["conv1"] == where(placement)["conv2"] == "host"
    assert placement.points == ()


def test_keep_float_that_names_nothing(captured):
    with pytest.raises(PlanError, match=r"--keep-float: no operator matches 'conv7'\. Closest: conv2, conv1"):
        place(captured("conv_chain"), target(CONV), keep_float=("conv7",))


def test_host_islands_are_quantized_again_at_the_border(captured):
    placement = place(captured("stranger"), target(CONV))
    assert reason(placement, "cumsum") == "graph: qhw has no kind for this operator, so it stays in float"
    assert reason(placement, "mul") == "operators.Mul: the target does not list it"
    assert [(p.name, p.role) for p in placement.points if p.role in ("input", "activation")] == [
        ("x", "input"),
        ("before", "activation"),
        ("mul", "input"),
        ("after", "activation"),
    ]
    shares = {o.name: o.macs for o in placement.operators}
    assert shares == {"before": 4 * 64 * 3, "cumsum": 0, "mul": 0, "after": 4 * 64 * 4}


def test_an_input_read_by_host_and_accelerator():
    graph = graph_of(lambda m, x: m.c(x) + torch.cumsum(x, 1), c=conv())
    placement = place(graph, target(CONV))
    assert by_name(placement)["x"].consumers == ("c",)
    assert where(placement)["cumsum"] == "host"


def test_views_are_one_tensor():
    graph = graph_of(
        lambda m, x: m.d(m.c(x).flatten(1).reshape(x.shape[0], 4, 6, 6).unsqueeze(0).squeeze(0)), c=conv(), d=conv()
    )
    placement = place(graph, target(CONV))
    assert [p.name for p in placement.points if p.role == "activation"] == ["c", "d"]
    assert by_name(placement)["c"].consumers == ("d",)
    assert set(where(placement).values()) == {"accelerator"}


def test_parts_of_a_split_are_one_tensor():
    graph = graph_of(lambda m, x: m.d(m.c(x).chunk(2, 1)[1]), c=conv(), d=conv(2, 3))
    placement = place(graph, target(CONV))
    assert by_name(placement)["c"].consumers == ("d",)


def test_one_of_several_results_is_a_tensor_of_its_own():
    graph = graph_of(lambda m, x: m.d(m.c(x).topk(2, 1)[0]), c=conv(), d=conv(2, 3))
    placement = place(graph, target(CONV))
    (point,) = [p for p in placement.points if p.role == "input" and p.name != "x"]
    assert isinstance(graph.module(torch.randn(2, 4, 6, 6)), torch.Tensor)
    assert graph.operator(point.tensor).attributes["of_tuple"]


def test_a_view_of_a_host_tensor_is_on_the_host():
    graph = graph_of(lambda m, x: torch.cumsum(m.c(x), 1).flatten(1), c=conv())
    assert where(place(graph, target(CONV))) == {"c": "accelerator", "cumsum": "host", "flatten": "host"}


def test_an_output_that_is_the_input():
    graph = graph_of(lambda m, x: (x, x.flatten(1), m.c(x)), c=conv())
    assert [p.name for p in place(graph, target(CONV)).points] == ["x", "c.weight", "c.bias", "c"]


# Boundary and fallback


def test_float_outputs_get_no_point():
    graph = graph_of(lambda m, x: m.d(m.c(x)), c=conv(), d=conv())
    points = by_name(place(graph, target(CONV, 'boundary = { outputs = "float" }')))
    assert "d" not in points
    assert "c" in points


def test_an_output_that_is_read_on_is_quantized_all_the_same():
    graph = graph_of(lambda m, x: (lambda y: (y, m.d(y)))(m.c(x)), c=conv(), d=conv())
    points = by_name(place(graph, target(CONV, 'boundary = { outputs = "float" }')))
    assert "c" in points
    assert "d" not in points


def test_a_target_that_refuses_host_operators_names_them(captured):
    with pytest.raises(
        PlanError,
        match=r"'test/npu' runs whole models only \(fallback = \"refuse\"\), and cannot run cumsum \(Unknown: .*\); "
        r"mul \(Mul: the target does not list it, operators\.Mul\)\. Replace these operators",
    ):
        place(captured("stranger"), target(CONV, 'fallback = "refuse"'))


def test_a_target_that_refuses_takes_what_it_can_run():
    graph = graph_of(lambda m, x: F.relu(m.c(x)).flatten(1), c=conv())
    assert place(graph, target(CONV, 'fallback = "refuse"')).operator("c").where == "accelerator"


def test_a_single_partition_ends_at_the_first_host_operator(captured):
    placement = place(captured("stranger"), target(CONV, 'fallback = "single_partition"'))
    assert where(placement) == {"before": "accelerator", "cumsum": "host", "mul": "host", "after": "host"}
    assert (
        reason(placement, "after")
        == "fallback: single partition: all that follows 'cumsum', the first on the host, is there"
    )


# Limits


LIMITS = [
    ("kernel = [1, 3]", conv(kernel=3), True),
    ("kernel = [1]", conv(kernel=3), False),
    ("kernel = [[3, 1]]", conv(kernel=(3, 1)), True),
    ("kernel = [[3, 1]]", conv(kernel=(1, 3)), False),
    ("kernel = { max = 2 }", conv(kernel=3), False),
    ("kernel = { max = 3, min = 2 }", conv(kernel=3), True),
    ("kernel = { min = 2 }", conv(), False),
    ("stride = [1]", conv(stride=2), False),
    ("stride = { values = [1, 2] }", conv(stride=2), True),
    ("dilation = [1]", conv(kernel=2, dilation=2), False),
    ("dilation = { multiple_of = 2 }", conv(kernel=2, dilation=2), True),
    ('groups = ["1"]', conv(groups=2), False),
    ('groups = ["1", "channels"]', conv(groups=4), True),
    ('groups = ["1", "channels"]', conv(groups=2), False),
    ("groups = [1, 2]", conv(groups=2), True),
    ("out_channels = { multiple_of = 4 }", conv(out=6), False),
    ("in_channels = { min = 4, max = 4 }", conv(), True),
    ("rank = [3]", conv(), False),
    ("inputs = [1]", conv(), True),
    ('kernel = "any"', conv(kernel=3), True),
    ('kernel = "unknown"', conv(kernel=3), True),
    ('padding = ["valid"]', conv(kernel=3, padding=1), False),
    ('padding = ["valid"]', conv(kernel=3), True),
]


@pytest.mark.parametrize(("limit", "layer", "fits"), LIMITS, ids=[f"{a}-{c}" for a, b, c in LIMITS])
def test_limits(limit, layer, fits):
    graph = graph_of(lambda m, x: m.c(x), c=layer)
    placement = place(graph, target(f'operators.Conv = {{ kernels = ["mac"], limits = {{ {limit} }} }}'))
    assert (placement.operator("c").where == "accelerator") == fits
    if not fits:
        name = limit.split()[0]
        assert placement.operator("c").subject == f"operators.Conv.limits.{name}"
        assert re.fullmatch(rf"{name} .* is outside the limit", placement.operator("c").reason)
        assert placement.points == ()


def test_a_depthwise_convolution_runs_as_a_convolution_where_none_is_listed():
    graph = graph_of(lambda m, x: m.c(x), c=conv(groups=4))
    assert place(graph, target(CONV)).operator("c").where == "accelerator"


@pytest.mark.parametrize(
    ("row", "subject"),
    [
        ('kernels = ["mac"], limits = { kernel = [3] }', "operators.DepthwiseConv.limits.kernel"),
        ("kernels = []", "operators.DepthwiseConv.kernels"),
    ],
    ids=["beyond its own limits", "not there"],
)
def test_a_depthwise_convolution_with_a_row_of_its_own_is_held_to_that_one(row, subject):
    graph = graph_of(lambda m, x: m.c(x), c=conv(groups=4))
    placed = place(graph, target(CONV, f"operators.DepthwiseConv = {{ {row} }}")).operator("c")
    assert (placed.where, placed.subject) == ("host", subject)


def test_a_global_pooling_runs_as_a_pooling_within_its_limits():
    graph = graph_of(lambda m, x: m.c(x).mean((2, 3)), c=conv())
    small = target(CONV, 'operators.AveragePool = { kernels = ["ew"], limits = { kernel = { max = 5 } } }')
    assert place(graph, small).operator("reducemean").subject == "operators.AveragePool.limits.kernel"
    large = target(CONV, 'operators.AveragePool = { kernels = ["ew"], limits = { kernel = { max = 6 } } }')
    assert place(graph, large).operator("reducemean").where == "accelerator"


# What a target leaves open, or cannot hold


@pytest.mark.parametrize(
    ("lines", "subject", "text"),
    [
        ('operators.Conv = { kernels = "unknown" }', "operators.Conv.kernels", "unknown"),
        ("operators.Conv = { kernels = [] }", "operators.Conv.kernels", "the target lists no kernel for it"),
        ("operators.Conv = {}", "operators.Conv.kernels", "the target lists no kernel for it"),
        (
            'kernels.k = { input = "unknown", weight = ["w8"], output = ["a8"] }\noperators.Conv = { kernels = ["k"] }',
            "kernels.k.input",
            "unknown",
        ),
        (
            'kernels.k = { input = ["a8"], output = ["a8"] }\noperators.Conv = { kernels = ["k"] }',
            "kernels.k.weight",
            "the target does not say which formats it takes",
        ),
        (
            'kernels.k = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "none" }\n'
            'operators.Conv = { kernels = ["k"] }',
            "kernels.k.bias",
            "it adds no bias, and the operator has one",
        ),
        (
            'formats.f = { kind = "float", bits = 8, per = "tensor" }\n'
            'kernels.k = { input = ["f"], weight = ["w8"], output = ["a8"] }\noperators.Conv = { kernels = ["k"] }',
            "kernels.k.input",
            'formats.f.exponent_bits: absent; kind = "float" needs it',
        ),
        (
            'kernels.k = { input = ["w8"], weight = ["w8"], output = ["a8"] }\noperators.Conv = { kernels = ["k"] }',
            "kernels.k.input",
            'formats.w8.per: "out_channel"; an activation has one scale, which is per = "tensor"',
        ),
    ],
)
def test_what_is_open_keeps_an_operator_on_the_host_and_is_named(lines, subject, text):
    graph = graph_of(lambda m, x: m.c(x), c=conv())
    placement = place(graph, target(lines))
    assert (placement.operator("c").subject, placement.operator("c").reason) == (subject, text)
    assert placement.points == ()


def test_a_kernel_without_bias_takes_an_operator_without_one():
    lines = (
        'kernels.k = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "none" }\n'
        'operators.Conv = { kernels = ["k"] }'
    )
    graph = graph_of(lambda m, x: m.n(m.c(x)), c=conv(bias=False), n=nn.BatchNorm2d(4))
    assert place(graph, target(lines)).operator("c").where == "accelerator"
    assert place(graph, target(lines), absorbed=("n",)).operator("c").subject == "kernels.k.bias"


def test_formats_that_cannot_be_planned_are_passed_over():
    lines = (
        'formats.f = { kind = "float", bits = 8, per = "tensor" }\n'
        'kernels.k = { input = ["f", "a8"], weight = ["f", "w8"], output = ["f", "a16", "a8"] }\n'
        'operators.Conv = { kernels = ["k"] }'
    )
    points = by_name(place(graph_of(lambda m, x: m.c(x), c=conv()), target(lines)))
    assert (points["x"].legal, points["c.weight"].legal, points["c"].legal) == (("a8",), ("w8",), ("a16", "a8"))


def test_the_next_kernel_is_taken_where_the_first_does_not_fit():
    lines = (
        'kernels.bare = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "none" }\n'
        'operators.Conv = { kernels = ["bare", "mac"] }'
    )
    assert place(graph_of(lambda m, x: m.c(x), c=conv()), target(lines)).operator("c").legal == ("mac",)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda m, x: m.c(x) > 0, "the result of Unknown"),
        (
            lambda m, x: m.c(x)[:1, :1, :1, :1] + torch.arange(2.0**20 + 1),
            "an operand is computed from parameters alone",
        ),
        (lambda m, x: F.conv2d(x[:1], x[:, :, :1, :1].detach()), "its weight or bias is no parameter"),
    ],
)
def test_operators_that_no_target_can_take(function, text):
    model = net(function, c=conv())
    graph = capture(model, torch.randn(4, 4, 6, 6), dynamic_batch=False)
    last = graph.operators[-1].name
    placement = place(graph, target(CONV))
    assert placement.operator(last).where == "host"
    if "Unknown" not in text:
        assert text in placement.operator(last).reason


# Formats and scales


def test_formats_that_differ_are_requantized_at_the_edge():
    lines = (CONV, 'operators.Gemm = { kernels = ["wide"] }')
    graph = graph_of(lambda m, x: m.f(m.c(x)), c=conv(), f=nn.Linear(6, 5))
    points = by_name(place(graph, target(*lines)))
    assert (points["c"].format, points["c"].consumers) == ("a8", ())
    edge = points["f.input.0"]
    assert (edge.role, edge.tensor, edge.operator, edge.format, edge.group) == ("edge", "c", "f", "a16", "f.input.0")
    assert edge.consumers == ("f",)


def test_an_edge_keeps_the_bounds_of_its_tensor():
    lines = ('operators.Conv = { kernels = ["mac"], fused = ["Clip"] }', 'operators.Gemm = { kernels = ["wide"] }')
    graph = graph_of(lambda m, x: m.f(F.relu6(m.c(x))), c=conv(), f=nn.Linear(6, 5))
    edge = by_name(place(graph, target(*lines)))["f.input.0"]
    assert (edge.minimum, edge.maximum) == (0.0, 6.0)


def test_one_reader_of_two_is_requantized():
    lines = (CONV, 'operators.Gemm = { kernels = ["wide"] }')
    graph = graph_of(lambda m, x: m.d(x) + m.f(x), d=conv(), f=nn.Linear(6, 6))
    points = by_name(place(graph, target(*lines)))
    assert (points["x"].format, points["x"].consumers) == ("a8", ("d",))
    assert (points["f.input.0"].format, points["f.input.0"].tensor) == ("a16", "x")


def test_preferred_kernels_win_and_the_others_stay_legal():
    graph = graph_of(lambda m, x: m.d(m.c(x)), c=conv(), d=conv())
    placement = place(graph, target('operators.Conv = { kernels = ["mac", "wide"] }'))
    assert [o.kernel for o in placement.operators] == ["mac", "mac"]
    assert placement.operator("c").legal == ("mac", "wide")
    points = by_name(placement)
    assert (points["c"].format, points["c"].legal) == ("a8", ("a8", "a16"))


def test_a_demand_moves_the_kernels_around_it():
    graph = graph_of(lambda m, x: m.d(m.c(x)), c=conv(), d=conv())
    both = target('operators.Conv = { kernels = ["mac", "wide"] }')
    placement = place(graph, both, formats={"c": "a16"})
    points = by_name(placement)
    assert (points["c"].format, placement.operator("c").kernel) == ("a16", "wide")
    assert points["x"].format == "a16"
    assert placement.operator("d").kernel == "wide"
    assert "c.bias" not in points  # the wide kernel states no bias rule


def test_a_demand_for_a_weight_is_met_among_several_formats():
    lines = (
        'formats.w4 = { codes = [-7, 7], zero_point = 0, per = "out_channel" }\n'
        'kernels.two = { input = ["a8"], weight = ["w8", "w4"], output = ["a8"] }\n'
        'operators.Conv = { kernels = ["two"] }'
    )
    graph = graph_of(lambda m, x: m.d(m.c(x)), c=conv(), d=conv())
    points = by_name(place(graph, target(lines), formats={"c.*": "w4"}))
    assert (points["c.weight"].format, points["d.weight"].format) == ("w4", "w8")
    assert points["d.weight"].legal == ("w8", "w4")


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        ({"c": "a4"}, r"--format c=a4: 'test/npu' has no format 'a4'\. Formats: a8, .* Closest: a"),
        ({"cc.weight": "w8"}, r"--format: no point matches 'cc\.weight'\. Closest: c\.weight"),
        ({"c": "a16"}, r"c: cannot be in 'a16' on this target\. Legal here: a8"),
        ({"c.weight": "t8"}, r"c\.weight: no kernel of Conv holds weights in 't8'\. It holds: w8"),
        ({"x": "w8"}, r"x: cannot be in 'w8' on this target\. Legal here: a8"),
    ],
)
def test_demands_that_cannot_be_met(formats, message):
    graph = graph_of(lambda m, x: m.c(x), c=conv())
    with pytest.raises(PlanError, match=message):
        place(graph, target(CONV), formats=formats)


def test_a_demand_on_a_float_output_is_not_passed_over():
    graph = graph_of(lambda m, x: m.c(x), c=conv())
    with pytest.raises(PlanError, match=r"--format: c cannot be 'a8' beside the other choices: it is not quantized"):
        place(graph, target(CONV, 'boundary = { outputs = "float" }'), formats={"c": "a8"})


# One scale for several tensors


def groups(placement):
    found = {}
    for point in placement.points:
        found.setdefault(point.group, []).append(point.name)
    return {frozenset(names) for names in found.values() if len(names) > 1}


def test_pooling_keeps_the_scale_of_its_input():
    graph = graph_of(lambda m, x: F.max_pool2d(m.c(x), 2), c=conv())
    pool = target(CONV, 'operators.MaxPool = { kernels = ["ew"], same_scale = "input_output" }')
    assert groups(place(graph, pool)) == {frozenset({"c", "maxpool"})}


def test_an_operator_without_kernels_only_moves_data():
    graph = graph_of(lambda m, x: m.d(F.max_pool2d(m.c(x), 2).transpose(2, 3)), c=conv(), d=conv())
    placement = place(graph, target(CONV, "operators.MaxPool = {}", "operators.Transpose = {}"))
    assert groups(placement) == {frozenset({"c", "maxpool", "transpose"})}
    assert placement.operator("maxpool").kernel is None


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        ("none", set()),
        ("inputs", {frozenset({"c", "d"})}),
        ("all", {frozenset({"c", "d", "concat"})}),
        ("input_output", {frozenset({"c", "concat"})}),
    ],
)
def test_same_scale_of_a_concat(rule, wanted):
    graph = graph_of(lambda m, x: torch.cat([m.c(x), m.d(x)], 1), c=conv(), d=conv())
    placement = place(graph, target(CONV, f'operators.Concat = {{ kernels = ["ew"], same_scale = "{rule}" }}'))
    assert groups(placement) == wanted


def test_the_same_tensor_twice():
    graph = graph_of(lambda m, x: torch.cat([m.c(x)] * 2, 1), c=conv())
    placement = place(graph, target(CONV, 'operators.Concat = { kernels = ["ew"], same_scale = "all" }'))
    assert groups(placement) == {frozenset({"c", "concat"})}
    assert by_name(placement)["c"].consumers == ("concat",)


def test_add_of_a_tensor_and_itself():
    graph = graph_of(lambda m, x: (lambda y: y + y)(m.c(x)), c=conv())
    placement = place(graph, target(CONV, 'operators.Add = { kernels = ["ew"] }'))
    assert summary(placement)[-1] == ("add", "activation", "a8")


def test_a_product_of_a_tensor_with_itself_in_two_formats():
    lines = (
        'kernels.mm = { input = ["a8"], weight = ["a16"], output = ["a8"] }',
        'operators.MatMul = { kernels = ["mm"] }',
    )
    graph = graph_of(lambda m, x: (lambda y: y @ y)(m.c(x)), c=conv())
    points = by_name(place(graph, target(CONV, *lines)))
    assert points["c"].format == "a8"
    edges = [p for p in points.values() if p.role == "edge"]
    assert [(e.name, e.format) for e in edges] == [("matmul.input.1", "a16")]


def test_a_tie_between_formats_that_differ_is_cut():
    lines = (
        'operators.Conv = { kernels = ["mac"] }',
        'operators.Gemm = { kernels = ["wide"] }',
        'operators.Concat = { kernels = ["ew", "ew16"], same_scale = "all" }',
    )
    graph = graph_of(lambda m, x: torch.cat([m.c(x), m.f(x)], 1), c=conv(), f=nn.Linear(6, 6))
    placement = place(graph, target(*lines))
    points = by_name(placement)
    (edge,) = [p for p in points.values() if p.role == "edge" and p.operator == "concat"]
    assert edge.format == points["concat"].format
    assert edge.group == points["concat"].group
    other = "f" if edge.tensor == "c" else "c"
    assert points[other].group == points["concat"].group
    assert points[edge.tensor].group == edge.tensor  # no tie is left over from before it was cut


FIXED = "fixed_output.a8 = { scale = 0.00390625, zero_point = -128 }"


def test_a_prescribed_scale():
    graph = graph_of(lambda m, x: m.d(torch.sigmoid(m.c(x))), c=conv(), d=conv())
    placement = place(graph, target(CONV, f'operators.Sigmoid = {{ kernels = ["ew"], {FIXED} }}'))
    point = by_name(placement)["sigmoid"]
    assert (point.fixed.scale, point.fixed.zero_point) == (2.0**-8, -128)
    assert (point.minimum, point.maximum) == (0.0, 1.0)
    assert by_name(placement)["c"].fixed is None


def test_a_prescribed_scale_passes_through_a_pooling():
    graph = graph_of(lambda m, x: F.max_pool2d(torch.sigmoid(m.c(x)), 2), c=conv())
    lines = (f'operators.Sigmoid = {{ kernels = ["ew"], {FIXED} }}', "operators.MaxPool = {}")
    points = by_name(place(graph, target(CONV, *lines)))
    assert points["maxpool"].fixed == points["sigmoid"].fixed
    assert points["maxpool"].fixed is not None


def test_a_prescribed_scale_is_not_forced_on_a_neighbour():
    graph = graph_of(lambda m, x: torch.cat([torch.sigmoid(m.c(x)), m.d(x)], 1), c=conv(), d=conv())
    lines = (
        f'operators.Sigmoid = {{ kernels = ["ew"], {FIXED} }}',
        'operators.Concat = { kernels = ["ew"], same_scale = "all" }',
    )
    placement = place(graph, target(CONV, *lines))
    points = by_name(placement)
    assert groups(placement) == {frozenset({"concat.input.0", "d", "concat"})}
    assert points["sigmoid"].fixed is not None
    assert points["concat"].fixed is None


def test_equal_prescribed_scales_stay_together():
    graph = graph_of(lambda m, x: torch.cat([torch.sigmoid(m.c(x)), torch.sigmoid(m.d(x))], 1), c=conv(), d=conv())
    lines = (
        f'operators.Sigmoid = {{ kernels = ["ew"], {FIXED} }}',
        'operators.Concat = { kernels = ["ew"], same_scale = "all" }',
    )
    placement = place(graph, target(CONV, *lines))
    assert groups(placement) == {frozenset({"sigmoid", "sigmoid_1", "concat"})}
    assert by_name(placement)["concat"].fixed == by_name(placement)["sigmoid"].fixed


def test_a_stated_range_narrows_the_bounds():
    graph = graph_of(lambda m, x: F.relu(m.c(x)), c=conv())
    lines = 'operators.Conv = { kernels = ["mac"], fused = ["Relu"], range = { min = -4, max = 10 } }'
    point = by_name(place(graph, target(lines)))["c"]
    assert (point.minimum, point.maximum) == (0.0, 10.0)


def test_data_movement_between_host_operators_is_not_quantized():
    graph = graph_of(lambda m, x: torch.cumsum(torch.cumsum(x, 1).transpose(2, 3), 1))
    placement = place(graph, target(CONV, "operators.Transpose = {}"))
    assert placement.points == ()
    assert reason(placement, "transpose") == "graph: only moves data that no operator on the accelerator computes with"


def test_data_movement_in_front_of_a_kernel_takes_its_format():
    graph = graph_of(lambda m, x: m.f(x.permute(0, 3, 2, 1)), f=nn.Linear(4, 3))
    placement = place(graph, target('operators.Gemm = { kernels = ["wide"] }', "operators.Transpose = {}"))
    assert summary(placement)[:2] == [("x", "input", "a16"), ("transpose", "activation", "a16")]
    assert groups(placement) == {frozenset({"x", "transpose"})}


# Constants and shared weights


def test_a_constant_operand_gets_a_weight_point():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.randn(7, 4))
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(x + self.table)

    graph = capture(Positions().eval(), torch.randn(2, 7, 4))
    lines = ('operators.Gemm = { kernels = ["mac"] }', 'operators.Add = { kernels = ["ew"] }')
    point = by_name(place(graph, target(*lines)))["table"]
    assert (point.role, point.format, point.axis, point.operator) == ("weight", "a8", None, "add")
    tied = ('operators.Gemm = { kernels = ["mac"] }', 'operators.Add = { kernels = ["ew"], same_scale = "inputs" }')
    assert place(graph, target(*tied)).operator("add").subject == "operators.Add.same_scale"


def test_a_product_reads_its_second_operand_in_the_weights_formats():
    lines = (
        'kernels.mm = { input = ["a8"], weight = ["a16"], output = ["a8"] }',
        'operators.MatMul = { kernels = ["mm"] }',
    )
    graph = graph_of(lambda m, x: m.c(x) @ m.d(x), c=conv(), d=conv())
    points = by_name(place(graph, target(CONV, *lines)))
    assert (points["c"].format, points["d"].format) == ("a8", "a8")
    assert points["matmul.input.1"].format == "a16"


def test_a_constant_on_the_left_is_the_first_operand():
    lines = (
        'kernels.mm = { input = ["a8"], weight = ["a16"], output = ["a8"] }',
        'operators.MatMul = { kernels = ["mm"] }',
    )

    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(5, 6))

        def forward(self, x):
            return self.w @ x

    points = by_name(place(capture(Left(), torch.randn(2, 6, 3)), target(*lines)))
    assert (points["x"].format, points["w"].format) == ("a16", "a8")


def test_a_weight_that_two_operators_share_has_one_point():
    graph = graph_of(lambda m, x: m.c(F.relu(m.c(x))), c=conv())
    placement = place(graph, target('operators.Conv = { kernels = ["mac", "wide"], fused = ["Relu"] }'))
    (weight,) = [p for p in placement.points if p.role == "weight"]
    assert (weight.name, weight.operator, weight.consumers) == ("c.weight", "c", ("c", "c_1"))
    biases = [(p.name, p.operator, p.tensor) for p in placement.points if p.role == "bias"]
    assert biases == [("c.bias", "c", "c.bias"), ("c_1.bias", "c_1", "c.bias")]  # their input scales differ


TIED = """
formats.w4 = { codes = [-7, 7], zero_point = 0, per = "tensor" }
kernels.look = { weight = ["w4", "t8"], output = ["a8"] }
kernels.fc = { input = ["a8"], weight = ["w8", "t8"], output = ["a8"] }
operators.Embedding = { kernels = ["look"] }
operators.Gemm = { kernels = ["fc"] }
"""


def tied_model():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.e = nn.Embedding(9, 4)

        def forward(self, x):
            return F.linear(self.e(x), self.e.weight)

    return capture(Tied(), torch.randint(0, 9, (2, 5)))


def test_operators_that_share_a_weight_agree_on_its_format():
    points = by_name(place(tied_model(), target(TIED)))
    assert (points["e.weight"].format, points["e.weight"].legal) == ("t8", ("t8",))
    assert points["e.weight"].consumers == ("e", "gemm")


def test_operators_that_cannot_agree_on_a_weight_are_both_named():
    with pytest.raises(
        PlanError,
        match=r"^gemm: no format fits both: gemm reads a8, holds weights in w8, gives a8 \(operators\.Gemm\.kernels\); "
        r"e\.weight is one weight of e, gemm, whose outputs lie along different axes, and so has one scale\. "
        r"Drop one: --keep-float gemm; untie the weights\.$",
    ):
        place(tied_model(), target(TIED.replace('"w4", "t8"', '"w4"').replace('"w8", "t8"', '"w8"')))


def test_a_shared_weight_whose_output_axes_differ_has_one_scale():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))

        def forward(self, x):
            return F.linear(x, self.w) @ self.w

    lines = (
        'kernels.fc = { input = ["a8"], weight = ["w8", "t8"], output = ["a8"] }\noperators.Gemm = { kernels = ["fc"] }'
    )
    graph = capture(Both(), torch.randn(3, 4))
    assert by_name(place(graph, target(lines)))["w"].format == "t8"


def test_a_layer_called_twice_with_a_batch_norm_each():
    graph = graph_of(
        lambda m, x: m.n2(m.c(m.n1(m.c(x)))), c=conv(bias=False), n1=nn.BatchNorm2d(4), n2=nn.BatchNorm2d(4)
    )
    assert [graph.bias_name(graph.operator(name)) for name in ("c", "c_1")] == ["c.bias", "c_1_bias"]
    points = by_name(place(graph, target(CONV), absorbed=("n1", "n2")))
    assert [(p.name, p.operator) for p in points.values() if p.role == "bias"] == [("c.bias", "c"), ("c_1_bias", "c_1")]


def test_a_bias_in_float_gets_no_point():
    lines = (
        'biases.fl = { bits = "float" }\n'
        'kernels.k = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "fl" }\n'
        'operators.Conv = { kernels = ["k"] }'
    )
    placement = place(graph_of(lambda m, x: m.c(x), c=conv()), target(lines))
    assert [p.role for p in placement.points] == ["input", "weight", "activation"]


def test_integer_inputs_get_no_point(captured):
    lines = 'kernels.look = { weight = ["t8"], output = ["a8"] }\noperators.Embedding = { kernels = ["look"] }'
    placement = place(captured("tokens"), target(lines))
    assert summary(placement) == [("embedding.weight", "weight", "t8"), ("embedding", "activation", "a8")]


def test_placing_leaves_the_graph_alone_and_is_repeatable(captured):
    graph = captured("transformer")
    lines = (
        'operators.Gemm = { kernels = ["mac", "wide"] }',
        'operators.MatMul = { kernels = ["ew"] }',
        'operators.Add = { kernels = ["ew"] }',
        "operators.Transpose = {}",
        'operators.Softmax = { kernels = ["ew"] }',
    )
    before = graph.fingerprint()
    assert place(graph, target(*lines)) == place(graph, target(*lines))
    assert graph.fingerprint() == before
