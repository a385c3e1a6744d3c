# SPDX-License-Identifier: Apache-2.0
"""What `target lint` says is left open about cost is what the estimate then lacks."""

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.graph import Graph
from qhw.roofline import CostReport
from qhw.schema import TargetSpec, open_fields, parse_target
from tests.unit.roofline.test_estimate import WHOLE


class Net(nn.Module):
    """One operator at least of every kernel of the target that `WHOLE` describes, but for the one of 4 bits."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.last = nn.Linear(8 * 4, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x)) + torch.sigmoid(self.second(x))
        return torch.as_tensor(self.last(nn.functional.max_pool2d(y, 2).flatten(1)))


@pytest.fixture(scope="module")
def graph() -> Graph:
    return qhw.capture(Net(), torch.randn(2, 3, 4, 4))


def left_open(spec: TargetSpec) -> dict[str, str]:
    fields = (field for field in open_fields(spec) if "qhw cost" in field.commands)
    return {".".join(map(str, field.path)): field.sentence() for field in fields}


def lacking(report: CostReport) -> set[str]:
    return {*report.cycles.missing, *report.seconds.missing, *report.joules.missing}


def without(old: str, new: str = "") -> str:
    # What holds for the kernel of 4 bits, which nothing here takes, is of no interest.
    text = WHOLE.replace('kernels = ["mac", "mac4"]', 'kernels = ["mac"]')
    assert old in text
    return text.replace(old, new, 1)


CASES = {
    "kernels.mac.macs_per_cycle": (", macs_per_cycle = 16", "absent: qhw cost cannot answer for Conv, DepthwiseConv"),
    "cost.channel_multiple": ("channel_multiple = 8, ", "absent: qhw cost cannot answer for Conv, DepthwiseConv"),
    "cost.elementwise_per_cycle": ("elementwise_per_cycle = 4, ", "absent: qhw cost cannot answer for Add, MaxPool"),
    "cost.power_w": (", power_w = 0.5", "absent: qhw cost tells no energy"),
    "clocks.main.clock_hz": ("clock_hz = 1e6, ", "absent: qhw cost tells no time at clock main"),
    "memories.ram.holds": (
        'holds = ["weights", "activations", "biases", "tables"], ',
        "absent: qhw cost does not know what memory ram holds",
    ),
    "memories.ram.bandwidth_bytes_per_s": (
        ", bandwidth_bytes_per_s = 1e6",
        "absent: qhw cost does not know what memory ram bounds",
    ),
    "memories.ram.ports": (", ports = 1", "absent: qhw cost does not know what memory ram bounds"),
}


@pytest.mark.parametrize("field", CASES)
def test_a_figure_left_open_is_what_the_estimate_lacks(field: str, graph: Graph) -> None:
    old, words = CASES[field]
    spec = parse_target(without(old))
    said = left_open(spec)
    assert set(said) == {field} and said[field].startswith(words)
    assert lacking(qhw.cost(graph, spec)) == {field}


def test_a_target_that_states_all_leaves_nothing_open_about_cost(graph: Graph) -> None:
    spec = parse_target(without(""))
    assert left_open(spec) == {} and lacking(qhw.cost(graph, spec)) == set()


def test_a_figure_that_is_unknown_is_said_to_be(graph: Graph) -> None:
    spec = parse_target(without("ports = 1", 'ports = "unknown"'))
    assert left_open(spec) == {"memories.ram.ports": "unknown: qhw cost does not know what memory ram bounds"}


def test_a_memory_with_another_behind_it_needs_a_capacity(graph: Graph) -> None:
    near = 'memories.near = { holds = ["weights"], bandwidth_bytes_per_s = 1e6, ports = 1 }\nmemories.ram'
    spec = parse_target(without("memories.ram", near))
    assert set(left_open(spec)) == lacking(qhw.cost(graph, spec)) == {"memories.near.capacity_bytes"}
    full = parse_target(without("memories.ram", near.replace("ports = 1", "ports = 1, capacity_bytes = 1")))
    assert set(left_open(full)) == lacking(qhw.cost(graph, full)) == {"memories.near.past_capacity"}


def test_one_of_several_clocks_is_the_default(graph: Graph) -> None:
    spec = parse_target(without(", is_default = true }", " }\nclocks.slow = { clock_hz = 1e5 }"))
    assert left_open(spec) == {"clocks.*.is_default": "absent: qhw cost needs --clock"}
    assert lacking(qhw.cost(graph, spec)) == {"clocks.*.is_default"}


def test_a_target_without_any_figure_gets_one_line() -> None:
    spec = parse_target('schema_version = 1\nname = "acme/none"\n')
    words = "absent: qhw cost tells multiply-accumulates and bytes; no cycles, time or energy"
    assert left_open(spec) == {"cost": words}


@pytest.mark.parametrize("name", ["arm/ethos-u55", "analog/max78000", "espressif/esp32-p4", "ti/tda4vm"])
def test_what_the_estimate_lacks_on_a_shipped_target_is_listed(name: str, graph: Graph) -> None:
    spec = qhw.load_target(name)
    paths = {field for field in lacking(qhw.cost(graph, spec)) if " " not in field}
    assert paths <= set(left_open(spec))
