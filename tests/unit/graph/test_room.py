# SPDX-License-Identifier: Apache-2.0
"""More accumulator bits where sums need them and the target gives them for nothing; and what is said of it."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.graph import OperatorPlacement, num_products, place, sum_bits
from qhw.schema import Format, parse_target

TARGET = """
schema_version = 1
name = "acme/two-widths"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight" }
accumulators.narrow = { bits = 20, overflow = "saturate" }
accumulators.wide = { bits = 32, overflow = "saturate" }
accumulators.widest = { bits = 48, overflow = "saturate" }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.fast = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "narrow", requantize = "r" }
kernels.more = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "wide", requantize = "r" }
kernels.most = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "widest", requantize = "r" }
operators.Conv = { kernels = ["fast", "more", "most"] }
operators.MatMul = { kernels = ["fast", "more"] }
fallback = "host"
"""
PLAIN = 'kernels.fast = { input = ["a"], weight = ["w"]'
MORE = 'kernels.more = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "wide"'


def placed(channels: int, *changes: tuple[str, str]) -> OperatorPlacement:
    """The placement of a 1x1 convolution with so many input channels."""
    text = TARGET
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    graph = qhw.capture(nn.Sequential(nn.Conv2d(channels, 2, 1)).eval(), torch.randn(2, channels, 2, 2))
    return next(op for op in place(graph, parse_target(text)).operators if op.kind == "Conv")


# 255 * 127 = 32385: 16 products stay below 2^19 = 524288 (518160), 17 do not.
def test_the_preferred_kernel_stays_where_its_bits_hold_every_sum() -> None:
    assert (placed(16).kernel, placed(16).reason) == ("fast", "")


def test_the_first_kernel_that_holds_every_sum_is_taken_for_the_same_formats() -> None:
    found = placed(17)
    assert (found.kernel, found.legal) == ("more", ("more", "fast", "most"))
    assert found.subject == "operators.Conv.kernels"
    assert found.reason == (
        "sums of 17 products can need 21 bits; kernels.fast has 20, so kernels.more with 32 bits is taken for the same "
        "formats"
    )


def test_the_widest_is_taken_where_none_holds_every_sum() -> None:
    narrow = ("accumulators.wide = { bits = 32", "accumulators.wide = { bits = 21")
    assert placed(70000, narrow, ("bits = 48", "bits = 22")).kernel == "most"  # 33 bits needed


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ((MORE, f"{MORE}, preference_cost = 2.0"), "kernels.more with 32 bits has preference_cost 2"),
        ((MORE, MORE.replace('["a"], w', '["a16"], w')), "kernels.more with 32 bits takes other formats (--format)"),
    ],
)
def test_a_kernel_that_costs_something_is_not_taken_and_says_why(change: tuple[str, str], reason: str) -> None:
    found = placed(17, change, ('"fast", "more", "most"', '"fast", "more"'))
    assert found.kernel == "fast"
    assert found.reason == f"sums of 17 products can need 21 bits; kernels.fast has 20; {reason}"


def test_a_slower_kernel_is_not_taken_and_says_how_much_slower() -> None:
    speeds = [(PLAIN, f"{PLAIN}, macs_per_cycle = 64.0"), (MORE, f"{MORE}, macs_per_cycle = 16.0")]
    found = placed(17, *speeds, ('"fast", "more", "most"', '"fast", "more"'))
    assert (found.kernel, found.reason.rpartition("; ")[2]) == (
        "fast",
        "kernels.more with 32 bits takes 4 x the cycles",
    )
    same = placed(17, speeds[0], (MORE, f"{MORE}, macs_per_cycle = 64.0"))
    assert same.kernel == "more"


@pytest.mark.parametrize("width", ['"unknown"', '"per_layer"'])
def test_nothing_is_decided_where_the_preferred_width_is_not_known_or_as_needed(width: str) -> None:
    found = placed(17, ("narrow = { bits = 20", f"narrow = {{ bits = {width}"))
    assert (found.kernel, found.reason) == ("fast", "")


def test_hardware_that_is_made_as_wide_as_needed_counts_as_wider() -> None:
    found = placed(17, ("wide = { bits = 32", 'wide = { bits = "per_layer"'))
    assert found.kernel == "more"
    assert "kernels.more with as many bits as needed is taken" in found.reason


def test_a_kernel_that_states_less_of_bias_or_requantization_is_not_taken() -> None:
    silent = (MORE, MORE.replace('bias = "b", ', ""))
    assert placed(17, silent).kernel == "most"
    assert placed(17, (f'{MORE}, requantize = "r"', f'{MORE}, requantize = "unknown"')).kernel == "most"


def test_products_of_two_activations_count_too() -> None:
    class Product(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x @ y

    text = TARGET.replace('weight = ["w"]', 'weight = ["a"]')
    graph = qhw.capture(Product().eval(), (torch.randn(2, 3, 40), torch.randn(2, 40, 3)))
    (found,) = place(graph, parse_target(text)).operators
    assert found.kernel == "more"
    assert found.reason.startswith("sums of 40 products can need 23 bits")  # 40 * 255 * 255 = 2601000 < 2^22


@given(st.integers(1, 300), st.integers(2, 16), st.integers(2, 16), st.booleans())
def test_bits_of_a_sum_by_python_integers(products: int, first: int, second: int, signed: bool) -> None:
    operator: Any = type("Operator", (), {"kind": "MatMul", "attributes": {"reduced_elements": products}})()
    a = Format.model_validate({"bits": first, "signed": signed, "zero_point": 0})
    b = Format.model_validate({"bits": second, "signed": True})
    largest = (2 ** (first - 1) if signed else 2**first - 1) * (2**second - 1) * products
    bits = sum_bits(operator, a, b)
    assert num_products(operator) == products
    assert largest <= 2 ** (bits - 1) - 1
    assert bits == 1 or largest > 2 ** (bits - 2) - 1
