# SPDX-License-Identifier: Apache-2.0
"""Where no formats fit, the constraints named contradict each other, and fit once any one of them is gone.

The judge below tries every assignment of formats, from the target's rows alone, and knows nothing of the search.
"""

from itertools import chain, combinations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

from qhw.errors import PlanError
from qhw.graph import Graph, place
from qhw.graph.cells import Wishes, find_cells
from qhw.graph.conflict import conflict_words, smallest_conflict
from qhw.graph.demands import Demands
from qhw.schema import parse_target

aten = torch.ops.aten
BITS = {"a8": 8, "a16": 16, "w8": 8, "w4": 4, "w16": 16}
ACTIVATIONS = ("a8", "a16")
WEIGHTS = ("w8", "w4", "w16")
HEAD = """
schema_version = 1
name = "test/any"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], bits = 8, zero_point = 0, per = "tensor" }
formats.w4 = { codes = [-7, 7], bits = 4, zero_point = 0, per = "tensor" }
formats.w16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
"""
TIES = {"none": (), "inputs": (0, 1), "input_output": (0, 2), "all": (0, 1, 2), "aligned": (0, 1, 2)}


def build(kinds, shared):
    """A chain: convolutions, on one weight or on weights of their own, and sums of the last two values."""
    root, graph = nn.Module(), fx.Graph()

    def named(node, name):
        node.meta.update(name=name, shape=(2, 4, 5, 5), dtype="float32")
        return node

    values = [named(graph.placeholder("x"), "x")]
    for index, kind in enumerate(kinds):
        if kind == "Conv":
            weight = "w" if shared else f"w{index}"
            root.register_parameter(weight, nn.Parameter(torch.zeros(4, 4, 1, 1)))
            parameter = graph.get_attr(weight)
            parameter.meta.update(shape=(4, 4, 1, 1), dtype="float32")
            values.append(named(graph.call_function(aten.conv2d.default, (values[-1], parameter)), f"conv{index}"))
        else:
            pair = (values[-1], values[-2 if len(values) > 1 else -1])
            values.append(named(graph.call_function(aten.add.Tensor, pair), f"add{index}"))
    graph.output((values[-1], values[1]))
    return Graph(fx.GraphModule(root, graph), 2)


def some(options):
    return st.lists(st.sampled_from(options), min_size=1, max_size=len(options), unique=True)


@st.composite
def problems(draw):
    """Rows of kernels, operators, a graph and what is demanded of its points."""
    rows = {
        f"k{index}": {
            "input": draw(some(ACTIVATIONS)),
            "weight": draw(some(WEIGHTS)),
            "output": draw(some(ACTIVATIONS)),
        }
        for index in range(draw(st.integers(1, 3)))
    }
    operators = {
        kind: {
            "kernels": draw(some(tuple(rows))),
            "same_scale": draw(st.sampled_from(tuple(TIES))),
            "keeps": draw(st.booleans()),
        }
        for kind in ("Conv", "Add")
    }
    edge = draw(st.none() | some(ACTIVATIONS))
    kinds = draw(st.lists(st.sampled_from(("Conv", "Conv", "Add")), min_size=1, max_size=3))
    tensors = draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(ACTIVATIONS)), max_size=3))
    weights = draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(WEIGHTS)), max_size=2))
    return rows, operators, edge, kinds, draw(st.booleans()), tensors, weights


def text_of(rows, operators, edge):
    lines = [
        f"kernels.{name} = {{ input = {row['input']}, weight = {row['weight']}, output = {row['output']} }}"
        for name, row in rows.items()
    ]
    for kind, row in operators.items():
        weightless = "" if kind == "Conv" else "_pair"
        lines.append(
            f"operators.{kind} = {{ kernels = {[name + weightless for name in row['kernels']]}, same_scale = "
            f'"{row["same_scale"]}", may_change_precision = {str(not row["keeps"]).lower()} }}'
        )
    lines += [f"kernels.{n}_pair = {{ input = {r['input']}, output = {r['output']} }}" for n, r in rows.items()]
    lines += [] if edge is None else [f"boundary.output_formats = {edge}"]
    return HEAD + "\n".join(lines).replace("'", '"')


