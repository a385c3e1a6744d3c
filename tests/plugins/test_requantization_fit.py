# SPDX-License-Identifier: Apache-2.0
"""Multipliers, shifts and biases are made legal by the least growth of a scale: checked in fractions, then executed."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.errors import RangeError
from qhw.integer import IntegerModel, prove_accumulators
from qhw.schema import TargetSpec, parse_target

TARGET = """
schema_version = 1
name = "acme/narrow-shift"
formats.a = { bits = 8, signed = true, per = "tensor" ZERO SCALE }
formats.w = { codes = [-127, 127], zero_point = 0, per = "PER" SCALE }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = 32, overflow = "saturate" }
requantize.r = { KIND }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "acc", requantize = "r" }
kernels.act = { input = ["a"], output = ["a"], accumulator = "acc", requantize = "r" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] AFTER }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu"] AFTER }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"] AFTER }
operators.Gemm = { kernels = ["mac"] AFTER }
operators.Add = { kernels = ["act"], preshift_bits = { a = 4 } AFTER }
operators.Mul = { kernels = ["act"] AFTER }
operators.GlobalAveragePool = { kernels = ["act"] AFTER }
operators.Flatten = { same_scale = "input_output" }
fallback = "host"
"""
FIXED = (
    'kind = "fixed_point", rounding = "half_away_from_zero", multiplier_bits = 15, shift = { min = LOW, max = HIGH }'
)
SHIFT = 'kind = "shift", rounding = "half_even", shift = { min = LOW, max = HIGH }'
POWER = ', scale = { kind = "power_of_two" }'
WIDE = (("accumulators.acc = { bits = 32", "accumulators.acc = { bits = 48"),)
WITHOUT = ("requantization_fit",)


def target(
    low: int = 0,
    high: int = 12,
    *,
    kind: str = FIXED,
    per: str = "out_channel",
    power: bool = False,
    changes: tuple[tuple[str, str], ...] = (),
) -> TargetSpec:
    text = TARGET.replace("KIND", kind).replace("LOW", str(low)).replace("HIGH", str(high)).replace("PER", per)
    text = text.replace("AFTER", ', rounding_order = "zero_point_after"')
    text = text.replace("ZERO", ", zero_point = 0" if power else "").replace("SCALE", POWER if power else "")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_target(text)


def network() -> tuple[nn.Module, Tensor]:
    """A channel that is nearly dead, one that is quiet."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2), nn.Flatten(), nn.Linear(8 * 13 * 13, 5),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight[1] *= 1e-7
        net[2].weight[3] *= 1e-3
    return net.eval(), torch.randn(16, 3, 8, 8)


def quantized(spec: TargetSpec, net: nn.Module, x: Any, **wishes: Any) -> QuantizedModel:
    inputs = tuple(part[:2] for part in x) if isinstance(x, tuple) else x[:2]
    data = [x] if isinstance(x, tuple) else x
    wishes = {"pipeline": "ranges-ptq", "progress": SilentProgress(), **wishes}
    return qhw.quantize(net, spec, example_inputs=inputs, calibration=data, **wishes)


def report(result: QuantizedModel) -> Any:
    return next(step for step in result.steps if step.algorithm == "requantization_fit")


def ratios(result: QuantizedModel, only: str | None = None) -> Iterator[Fraction]:
    """Input scale times weight scale over output scale, of every channel of every layer or of one, exact."""
    found = result.encodings()
    read = {name: p.group for p in result.plan.points if p.role in ("input", "activation") for name in p.consumers}
    written = {p.operator: p.group for p in result.plan.points if p.role == "activation"}
    for point in result.plan.points:
        if point.role == "weight" and only in (None, point.name):
            x, y = (Fraction(float(found[g[point.operator]].scale)) for g in (read, written))
            for scale in found[point.group].scale.flatten().tolist():
                yield x * Fraction(scale) / y


def sqnr(result: QuantizedModel, net: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, found = net(x).double(), IntegerModel(result)(x).double()
    return float(10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()))


