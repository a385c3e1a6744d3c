# SPDX-License-Identifier: Apache-2.0
"""Laws of the roofline: more work never takes less time, faster parts never more, and unknown parts stay unknown."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import qhw
from qhw.decisions import QuantPlan
from qhw.graph import Graph, Operator
from qhw.roofline import Figure, estimate
from qhw.roofline.compute import padded_macs
from qhw.schema import TargetSpec, parse_target

FIGURES = st.builds(
    Figure,
    st.floats(0, 1e12),
    st.lists(st.sampled_from(["cost.power_w", "clocks", "memories"]), max_size=2, unique=True).map(tuple),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(FIGURES, max_size=6))
def test_sums_and_maxima_lack_what_any_part_lacks(parts: list[Figure]) -> None:
    for total in (Figure.sum(parts), Figure.largest(parts)):
        assert set(total.missing) == {field for part in parts for field in part.missing}
        assert (total.value is None) == any(part.missing for part in parts)
        assert all(total.at_least >= part.at_least for part in parts)
    assert Figure.sum(parts).at_least == pytest.approx(math.fsum(part.at_least for part in parts))


def test_a_figure_of_which_nothing_is_known_has_no_bound() -> None:
    assert Figure(0.0, ("clocks",)).to_data() == {"value": None, "at_least": None, "missing": ["clocks"]}
    assert Figure(0.0).to_data() == {"value": 0.0, "at_least": 0.0, "missing": []}


@settings(deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 4), st.integers(1, 32))
def test_padding_is_the_product_of_rounded_channels(inner: int, outer: int, groups: int, multiple: int) -> None:
    facts = {"in_channels": inner * groups, "out_channels": outer * groups, "groups": groups}
    operator = Operator("conv", "Conv", "conv", (), attributes=facts)

    def rounded(size: int) -> int:
        return size + (-size) % multiple

    macs = inner * outer * groups * 6
    padded = padded_macs(operator, macs, multiple)
    assert padded == pytest.approx(rounded(inner) * rounded(outer) * groups * 6)
    assert padded >= macs and (multiple > 1 or padded == macs)


def target_with(macs_per_cycle: float, bandwidth: float, capacity: int, multiple: int = 4) -> TargetSpec:
    held, speed = '"weights", "biases", "activations"', f"bandwidth_bytes_per_s = {bandwidth}"
    return parse_target(f"""
schema_version = 1
name = "acme/line"
formats.a8 = {{ bits = 8, signed = true, zero_point = 0, per = "tensor" }}
kernels.mac = {{ input = ["a8"], weight = ["a8"], output = ["a8"], macs_per_cycle = {macs_per_cycle} }}
operators.Conv = {{ kernels = ["mac"], fused = ["Relu"] }}
clocks.main.clock_hz = 1e6
cost = {{ channel_multiple = {multiple}, power_w = 1 }}
[memories]
near = {{ holds = [{held}], capacity_bytes = {capacity}, past_capacity = "stream", ports = 1, {speed} }}
far = {{ holds = [{held}], ports = 1, bandwidth_bytes_per_s = 1e5 }}
""")


@pytest.fixture(scope="module")
def planned() -> tuple[Graph, QuantPlan]:
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU())
    graph = qhw.capture(module, torch.randn(2, 3, 9, 9))
    return graph, qhw.plan(graph, target_with(1.0, 1e6, 1000), calibration=torch.randn(2, 3, 9, 9))


SPEEDS = st.floats(0.25, 512)
WIDTHS = st.floats(1e4, 1e9)
SIZES = st.integers(1, 5000)


@settings(max_examples=60, deadline=None)
@given(macs=st.tuples(SPEEDS, SPEEDS), width=st.tuples(WIDTHS, WIDTHS), size=st.tuples(SIZES, SIZES))
def test_faster_parts_never_cost_more(
    planned: tuple[Graph, QuantPlan], macs: tuple[float, float], width: tuple[float, float], size: tuple[int, int]
) -> None:
    slow = estimate(*planned, target_with(min(macs), min(width), min(size)))
    fast = estimate(*planned, target_with(max(macs), max(width), max(size)))
    assert slow.cycles.value is not None and fast.cycles.value is not None
    assert fast.cycles.value <= slow.cycles.value * (1 + 1e-9)
    assert slow.joules.value == pytest.approx(slow.seconds.value)
    for operator in slow.operators:
        parts = [operator.compute.at_least, *(figure.at_least for figure in operator.memory.values())]
        assert operator.cycles.value == max(parts)


@settings(max_examples=30, deadline=None)
@given(multiples=st.tuples(st.sampled_from([1, 2, 4, 8, 16]), st.sampled_from([1, 2, 4, 8, 16])))
def test_coarser_channels_never_cost_less(planned: tuple[Graph, QuantPlan], multiples: tuple[int, int]) -> None:
    fine = estimate(*planned, target_with(1.0, 1e9, 5000, min(multiples)))
    coarse = estimate(*planned, target_with(1.0, 1e9, 5000, max(multiples)))
    assert fine.cycles.at_least <= coarse.cycles.at_least


@settings(max_examples=6, deadline=None)
@given(st.integers(4, 12), st.integers(1, 6), st.integers(1, 6))
def test_more_work_never_costs_less(size: int, channels: int, more: int) -> None:
    target = target_with(2.0, 1e6, 300)
    costs = []
    for outputs in (channels, channels + more):
        graph = qhw.capture(nn.Sequential(nn.Conv2d(2, outputs, 3)), torch.randn(2, 2, size, size))
        plan = qhw.plan(graph, target, calibration=torch.randn(2, 2, size, size))
        costs.append(estimate(graph, plan, target).cycles.at_least)
    assert costs[0] <= costs[1]
