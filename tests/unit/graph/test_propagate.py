# SPDX-License-Identifier: Apache-2.0
"""Any small graph on any small target: placing ends, and every kernel gets and gives formats that it allows.

The checker below reads the target's text again and knows nothing of the search.
"""

import pytest
import torch
from hypothesis import example as also
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from qhw.graph import Graph, place
from qhw.schema import parse_target

aten = torch.ops.aten
FORMATS = ("a8", "b8", "a16")
WEIGHTS = ("w8", "w4", "t8")
HEAD = """
schema_version = 1
name = "test/any"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.b8 = { bits = 8, signed = false, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.w4 = { codes = [-7, 7], zero_point = 0, per = "out_channel" }
formats.t8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
"""
RULES = ("none", "input_output", "inputs", "all")
KINDS = ("Conv", "Relu", "Add", "Concat", "MaxPool", "Transpose", "Cumsum", "Const")


def build(steps, outputs, shared):
    """A graph of 4-channel images: each step is a kind and which earlier values it reads."""
    root, graph = nn.Module(), fx.Graph()
    for name, shape in (("w", (4, 4, 1, 1)), ("c", (4, 1, 1)), ("narrow", (4, 8, 1, 1))):
        root.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    values = []

    def add(target, args, name, shape=(2, 4, 5, 5)):
        node = graph.call_function(target, args)
        node.meta.update(name=name, shape=shape, dtype="float32")
        return node

    def parameter(name):
        node = graph.get_attr(name)
        node.meta.update(shape=tuple(getattr(root, name).shape), dtype="float32")
        return node

    first = graph.placeholder("x")
    first.meta.update(name="x", shape=(2, 4, 5, 5), dtype="float32")
    values.append(first)
    for index, (kind, left, right) in enumerate(steps):
        a, b = values[left % len(values)], values[right % len(values)]
        name = f"{kind.lower()}{index}"
        if kind == "Conv":
            weight = "w" if shared else f"w{index}"
            if not shared:
                root.register_parameter(weight, nn.Parameter(torch.zeros(4, 4, 1, 1)))
            node = add(aten.conv2d.default, (a, parameter(weight)), name)
        elif kind == "Add":
            node = add(aten.add.Tensor, (a, b), name)
        elif kind == "Const":
            node = add(aten.add.Tensor, (a, parameter("c")), name)
        elif kind == "Concat":
            joined = add(aten.cat.default, ([a, b], 1), name, (2, 8, 5, 5))
            node = add(aten.conv2d.default, (joined, parameter("narrow")), f"{name}narrow")
        elif kind == "Relu":
            node = add(aten.relu.default, (a,), name)
        elif kind == "MaxPool":
            node = add(aten.max_pool2d.default, (a, [3], [1], [1]), name)
        elif kind == "Transpose":
            node = add(aten.transpose.int, (a, 2, 3), name)
        else:
            node = add(aten.cumsum.default, (a, 1), name)
        values.append(node)
    graph.output(tuple(values[index % len(values)] for index in outputs) or (values[-1],))
    return Graph(fx.GraphModule(root, graph), 2)


def some(options, least=1):
    return st.lists(st.sampled_from(options), min_size=least, max_size=len(options), unique=True)


@st.composite
def targets(draw):
    kernels, lines = {}, []
    for index in range(draw(st.integers(1, 4))):
        row = {"input": draw(some(FORMATS)), "output": draw(some(FORMATS))}
        if draw(st.booleans()):
            row["weight"] = draw(some(WEIGHTS + FORMATS))
        kernels[f"k{index}"] = row
        lines.append(f"kernels.k{index} = {{ " + ", ".join(f"{key} = {value}" for key, value in row.items()) + " }")
    operators = {}
    for kind in ("Conv", "Relu", "Add", "Concat", "MaxPool", "Transpose"):
        if draw(st.integers(0, 5)) == 0:
            continue
        row = {"same_scale": draw(st.sampled_from(RULES)), "kernels": draw(some(tuple(kernels)))}
        if kind in ("MaxPool", "Transpose", "Concat") and draw(st.booleans()):
            del row["kernels"]
        if kind in ("Conv", "Add"):
            row["fused"] = [list(c) for c in draw(some((("Relu",), ("Relu", "MaxPool"), ("Transpose",)), 0))]
        if kind == "Relu" and draw(st.booleans()):
            row["fixed_output"] = {name: (0.5, 0) for name in draw(some(FORMATS))}
        operators[kind] = row
        text = [f"kernels = {row['kernels']}"] if "kernels" in row else []
        text.append(f'same_scale = "{row["same_scale"]}"')
        text.append(f"fused = {row.get('fused', [])}")
        text += [f"fixed_output.{f} = {{ scale = 0.5, zero_point = 0 }}" for f in row.get("fixed_output", {})]
        lines.append(f"operators.{kind} = {{ {', '.join(text)} }}")
    float_outputs = draw(st.booleans())
    if float_outputs:
        lines.append('boundary = { outputs = "float" }')
    return HEAD + "\n".join(lines).replace("'", '"'), kernels, operators, float_outputs


