# SPDX-License-Identifier: Apache-2.0
"""The roofline, against figures computed by hand beside each test."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan
from qhw.errors import PlanError, TargetError
from qhw.graph import Graph
from qhw.roofline import CostReport, estimate
from qhw.schema import TargetSpec, parse_target

BASE = """\
schema_version = 1
name = "acme/line"
fallback = "host"
formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
formats.w4 = { bits = 4, signed = true, zero_point = 0, per = "tensor" }
biases.b = { bits = 32, scale = "input*weight" }
kernels.mac = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"], macs_per_cycle = 16 }
kernels.mac4 = { input = ["a8"], weight = ["w4"], bias = "b", output = ["a8"], macs_per_cycle = 32 }
kernels.vector = { input = ["a8"], output = ["a8"] }
operators.Conv = { kernels = ["mac", "mac4"], fused = ["Relu"] }
operators.DepthwiseConv = { kernels = ["mac"] }
operators.Gemm = { kernels = ["mac"] }
operators.Add.kernels = ["vector"]
operators.MaxPool.kernels = ["vector"]
operators.Sigmoid = { kernels = ["vector"], approximation = { kind = "table", entries = 256 } }
operators.Transpose.same_scale = "input_output"
operators.Flatten.same_scale = "input_output"
"""
CLOCK = "clocks.main = { clock_hz = 1e6, is_default = true }\n"
COST = "cost = { channel_multiple = 8, elementwise_per_cycle = 4, power_w = 0.5 }\n"
# 1e6 bytes a second at 1e6 Hz: a byte a cycle.
ALL = 'holds = ["weights", "activations", "biases", "tables"], '
MEMORY = f"memories.ram = {{ {ALL}capacity_bytes = 1000000, bandwidth_bytes_per_s = 1e6, ports = 1 }}\n"
WHOLE = BASE + CLOCK + COST + MEMORY


def target_of(text: str = WHOLE, old: str = "", new: str = "") -> TargetSpec:
    assert old in text
    return parse_target(text.replace(old, new, 1))


def report_of(module: nn.Module, target: TargetSpec, *shape: int, **more: Any) -> CostReport:
    clock = more.pop("clock", None)
    graph = qhw.capture(module, torch.randn(2, *shape))
    plan = qhw.plan(graph, target, calibration=torch.randn(2, *shape), **more)
    return estimate(graph, plan, target, clock)


def conv() -> nn.Module:
    """3 -> 10 channels, 1x1, on 4x5 pixels: 600 multiply-accumulates, 30 weights, 10 biases."""
    return nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU())


# 600 macs; channels 3 -> 8 and 10 -> 16: 20 pixels * 8 * 16 = 2560; / 16 = 160 cycles.
# Bytes: 30 weights + 10 biases of 4 bytes + 60 in + 200 out = 330, a cycle each.
def test_a_convolution_by_hand() -> None:
    report = report_of(conv(), target_of(), 3, 4, 5)
    (operator,) = report.operators
    assert operator.macs == 600
    assert operator.compute.value == 160
    assert operator.traffic["ram"].value == 330
    assert operator.memory["ram"].value == 330
    assert (operator.cycles.value, operator.bound_by) == (330, "ram")
    assert (report.cycles.value, report.seconds.value, report.joules.value) == (330, 330e-6, 165e-6)
    assert (report.clock, report.host, report.refused) == ("main", (), ())


def test_a_faster_memory_leaves_the_arithmetic() -> None:
    report = report_of(conv(), target_of(WHOLE, "ports = 1", "ports = 4"), 3, 4, 5)
    assert report.operators[0].memory["ram"].value == 82.5
    assert (report.cycles.value, report.bounds) == (160, {"compute": 1})


def test_four_bit_weights_are_packed_and_faster() -> None:
    """15 bytes of weights, 2560 / 32 = 80 cycles."""
    report = report_of(conv(), target_of(), 3, 4, 5, formats={"*.weight": "w4"})
    (operator,) = report.operators
    assert (operator.kernel, operator.compute.value, operator.traffic["ram"].value) == ("mac4", 80, 315)


def test_a_depthwise_convolution_rounds_its_channels_once() -> None:
    """5 channels, 3x3, padded, on 4x4: 16 * 9 * 5 = 720; 5 -> 8 channels: 1152; / 16 = 72."""
    report = report_of(nn.Conv2d(5, 5, 3, padding=1, groups=5), target_of(), 5, 4, 4)
    assert (report.operators[0].kind, report.operators[0].compute.value) == ("DepthwiseConv", 72)


def test_groups_are_rounded_each() -> None:
    """2 groups of 4 -> 6 channels on 1 pixel: 2 * 4 * 6 = 48; 2 * 8 * 8 = 128; / 16 = 8."""
    report = report_of(nn.Conv2d(8, 12, 1, groups=2), target_of(), 8, 1, 1)
    assert (report.operators[0].macs, report.operators[0].compute.value) == (48, 8)


class Residual(nn.Module):
    """A convolution of 8 channels, added to its input, pooled, squashed, and sorted anew."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        pooled = nn.functional.max_pool2d(self.conv(x) + x, 2)
        return pooled.sigmoid().permute(0, 2, 3, 1)


