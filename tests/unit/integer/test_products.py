# SPDX-License-Identifier: Apache-2.0
"""Convolutions, linear operators and products of two activations against int64 references of whole operators."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qhw.errors import IntegerError
from qhw.integer import IntegerModel, prove_accumulators
from qhw.schema import parse_target
from tests import integer_support as reference
from tests.integer_support import RULES, S8, S16, Grid, Rule, fill, quantized, result_of

RANDOM = st.integers(0, 2**32 - 1)
PHASES = (Phase.explicit, Phase.generate)  # a smaller example says little more, and takes minutes
FLOAT = RULES[0]
WIDE_SHIFT = Rule('kind = "shift", rounding = "floor", shift = { min = -62, max = 62 }', "shift", "floor")


def scales(rule: Rule, rng: np.random.Generator, count: int | None = None) -> Any:
    """Random scales; powers of two where the rule only shifts, and often elsewhere: those make exact ties."""
    found = 2.0 ** rng.uniform(-8, -5, count)
    if rule.kind == "shift" or rng.random() < 0.5:
        found = 2.0 ** np.round(np.log2(found))
    return np.float32(found)


def grid(rng: np.random.Generator, rule: Rule, low: int = -128, high: int = 127) -> Grid:
    return Grid(scales(rule, rng), int(rng.integers(low, high + 1)), low, high)


def weight_grid(rng: np.random.Generator, rule: Rule, channels: int, per_channel: bool, axis: int) -> Grid:
    count = channels if per_channel else None
    zero = rng.integers(-20, 21, count) if rng.random() < 0.5 else np.zeros(count or (), np.int64)
    return Grid(scales(rule, rng, count), zero, -128, 127, axis)


def output_grid(rng: np.random.Generator, rule: Rule, acc: Any, unit: Any) -> Grid:
    """A grid that most results fit."""
    reals = acc * np.prod(np.broadcast_arrays(*(np.asarray(u, np.float64) for u in unit)), axis=0)
    wanted = float(np.abs(reals).max() / 100 + 1e-6)
    if rule.kind == "shift" or rng.random() < 0.5:
        wanted = 2.0 ** round(np.log2(wanted))
    return Grid(np.float32(wanted), int(rng.integers(-40, 41)))


def check(
    model: nn.Module, rule: Rule, rng: np.random.Generator, shape: tuple[int, ...], weight: Any, product: Any, axis: int
) -> None:
    """Random codes on random grids through a model of one operator with weights, `weight`, `bias` and one input.

    Args:
        weight: Its name, and the axis of its output channels, and whether it has a scale for each.
        product: Centred operand and weight -> accumulators without the bias.
        axis: Of the output channels in the result.
    """
    name, weight_axis, per_channel = weight
    parameter, bias = model.get_parameter(name), getattr(model, "bias", None)
    x = grid(rng, rule)
    w = weight_grid(rng, rule, parameter.shape[weight_axis], per_channel, weight_axis)
    x_q, w_q = x.codes(rng, *shape), w.codes(rng, *parameter.shape)
    fill(parameter, w.reals(w_q))
    acc = product(x.centred(x_q), w.centred(w_q))
    channels = acc.shape[axis]
    along = [-1 if i == axis % acc.ndim else 1 for i in range(acc.ndim)]
    per_output = np.tile(w.scale, channels // len(w.scale)) if per_channel else w.scale
    grids = {"input": x, name: w}
    if bias is not None:
        b_q = rng.integers(-3000, 3001, channels)
        grids["bias"] = Grid(np.float32(x.scale) * np.float32(per_output), 0, -(2**31), 2**31 - 1)
        fill(bias, grids["bias"].reals(b_q))
        acc = acc + b_q.reshape(along)
    unit = [x.scale, per_output.reshape(along) if per_channel else w.scale]
    out = output_grid(rng, rule, acc, unit)
    spec = reference.target(rule.text, order=rule.order, weight=W_BOTH[per_channel])
    result = quantized(model, spec, x.reals(x_q)[:2], grids | {"result": out})
    found = IntegerModel(result).codes(x.reals(x_q))
    np.testing.assert_array_equal(found["input"].numpy(), x_q)
    expected = out.clamped(rule.codes(acc, unit, out)).astype(np.int64)
    np.testing.assert_array_equal(result_of(found), expected)


W_BOTH = {True: reference.W8, False: S8}


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}


@pytest.mark.slow
@settings(max_examples=35, phases=PHASES, deadline=None)
@given(st.data())
def test_a_convolution_of_any_form_equals_int64_sums_and_its_rounding(data: Any) -> None:
    draw = data.draw
    dims, rule = draw(st.integers(1, 3)), draw(st.sampled_from(RULES))
    groups, per_in, per_out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    named = draw(st.sampled_from(["", "same", "valid"]))
    padding: Any = named or [draw(st.integers(0, 2)) for _ in range(dims)]
    if named == "same":
        stride = [1] * dims
    rng = np.random.default_rng(draw(RANDOM))
    size = [d * (k - 1) + 1 + draw(st.integers(0, 3)) for k, d in zip(kernel, dilation, strict=True)]
    model = CONVOLUTIONS[dims](
        groups * per_in, groups * per_out, kernel, stride, padding, dilation, groups, draw(st.booleans())
    )
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    edges = {"same": [(t // 2, t - t // 2) for t in totals], "valid": [(0, 0)] * dims}.get(named) or [
        (p, p) for p in padding
    ]

    def product(x: Any, w: Any) -> Any:
        return reference.convolution(x, w, stride, edges, dilation, groups)

    shape = (draw(st.integers(1, 3)), groups * per_in, *size)
    check(model, rule, rng, shape, ("weight", 0, draw(st.booleans())), product, 1)


@pytest.mark.slow
@settings(max_examples=25, phases=PHASES, deadline=None)
@given(st.data())
def test_a_transposed_convolution_spreads_its_taps_as_int64_does(data: Any) -> None:
    draw = data.draw
    dims, rule = draw(st.integers(1, 3)), draw(st.sampled_from(RULES))
    groups, per_in, per_out = (draw(st.integers(1, 3)) for _ in range(3))
    kernel, stride, dilation = ([draw(st.integers(1, 3)) for _ in range(dims)] for _ in range(3))
    padding = [draw(st.integers(0, (k - 1) * d // 2)) for k, d in zip(kernel, dilation, strict=True)]
    more = [draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)]
    rng = np.random.default_rng(draw(RANDOM))
    size = [draw(st.integers(2, 4)) for _ in range(dims)]
    model = TRANSPOSED[dims](
        groups * per_in, groups * per_out, kernel, stride, padding, more, groups, draw(st.booleans()), dilation
    )

    def product(x: Any, w: Any) -> Any:
        return reference.transposed_convolution(x, w, stride, padding, more, dilation, groups)

    shape = (draw(st.integers(1, 3)), groups * per_in, *size)
    check(model, rule, rng, shape, ("weight", 1, draw(st.booleans())), product, 1)


class AddMm(nn.Module):
    """bias + x @ weight: the constant stands on the right, [in, out]."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, input: Tensor) -> Tensor:
        return torch.addmm(self.bias, input, self.weight)