@pytest.mark.parametrize("per", ["out_channel", "tensor"])
@pytest.mark.parametrize(("low", "high"), [(0, 8), (0, 12), (3, 20), (7, 20), (-8, 9)])
def test_every_ratio_lies_within_the_shifts_and_the_result_stays_near(per: str, low: int, high: int) -> None:
    net, x = network()
    result = quantized(target(low, high, per=per), net, x)
    found = list(ratios(result))
    assert all(Fraction(1, 2 ** (high + 1)) <= ratio < Fraction(2) ** -low for ratio in found)
    assert not any(proof.overflowing_channels for proof in prove_accumulators(result, witnesses=False))
    # 8 bits give some 35 dB; a layer whose scales were off by a bit would give less than 30.
    assert sqnr(result, net, x) > 30


def test_without_the_step_the_same_network_cannot_run() -> None:
    net, x = network()
    result = quantized(target(0, 8), net, x, without=WITHOUT)
    assert any(ratio < Fraction(1, 2**9) for ratio in ratios(result))
    with pytest.raises(qhw.QhwError, match=r"requantize\.r: multiplier: ratio must be at least 2\*\*-9"):
        IntegerModel(result)


def test_only_what_fails_changes_and_no_more_than_it_must() -> None:
    net, x = network()
    before, after = quantized(target(0, 12), net, x, without=WITHOUT), quantized(target(0, 12), net, x)
    old, new = before.encodings(), after.encodings()
    raised = 0
    for group in ("0.weight", "2.weight", "4.weight", "6.weight"):
        for a, b, ratio in zip(old[group].scale.tolist(), new[group].scale.tolist(), ratios(after, group), strict=True):
            assert b >= a
            if b > a:
                raised += 1
                assert ratio <= Fraction(1, 2**13) * (1 + Fraction(1, 2**18))  # the smallest legal one
    assert raised == sum(int(v) for s in report(after).sites.values() for k, v in s.items() if k.startswith("grown."))
    assert raised >= 2
    assert all(torch.equal(old[g].zero_point, new[g].zero_point) for g in old)


@pytest.mark.parametrize(("low", "high"), [(0, 9), (4, 30), (7, 9)])
def test_powers_of_two_stay_powers_of_two_by_shifts(low: int, high: int) -> None:
    net, x = network()
    result = quantized(target(low, high, kind=SHIFT, power=True), net, x)
    for ratio in ratios(result):
        shift = int(math.log2(ratio.denominator)) - int(math.log2(ratio.numerator))
        assert Fraction(2) ** -shift == ratio and low <= shift <= high
    assert torch.isfinite(IntegerModel(result)(x)).all()


class Branches(nn.Module):
    """A sum of operands of very different size, a product, a mean."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.adaptive_avg_pool2d((x + y) * y, 1)


def branches() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return Branches().eval(), (
        torch.randn(8, 4, 6, 6, generator=generator),
        3e-4 * torch.randn(8, 4, 6, 6, generator=generator),
    )


class QuietBranch(nn.Module):
    """A sum of x and of a branch that is some 2^7 times quieter."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1)
        with torch.no_grad():
            self.conv.weight *= 2.0**-6
            self.conv.bias *= 2.0**-6  # type: ignore[operator]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + x


@pytest.mark.parametrize(
    ("align", "most"),
    [
        ('{ to = "coarser", rounding = "floor", shift = { min = 0, max = 3 } }', 3),
        ('{ to = "finer", shift = { min = -5, max = 0 } }', 5),
    ],
    ids=["coarser", "finer"],
)
def test_operands_of_a_sum_come_as_close_as_shifts_bring_them_together(align: str, most: int) -> None:
    net, x = QuietBranch().eval(), torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    spec = target(0, 31, kind=f"{SHIFT}, align = {align}", power=True)
    with pytest.raises(qhw.QhwError, match=r"requantize\.r\.align\.shift goes from"):
        IntegerModel(quantized(spec, net, x, without=WITHOUT))
    result = quantized(spec, net, x)
    scales = [float(result.encodings()[group].scale) for group in ("x", "conv")]
    assert math.log2(scales[0] / scales[1]) == most  # raised as far as it must be, and no further
    assert IntegerModel(result)(x).shape == x.shape