def test_elementwise_pools_tables_and_movement_by_hand() -> None:
    """On 4x4: 128 values, 32 behind the pool. Four results a cycle; a window of 2x2 is four of them."""
    report = report_of(Residual(), target_of(), 8, 4, 4)
    by_kind = {operator.kind: operator for operator in report.operators}
    compute = {kind: operator.compute.value for kind, operator in by_kind.items()}
    traffic = {kind: operator.traffic["ram"].value for kind, operator in by_kind.items()}
    assert compute == {"Conv": 16 * 64 / 16, "Add": 128 / 4, "MaxPool": 32 * 4 / 4, "Sigmoid": 32 / 4, "Transpose": 0}
    # 64 weights and 128 in and out (the planner gives the layer a bias of zeros only where it must).
    assert traffic["Conv"] == 64 + 128 + 128
    assert traffic["Add"] == 3 * 128 and traffic["MaxPool"] == 128 + 32
    assert traffic["Sigmoid"] == 32 + 32 + 256 and traffic["Transpose"] == 32 + 32
    assert report.cycles.value == sum(traffic.values())  # a byte takes a cycle: longer than any arithmetic here


def test_a_tensor_seen_otherwise_costs_nothing() -> None:
    report = report_of(nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)), target_of(), 3, 2, 2)
    (operator,) = report.operators
    assert (operator.kind, operator.macs, operator.traffic["ram"].value) == ("Gemm", 48, 48 + 12 + 4)


# What is missing, the change that leaves it out, and what is still known of 330 cycles.
MISSING = [
    ("kernels.mac.macs_per_cycle", ", macs_per_cycle = 16", "", 330),
    ("kernels.mac.macs_per_cycle", "macs_per_cycle = 16", 'macs_per_cycle = "unknown"', 330),
    ("cost.channel_multiple", "channel_multiple = 8, ", "", 330),
    ("memories.ram.bandwidth_bytes_per_s", "bandwidth_bytes_per_s = 1e6, ", "", 160),
    ("memories.ram.bandwidth_bytes_per_s", "bandwidth_bytes_per_s = 1e6", 'bandwidth_bytes_per_s = "unknown"', 160),
    ("memories.ram.ports", ", ports = 1", "", 160),
    ("memories.ram.holds", ALL, 'holds = "unknown", ', 160),
    ("memories", MEMORY, "", 160),
    ("memories.*.holds: none holds biases", '"biases", ', "", 290),
    ("clocks", CLOCK, "", 160),
    ("clocks.main.clock_hz", "clock_hz = 1e6, ", "", 160),
    ("clocks.*.is_default", ", is_default = true }", " }\nclocks.low.clock_hz = 1.0", 160),
    ("cost.weight_compression", "channel_multiple", 'weight_compression = "unknown", channel_multiple', 300),
    (
        "how far cost.weight_compression = lossless shrinks these weights",
        "channel_multiple",
        'weight_compression = "lossless", channel_multiple',
        300,
    ),
]


@pytest.mark.parametrize(("field", "old", "new", "low"), MISSING)
def test_what_is_not_known_is_named_and_never_nothing(field: str, old: str, new: str, low: float) -> None:
    report = report_of(conv(), target_of(WHOLE, old, new), 3, 4, 5)
    assert report.cycles.value is None and report.cycles.at_least == low
    assert field in report.cycles.missing
    assert report.seconds.value is None and field in report.seconds.missing
    assert report.joules.value is None and report.joules.at_least == 0
    assert report.operators[0].bound_by is None and report.bounds == {"unknown": 1}