class MatMul(nn.Module):
    """x @ weight."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(inputs, outputs))

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight


@pytest.mark.slow
@settings(max_examples=25, phases=PHASES, deadline=None)
@given(st.data())
def test_a_linear_operator_of_any_rank_and_spelling_equals_int64_sums(data: Any) -> None:
    draw = data.draw
    rule, inputs, outputs = draw(st.sampled_from(RULES)), draw(st.integers(1, 9)), draw(st.integers(1, 5))
    form = draw(st.sampled_from(["linear", "addmm", "matmul"]))
    rank = 2 if form == "addmm" else draw(st.integers(2, 4))
    model: nn.Module
    if form == "linear":
        model = nn.Linear(inputs, outputs, draw(st.booleans()))
    else:
        model = AddMm(inputs, outputs) if form == "addmm" else MatMul(inputs, outputs)

    def product(x: Any, w: Any) -> Any:
        return x @ (w.T if form == "linear" else w)

    shape = (*(draw(st.integers(1, 3)) for _ in range(rank - 1)), inputs)
    axis = 0 if form == "linear" else 1
    rng = np.random.default_rng(draw(RANDOM))
    check(model, rule, rng, shape, ("weight", axis, draw(st.booleans())), product, -1)


class Product(nn.Module):
    """Two activations."""

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b


@pytest.mark.slow
@settings(max_examples=15, phases=PHASES, deadline=None)
@given(st.data())
def test_a_product_of_two_activations_equals_int64_sums(data: Any) -> None:
    draw = data.draw
    rule, rank = draw(st.sampled_from(RULES)), draw(st.integers(3, 4))
    batch = [draw(st.integers(1, 3)) for _ in range(rank - 2)]
    n, k, m = (draw(st.integers(1, 5)) for _ in range(3))
    rng = np.random.default_rng(draw(RANDOM))
    a, b = grid(rng, rule), grid(rng, rule)
    a_q, b_q = a.codes(rng, *batch, n, k), b.codes(rng, *batch, k, m)
    acc = a.centred(a_q) @ b.centred(b_q)
    out = output_grid(rng, rule, acc, [a.scale, b.scale])
    spec = reference.target(rule.text, order=rule.order)
    example = a.reals(a_q), b.reals(b_q)
    result = quantized(Product(), spec, example, {"a": a, "b": b, "result": out})
    found = IntegerModel(result).codes(*example)
    expected = out.clamped(rule.codes(acc, [a.scale, b.scale], out)).astype(np.int64)
    np.testing.assert_array_equal(result_of(found), expected)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: f"{r.kind}-{r.rounding}-{r.bits}-{r.order}")
def test_every_rounding_of_every_requantization_decides_its_ties(rule: Rule) -> None:
    # A ratio of 1/4: one accumulator in two is a tie or near one; all from -1000 to 1000 are met.
    model = nn.Linear(1, 1)
    x, w, out = Grid(0.5, -3, -1000, 1000), Grid([0.25]), Grid(0.5, 7, -1000, 1000)
    x_q = np.arange(-1000, 1001).reshape(-1, 1)
    fill(model.weight, torch.tensor([[0.25]]))
    fill(model.bias, torch.tensor([0.125]))
    grids = {"input": x, "weight": w, "bias": Grid([0.125], 0, -(2**31), 2**31 - 1), "result": out}
    result = quantized(model, reference.target(rule.text, order=rule.order, activation=S16), x.reals(x_q), grids)
    acc = x_q + 3 + 1
    expected = rule.codes(acc, [x.scale, w.scale], out).astype(np.int64)
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(x.reals(x_q))), expected)


class Rectified(nn.Module):
    """A convolution with functions behind it."""

    def __init__(self, *behind: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.behind = nn.Sequential(*behind)

    def forward(self, input: Tensor) -> Tensor:
        y: Tensor = self.behind(self.conv(input))
        return y


def rectified(*behind: nn.Module, outputs: str = "quantized") -> tuple[Any, Any, Any, Any, Any]:
    """The result, an input, its accumulators, the factors of a unit, and the output's grid."""
    rng = np.random.default_rng(5)
    model = Rectified(*behind)
    x, w = Grid(0.04, 11), Grid(np.float32([0.02, 0.03, 0.01]))
    x_q, w_q, b_q = x.codes(rng, 4, 2, 5, 5), w.codes(rng, 3, 2, 2, 2), rng.integers(-900, 900, 3)
    bias = Grid(np.float32(x.scale) * w.scale, 0, -(2**31), 2**31 - 1)
    fill(model.conv.weight, w.reals(w_q))
    fill(model.conv.bias, bias.reals(b_q))
    out = Grid(0.3, -50)
    grids = {"input": x, "conv.weight": w, "conv.bias": bias, "result": out}
    result = quantized(model, reference.target(outputs=outputs), x.reals(x_q), grids)
    acc = reference.convolution(x.centred(x_q), w.centred(w_q), [1, 1], [(0, 0)] * 2, [1, 1], 1)
    return result, x.reals(x_q), acc + b_q.reshape(1, -1, 1, 1), [x.scale, w.scale.reshape(1, -1, 1, 1)], out


