# SPDX-License-Identifier: Apache-2.0
"""Biases on a scale of their own, and behind the multiplier, against fractions."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from qhw.errors import IntegerError
from qhw.integer import IntegerModel, prove_accumulators
from tests import integer_support as reference
from tests.integer_support import SINGLE, Grid, fill, multiplier_of, quantized, result_of, rounded

PHASES = (Phase.explicit, Phase.generate)
OWN = 'bits = 16, scale = "own", applied = "before_requantize", align = "shift"'
LOW, HIGH = -(2**15), 2**15 - 1


def lowered(spec: Any, w: Grid, bias: Grid, rng: np.random.Generator, out: Grid) -> tuple[IntegerModel, Any, Any, Any]:
    """A convolution with random codes: the model, its input as reals, its sums without bias, its bias codes."""
    model = nn.Conv1d(2, 3, 2, padding=1)
    x = Grid(0.5, 9)
    x_q, w_q = x.codes(rng, 4, 2, 5), w.codes(rng, 3, 2, 2)
    b_q = rng.integers(-1000, 1000, 3)
    fill(model.get_parameter("weight"), w.reals(w_q))
    fill(model.get_parameter("bias"), bias.reals(b_q))
    grids = {"input": x, "weight": w, "bias": bias, "result": out}
    acc = reference.convolution(x.centred(x_q), w.centred(w_q), [1], [(1, 1)], [1], 1)
    return IntegerModel(quantized(model, spec, x.reals(x_q), grids)), x.reals(x_q), acc, b_q


@pytest.mark.slow
@settings(max_examples=30, phases=PHASES, deadline=None)
@given(st.data())
def test_a_bias_of_its_own_scale_is_shifted_onto_the_sum(data: Any) -> None:
    draw = data.draw
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w = Grid(np.float32(2.0 ** rng.uniform(-8, -5, 3)), 0)
    shifts = np.array(draw(st.lists(st.integers(0, 9), min_size=3, max_size=3)))
    scale = np.float32(0.5) * w.scale * np.float32(2.0) ** shifts.astype(np.float32)
    model, x, acc, b_q = lowered(
        reference.target(bias=OWN), w, Grid(scale, rng.integers(-3, 4, 3), LOW, HIGH), rng, out := Grid(0.25, 3)
    )
    zero = model.sites["conv"].bias.qparams.zero_point.numpy()
    total = acc + ((b_q - zero) << shifts)[:, None]
    found = model.codes(x)
    np.testing.assert_array_equal(model.accumulators("conv", found["input"]).numpy(), total)
    expected = out.clamped(reference.by_float32(total, (np.float32(0.5) * w.scale / np.float32(0.25))[:, None], 3))
    np.testing.assert_array_equal(result_of(found), expected.astype(np.int64))


FIXED = {rule: reference.fixed_point(rule, bits=8, low=-20, high=40) for rule in SINGLE}


@pytest.mark.slow
@settings(max_examples=30, phases=PHASES, deadline=None)
@given(st.data())
def test_a_bias_behind_the_multiplier_is_rounded_with_the_product(data: Any) -> None:
    draw = data.draw
    rule, is_own = draw(st.sampled_from(SINGLE)), draw(st.booleans())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    w, out = Grid(np.float32(2.0 ** rng.uniform(-8, -5, 3)), 0), Grid(np.float32(2.0 ** rng.uniform(-2, 1)), 3)
    ratios = [float(np.float64(np.float32(0.5)) * float(s) / float(out.scale)) for s in w.scale]
    made = [multiplier_of(ratio, 8) for ratio in ratios]
    shifts = rng.integers(0, 6, 3)
    scale = np.float32(0.5) * w.scale
    if is_own:
        scale = np.float32([np.float32(out.scale) * 2.0 ** (int(n) - right - 8) for n, (_, right) in zip(shifts, made)])  # noqa: B905
    text = f'bits = 32, scale = "{"own" if is_own else "input*weight"}", align = "shift", applied = "after_multiplier"'
    spec = reference.target(FIXED[rule], bias=text)
    model, x, acc, b_q = lowered(spec, w, Grid(scale, 0, -(2**31), 2**31 - 1), rng, out)
    found = model.codes(x)
    # The accumulator has no bias in it.
    np.testing.assert_array_equal(model.accumulators("conv", found["input"]).numpy(), acc)
    expected = np.zeros(acc.shape, np.int64)
    for n, c, i in np.ndindex(acc.shape):
        multiplier, right = made[c]
        added = int(b_q[c]) << int(shifts[c]) if is_own else int(b_q[c]) * multiplier
        value = Fraction(int(acc[n, c, i]) * multiplier + added) / Fraction(2) ** (right + 8)
        expected[n, c, i] = rounded(value, rule) + 3
    np.testing.assert_array_equal(result_of(found), out.clamped(expected))


def test_a_bias_behind_the_multiplier_does_not_wrap_with_the_sum() -> None:
    # 4 bits: 2 x 3 = 6 fits, 6 + 4 wraps to -6; behind the multiplier it does not.
    model = nn.Linear(1, 1)
    fill(model.weight, torch.tensor([[0.75]]))
    fill(model.bias, torch.tensor([0.5]))
    grids = {
        "input": Grid(0.5, 0, -2, 2), "weight": Grid([0.25]), "bias": Grid([0.125], 0, LOW, HIGH), "result": Grid(0.125)
    }  # fmt: skip
    for applied, expected in (("before_requantize", -6), ("after_multiplier", 10)):
        spec = reference.target(
            FIXED["floor"], activation='codes = [-2, 2], zero_point = 0, per = "tensor"',
            accumulator='bits = 4, overflow = "wrap"',
            bias=f'bits = 16, scale = "input*weight", applied = "{applied}"',
        )  # fmt: skip
        spec = spec.model_copy(update={"formats": {**spec.formats, "o": spec.formats["w"]}})
        result = quantized(model, spec, torch.zeros(2, 1), grids | {"result": Grid(0.125, 0, -100, 100)})
        assert int(result_of(IntegerModel(result).codes(torch.tensor([[1.0]])))[0, 0]) == expected


def refused(bias: str, scale: Any, match: str, requantize: str = reference.FLOAT32, outputs: str = "quantized") -> None:
    rng = np.random.default_rng(0)
    spec = reference.target(requantize, bias=bias, outputs=outputs)
    with pytest.raises(IntegerError, match=match):
        lowered(spec, Grid(np.float32([0.25] * 3)), Grid(np.float32([scale] * 3), 0, LOW, HIGH), rng, Grid(0.25))


AFTER = 'bits = 16, scale = "SCALE", applied = "after_multiplier", align = "shift"'


@pytest.mark.parametrize(
    ("bias", "scale", "requantize", "match"),
    [
        (OWN.replace(', align = "shift"', ""), 0.5, reference.FLOAT32, r"biases\.b\.align is not stated"),
        (OWN.replace('"shift"', '"unknown"'), 0.5, reference.FLOAT32, r"biases\.b\.align is 'unknown'"),
        (OWN, 0.3, reference.FLOAT32, r"input\*weight times 1, 2, 4, \.\.\.; got a factor of 2\.4"),
        (OWN, 0.0625, reference.FLOAT32, r"input\*weight times 1, 2, 4, \.\.\.; got a factor of 0\.5"),
        (OWN, 2.0**60, reference.FLOAT32, r"biases\.b: its bias shifted left by 63 bits needs more than 63"),
        (AFTER, 0.125, reference.DOUBLE, r'applied = "after_multiplier" needs requantize\.r\.kind = "fixed_point"'),
        (AFTER, 0.125, reference.FLOAT32, r'applied = "after_multiplier" needs requantize\.r\.kind = "fixed_point"'),
        (
            AFTER.replace("SCALE", "own"), 0.3, FIXED["floor"],
            r"the output scale over 2\^\(multiplier bits \+ shift\) times 1, 2, 4, \.\.\.; got a factor of 307\.2",
        ),
    ],
)  # fmt: skip
def test_what_the_target_does_not_align_is_refused(bias: str, scale: float, requantize: str, match: str) -> None:
    refused(bias.replace("SCALE", "input*weight"), scale, match, requantize)


def test_a_product_with_the_multiplier_that_leaves_63_bits_is_refused() -> None:
    spec = reference.target(
        reference.fixed_point("floor"), activation=reference.S16, weight=reference.S16,
        accumulator='bits = 48, overflow = "wrap"', bias=AFTER.replace("16", "40").replace("SCALE", "input*weight"),
    )  # fmt: skip
    result = reference.calibrated(nn.Linear(9, 2), spec, torch.randn(4, 9))
    with pytest.raises(IntegerError, match=r"biases\.b: its bias behind the multiplier needs more than 63 bits"):
        IntegerModel(result)


def test_a_bias_behind_a_multiplier_that_is_not_there_is_refused() -> None:
    text = AFTER.replace("SCALE", "input*weight")
    refused(text, 0.125, "a bias behind the multiplier, and no multiplier", FIXED["floor"], "float")


@pytest.mark.parametrize("per", ["tensor", "out_channel"])
def test_the_scales_that_quantization_chooses_are_aligned(per: str) -> None:
    torch.manual_seed(0)
    power = f'{reference.S8}, zero_point = 0, scale = {{ kind = "power_of_two" }}'
    spec = reference.target(
        reference.SHIFT, activation=power, weight=power,
        bias=f'bits = 8, scale = "own", align = "shift", per = "{per}"',
    )  # fmt: skip
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(32, 3, 8, 8)
    result = reference.calibrated(model, spec, x)
    biases = [result.codes(point) for point in result.plan.points if point.role == "bias"]
    assert len(biases) == 2 and all(int(codes.abs().max()) >= 32 for codes in biases)
    with torch.no_grad():
        assert float((IntegerModel(result)(x) - model(x)).abs().max()) < 0.15


def test_a_bias_that_no_field_aligns_is_bounded_from_outside_and_not_witnessed() -> None:
    model = nn.Linear(2, 1)
    fill(model.weight, torch.tensor([[0.5, -0.25]]))
    fill(model.bias, torch.tensor([0.3]))
    grids = {
        "input": Grid(0.5, 0, -2, 1), "weight": Grid([0.25]), "bias": Grid([0.1], 0, LOW, HIGH), "result": Grid(1.0)
    }  # fmt: skip
    spec = reference.target(activation='bits = 2, signed = true, per = "tensor"', bias='bits = 16, scale = "own"')
    (proof,) = prove_accumulators(quantized(model, spec, torch.zeros(2, 2), grids))
    # Weights 2 and -1, inputs from -2 to 1: -5 to 4; 0.3 are 2.4 units of 0.125, at most 3.
    assert (proof.bounds.lowest.tolist(), proof.bounds.highest.tolist()) == ([-5], [4 + 3])
    assert proof.witness is None
