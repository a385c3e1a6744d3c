# SPDX-License-Identifier: Apache-2.0
"""Whole models in integers: islands on the host, operands on another grid, batches, odd inputs and outputs."""

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.errors import IntegerError
from qhw.integer import IntegerModel, compare, lower, simulated_codes
from qhw.schema import TargetSpec, parse_target
from tests import integer_support as reference
from tests.integer_support import Grid, calibrated, fill, grid_of, quantized

SPEC = reference.target()


def images(count: int = 6, channels: int = 3, size: int = 8, seed: int = 0) -> Tensor:
    return torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(seed))


def agreement(result: Any, *inputs: Tensor) -> None:
    """Every code within 1 of the simulation, which rounds in float32; the outputs are the last codes."""
    model = IntegerModel(result)
    mine, theirs = model.codes(*inputs), simulated_codes(result, *inputs)
    assert mine
    assert set(theirs) <= set(mine)
    for name, codes in theirs.items():
        gap = (mine[name].long() - codes.long()).abs()
        assert int(gap.max()) <= 1, name
        assert float((gap > 0).float().mean()) < 0.05, name


class Islands(nn.Module):
    """Convolution, a host operator, convolution, a host operator with two outputs, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.sin(torch.relu(self.one(x)))
        x = self.two(x)
        values, _ = torch.cummax(x, 2)
        y: Tensor = self.fc(values.mean((2, 3)))
        return y


def test_host_operators_run_in_float_between_integer_parts() -> None:
    torch.manual_seed(0)
    x = images()
    result = calibrated(Islands(), SPEC, x)
    host = {o.kind for o in result.plan.operators if o.where == "host"}
    assert "Unknown" in host
    model = IntegerModel(result)
    codes = model.codes(x)
    # The second convolution reads what the host made of the first's codes.
    sine = next(p for p in result.plan.points if p.role == "input" and p.tensor != "x")
    first = grid_of(result, "one")
    reals = torch.sin(first.reals(codes[next(n for n in codes if n != "x")].numpy().astype(np.int64)))
    np.testing.assert_array_equal(codes[sine.tensor].numpy(), grid_of(result, sine.group).quantized(reals.numpy()))
    agreement(result, x)


@pytest.mark.parametrize("count", [1, 2, 5, 33])
def test_any_batch_gives_each_sample_the_same_codes(count: int) -> None:
    torch.manual_seed(0)
    result = calibrated(Islands(), SPEC, images(4))
    model, x = IntegerModel(result), images(33, seed=3)
    together, alone = model.codes(x[:count]), model.codes(x[:1])
    for name, codes in alone.items():
        np.testing.assert_array_equal(codes.numpy(), together[name][:1].numpy())


class TwoInputs(nn.Module):
    """Two inputs that are read, one that is not, an output of each kind, and an inner value that is returned."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 5), nn.Linear(6, 5)

    def forward(self, left: Tensor, unused: Tensor, right: Tensor) -> dict[str, Tensor]:
        first = self.a(left)
        total = first + self.b(right)
        return {"total": total, "first": first, "given": left, "wave": torch.sin(total)}


def test_several_inputs_and_outputs_keep_their_places() -> None:
    torch.manual_seed(1)
    left, unused, right = torch.randn(3, 4), torch.randn(3, 2), torch.randn(3, 6)
    result = calibrated(TwoInputs(), SPEC, (left, unused, right))
    model = IntegerModel(result)
    assert model.input_names == ("left", "unused", "right")
    found, expected = model(left, unused, right), result(left, unused, right)
    flat, other = torch.utils._pytree.tree_leaves(found), torch.utils._pytree.tree_leaves(expected)
    assert len(flat) == len(other) == 4
    for mine, theirs in zip(flat, other, strict=True):
        assert mine.shape == theirs.shape
        assert mine.dtype == torch.float32
        assert float((mine - theirs).abs().max()) < 0.1
    agreement(result, left, unused, right)