@pytest.mark.parametrize(
    ("behind", "low", "high"),
    [
        ([nn.ReLU()], -50, 127),
        ([nn.ReLU6()], -50, -30),  # 6 / 0.3 = 20 codes above 0.0
        ([nn.Hardtanh(-1.0, 2.0)], -53, -43),  # -3.33 and 6.67 codes, rounded
        ([nn.ReLU(), nn.Dropout(0.5)], -50, 127),
        ([nn.Dropout(0.5), nn.ReLU6()], -50, -30),
        ([nn.Hardtanh(2.0, 3.0)], -43, -40),
    ],
    ids=["relu", "relu6", "hardtanh", "relu-dropout", "dropout-relu6", "clip-above-0"],
)
def test_a_fused_clip_is_a_clamp_of_codes(behind: list[nn.Module], low: int, high: int) -> None:
    result, x, acc, unit, out = rectified(*behind)
    expected = np.clip(reference.by_float32(acc, unit[0] * unit[1] / np.float32(out.scale), -50), low, high)
    np.testing.assert_array_equal(result_of(IntegerModel(result).codes(x)), expected.astype(np.int64))


@pytest.mark.parametrize(
    ("behind", "function"),
    [([], lambda y: y), ([nn.ReLU()], lambda y: y.clip(0)), ([nn.Hardtanh(-0.5, 1.0)], lambda y: y.clip(-0.5, 1.0))],
    ids=["nothing", "relu", "hardtanh"],
)
def test_an_output_that_stays_float_is_the_accumulator_in_reals_with_its_clips(behind: Any, function: Any) -> None:
    result, x, acc, unit, _ = rectified(*behind, outputs="float")
    expected = function(acc.astype(np.float32) * (np.float32(unit[0]) * unit[1].astype(np.float32)))
    found = IntegerModel(result)(x)
    np.testing.assert_array_equal(found.numpy(), expected.astype(np.float32))