@pytest.mark.parametrize("high", [8, 9, 10])
def test_operators_without_weights_move_the_scales_of_their_operands(high: int) -> None:
    net, data = branches()
    with pytest.raises(qhw.QhwError, match="its integer result cannot be computed"):
        IntegerModel(quantized(target(0, high), net, data, without=WITHOUT))
    result = quantized(target(0, high), net, data)
    assert torch.isfinite(IntegerModel(result)(*data)).all()


@pytest.mark.parametrize("word", ["saturate", "zero_scale"])
def test_a_ratio_whose_results_are_always_0_stays_where_the_target_defines_that(word: str) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False)).eval()
    with torch.no_grad():
        net[0].weight[1] *= 1e-12  # type: ignore[operator,union-attr,index]
    x = torch.randn(16, 3, 4, 4)
    defined = target(0, 20, kind=f'{FIXED}, out_of_range = "{word}"')
    kept, raised = (quantized(spec, net, x).encodings()["0.weight"].scale for spec in (defined, target(0, 20)))
    assert float(kept[1]) < 1e-12 < float(raised[1])
    assert "no scale had to grow" in report(quantized(defined, net, x)).summary


@pytest.mark.parametrize("word", ["saturate", "zero_scale"])
def test_a_ratio_whose_results_would_be_lost_is_repaired_whatever_the_target_defines(word: str) -> None:
    net, x = network()
    spec = target(0, 8, kind=f'{FIXED}, out_of_range = "{word}"', changes=WIDE)
    assert sqnr(quantized(spec, net, x), net, x) > 30
    assert sqnr(quantized(spec, net, x, without=WITHOUT), net, x) < 25  # some channels are scaled by 0


# The fewer bits a bias has, the larger the step of the sum that it is counted in: below some 16 that shows.
@pytest.mark.parametrize(("bits", "least_db"), [(10, 5), (12, 18), (16, 30)])
@pytest.mark.parametrize("per", ["out_channel", "tensor"])
def test_narrow_biases_fit_by_coarser_weights(bits: int, least_db: int, per: str) -> None:
    net, x = network()
    spec = target(-8, 31, per=per, changes=(("biases.b = { bits = 32", f"biases.b = {{ bits = {bits}"),))
    result = quantized(spec, net, x)
    for point in result.plan.points:
        if point.role == "bias":
            codes = result.codes(point).tolist()
            assert all(-(2 ** (bits - 1)) < code < 2 ** (bits - 1) for code in codes)
    assert "(biases.b.bits)" in report(result).summary
    assert sqnr(result, net, x) > least_db


@pytest.mark.parametrize("word", ["saturate", "refuse", "wrap", "enlarge_scale"])
def test_the_step_makes_a_bias_fit_whatever_the_tool_does_with_one_that_does_not(word: str) -> None:
    net, x = network()
    rule = f'biases.b = {{ bits = 12, out_of_range = "{word}"'
    result = quantized(target(-8, 31, changes=(("biases.b = { bits = 32", rule),)), net, x)
    for point in result.plan.points:
        if point.role == "bias":
            real = result.float_graph.tensor(point.tensor).detach().double()
            grid = result.encodings()[point.group]
            assert float((real / grid.scale.double() - result.codes(point).double()).abs().max()) <= 0.5 + 1e-6


def test_a_bias_leaves_room_in_the_accumulator_for_the_widest_sum() -> None:
    net, x = network()
    spec = target(-30, 31)
    before = prove_accumulators(quantized(spec, net, x, without=WITHOUT), witnesses=False)
    assert any(proof.overflowing_channels for proof in before)  # the nearly dead channel's bias fills 32 bits
    result = quantized(spec, net, x)
    assert not any(proof.overflowing_channels for proof in prove_accumulators(result, witnesses=False))
    assert "its bias leaves room for its sums (accumulators.acc.bits)" in report(result).summary


EXPONENTS = ", exponents = [{ terms = { weight = -1, input = -1, output = 1 }, min = LEAST, max = MOST }] }"


@pytest.mark.slow
@settings(max_examples=8, deadline=None)
@given(st.integers(0, 9), st.integers(0, 4))
def test_inequalities_between_exponents_are_kept(least: int, more: int) -> None:
    net, x = network()
    rule = EXPONENTS.replace("LEAST", str(least)).replace("MOST", str(least + more))
    free = target(-30, 31, kind=SHIFT, power=True)
    held = target(-30, 31, kind=SHIFT, power=True, changes=((" }\nkernels.act", f"{rule}\nkernels.act"),))
    shifts = [math.log2(1 / ratio) for ratio in ratios(quantized(held, net, x))]
    assert all(least <= shift <= least + more for shift in shifts)
    assert not all(least <= math.log2(1 / ratio) <= least + more for ratio in ratios(quantized(free, net, x)))


