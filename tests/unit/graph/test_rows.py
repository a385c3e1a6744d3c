# SPDX-License-Identifier: Apache-2.0
"""Which weight formats a kernel takes: scales per channel, per group, and of grouped and transposed convolutions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qhw.graph import capture, place
from qhw.graph.operator import Operator
from qhw.graph.rows import group_size, preferred
from qhw.schema import Format, parse_target

HEAD = """
schema_version = 1
name = "test/rows"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.t8 = { codes = [-127, 127], zero_point = 0, per = "tensor" }
kernels.mac = { input = ["a8"], weight = ["w8", "t8"], output = ["a8"] }
"""


@pytest.mark.parametrize(
    ("groups", "scales", "weight"),
    [
        (1, "", "w8"),
        (1, "out_channels", "w8"),
        (1, "out_channels/groups", "w8"),  # one group: both are the same number
        (2, "", "w8"),
        (2, "out_channels/groups", "w8"),
        (2, "out_channels", "t8"),  # 6 scales along an axis of 3
    ],
)
def test_a_grouped_transposed_convolution_has_the_scales_of_one_group(groups: int, scales: str, weight: str) -> None:
    graph = capture(nn.ConvTranspose2d(4, 6, 3, groups=groups).eval(), torch.randn(2, 4, 5, 5))
    stated = f', weight_scales = "{scales}"' if scales else ""
    placed = place(graph, parse_target(f'{HEAD}operators.ConvTranspose = {{ kernels = ["mac"]{stated} }}'))
    point = next(p for p in placed.points if p.role == "weight")
    assert (point.format, point.axis) == (weight, 1)
    assert graph.tensor(point.tensor).shape[1] == 6 // groups


@given(
    inputs=st.integers(1, 96),
    groups=st.sampled_from([1, 2, 3]),
    sizes=st.lists(st.integers(1, 64), min_size=1, max_size=5),
)
def test_the_size_of_a_group_is_the_largest_that_divides(inputs: int, groups: int, sizes: list[int]) -> None:
    operator = Operator("c", "Conv", "c", (), attributes={"in_channels": inputs * groups, "groups": groups})
    form = Format(bits=4, signed=True, zero_point=0, per="group", group_size=tuple(sizes))
    dividing = [size for size in sizes if (inputs * groups // groups) % size == 0]
    assert group_size(form, operator) == max(dividing, default=None)


def test_costs_order_kernels_and_equal_ones_keep_their_place() -> None:
    rows = "".join(
        f'kernels.k{index} = {{ input = ["a8"], output = ["a8"]{cost} }}\n'
        for index, cost in enumerate(
            [", preference_cost = 2.0", "", ", preference_cost = 0.5", ", preference_cost = 0.0"]
        )
    )
    assert preferred(parse_target(HEAD + rows).kernels, ["k0", "k1", "k2", "k3"]) == ["k1", "k3", "k2", "k0"]
