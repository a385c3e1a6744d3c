# SPDX-License-Identifier: Apache-2.0
"""A sum past its accumulator's width: wrapped as two's complement has it, or refused."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import qhw
from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.integer.accumulate import wrapped
from qhw.schema import parse_target

TARGET = """
schema_version = 1
name = "acme/narrow"
formats.a = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
formats.w = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
accumulators.acc = { bits = 17, overflow = "OVERFLOW" }
requantize.rescale = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"], accumulator = "acc", requantize = "rescale" }
operators.Gemm = { kernels = ["mac"] }
"""


@given(st.lists(st.integers(-(2**62), 2**62 - 1), min_size=1), st.integers(1, 62))
def test_wrapping_keeps_the_low_bits_as_two_s_complement(values: list[int], bits: int) -> None:
    found = wrapped(torch.tensor(values), bits).tolist()
    for value, kept in zip(values, found, strict=True):
        assert (kept - value) % 2**bits == 0
        assert -(2 ** (bits - 1)) <= kept < 2 ** (bits - 1)


def model_of(overflow: str) -> tuple[Any, torch.Tensor]:
    torch.manual_seed(0)
    net = nn.Linear(64, 3, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.sign(net.weight))  # every weight code at the end of its grid
    x = torch.ones(4, 64)
    x[1] = -1.0
    x[2] = torch.sign(net.weight[0].detach())
    x[3, ::2] = 0.5
    target = parse_target(TARGET.replace("OVERFLOW", overflow))
    wishes = {"pipeline": "ranges-ptq", "without": ["accumulator_projection"]}  # else the overflow is repaired
    return qhw.quantize(net, target, example_inputs=x, calibration=x, **wishes), x


def test_a_sum_that_wraps_is_computed_and_wrapped_before_it_is_rescaled() -> None:
    result, x = model_of("wrap")
    codes = IntegerModel(result).codes(x)
    weights = result.codes(next(p for p in result.plan.points if p.role == "weight")).long()
    scales = {name: float(q.scale) for name, q in result.encodings().items()}
    ratio = torch.tensor(scales["input"]) * torch.tensor(scales["weight"]) / torch.tensor(scales["gemm"])
    sums = (codes["input"].long() @ weights.t()).tolist()
    is_wrapped = False
    for row, got in zip(sums, codes["gemm"].tolist(), strict=True):
        for total, code in zip(row, got, strict=True):
            low = (total + 2**16) % 2**17 - 2**16
            is_wrapped |= low != total
            assert code == max(-128, min(127, int((torch.tensor(float(low)) * ratio).round())))
    assert is_wrapped


@pytest.mark.parametrize("overflow", ["saturate", "unknown"])
def test_a_sum_whose_value_depends_on_the_order_is_refused(overflow: str) -> None:
    result, _ = model_of(overflow)
    with pytest.raises(IntegerError, match=r"may need 21 bits, accumulators\.acc\.bits = 17.*is not defined"):
        IntegerModel(result)