def test_without_power_there_is_time_and_no_energy() -> None:
    report = report_of(conv(), target_of(WHOLE, ", power_w = 0.5", ""), 3, 4, 5)
    assert (report.cycles.value, report.seconds.value) == (330, 330e-6)
    assert (report.joules.value, report.joules.missing) == (None, ("cost.power_w",))


def test_a_published_peak_bounds_from_below() -> None:
    """2 * 600 operations at 6e6 a second take 200 us: 200 cycles at 1 MHz."""
    text = WHOLE.replace(", macs_per_cycle = 16", "").replace("power_w = 0.5", "peak_ops_per_s = 6e6")
    report = report_of(conv(), target_of(text), 3, 4, 5)
    assert report.operators[0].compute.at_least == 200
    without = report_of(conv(), target_of(text, CLOCK, ""), 3, 4, 5)
    assert (without.seconds.value, without.seconds.at_least) == (None, pytest.approx(200e-6))


def test_one_unknown_layer_makes_the_total_unknown() -> None:
    """The pool needs elementwise_per_cycle, the convolution does not: 330 and 200 + 40 in and out are still known."""
    module = nn.Sequential(nn.Conv2d(3, 10, 1), nn.ReLU(), nn.MaxPool2d((2, 2)))
    report = report_of(module, target_of(WHOLE, "elementwise_per_cycle = 4, ", ""), 3, 4, 5)
    assert [operator.cycles.value for operator in report.operators] == [330, None]
    assert report.cycles.missing == ("cost.elementwise_per_cycle",)
    assert report.cycles.at_least == 330 + (200 + 10 * 2 * 2)


def test_what_the_host_runs_is_listed_and_not_counted() -> None:
    report = report_of(nn.Sequential(nn.Conv2d(3, 10, 1), nn.Softplus()), target_of(), 3, 4, 5)
    assert len(report.operators) == 1 and report.host == ("1",)


TWO = (
    "memories.near = { holds = [HOLDS], capacity_bytes = CAPACITY, bandwidth_bytes_per_s = 1e9, ports = 1, "
    'past_capacity = "PAST" }\n' + MEMORY.replace("capacity_bytes = 1000000, ", "")
)


def two(capacity: int, past: str = "stream", holds: str = '"weights"') -> TargetSpec:
    text = BASE + CLOCK + COST + TWO.replace("CAPACITY", str(capacity)).replace("PAST", past)
    return parse_target(text.replace("HOLDS", holds))


def layers() -> nn.Module:
    """Two layers of 64 weights each on one pixel."""
    return nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 1, bias=False))


@pytest.mark.parametrize(("capacity", "streamed"), [(1000, 0), (128, 0), (127, 0.5), (64, 32), (1, 63.5)])
def test_weights_past_the_capacity_come_from_the_next_memory(capacity: int, streamed: float) -> None:
    """128 bytes of weights: what does not fit is read from afar, shared among both layers; 8 + 8 activations each."""
    report = report_of(layers(), two(capacity), 8, 1, 1)
    assert [operator.traffic["near"].value for operator in report.operators] == [64, 64]
    assert [operator.traffic["ram"].value for operator in report.operators] == [pytest.approx(16 + streamed)] * 2


def test_activations_past_the_capacity_are_spilled_where_they_do_not_fit() -> None:
    """Alive: 8 + 8 bytes in each layer. 12 fit: a quarter of the 16 that each layer moves goes on."""
    report = report_of(layers(), two(12, "spill", '"activations"'), 8, 1, 1)
    assert [operator.traffic["near"].value for operator in report.operators] == [16, 16]
    assert [operator.traffic["ram"].value for operator in report.operators] == [64 + 4, 64 + 4]


def test_a_tensor_that_waits_takes_room() -> None:
    """x is kept for the Add: while the second layer runs, x, its input and its output are alive: 24 bytes."""

    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.Conv2d(8, 8, 1, bias=False) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x)) + x

    report = report_of(Waiting(), two(20, "spill", '"activations"'), 8, 1, 1)
    ram = {operator.name: operator.traffic["ram"].value for operator in report.operators}
    assert ram["first"] == 64
    assert ram["second"] == pytest.approx(64 + 16 * (1 - 20 / 24))
    assert ram["add"] == pytest.approx(24 * (1 - 20 / 24))