class Judge:
    """Whether formats exist for some of the constraints, by trying all."""

    def __init__(self, rows, operators, edge, cells, demands):
        self.rows, self.operators, self.edge, self.cells, self.demands = rows, operators, edge, cells, demands

    def may(self, cell, keys, held, formats):
        """Whether operands and result, in this order, may have these formats."""
        name, kind = cell.operator.name, cell.operator.kind
        row = self.operators[kind]
        *given, result = formats
        if ("demand", cell.output) in keys and self.demands.tensors[cell.output] != result:
            return False
        if ("demand", cell.weight) in keys and self.demands.weights[cell.weight] != held:
            return False
        if ("edge", cell.output) in keys and result not in self.edge:
            return False
        if ("scale", name) in keys:
            places = [given[0], given[-1], result]
            if len({places[i] for i in TIES[row["same_scale"]]}) > 1:
                return False
        widths = {BITS[f] for f in (*formats, *([held] if held else []))}
        if ("precision", name) in keys and len(widths) > 1:
            return False
        if ("kernels", name) not in keys:
            return True
        outputs = {k: self.edge if cell.at_edge is not None else self.rows[k]["output"] for k in row["kernels"]}
        return any(
            set(given) <= set(self.rows[k]["input"])
            and (held is None or held in self.rows[k]["weight"])
            and result in outputs[k]
            for k in row["kernels"]
        )

    def works(self, cell, keys, held):
        places = [tuple(BITS)] * (len(cell.inputs) + 1)
        return any(self.may(cell, keys, held, formats) for formats in product(*places))

    def is_met(self, keys):
        shared = {c.weight for c in self.cells if c.weight is not None and ("shared", c.weight) in keys}
        for name in shared:
            family = [c for c in self.cells if c.weight == name]
            if not any(all(self.works(c, keys, held) for c in family) for held in BITS):
                return False
        rest = [c for c in self.cells if c.weight not in shared or c.weight is None]
        return all(any(self.works(c, keys, held) for held in (BITS if c.weight else (None,))) for c in rest)


def all_keys(cells, operators, demands):
    keys = [("kernels", c.operator.name) for c in cells]
    keys += [("scale", c.operator.name) for c in cells if operators[c.operator.kind]["same_scale"] != "none"]
    keys += [("precision", c.operator.name) for c in cells if operators[c.operator.kind]["keeps"]]
    weights = [c.weight for c in cells if c.weight]
    keys += [("shared", name) for name in dict.fromkeys(weights) if weights.count(name) > 1]
    return [
        *keys,
        *(("demand", n) for n in (*demands.weights, *demands.tensors)),
        *(("edge", n) for n in demands.outputs),
    ]


def subsets(keys):
    return chain.from_iterable(combinations(keys, size) for size in range(len(keys)))


@given(problem=problems())
@settings(max_examples=80, deadline=None)
def test_the_set_named_conflicts_and_every_smaller_one_fits(problem):
    rows, operators, edge, kinds, shared, tensors, weights = problem
    graph, spec = build(kinds, shared), parse_target(text_of(rows, operators, edge))
    cells = find_cells(graph, spec, Wishes()).cells
    held = list(dict.fromkeys(c.weight for c in cells if c.weight))
    wanted = {cells[i % len(cells)].output: name for i, name in tensors if cells}
    asked = {held[i % len(held)]: name for i, name in weights if held}
    read = {name for c in cells for name in c.inputs}
    outputs = {c.output: tuple(edge) for c in cells if edge and c.output in graph.output_values and c.output in read}
    demands = Demands(asked, wanted, {}, outputs)
    judge = Judge(rows, operators, edge, cells, demands)
    conflict = smallest_conflict(spec, cells, demands)
    assert bool(conflict) is not judge.is_met(all_keys(cells, operators, demands))
    if conflict:
        keys = [one.key for one in conflict]
        assert not judge.is_met(keys)
        assert all(judge.is_met(some_of) for some_of in subsets(keys))
        assert "\n" not in conflict_words(conflict)
        with pytest.raises(PlanError):
            place(graph, spec, formats=wanted | asked)
    else:  # and what can be met is met, however many operands it takes
        placed = place(graph, spec, formats=wanted | asked)
        chosen = {p.tensor: p.format for p in placed.points if p.role != "edge"}
        assert {name: chosen[name] for name in wanted | asked} == wanted | asked