@pytest.mark.parametrize("width", [16, 24, 30], ids=lambda n: f"{n}-bits")
@pytest.mark.parametrize(
    "rule",
    [FLOAT, Rule(reference.fixed_point("half_even", low=-62, high=62), "fixed_point", "half_even"), WIDE_SHIFT],
    ids=lambda r: r.kind,
)
def test_sums_beyond_two_to_the_24_and_53_stay_exact(width: int, rule: Rule) -> None:
    # 30 bits by 30 bits leave float64, 16 by 16 and 24 by 24 leave float32.
    rng = np.random.default_rng(width)
    low, high = -(2 ** (width - 1)), 2 ** (width - 1) - 1
    wide = f'bits = {width}, signed = true, per = "tensor"'
    model = nn.Linear(6, 3, bias=False)
    x, w = Grid(2.0**-width, 5, low, high), Grid(2.0**-width, 0, low, high)
    x_q, w_q = x.codes(rng, 7, 6), w.codes(rng, 3, 6)
    # float32 weights hold 24 bits.
    keep = 2 ** max(width - 23, 0)
    x_q, w_q = x_q // (8 * keep) * (8 * keep) + 5, w_q // keep * keep
    fill(model.weight, w.reals(w_q))
    acc = x.centred(x_q) @ w.centred(w_q).T
    assert np.abs(acc).max() >= 2 ** (2 * width - 3)
    out = Grid(2.0**-6, 3)
    wider = {
        "accumulator": 'bits = 64, overflow = "wrap"',
        "bias": 'bits = 40, scale = "input*weight", applied = "before_requantize"',
    }
    spec = reference.target(rule.text, activation=wide, weight=wide, **wider)
    result = quantized(model, spec, x.reals(x_q), {"input": x, "weight": w, "result": out})
    found = IntegerModel(result).codes(x.reals(x_q))
    np.testing.assert_array_equal(found["input"].numpy(), x_q)
    expected = out.clamped(rule.codes(acc, [x.scale, w.scale], out)).astype(np.int64)
    np.testing.assert_array_equal(result_of(found), expected)


