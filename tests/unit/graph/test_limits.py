# SPDX-License-Identifier: Apache-2.0
"""Structural limits: what an operator has is what its definition says, and a limit just outside it refuses it."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qhw.graph import capture, place
from qhw.graph.limits import violated_limit
from qhw.schema import parse_target
from qhw.schema.operators import ATTRIBUTES, PLANNED_LIMITS

HEAD = """
schema_version = 1
name = "test/limits"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"] }
kernels.unary = { input = ["a8"], output = ["a8"] }
"""
WEIGHTED = ("Conv", "DepthwiseConv", "ConvTranspose", "Gemm")


class Net(nn.Module):
    def __init__(self, function, layer):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, x):
        return self.function(self.layer, x)


def graph_of(function, shape=(2, 4, 6, 8), layer=None):
    torch.manual_seed(0)
    return capture(Net(function, layer).eval(), torch.randn(shape))


def verdict(graph, kind, limit):
    """Where the operator of a kind runs under a limit, and the field that decides."""
    kernel = "mac" if kind in WEIGHTED else "unary"
    spec = parse_target(f'{HEAD}operators.{kind} = {{ kernels = ["{kernel}"], limits = {{ {limit} }} }}')
    placed = place(graph, spec)
    operator = next(o for o in graph.operators if o.kind == kind)
    found = placed.operator(operator.name)
    return found.where == "accelerator", found.subject


def run(layer, x):
    return layer(x)


def bilinear(x):
    return F.interpolate(x, scale_factor=2, mode="bilinear")


CONV = nn.Conv2d(4, 6, 3, padding=1)
DEPTH = nn.Conv2d(4, 8, 3, groups=4)
# An operator; its kind; limits that it keeps, each with one that it breaks.
CASES = [
    (run, CONV, "Conv", "height = { max = 6 }", "height = { max = 5 }"),
    (run, CONV, "Conv", "width = { min = 8 }", "width = { min = 9 }"),
    (run, CONV, "Conv", "elements = { max = 288 }", "elements = { max = 287 }"),  # 6 x 6 x 8
    (run, CONV, "Conv", "reduced_elements = [36]", "reduced_elements = { max = 35 }"),  # 3 x 3 x 4
    (run, CONV, "Conv", 'padding = ["same"]', 'padding = ["valid"]'),
    (run, CONV, "Conv", 'padding = ["valid", 1]', "padding = [0]"),
    (run, CONV, "Conv", 'padding = ["explicit"]', "padding = [2]"),
    (run, CONV, "Conv", 'padding = ["zero"]', "padding = { max = 0 }"),
    (run, nn.Conv2d(4, 6, 3), "Conv", 'padding = ["valid"]', 'padding = ["same"]'),
    (run, nn.Conv2d(4, 6, 3, padding="same"), "Conv", 'padding = ["same"]', 'padding = ["valid"]'),
    (run, nn.Conv2d(4, 6, 3, padding="same"), "Conv", "padding = [1]", "padding = [0]"),
    (run, nn.Conv2d(4, 6, 3, padding="valid"), "Conv", 'padding = ["valid"]', 'padding = ["same"]'),
    # TFLite's "same" puts the one row that is needed behind 6 rows at stride 2; torch puts one on both sides.
    (run, nn.Conv2d(4, 6, 3, stride=2, padding=1), "Conv", 'padding = ["explicit"]', 'padding = ["same"]'),
    (run, DEPTH, "DepthwiseConv", "depth_multiplier = [2]", "depth_multiplier = [1]"),
    (run, DEPTH, "DepthwiseConv", "reduced_elements = [9]", "reduced_elements = [18]"),
    (run, nn.MaxPool2d(3, 1, 1), "MaxPool", 'padding = ["same"]', 'padding = ["zero"]'),  # it pads with -inf
    (run, nn.AvgPool2d((2, 4)), "AveragePool", "reduced_elements = [8]", "reduced_elements = [6]"),
    (lambda m, x: x.softmax(1), None, "Softmax", 'axis = ["channel"]', 'axis = ["last"]'),
    (lambda m, x: x.softmax(-1), None, "Softmax", 'axis = ["width"]', 'axis = ["height"]'),
    (lambda m, x: x.softmax(2), None, "Softmax", 'axis = ["height"]', "axis = [1, -1]"),
    (lambda m, x: x.softmax(3), None, "Softmax", "axis = [-1]", "axis = [2]"),
    (lambda m, x: x.mean((1, 3)), None, "ReduceMean", 'axis = ["channel", "last"]', 'axis = ["last"]'),
    (lambda m, x: x.mean((1, 3)), None, "ReduceMean", "reduced_elements = [32]", "reduced_elements = { max = 31 }"),
    (lambda m, x: torch.cat([x, x], 2), None, "Concat", "axis = [2]", 'axis = ["channel"]'),
    (lambda m, x: F.leaky_relu(x, 0.25), None, "LeakyRelu", "slope = { max = 0.25 }", "slope = { max = 0.2 }"),
    (lambda m, x: F.interpolate(x, scale_factor=2), None, "Resize", 'mode = ["nearest"]', 'mode = ["linear"]'),
    (lambda m, x: bilinear(x), None, "Resize", 'mode = ["linear"]', 'mode = ["nearest"]'),
    (lambda m, x: F.interpolate(x, scale_factor=2), None, "Resize", "elements = [768]", "elements = { max = 767 }"),
    (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="reflect"), None, "Pad", 'mode = ["reflect"]', 'mode = ["constant"]'),
    (lambda m, x: F.pad(x, (1, 1, 1, 1), mode="replicate"), None, "Pad", 'mode = ["edge"]', 'padding = ["zero"]'),
    (lambda m, x: torch.relu(x) * 1.0, None, "Relu", "height = [6]", "width = [6]"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "layer", "kind", "kept", "broken"), CASES, ids=[f"{c[2]}-{c[3]}" for c in CASES])
def test_a_limit_is_kept_or_sends_the_operator_to_the_host(function, layer, kind, kept, broken):
    graph = graph_of(function, layer=layer)
    assert verdict(graph, kind, kept) == (True, f"operators.{kind}.kernels")
    assert verdict(graph, kind, broken) == (False, f"operators.{kind}.limits.{broken.split()[0]}")


SPLITS = {
    "chunk": (lambda m, x: x.chunk(3, 1)[0] * 1.0, 2, 1),  # of 4 channels: 2 + 2, so two parts
    "split": (lambda m, x: x.split(3, 3)[0] * 1.0, 3, 3),
    "split-sizes": (lambda m, x: x.split([1, 2, 3], 2)[2] * 1.0, 3, 2),
    "unbind": (lambda m, x: x.unbind(1)[0] * 1.0, 4, 1),
}


@pytest.mark.parametrize("how", SPLITS)
def test_into_how_many_parts_a_split_cuts_and_where(how):
    function, outputs, axis = SPLITS[how]
    graph = graph_of(function)
    split = next(o for o in graph.operators if o.kind == "Split")
    assert len(function(None, torch.zeros(2, 4, 6, 8))) == len(split.shape) or outputs
    assert (split.attributes["outputs"], split.attributes["axis"]) == (outputs, axis)
    assert violated_limit(split, {"outputs": (outputs,), "axis": (axis,)}) is None
    assert violated_limit(split, {"outputs": (outputs + 1,)}) == ("outputs", str(outputs))


def test_a_split_outside_its_limits_is_the_hosts_and_its_parts_are_read_anew():
    layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(1, 2, 1)])
    graph = graph_of(lambda m, x: m[1](m[0](x).split(1, 1)[2]), layer=layers)
    text = (
        HEAD
        + 'operators.Conv = { kernels = ["mac"] }\noperators.Split = { same_scale = "input_output", limits = { %s } }'
    )
    inside = place(graph, parse_target(text % "outputs = { max = 4 }"))
    first, split, part, second = (o.name for o in graph.operators)
    assert [inside.operator(name).where for name in (split, part)] == ["accelerator", "accelerator"]
    assert [p.name for p in inside.points if p.role == "input"] == ["x"]
    outside = place(graph, parse_target(text % "outputs = { max = 3 }"))
    assert [outside.operator(name).where for name in (first, split, part, second)] == [
        "accelerator",
        "host",
        "host",
        "accelerator",
    ]
    assert outside.operator(split).subject == "operators.Split.limits.outputs"
    assert [p.name for p in outside.points if p.role == "input"] == ["x", part]


def test_a_view_that_the_target_does_not_have_is_the_hosts():
    graph = graph_of(lambda m, x: m(x.flatten(1)), layer=nn.Linear(192, 3))
    text = HEAD + 'operators.Gemm = { kernels = ["mac"] }\n'
    view, _ = (o.name for o in graph.operators)
    assert place(graph, parse_target(text)).operator(view).where == "accelerator"
    placed = place(graph, parse_target(text + "operators.Flatten = { kernels = [] }"))
    assert (placed.operator(view).where, placed.operator(view).subject) == ("host", "operators.Flatten.kernels")
    assert [p.name for p in placed.points if p.role == "input"] == [view]


@given(
    size=st.integers(1, 40),
    taps=st.integers(1, 7),
    stride=st.integers(1, 4),
    gap=st.integers(1, 3),
    pad=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_same_padding_is_that_of_tensorflow_in_equal_parts(size, taps, stride, gap, pad):
    """TensorFlow: out = ceil(size / stride), total = max((out - 1) stride + effective - size, 0), the half in front."""
    from types import SimpleNamespace

    facts = {"kernel": [taps], "stride": [stride], "dilation": [gap], "padding": [pad], "spatial": [size], "rank": 3}
    operator = SimpleNamespace(kind="Conv", attributes=facts)
    effective = (taps - 1) * gap + 1
    total = max((-(-size // stride) - 1) * stride + effective - size, 0)
    front, behind = total // 2, total - total // 2
    assert (violated_limit(operator, {"padding": ("same",)}) is None) == (front == behind == pad)


def test_every_attribute_but_the_ratio_of_scales_is_read():
    assert set(ATTRIBUTES) - set(PLANNED_LIMITS) == {"rescale"}