def test_a_row_that_a_common_scale_rules_out_is_no_part_of_the_conflict_without_it():
    rows = """
kernels.plain = { input = ["a8"], weight = ["w8"], output = ["a16"] }
kernels.tied = { input = ["a8"], weight = ["w16"], output = ["a8"] }
operators.Conv = { kernels = ["plain", "tied"], same_scale = "input_output" }
"""
    with pytest.raises(PlanError) as caught:
        place(build(["Conv"], False), parse_target(HEAD + rows), formats={"w0": "w8"})
    assert "one scale for what it reads and gives (operators.Conv.same_scale)" in str(caught.value)
    assert "w0 is demanded in w8" in str(caught.value) and "all 3" in str(caught.value)


SHARING = (
    HEAD
    + """
kernels.narrow = { input = ["a8"], weight = ["w8"], output = ["a8"] }
kernels.wide = { input = ["a16"], weight = ["w16"], output = ["a16"] }
operators.Conv = { kernels = ["narrow", "wide"] }
"""
)


def test_a_conflict_is_told_in_one_line_with_its_fields_and_ways_out():
    with pytest.raises(PlanError) as caught:
        place(build(["Conv", "Conv", "Conv"], True), parse_target(SHARING), formats={"conv0": "a8", "conv2": "a16"})
    assert str(caught.value) == (
        "conv0: no format fits all 5: conv0 reads a8, holds weights in w8, gives a8 or reads a16, holds weights in "
        "w16, gives a16 (operators.Conv.kernels); conv2 reads a8, holds weights in w8, gives a8 or reads a16, holds "
        "weights in w16, gives a16 (operators.Conv.kernels); w is one weight of conv0, conv1, conv2; conv0 is demanded "
        "in a8 (--format); conv2 is demanded in a16 (--format). Drop one: --keep-float conv0; --keep-float conv2; "
        "untie the weights; --format conv0=a8; --format conv2=a16."
    )


def test_who_reads_a_result_does_not_bind_the_weight_of_whom_it_shares():
    """The sum wants 16 bits of the first convolution; the second can only have 8, and so has the weight they share."""
    text = (
        SHARING
        + """
kernels.pair = { input = ["a16"], output = ["a16"] }
operators.Add = { kernels = ["pair"] }
"""
    )
    placed = place(build(["Conv", "Add", "Conv"], True), parse_target(text), formats={"conv2": "a8"})
    assert {p.name: p.format for p in placed.points if p.role in ("weight", "activation", "edge")} == {
        "w": "w8",
        "conv0.input.0": "a8",  # the sum reads x, too
        "conv0": "a8",
        "add1.input.0": "a16",
        "add1": "a16",
        "conv2.input.0": "a8",
        "conv2": "a8",
    }


def test_the_conflict_of_a_precision_that_may_not_change():
    text = (
        HEAD
        + """
kernels.k = { input = ["a8"], weight = ["w8"], output = ["a16"] }
kernels.l = { input = ["a16"], weight = ["w8", "w16"], output = ["a8", "a16"] }
operators.Conv = { kernels = ["k", "l"], may_change_precision = false }
"""
    )
    with pytest.raises(PlanError, match=r"conv0 reads and gives one width \(operators\.Conv\.may_change_precision\)"):
        place(build(["Conv"], False), parse_target(text), formats={"conv0": "a16", "w0": "w8"})