@pytest.mark.parametrize(("width", "exponent"), [(16, 31), (24, 46), (30, 58)])
def test_the_accumulators_of_wide_formats_are_exact_integers(width: int, exponent: int) -> None:
    # Sums of more than 24 bits, of more than float32 holds by far, and of more than 53: to the last bit.
    rng = np.random.default_rng(width)
    wide = f'bits = {width}, signed = true, per = "tensor"'
    model = nn.Linear(6, 4, bias=False)
    g = Grid(2.0**-width, 0, -(2 ** (width - 1)), 2 ** (width - 1) - 1)
    step = 2 ** max(width - 24, 0)  # a float32 weight holds 24 bits
    w_q = rng.integers(g.low // step, (g.high + 1) // step, (4, 6)) * step
    fill(model.weight, g.reals(w_q))
    spec = reference.target(activation=wide, weight=wide, accumulator='bits = 64, overflow = "wrap"')
    result = quantized(model, spec, torch.zeros(2, 6), {"input": g, "weight": g, "result": g})
    x_q = rng.integers(g.low, g.high + 1, (50, 6))
    found = IntegerModel(result).accumulators("gemm", torch.from_numpy(x_q))
    exact = [[sum(int(a) * int(b) for a, b in zip(x, w, strict=True)) for w in w_q] for x in x_q]
    assert found.tolist() == exact
    assert max(abs(v) for row in exact for v in row) > 2**exponent


def test_a_bias_is_not_dropped_where_the_target_does_not_say_how_it_is_added() -> None:
    text = reference.text().replace(', bias = "b"', "")
    model = nn.Linear(3, 2)
    g = Grid(0.1)
    result = quantized(
        model, parse_target(text), torch.randn(2, 3), {"input": g, "weight": Grid([0.1, 0.1]), "result": g}
    )
    with pytest.raises(IntegerError, match=r"kernels\.mac\.bias is not stated \(gemm\)"):
        IntegerModel(result)


def test_a_product_with_a_constant_on_the_left_is_named_not_computed() -> None:
    class Left(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 3))

        def forward(self, input: Tensor) -> Tensor:
            return self.weight @ input

    result = reference.calibrated(Left(), reference.target(), torch.randn(2, 3, 3))
    if "matmul" in {o.name for o in result.plan.operators if o.where == "accelerator"}:
        with pytest.raises(IntegerError, match="a product with a constant tensor cannot be executed exactly yet"):
            IntegerModel(result)


def test_a_product_that_sums_over_the_batch_runs_batches_of_the_captured_size() -> None:
    class Gram(nn.Module):
        def forward(self, input: Tensor) -> Tensor:
            return input.t() @ input

    x = torch.randn(4, 3)
    model = IntegerModel(reference.calibrated(Gram(), reference.target(), x))
    codes = model.codes(x)
    centred = codes["input"].numpy().astype(np.int64) - int(model.sites["matmul"].inputs[0].zero_point)
    found = model.accumulators("matmul", codes["input"].t(), codes["input"]).numpy()
    np.testing.assert_array_equal(found, centred.T @ centred)
    with pytest.raises(
        IntegerError, match=r"matmul: sums 6 products of a batch; captured with 4\. Run batches of that"
    ):
        model.codes(torch.randn(6, 3))


@pytest.mark.parametrize("outputs", ["quantized", "float"])
def test_weights_with_a_scale_per_group_name_the_field_that_no_target_has(outputs: str) -> None:
    spec = reference.target(weight='bits = 4, signed = true, zero_point = 0, per = "group", group_size = 2')
    result = reference.calibrated(nn.Linear(6, 2, bias=False), spec, torch.randn(3, 6))
    with pytest.raises(
        IntegerError, match=r"no field of a target says how the sums of groups become one .*accumulators"
    ):
        IntegerModel(result)
    # Their sums are bounded as if all were one.
    (proof,) = prove_accumulators(result)
    codes = result.codes(next(p for p in result.plan.points if p.role == "weight")).long()
    x = result.encodings()["input"]
    ends = torch.stack([codes * (x.quant_min - int(x.zero_point)), codes * (x.quant_max - int(x.zero_point))])
    assert proof.bounds.highest.tolist() == ends.amax(0).sum(1).tolist()
    assert proof.bounds.lowest.tolist() == ends.amin(0).sum(1).tolist()
