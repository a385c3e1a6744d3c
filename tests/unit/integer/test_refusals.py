# SPDX-License-Identifier: Apache-2.0
"""What cannot be executed exactly says so word by word: one model and one change of the target for each reason."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.errors import IntegerError
from qhw.integer import IntegerModel
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import FunctionOf

FLOAT, FIXED, SHIFT = reference.FLOAT32, reference.DOUBLE, reference.SHIFT
POWER = f'{reference.S8}, scale = {{ kind = "power_of_two" }}'
POWER_W = f'{reference.W8}, scale = {{ kind = "power_of_two" }}'


def result_of(model: nn.Module, text: str, *example: Tensor) -> Any:
    return reference.calibrated(model, parse_target(text), example)


def linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


def row(kind: str, more: str) -> Callable[[str], str]:
    """A change of a target: more in one operator's row."""
    return lambda text: text.replace(f"operators.{kind} = {{", f"operators.{kind} = {{ {more},")


SKEWED = torch.linspace(-1, 3, 8).reshape(2, 4)
X, IMAGE = torch.linspace(-1, 1, 8).reshape(2, 4), torch.linspace(-1, 1, 128).reshape(2, 4, 4, 4)

REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[Tensor, ...], str, Callable[[str], str], str]] = {
    "stages": (
        linear, (X,), reference.text(),
        lambda t: t.replace('"half_even" }', '"half_even", stages = [{ operation = "shift", rounding = "floor" }] }'),
        "requantize.r.stages needs kind fixed_point or shift; got float32",
    ),
    "count in a float multiplier": (
        lambda: FunctionOf(lambda x: x.mean(1)), (X,), reference.text(), row("ReduceMean", 'mean_count = "multiplier"'),
        'operators.ReduceMean.mean_count = "multiplier" needs requantize kind fixed_point',
    ),
    "windows of several counts": (
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), (IMAGE,), reference.text(FIXED),
        row("AveragePool", 'mean_count = "multiplier"'),
        'operators.AveragePool.mean_count = "multiplier" needs windows of one count',
    ),
    "zero point first in fixed point": (
        linear, (X,), reference.text(FIXED, order="zero_point_before"), str,
        'operators.Gemm.rounding_order = "zero_point_before" does not say before which rounding of "double"',
    ),
    "zero point first in a fixed-point sum": (
        lambda: FunctionOf(lambda x: x + x), (SKEWED,), reference.text(FIXED, order="zero_point_before"), str,
        'operators.Add.rounding_order = "zero_point_before" does not say before which rounding of "double"',
    ),
    "an open order of a fixed-point sum": (
        lambda: FunctionOf(lambda x: x + x), (X,), reference.text(FIXED, order="unknown"), str,
        "operators.Add.rounding_order is 'unknown'",
    ),
    "a ratio that is no power of two": (
        linear, (X,), reference.text(SHIFT), str,
        'requantize.r.kind = "shift" needs a ratio of scales that is a power of two; got',
    ),
    "a shift that the target has not": (
        linear, (X,), reference.text(
            'kind = "shift", rounding = "floor", shift = { min = 30, max = 31 }', activation=POWER, weight=POWER_W,
        ), str,
        "requantize.r.shift goes from 30 to 31, and this operator needs",
    ),
    "a sum of another kind": (
        lambda: FunctionOf(lambda x: x + x), (X,), reference.text('kind = "float64", rounding = "half_even"'), str,
        'requantize.r.kind = "float64" cannot be executed for Add; kinds that can: float32, fixed_point, shift',
    ),
    "a kind without arithmetic": (
        linear, (X,), reference.text('kind = "thresholds"'), str,
        'requantize.r.kind = "thresholds" cannot be executed; kinds that can: float32, float64, fixed_point, shift',
    ),
    "each operand repeated along the other": (
        lambda: FunctionOf(lambda x, y: x + y), (IMAGE[:, :1], IMAGE[:, :, :1]),
        reference.text(order="zero_point_before"), str,
        "Add of operands that are each broadcast along the other cannot be executed exactly: the order of its float32 "
        "sum is not known",
    ),
    "an extremum with a constant": (
        lambda: FunctionOf(torch.maximum, torch.ones(4)), (X,), reference.text(),
        lambda t: t + 'operators.Max = { kernels = ["two"], rounding_order = "zero_point_after" }',
        "Max with a constant cannot be executed exactly yet",
    ),
    "no form": (
        lambda: FunctionOf(lambda x: x / x), (X,), reference.text(),
        lambda t: t + 'operators.Div = { kernels = ["two"] }',
        "Div has no integer form in qhw yet",
    ),
    "a negative slope": (
        lambda: nn.LeakyReLU(-0.5), (X,), reference.text(without=("LeakyRelu",)),
        lambda t: t + 'operators.LeakyRelu = { kernels = ["two"] }',
        "LeakyRelu with slope -0.5 cannot be executed exactly yet",
    ),
    "rounding of codes": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.ReLU6()), (X,),
        reference.text(activation=f'{reference.S8}, rounding = "double"'), str,
        'formats.*.rounding = "double" names no single rounding',
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REFUSED))
def test_the_reason_is_given_word_by_word_with_the_operator(name: str) -> None:
    make, example, text, change, reason = REFUSED[name]
    result = result_of(make(), change(text), *example)
    with pytest.raises(IntegerError, match=rf"{re.escape(reason)}.*\("):
        IntegerModel(result)


def test_a_ratio_that_float32_cannot_hold_says_so() -> None:
    result = result_of(linear(), reference.text(), X)
    result.quantizer("gemm").scale.data.fill_(1e38)
    result.quantizer("input").scale.data.fill_(1e-20)
    bias = next(point for point in result.plan.points if point.role == "bias")
    weight = next(point for point in result.plan.points if point.role == "weight")
    unit = result.quantizer("input").scale * result.quantizer(weight.group).scale
    result.quantizer(bias.group).scale.data.copy_(unit)
    result.float_graph.tensor(bias.tensor).data.zero_()
    with pytest.raises(IntegerError, match=r"its ratio of scales must be a positive float32; got 0\. Change a scale"):
        IntegerModel(result)


def test_a_model_that_the_host_runs_has_no_vectors(tmp_path: Any) -> None:
    result = result_of(FunctionOf(lambda x: torch.cumsum(x, 1)), reference.text(), X)
    with pytest.raises(IntegerError, match="no operator runs on the accelerator, so there are no vectors"):
        qhw.golden(result, tmp_path / "vectors", data=[X])


def test_an_accumulator_is_asked_of_an_operator_that_sums() -> None:
    model = IntegerModel(result_of(nn.Sigmoid(), reference.text(), X))
    with pytest.raises(IntegerError, match=r"sigmoid: sums no products on the accelerator\."):
        model.accumulators("sigmoid", torch.zeros(1, 4))
