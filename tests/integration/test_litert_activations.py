# SPDX-License-Identifier: Apache-2.0
"""Softmax, functions, roots and Resize against LiteRT's reference kernels: 0 codes differ for the shipped target.

As in test_litert_operators.py: scales of three kinds, and a mutant of the target for every clause that decides.
"""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("ai_edge_litert")

from qhw.errors import IntegerError
from tests import litert_support as litert
from tests.integer_support import FunctionOf
from tests.integration.test_litert_operators import (
    EVERY_CODE,
    KINDS,
    Case,
    Draws,
    Operator,
    check_many_more,
    check_operator,
    first,
    function,
    last,
    own,
    results_of,
    target,
)
from tests.litert_support import Codes, Encoding, schema

pytestmark = pytest.mark.slow

# Sizes, old and new, whose ratio or its inverse is rounded to float32 such that a position lies at another element.
ROUNDED_SIZES = ((14, 46), (26, 22), (28, 46), (39, 33), (54, 38))
# Scales with sqrt(k scale) / result next to whole numbers: a quotient and a product with 1 / result lie on two sides.
NEXT_TO_WHOLE = ((0.13, 0.1), (0.289, 0.85), (0.294, 0.21), (0.065, 0.05), (0.21, 0.42))
PROBABILITY, LOG_PROBABILITY = Encoding(1 / 256, -128), Encoding(1 / 16, 127)


def rows(draws: Draws, most: float = 2.0) -> Codes:
    """Logits: a long row, or so many short ones that a sum next to a tie is among them; over all codes or a few."""
    shape = draws.choose((4, draws.one(60, 400)), (3, draws.choose(1, 2)), (4000, draws.one(2, 40)))
    spread = draws.choose(1, 1, 2, 8)
    codes = torch.div(draws.integers(-128, 127, *shape), spread, rounding_mode="floor")
    return Codes(codes.numpy(), float(draws.scale(0.001, most)), draws.one(-128, 127))


def softmax(draws: Draws, optimized: bool = False) -> Case:
    options, x = schema.SoftmaxOptionsT(), rows(draws)
    options.beta = 1.0
    y = litert.run_operator("SOFTMAX", options, [x], PROBABILITY, optimized=optimized)
    return Case(FunctionOf(lambda v: v.softmax(-1)), [x], PROBABILITY, y)


def log_softmax(draws: Draws) -> Case:
    x = rows(draws, 0.5)
    y = litert.run_operator("LOG_SOFTMAX", schema.LogSoftmaxOptionsT(), [x], LOG_PROBABILITY)
    return Case(FunctionOf(lambda v: v.log_softmax(-1)), [x], LOG_PROBABILITY, y)


def hard_swish(draws: Draws) -> Case:
    x = Codes(EVERY_CODE, float(draws.scale(0.001, 1.0)), draws.one(-128, 127))
    scale = min(max(float(draws.scale(0.005, 1.0)), x.scale / 50), x.scale * 100)
    output = Encoding(scale, draws.one(-128, 127))
    return Case(FunctionOf(F.hardswish), [x], output, litert.run_operator("HARD_SWISH", None, [x], output))


def gelu(draws: Draws, approximate: str) -> Case:
    x, output = Codes(EVERY_CODE, float(draws.scale(0.005, 0.3)), draws.one(-128, 127)), draws.output(0.005, 0.5)
    if draws.kind == "decimal":  # 3 / 2 or 5 / 2, but for the rounding of scales
        n = draws.one(1, 30)
        x, output = Codes(EVERY_CODE, draws.choose(1.5, 2.5) * n / 100, x.zero_point), Encoding(n / 100, 3)
    options = schema.GeluOptionsT()
    options.approximate = approximate == "tanh"
    y = litert.run_operator("GELU", options, [x], output)
    return Case(FunctionOf(lambda v: F.gelu(v, approximate=approximate)), [x], output, y)


def root(name: str, called: Callable[[Tensor], Tensor]) -> Callable[[Draws], Case]:
    def draw(draws: Draws) -> Case:
        zero_point = draws.one(-128, 60)
        codes = torch.arange(zero_point, 128).repeat(2, 1).numpy()
        x, output = Codes(codes, float(draws.scale(0.001, 3.0)), zero_point), draws.output(0.01, 1.0)
        if draws.kind == "decimal":
            scale, result = draws.choose(*NEXT_TO_WHOLE)
            x, output = Codes(codes, scale, zero_point), Encoding(result, output.zero_point)
        return Case(FunctionOf(called), [x], output, litert.run_operator(name, None, [x], output))

    return draw