def test_a_network_that_is_refused_is_told_so() -> None:
    report = report_of(layers(), two(127, "refuse"), 8, 1, 1)
    assert report.refused == ("memories.near: 127 bytes, and refuses more; 128 are needed",)
    assert report.cycles.missing == ("memories.near: what does not fit is refused",)
    assert report_of(layers(), two(128, "refuse"), 8, 1, 1).refused == ()


def test_past_a_capacity_nobody_tells_what_happens() -> None:
    report = report_of(layers(), two(127, "unknown"), 8, 1, 1)
    assert "memories.near.past_capacity" in report.cycles.missing
    unknown = BASE + CLOCK + COST + TWO.replace("capacity_bytes = CAPACITY, ", "").replace("PAST", "stream")
    report = report_of(layers(), parse_target(unknown.replace("HOLDS", '"weights"')), 8, 1, 1)
    assert report.cycles.missing == ("memories.near.capacity_bytes",)


PRESETS = (
    "clocks.slow = { clock_hz = 1e6, is_default = true }\n"
    "clocks.fast = { clock_hz = 4e6, bandwidth_bytes_per_s = { ram = 2e6 } }\n"
)


def test_a_clock_preset_brings_its_own_bandwidth() -> None:
    """330 bytes at 2e6 a second are 660 cycles of 4e6: 165 us."""
    target = target_of(WHOLE, CLOCK, PRESETS)
    assert report_of(conv(), target, 3, 4, 5).cycles.value == 330
    fast = report_of(conv(), target, 3, 4, 5, clock="fast")
    assert (fast.clock, fast.cycles.value, fast.seconds.value) == ("fast", 660, 165e-6)


def test_the_bandwidth_of_another_preset_is_not_that_of_the_default() -> None:
    target = target_of(WHOLE, CLOCK, PRESETS.replace(", bandwidth_bytes_per_s = { ram = 2e6 }", ""))
    report = report_of(conv(), target, 3, 4, 5, clock="fast")
    assert report.cycles.missing == ("clocks.fast.bandwidth_bytes_per_s.ram",)


def test_a_preset_that_is_not_there_is_refused() -> None:
    with pytest.raises(
        TargetError, match=r"--clock: 'acme/line' has no clock preset 'man'\. Known: main\. Closest: main"
    ):
        report_of(conv(), target_of(), 3, 4, 5, clock="man")


def graph_and_plan() -> tuple[Graph, QuantPlan]:
    graph = qhw.capture(conv(), torch.randn(2, 3, 4, 5))
    return graph, qhw.plan(graph, target_of(), calibration=torch.randn(2, 3, 4, 5))


def test_the_public_call_takes_a_plan_a_target_or_a_result() -> None:
    graph, plan = graph_and_plan()
    assert qhw.cost(graph, plan).cycles.value == 330
    assert qhw.cost(graph, target_of()).cycles.value == 330
    assert qhw.cost(conv(), target_of(), example_inputs=torch.randn(2, 3, 4, 5), clock="main").cycles.value == 330
    result = qhw.quantize(graph, plan, calibration=torch.randn(2, 3, 4, 5))
    assert qhw.cost(result).to_data() == qhw.cost(graph, plan).to_data()
    with pytest.raises(PlanError, match=r"^cost: needs a plan or a target beside a float model\."):
        qhw.cost(graph)
    with pytest.raises(PlanError, match=r"^cost: a result has its plan and target already\. Pass it alone\.$"):
        qhw.cost(result, plan)


def test_the_report_as_data() -> None:
    graph, plan = graph_and_plan()
    data = qhw.cost(graph, plan, target=target_of(WHOLE, "ports = 1", 'ports = "unknown"')).to_data()
    assert data["cycles"] == {"value": None, "at_least": 160, "missing": ["memories.ram.ports"]}
    assert data["joules"] == {"value": None, "at_least": None, "missing": ["memories.ram.ports"]}
    assert data["operators"][0]["memory_bytes"] == {"ram": {"value": 330, "at_least": 330, "missing": []}}
    assert data["bounds"] == {"unknown": 1}