def test_stated_bounds_of_the_ratio_are_kept() -> None:
    net, x = network()
    spec = target(kind='kind = "float32", rounding = "half_even", ratio = { min = 0.002, max = 0.0025 }')
    found = [float(ratio) for ratio in ratios(quantized(spec, net, x))]
    assert all(0.002 <= ratio <= 0.0025 * (1 + 1e-6) for ratio in found)


def test_what_cannot_grow_is_named_with_its_field_and_a_way_out() -> None:
    net, x = network()
    ends = (
        ('per = "out_channel"', 'per = "out_channel", scale = { max = 1e-3 }'),
        ('per = "tensor"', 'per = "tensor", scale = { max = 0.05 }'),
    )
    message = (
        r"^\d: its multiplier must be at least 2\^-4 \(requantize\.r\.shift\.max\); got [\d.e-]+, and the scale that "
        r"could grow is fixed or at its largest\. Keep '\d' in float with --keep-float, or choose another --format\.$"
    )
    with pytest.raises(RangeError, match=message):
        quantized(target(0, 3, changes=ends), net, x)


def test_a_prescribed_output_scale_stays_and_is_named() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1)).eval()
    conv = 'operators.Conv = { kernels = ["mac"]'
    fixed = ((conv, f"{conv}, fixed_output = {{ a = {{ scale = 1e-6, zero_point = 0 }} }}"),)
    with pytest.raises(
        RangeError, match=r"^0: its multiplier must be at most 2\^-4 \(requantize\.r\.shift\.min\); got"
    ):
        quantized(target(4, 31, changes=fixed), net, torch.randn(16, 3, 4, 4))


def test_tensors_that_are_left_with_few_codes_are_warned_of() -> None:
    net, x = network()
    coarse = quantized(target(5, 31, changes=(("biases.b = { bits = 32", "biases.b = { bits = 10"),)), net, x)
    assert "Warning: values use fewer than 16 codes at" in report(coarse).summary
    assert "Warning" not in report(quantized(target(), net, x)).summary


def test_a_tensor_that_would_be_left_with_one_code_is_an_error() -> None:
    net, x = network()
    message = (
        r"^0: .*its multiplier is at most 2\^-18 \(requantize\.r\.shift\.min\).* only with '0' on so coarse a scale"
    )
    with pytest.raises(RangeError, match=message):
        quantized(target(18, 31), net, x)


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        (FIXED, "multipliers are proven: ratios of scales from 2^-13 to 2^0 (requantize.r)"),
        (SHIFT, "multipliers are proven: ratios of scales from 2^-12 to 2^0 (requantize.r)"),
    ],
)
def test_the_plan_says_what_is_proven(kind: str, sentence: str) -> None:
    net, x = network()
    plan = qhw.plan(net, target(kind=kind), example_inputs=x[:2], calibration=x, pipeline="ranges-ptq")
    step = next(step for step in plan.steps if step.algorithm == "requantization_fit")
    assert sentence in step.verdict.sentence()
    assert "biases are proven to fit 32 bits (biases.b.bits)" in step.verdict.sentence()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            (("shift = { min = 0, max = 12 }", 'shift = "unknown"'),),
            "its bounds are not stated: nothing to hold a multi",
        ),
        (
            (('requantize = "r" }', 'requantize = "unknown" }'),),
            "unknown: nothing to hold a multiplier to (kernels.mac.r",
        ),
    ],
)
def test_the_plan_says_what_is_missing(changes: tuple[tuple[str, str], ...], sentence: str) -> None:
    net, x = network()
    spec = target(changes=(*changes, (', bias = "b"', "")))
    plan = qhw.plan(net, spec, example_inputs=x[:2], calibration=x, pipeline="ranges-ptq")
    refused = next(r for r in plan.refused if r.algorithm == "requantization_fit")
    assert sentence in refused.verdict.sentence()