def resize(draws: Draws, mode: str) -> Case:
    drawn = draws.one(1, 11), draws.one(1, 25)
    height, new_height = drawn if draws.kind == "random" else draws.choose(*ROUNDED_SIZES)
    x, size = draws.tensor(2, 3, height, draws.one(1, 11)), [new_height, draws.one(1, 25)]
    if mode == "nearest":
        name, options = "RESIZE_NEAREST_NEIGHBOR", schema.ResizeNearestNeighborOptionsT()
        called = partial(F.interpolate, size=size)
    else:
        name, options = "RESIZE_BILINEAR", schema.ResizeBilinearOptionsT()
        options.alignCorners, options.halfPixelCenters = mode == "corners", mode != "corners"
        called = partial(F.interpolate, size=size, mode="bilinear", align_corners=mode == "corners")
    y = litert.run_operator(name, options, [last(x)], x.encoding, [np.asarray(size, np.int32)])
    return Case(FunctionOf(called), [x], x.encoding, first(y))


def approximated(kind: str, clause: str) -> str:
    """A change of the operator's approximation alone."""
    return own(kind, f'approximation = {{ {clause}, source = "memory" }}')


FIXED = 'kind = "fixed_point"'
DIVIDED = 'quotient = "division"'
WEIGHTS = {
    "rounded to even": own("Resize", 'rounding = "half_even"'),
    "zero point after": own("Resize", 'rounding_order = "zero_point_after"'),
    "8 bits of fraction": approximated("Resize", "fraction_bits = 8"),
}
OPERATORS = {
    "Softmax": Operator(softmax, 16, {
        "4 integer bits": approximated("Softmax", "integer_bits = 4"),
        "20 bits of sums": approximated("Softmax", "sum_integer_bits = 20"),
        "reals": approximated("Softmax", 'kind = "table", quotient = "reciprocal"')}),
    "LogSoftmax": Operator(log_softmax, 10, {
        "4 integer bits": approximated("LogSoftmax", "integer_bits = 4"),
        "20 bits of sums": approximated("LogSoftmax", "sum_integer_bits = 20")}),
    "HardSwish": Operator(hard_swish, 8, {
        "a table": approximated("HardSwish", 'kind = "table"'),
        "multipliers of 14 bits": approximated("HardSwish", "multiplier_bits = 14")}),
    "Gelu": Operator(partial(gelu, approximate="none"), 10, {
        "divided": approximated("Gelu", DIVIDED), "half even": own("Gelu", 'rounding = "half_even"')}),
    "Gelu by tanh": Operator(partial(gelu, approximate="tanh"), 10, {"divided": approximated("Gelu", DIVIDED)}),
    "Exp": Operator(function("EXP", torch.exp), 8, {"downwards": own("Exp", 'rounding = "floor"')}),
    "Log": Operator(function("LOG", torch.log), 8, {
        "highest outside": approximated("Log", 'outside = "highest"')}),
    "Sqrt": Operator(root("SQRT", torch.sqrt), 8, {
        "multiplied": approximated("Sqrt", 'quotient = "reciprocal"'),
        "to the nearest": own("Sqrt", 'rounding = "half_away_from_zero"')}),
    "Rsqrt": Operator(root("RSQRT", torch.rsqrt), 8, {
        "a table": approximated("Rsqrt", 'kind = "table", outside = "lowest"'),
        "rounded once": 'requantize.rescale = { rounding = "floor", source = "memory" }'}),
    "Resize to the nearest": Operator(partial(resize, mode="nearest"), 10, {
        "exact positions": approximated("Resize", 'position = "exact"'),
        "positions by division": approximated("Resize", 'position = "float32_quotient"')}),
    "Resize between centres": Operator(partial(resize, mode="centres"), 6, WEIGHTS),
    "Resize between corners": Operator(partial(resize, mode="corners"), 6, WEIGHTS),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERATORS)
def test_no_code_differs_from_the_runtime_and_some_of_every_mutant_do(name, record_property):
    check_operator(name, OPERATORS[name], record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATORS)
def test_no_code_differs_on_many_more_models(name):
    check_many_more(OPERATORS[name])


def test_the_optimized_softmax_is_a_table_of_reals():
    spec = target(approximated("Softmax", 'kind = "table", quotient = "reciprocal"'))
    differing = np.zeros(2, np.int64)
    for kind in KINDS:
        for seed in range(20):
            case = softmax(Draws(kind, seed), optimized=True)
            differing += [int((one != case.expected).sum()) for one in results_of(case, [spec, target()])]
    assert differing[0] == 0
    assert differing[1] > 0, "these codes do not tell the reference kernel from the optimized one"


@pytest.mark.parametrize(
    ("called", "name"), [(torch.sqrt, "Sqrt"), (torch.rsqrt, "Rsqrt")], ids=["square root", "its inverse"]
)
def test_a_root_of_a_negative_value_ends_here_as_it_does_there(called, name):
    x = Codes(np.arange(-128, 128).reshape(1, -1), 0.1, -28)
    with pytest.raises(RuntimeError, match="only defined for"):
        litert.run_operator(name.upper(), None, [x], Encoding(0.1))
    case = Case(FunctionOf(called), [x], Encoding(0.1), np.zeros((1, 256)))
    with pytest.raises(
        IntegerError, match=rf"{name.lower()}: {name} has no value at code -128, and operators\.{name}\."
    ):
        results_of(case, [target()])