@st.composite
def graphs(draw):
    steps = draw(
        st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9)
    )
    return steps, draw(st.lists(st.integers(1, 9), max_size=2)), draw(st.booleans())


def check(graph, kernels, operators, float_outputs, placement):
    """Every rule that a placement must keep, from the raw facts."""
    placed = {o.name: o for o in placement.operators}
    assert set(placed) == {o.name for o in graph.operators}
    assert len({p.name for p in placement.points}) == len(placement.points)
    tensors = {p.tensor: p for p in placement.points if p.role in ("activation", "input")}
    edges = {p.name: p for p in placement.points if p.role == "edge"}
    weights = {p.tensor: p for p in placement.points if p.role == "weight"}
    fused = {o.name for o in placement.operators if o.fused_into}
    for point in placement.points:
        assert point.format == point.legal[0]
        assert len(set(point.legal)) == len(point.legal)
        assert all(placed[name].where == "accelerator" for name in point.consumers)
        if point.role == "input":
            assert point.tensor == "x" or placed[point.tensor].where == "host"
            assert point.consumers
        if point.role == "activation":
            assert placed[point.operator].where == "accelerator"
    used_edges = set()
    for operator in graph.operators:
        here = placed[operator.name]
        if here.where == "host":
            assert here.subject
            assert here.reason
            assert operator.name not in {p.operator for p in placement.points if p.role != "input"}
            continue
        if operator.name in fused:
            continue
        chain = [graph.operator(name).kind for name in here.members[1:]]
        assert not chain or chain in operators[operator.kind]["fused"]
        for before, after in zip(here.members, here.members[1:], strict=False):
            assert [o.name for o in graph.consumers(before)] == [after]
            assert before not in graph.output_values
        slots = []
        for index, value in enumerate(operator.inputs):
            name = f"{operator.name}.input.{index}"
            used_edges |= {name} & set(edges)
            slots.append(edges.get(name) or tensors[value])
            assert name in edges or operator.name in tensors[value].consumers
        result = tensors.get(here.members[-1])
        assert result is not None or float_outputs
        row = operators[operator.kind]
        if "kernels" in row:
            kernel = kernels[here.kernel]
            assert here.kernel in row["kernels"]
            for index, slot in enumerate(slots):
                second = index == 1 and operator.kind == "Add"
                assert slot.format in (kernel.get("weight", kernel["input"]) if second else kernel["input"])
            if operator.weight is not None:
                allowed = kernel["weight"] if operator.kind == "Conv" else kernel.get("weight", kernel["input"])
                assert weights[operator.weight].format in allowed
            assert result is None or result.format in kernel["output"]
        tied = {"all": [*slots, result], "inputs": slots, "input_output": [slots[0], result], "none": []}
        together = [s for s in tied[row["same_scale"] if "kernels" in row else "all"] if s is not None]
        assert len({s.group for s in together}) <= 1
        own = row.get("fixed_output", {})
        if "kernels" in row and result is not None and result.format in own:
            assert result.fixed is not None
    assert used_edges == set(edges)
    for group in {p.group for p in placement.points}:
        members = [p for p in placement.points if p.group == group]
        assert len({p.format for p in members}) == 1
        assert len({p.fixed for p in members}) == 1


@pytest.mark.slow
@given(target=targets(), graph=graphs())
@settings(max_examples=150, deadline=None)
@also(  # an operand that reads one tensor twice, in formats that differ
    target=(
        HEAD
        + 'kernels.k0 = { input = ["a8"], weight = ["b8"], output = ["a16"] }\n'
        + 'operators.Add = { kernels = ["k0"], same_scale = "none", fused = [] }',
        {"k0": {"input": ["a8"], "weight": ["b8"], "output": ["a16"]}},
        {"Add": {"kernels": ["k0"], "same_scale": "none", "fused": []}},
        False,
    ),
    graph=([("Add", 0, 0), ("Add", 1, 1)], [], False),
)
def test_every_placement_keeps_every_rule(target, graph):
    text, kernels, operators, float_outputs = target
    captured = build(*graph)
    check(captured, kernels, operators, float_outputs, place(captured, parse_target(text)))


def test_the_checker_can_fail():
    text = (
        HEAD
        + 'kernels.k0 = { input = ["a8"], weight = ["w8"], output = ["a8"] }\noperators.Conv = { kernels = ["k0"] }'
    )
    row = {"input": ["a16"], "weight": ["w8"], "output": ["a8"]}
    graph = build([("Conv", 0, 0)], [], False)
    with pytest.raises(AssertionError):
        check(
            graph,
            {"k0": row},
            {"Conv": {"kernels": ["k0"], "same_scale": "none"}},
            False,
            place(graph, parse_target(text)),
        )