def test_another_input_in_place_of_an_unused_one_changes_nothing() -> None:
    torch.manual_seed(1)
    left, unused, right = torch.randn(3, 4), torch.randn(3, 2), torch.randn(3, 6)
    result = calibrated(TwoInputs(), SPEC, (left, unused, right))
    one, two = IntegerModel(result).codes(left, unused, right), IntegerModel(result).codes(left, unused * 7, right)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


class Residual(nn.Module):
    """x + x, a layer called twice, dropout in a chain, and a shared weight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(torch.relu(self.conv(x)))
        y = y + y
        return torch.relu(self.conv(self.drop(y)) + x)


@pytest.mark.parametrize("concat", ["none", "all"])
def test_residuals_shared_weights_and_dropout_agree_with_the_simulation(concat: str) -> None:
    torch.manual_seed(2)
    x = images()
    agreement(calibrated(Residual(), reference.target(concat=concat), x), x)


def test_a_model_in_training_mode_is_computed_as_in_evaluation() -> None:
    torch.manual_seed(2)
    x = images()
    result = calibrated(Residual(), SPEC, x)
    before = IntegerModel(result).codes(x)
    result.train()
    after = IntegerModel(result).codes(x)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_copy_of_a_result_computes_what_the_result_does_and_follows_its_own_weights() -> None:
    torch.manual_seed(2)
    x = images()
    result = calibrated(Residual(), SPEC, x)
    other = copy.deepcopy(result)
    fill(other.module.get_parameter("conv.weight"), torch.zeros(3, 3, 3, 3))
    mine, theirs = IntegerModel(result).codes(x), IntegerModel(other).codes(x)
    assert any(not torch.equal(mine[name], theirs[name]) for name in mine)
    assert all(torch.equal(codes, IntegerModel(result).codes(x)[name]) for name, codes in mine.items())


EDGES = """
schema_version = 1
name = "acme/edges"
fallback = "host"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.a16 = { bits = 16, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.b = { bits = 40, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = 40, overflow = "wrap" }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.mac8 = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"], accumulator = "acc", requantize = "r" }
kernels.mac16 = { input = ["a16"], weight = ["w8"], bias = "b", output = ["a16"], requantize = "r", accumulator = "acc"}
operators.Conv = { kernels = ["mac8"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac16"], rounding_order = "zero_point_after" }
boundary = { inputs = "quantized", outputs = "quantized" }
"""


class Mixed(nn.Module):
    """A tensor that an 8-bit and a 16-bit operator read: one of them reads it through an edge."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 6)
        self.conv = nn.Conv1d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.conv(x), self.fc(x)


class Chain(nn.Module):
    """An 8-bit operator's result, read by a 16-bit one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 1)
        self.fc = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.conv(x))
        return y


def test_an_operand_on_another_grid_is_requantized_by_the_reader() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 3, 6)
    result = calibrated(Chain(), parse_target(EDGES), x)
    edge = [p for p in result.plan.points if p.role == "edge"]
    assert [p.name for p in edge] == ["fc.input.0"]
    agreement(result, x)
    codes = IntegerModel(result).codes(x)
    grid, wide = grid_of(result, "conv"), grid_of(result, edge[0].group)
    operand = codes["conv"].numpy().astype(np.int64)
    moved = reference.by_float32(
        grid.centred(operand), np.float32(grid.scale) / np.float32(wide.scale), wide.zero_point
    )
    model = IntegerModel(result)
    acc = model.accumulators("fc", torch.from_numpy(wide.clamped(moved).astype(np.int64))).numpy()
    points = {p.role: p for p in result.plan.points if p.operator == "fc"}
    weight, bias = (result.codes(points[role]).long().numpy() for role in ("weight", "bias"))
    np.testing.assert_array_equal(acc, wide.centred(wide.clamped(moved).astype(np.int64)) @ weight.T + bias)


def test_a_tensor_that_is_read_on_two_grids_is_compared_on_its_own() -> None:
    torch.manual_seed(3)
    x = torch.randn(5, 3, 6)
    result = calibrated(Mixed(), parse_target(EDGES), x)
    agreement(result, x)


class Shapes(nn.Module):
    """Reshapes by computed sizes, splits and joins."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.fc = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        a, b = y.chunk(2, 1)
        y = torch.cat([b, a], 1)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        first, *_, last = y.unbind(1)
        y = torch.stack([first, last], 1)
        z: Tensor = self.fc(y.reshape(n, -1, w))
        return z


def test_views_by_computed_sizes_carry_codes() -> None:
    torch.manual_seed(4)
    x = images(7)
    result = calibrated(Shapes(), SPEC, x[:3])
    agreement(result, x)


class Halves(nn.Module):
    """An input that is read through views first, then as it is."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, 1)
        return torch.cat([second, first], 1) * x


class Flat(nn.Module):
    """An input that is read through a view alone."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4 * 64, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(x.flatten(1))
        return y


@pytest.mark.parametrize("model", [Halves, Flat])
def test_an_input_that_is_read_through_views_is_shown_in_its_own_shape(model: type[nn.Module]) -> None:
    torch.manual_seed(5)
    x = images(3, 4)
    result = calibrated(model(), SPEC, x)
    point = next(point for point in result.plan.points if point.role == "input")
    codes = IntegerModel(result).codes(x)[point.tensor]
    assert torch.equal(codes.long(), codes_of(result, x))


def codes_of(result: Any, x: Tensor) -> Tensor:
    """The input's codes in numpy."""
    q = next(q for p in result.plan.points if p.role == "input" for q in [result.quantizer(p.group).qparams])
    codes = np.rint(x.numpy() / np.float32(q.scale)) + int(q.zero_point)
    return torch.from_numpy(codes.clip(q.quant_min, q.quant_max)).long()


class Plain(nn.Module):
    """Nothing for the accelerator but the input."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(x)


def test_a_model_without_an_integer_operator_runs_on_the_host() -> None:
    x = images(2)
    result = calibrated(Plain(), SPEC, x)
    assert torch.equal(IntegerModel(result)(x), torch.sin(x))
    assert IntegerModel(result).codes(x) == {}


def test_nan_in_an_input_is_named_and_not_computed() -> None:
    torch.manual_seed(2)
    x = images(2)
    result = calibrated(Residual(), SPEC, x)
    x = x.clone()
    x[0, 0, 0, 0] = float("nan")
    with pytest.raises(qhw.errors.RangeError, match="x: values must not be NaN; got 1 of 384 elements that are"):
        IntegerModel(result)(x)


def test_comparison_adds_the_batches_up() -> None:
    torch.manual_seed(2)
    x = images()
    result = calibrated(Residual(), SPEC, x)
    rows = compare(result, IntegerModel(result), [(x[:4],), (x[4:],)])
    assert [row.tensor for row in rows] == list(IntegerModel(result).codes(x))
    assert all(row.codes == x.numel() for row in rows)


def test_an_operator_that_sums_nothing_has_no_accumulators() -> None:
    torch.manual_seed(2)
    result = calibrated(Residual(), SPEC, images(2))
    with pytest.raises(IntegerError, match="nothing: sums no products on the accelerator"):
        IntegerModel(result).accumulators("nothing", torch.zeros(1))


# What the target leaves open.


def linear(spec: TargetSpec) -> Any:
    g = Grid(0.1, 3)
    model = nn.Linear(4, 3)
    grids = {
        "input": g,
        "weight": Grid([0.1] * 3),
        "bias": Grid([np.float32(0.1) * np.float32(0.1)] * 3, 0, -(2**31), 2**31 - 1),
    }
    return quantized(model, spec, torch.randn(2, 4), grids | {"result": g})


FLOAT = 'kind = "float32", rounding = "half_even"'
FIXED = 'kind = "fixed_point", rounding = "floor", multiplier_bits = 31, shift = { min = -30, max = 31 }'
ACC, ORDER = 'overflow = "wrap"', 'rounding_order = "zero_point_after"'
APPLIED = 'applied = "before_requantize"'
BIAS = f'scale = "input*weight", {APPLIED}'
PAIRS = 'pairwise = { bits = 9, overflow = "saturate"'
WIDE, NARROW = 'bits = 32, overflow = "wrap"', 'bits = 9, overflow = "saturate"'
OPEN = [
    (FLOAT, 'kind = "float32"', "", r"requantize\.r\.kind is not stated"),
    (FLOAT, 'kind = "float32"', 'kind = "unknown"', r"requantize\.r\.kind is 'unknown'"),
    (FLOAT, 'rounding = "half_even"', "", r"requantize\.r\.rounding is not stated"),
    (FLOAT, 'rounding = "half_even"', 'rounding = "unknown"', r"requantize\.r\.rounding is 'unknown'"),
    (FLOAT, 'rounding = "half_even"', 'rounding = "double"', r'requantize\.r\.rounding = "double" names no single'),
    (FIXED, "multiplier_bits = 31", 'multiplier_bits = "unknown"', r"requantize\.r\.multiplier_bits is 'unknown'"),
    (FIXED, "multiplier_bits = 31", "", r"requantize\.r\.multiplier_bits is not stated"),
    (FIXED, "shift = { min = -30, max = 31 }", "", r"requantize\.r\.shift is not stated"),
    (FIXED, "shift = { min = -30, max = 31 }", 'shift = "unknown"', r"requantize\.r\.shift is 'unknown'"),
    (FLOAT, 'requantize = "r"', 'requantize = "unknown"', r"kernels\.mac\.requantize is 'unknown'"),
    (FLOAT, ', requantize = "r"', "", r"kernels\.mac\.requantize is not stated"),
    (FLOAT, ', accumulator = "acc"', "", r"kernels\.mac\.accumulator is not stated"),
    (FLOAT, 'accumulator = "acc"', 'accumulator = "unknown"', r"kernels\.mac\.accumulator is 'unknown'"),
    (FLOAT, 'bits = 32, overflow = "wrap"', 'overflow = "wrap"', r"accumulators\.acc\.bits is not stated"),
    (FLOAT, 'bits = 32, overflow', 'bits = "unknown", overflow', r"accumulators\.acc\.bits is 'unknown'"),
    (FLOAT, ACC, f'{ACC}, pairwise = "unknown"', r"accumulators\.acc\.pairwise is 'unknown'"),
    (FLOAT, ACC, f'{ACC}, pairwise = {{ overflow = "wrap" }}', r"accumulators\.acc\.pairwise\.bits is not stated"),
    (FLOAT, ACC, f"{ACC}, pairwise = {{ bits = 9 }}", r"accumulators\.acc\.pairwise\.bits = 9, and with overflow"),
    (FLOAT, ACC, f"{ACC}, {PAIRS} }}", r"accumulators\.acc\.pairwise\.operands is not stated"),
    (FLOAT, ACC, f'{ACC}, {PAIRS}, operands = "centred" }}', r"accumulators\.acc\.order is not stated"),
    (FLOAT, ACC, f'{ACC}, {PAIRS}, operands = "stored" }}, order = "unknown"', r"acc\.order is 'unknown'"),
    (FLOAT, WIDE, NARROW, r"accumulators\.acc\.products_per_step is not stated"),
    (FLOAT, WIDE, f"{NARROW}, products_per_step = 1", r"accumulators\.acc\.order is not stated"),
    (FLOAT, WIDE, f'{NARROW}, products_per_step = "all"', r"accumulators\.acc\.bias_added is not stated"),
    (FLOAT, 'overflow = "wrap"', 'overflow = "wrap", kind = "float"', r"accumulators\.acc\.kind = .float. cannot"),
    (FLOAT, 'bias = "b"', 'bias = "unknown"', r"kernels\.mac\.bias is 'unknown'"),
    (FLOAT, ', bias = "b"', "", r"kernels\.mac\.bias is not stated"),
    (FLOAT, APPLIED, 'applied = "after_multiplier"', r"biases\.b\.applied = .after_multiplier. needs requantize"),
    (FIXED, BIAS, 'applied = "after_multiplier"', r"biases\.b\.scale is not stated"),
    (FLOAT, APPLIED, 'applied = "unknown"', r"biases\.b\.applied is 'unknown', and must be before_requantize or"),
    (FLOAT, f", {APPLIED}", "", r"biases\.b\.applied is not stated, and must be before_requantize or after_multiplier"),
    (FIXED, f", {APPLIED}", "", r"biases\.b\.applied is not stated"),
    (FLOAT, f"bits = 32, {BIAS}", f'bits = "unknown", {BIAS}', r"biases\.b\.bits is 'unknown'"),
    (FLOAT, ORDER, 'rounding_order = "unknown"', r"operators\.Gemm\.rounding_order is 'unknown'"),
    (FLOAT, '"half_even" }', '"half_even", stages = "unknown" }', r"requantize\.r\.stages is 'unknown'"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "old", "new", "named"), OPEN, ids=[row[3].replace("\\", "") for row in OPEN])
def test_a_fact_that_decides_is_named_where_it_is_open_and_runs_once_stated(
    base: str, old: str, new: str, named: str
) -> None:
    text = reference.text(base)
    assert old in text
    changed = re.sub(r", *(?=[,}])|(?<={) *,", "", text.replace(old, new))
    with pytest.raises(IntegerError, match=rf"'acme/exact': its integer result cannot be computed: .*{named}.*gemm"):
        IntegerModel(linear(parse_target(changed)))
    assert IntegerModel(linear(parse_target(text))).codes(torch.randn(2, 4))


def test_a_pre_shift_that_is_not_stated_is_named_for_a_fixed_point_sum() -> None:
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    text = reference.text(FIXED)
    for new, named in (("", "is not stated"), (', preshift_bits = "unknown"', "is 'unknown'")):
        result = calibrated(Sum(), parse_target(text.replace(", preshift_bits = { a = 20 }", new)), torch.randn(2, 3))
        with pytest.raises(IntegerError, match=rf"operators\.Add\.preshift_bits {named}"):
            IntegerModel(result)
    assert IntegerModel(calibrated(Sum(), parse_target(text), torch.randn(2, 3)))


def test_obstacles_of_one_reason_are_counted_and_those_of_several_are_all_named() -> None:
    torch.manual_seed(0)
    text = reference.text().replace(
        'kind = "float32", rounding = "half_even"', 'kind = "float32", rounding = "unknown"'
    )
    text = text.replace('accumulator = "acc", requantize = "r" }\nkernels.two', 'requantize = "r" }\nkernels.two')
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    result = calibrated(model, parse_target(text), torch.randn(4, 3))
    _, obstacles = lower(result)
    assert [o.operator for o in obstacles] == ["0", "2", "4"]
    with pytest.raises(
        IntegerError, match=r"kernels\.mac\.accumulator is not stated \(0 and 2 more\)\. State what is open"
    ):
        IntegerModel(result)


# Scales and multipliers at the ends.


@pytest.mark.parametrize("scales", [(1e-30, 1e-30, 1.0), (1e30, 1e30, 1.0), (1e-30, 1.0, 1e30)])
@pytest.mark.parametrize("rule", [FLOAT, FIXED, reference.SHIFT], ids=["float32", "fixed_point", "shift"])
def test_a_ratio_that_arithmetic_cannot_hold_is_an_error_with_layer_and_remedy(
    rule: str, scales: tuple[float, float, float]
) -> None:
    x, w, out = (2.0 ** round(float(np.log2(s))) for s in scales)
    model = nn.Linear(3, 2, bias=False)
    fill(model.weight, torch.full((2, 3), float(np.float32(w))))
    grids = {"input": Grid(np.float32(x)), "weight": Grid([np.float32(w)] * 2), "result": Grid(np.float32(out))}
    result = quantized(model, reference.target(rule), torch.zeros(2, 3), grids)
    with pytest.raises(IntegerError, match=r"gemm.*(scale|ratio)|(scale|ratio).*gemm"):
        IntegerModel(result).codes(torch.full((2, 3), float(np.float32(x))))


@pytest.mark.parametrize("text", [
    'kind = "fixed_point", rounding = "floor", multiplier_bits = 31, shift = { min = 0, max = 4 }',
    'kind = "shift", rounding = "floor", shift = { min = 0, max = 4 }',
], ids=["fixed_point", "shift"])  # fmt: skip
@pytest.mark.parametrize("out", [2.0**-12, 2.0**8], ids=["too-far-left", "too-far-right"])
def test_a_shift_outside_the_range_of_the_target_is_an_error_with_layer_and_remedy(text: str, out: float) -> None:
    model = nn.Linear(3, 2, bias=False)
    fill(model.weight, torch.ones(2, 3))
    grids = {"input": Grid(0.125), "weight": Grid([0.25, 0.25]), "result": Grid(out)}
    result = quantized(model, reference.target(text), torch.zeros(2, 3), grids)
    with pytest.raises(IntegerError, match=r"shift.*gemm"):
        IntegerModel(result)


def test_a_ratio_of_1e30_that_float32_holds_drives_codes_to_the_ends() -> None:
    model = nn.Linear(3, 2, bias=False)
    fill(model.weight, torch.full((2, 3), 2.0**-100))
    grids = {"input": Grid(2.0**100), "weight": Grid([2.0**-100] * 2), "result": Grid(2.0**-100)}
    result = quantized(model, SPEC, torch.zeros(2, 3), grids)
    x = torch.tensor([[2.0**100], [0.0], [-(2.0**100)]]).repeat(1, 3)
    assert reference.result_of(IntegerModel(result).codes(x)).tolist() == [[127, 127], [0, 0], [-128, -128]]


@pytest.mark.parametrize("word", ["saturate", "zero_scale"])
def test_a_multiplier_out_of_range_does_what_the_target_says(word: str) -> None:
    text = reference.fixed_point("floor", low=0, high=4, more=f', out_of_range = "{word}"')
    model = nn.Linear(1, 1, bias=False)
    fill(model.weight, torch.ones(1, 1) * 0.25)
    x, out = Grid(0.125), Grid(2.0**-7, 5)  # the ratio is 4, the largest multiplier is just below 1
    result = quantized(
        model, reference.target(text), torch.zeros(2, 1), {"input": x, "weight": Grid([0.25]), "result": out}
    )
    x_q = np.array([[-3], [-1], [0], [1], [7]])
    found = IntegerModel(result).codes(x.reals(x_q))
    # floor(x (2^31 - 1) / 2^31): one below x, but 0 at 0 and, of negative ones, x itself.
    expected = {"saturate": [[2], [4], [5], [5], [11]], "zero_scale": [[5]] * 5}[word]
    assert reference.result_of(found).tolist() == expected


@pytest.mark.parametrize("width", [24, 32], ids=["24-bits", "32-bits"])
def test_codes_wider_than_float32_stay_within_their_grid(width: int) -> None:
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    wide = f'bits = {width}, signed = true, per = "tensor"'
    model = nn.Linear(1, 1, bias=False)
    fill(model.weight, torch.ones(1, 1))
    x, out = Grid(2.0**-10), Grid(2.0**-40, 0, low, high)
    spec = parse_target(
        reference.text().replace('output = ["a"], accumulator', 'output = ["o"], accumulator')
        + f"\nformats.o = {{ {wide} }}"
    )
    grids = {"input": x, "weight": Grid([1.0]), "result": out}
    found = IntegerModel(quantized(model, spec, torch.zeros(2, 1), grids)).codes(
        x.reals(np.array([[-100], [0], [100]]))
    )
    assert reference.result_of(found).tolist() == [[low], [0], [high]]
