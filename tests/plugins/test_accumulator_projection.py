# SPDX-License-Identifier: Apache-2.0
"""Sums are made to fit narrow accumulators: proven by hand, with little lost, and only where it is needed."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.decisions import QuantPlan
from qhw.engine import Work
from qhw.errors import PlanError, RangeError
from qhw.integer import IntegerModel, prove_accumulators
from qhw.schema import parse_target
from qhw_plugins import fitted_weights
from qhw_plugins.accumulator_projection import projected
from qhw_plugins.l1_ball import onto_ball

TARGET = """
schema_version = 1
name = "acme/narrow"
formats.a = { bits = 8, signed = SIGNED, ZERO per = "tensor" SCALE }
formats.w = { bits = 8, signed = true, zero_point = 0, per = "PER" SCALE }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = BITS, overflow = "saturate" }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "acc", requantize = "r" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Flatten = { same_scale = "input_output" }
fallback = "host"
"""


def target(
    bits: str = "16", per: str = "out_channel", signed: bool = False, zero: bool = False, scale: str = ""
) -> Any:
    text = TARGET.replace("BITS", bits).replace("PER", per).replace("SIGNED", str(signed).lower())
    text = text.replace("ZERO", "zero_point = 0," if zero else "")
    return parse_target(text.replace("SCALE", f", scale = {scale}" if scale else ""))


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 3, stride=2, groups=2), nn.ReLU(), nn.Conv2d(8, 6, 5), nn.Flatten(),
        nn.Linear(6 * 9 * 9, 5),
    )  # fmt: skip
    return net.eval(), torch.randn(32, 3, 8, 8)


def quantized(spec: Any, **wishes: Any) -> Any:
    net, x = network()
    return qhw.quantize(net, spec, example_inputs=x[:2], calibration=x, pipeline="ranges-ptq", **wishes)


def refusal(plan: QuantPlan) -> str:
    return next(r.verdict.sentence() for r in plan.refused if r.algorithm == "accumulator_projection")


rows_of_codes = st.lists(st.lists(st.integers(-127, 127), min_size=6, max_size=6), min_size=1, max_size=5)


@settings(max_examples=200)
@given(rows_of_codes, st.integers(-255, 0), st.integers(0, 255), st.integers(-300, 300), st.integers(11, 18))
def test_projected_codes_fit_by_python_integers_and_keep_their_signs(
    rows: list[list[int]], low: int, high: int, bias: int, bits: int
) -> None:
    if low == high:
        return
    codes = torch.tensor(rows, dtype=torch.float64)
    found, over = projected(codes, low, high, torch.full((len(rows),), float(bias)), bits)
    for before, after, changed in zip(rows, found.long().tolist(), over.tolist(), strict=True):
        for weights, must in ((before, False), (after, True)):
            highest = sum(max(w * low, w * high) for w in weights) + max(bias, 0)
            lowest = sum(min(w * low, w * high) for w in weights) + min(bias, 0)
            fits = -(2 ** (bits - 1)) <= lowest and highest <= 2 ** (bits - 1) - 1
            assert fits if must else fits == (not changed)
        assert after == before or changed
        assert all(0 <= a * (1 if b >= 0 else -1) <= abs(b) for a, b in zip(after, before, strict=True))


@settings(max_examples=100)
@given(st.lists(st.integers(0, 127), min_size=2, max_size=9), st.integers(0, 600))
def test_the_ball_is_filled_by_the_nearest_whole_numbers(magnitudes: list[int], limit: int) -> None:
    found = onto_ball(torch.tensor([magnitudes], dtype=torch.float64), torch.tensor([float(limit)]))[0].tolist()
    low, high = 0.0, float(max(magnitudes))  # the threshold of the projection, by bisection
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(max(m - middle, 0) for m in magnitudes) > limit else (low, middle)
    wanted = magnitudes if sum(magnitudes) <= limit else [max(m - high, 0.0) for m in magnitudes]
    assert sum(found) <= limit
    assert all(abs(f - w) < 1 + 1e-6 for f, w in zip(found, wanted, strict=True))
    assert sum(found) == min(limit, sum(magnitudes))


@pytest.mark.slow
@pytest.mark.parametrize("per", ["tensor", "out_channel"])
@pytest.mark.parametrize(
    "grid", [{}, {"signed": True, "zero": True}, {"signed": True, "zero": True, "scale": '{ kind = "power_of_two" }'}]
)
@pytest.mark.parametrize("bits", ["15", "18"])
def test_no_sum_can_overflow_any_more_and_the_integers_run(per: str, grid: dict[str, Any], bits: str) -> None:
    spec = target(bits, per, **grid)
    before = list(prove_accumulators(quantized(spec, without=("accumulator_projection",))))
    result = quantized(spec)
    proofs = list(prove_accumulators(result))
    assert any(proof.overflowing_channels for proof in before)
    assert not any(proof.overflowing_channels for proof in proofs)
    _, x = network()
    assert torch.isfinite(IntegerModel(result)(x)).all()


def test_coarser_scales_keep_the_function_where_projection_alone_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = network()

    def sqnr(result: Any) -> float:
        with torch.no_grad():
            wanted, found = net(x).double().numpy(), result(x).double().numpy()
        return float(10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()))

    result = quantized(target("18"))
    report = next(step for step in result.steps if step.algorithm == "accumulator_projection")
    assert all(site["bits"] <= 18 for site in report.sites.values())
    assert any(site["bits_before"] > 18 and site["channels"] > 0 for site in report.sites.values())
    monkeypatch.setattr(fitted_weights, "_CANDIDATES", 1)  # the present scale alone
    assert sqnr(result) > sqnr(quantized(target("18"))) + 6


def test_channels_that_fit_stay_as_they_are() -> None:
    wide, narrow = (quantized(target(bits)) for bits in ("32", "19"))
    report = next(step for step in narrow.steps if step.algorithm == "accumulator_projection")
    seen = 0
    for name in ("0.weight", "2.weight", "6.weight", "8.weight"):  # output channels first
        same = (wide.float_graph.tensor(name) == narrow.float_graph.tensor(name)).flatten(1).all(1)
        changed = int(str(report.sites[name]["channels"])) if name in report.sites else 0
        assert int((~same).sum()) <= changed
        seen += changed
    assert seen > 0


@pytest.mark.parametrize(
    ("bits", "expected"),
    [
        ("32", "32 bits hold every sum that formats and shapes allow"),
        ('"unknown"', "the width of the accumulator is unknown"),
        ('"per_layer"', "the width of the accumulator is per_layer"),
    ],
)
def test_what_makes_it_needless_is_named(bits: str, expected: str) -> None:
    net, x = network()
    plan = qhw.plan(qhw.capture(net, x[:2]), target(bits), calibration=x, pipeline="ranges-ptq")
    assert expected in refusal(plan)
    assert all(step.algorithm != "accumulator_projection" for step in plan.steps)


def test_a_dead_channel_behind_a_large_bias_gets_a_coarser_scale() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        net[0].weight[1] = 1e-6
        net[0].bias[1] = 5.0
    x = torch.randn(16, 3, 8, 8)
    spec = target("16")
    result = qhw.quantize(net.eval(), spec, example_inputs=x[:2], calibration=x, pipeline="ranges-ptq")
    assert not any(proof.overflowing_channels for proof in prove_accumulators(result))
    with torch.no_grad():
        assert float((result(x) - net(x))[:, 1].abs().max()) < 0.1  # the bias is all there is


def test_a_bias_that_fills_the_accumulator_on_every_legal_scale_is_an_error() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3))
    with torch.no_grad():
        net[0].bias[1] = 1e5
    x = torch.randn(16, 3, 8, 8)
    spec = target("10", per="tensor", signed=True, zero=True, scale='{ kind = "power_of_two", exponent_max = 0 }')
    with pytest.raises(RangeError, match=r"0\.weight: its sums need \d+ bits, of which 10 are there"):
        qhw.quantize(net.eval(), spec, example_inputs=x[:2], calibration=x, pipeline="ranges-ptq")


def test_an_operator_whose_input_is_not_quantized_has_no_input_group() -> None:
    result = quantized(target("32"))
    work = Work(result.float_graph, result.target, result.plan)
    assert work.input_group("0") == "input"
    with pytest.raises(PlanError, match=r"nowhere: its input is not quantized, so its sums have no scale\. Plan again"):
        work.input_group("nowhere")


def test_a_layer_that_is_wrecked_is_warned_of_in_words() -> None:
    def summary(bits: str) -> tuple[str, dict[str, float]]:
        report = next(step for step in quantized(target(bits)).steps if step.algorithm == "accumulator_projection")
        known = {name: site["sqnr_db"] for name, site in report.sites.items() if site["channels"] and site["sqnr_db"]}
        return report.summary, {name: float(str(value)) for name, value in known.items()}

    mild, kept = summary("19")
    assert min(kept.values()) >= 15 and "Warning" not in mild
    words, lost = summary("14")
    wrecked = sorted((name for name, value in lost.items() if value < 15), key=lambda name: lost[name])
    assert wrecked
    assert (
        f"lowest SQNR {lost[wrecked[0]]:.1f} dB ({wrecked[0]}). Warning: below 15 dB, what 3-bit weights keep: "
        in words
    )
    assert ", ".join(wrecked[:3]) in words and "--keep-float" in words


def test_bits_that_another_kernel_has_for_nothing_come_before_any_projection() -> None:
    spec = parse_target(
        TARGET.replace("BITS", "16").replace("PER", "out_channel").replace("SIGNED", "false").replace("ZERO", "")
        .replace("SCALE", "").replace('kernels = ["mac"]', 'kernels = ["mac", "wide"]')
        .replace("kernels.mac =", 'accumulators.more = { bits = 32, overflow = "saturate" }\nkernels.wide = '
                 '{ input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "more", '
                 'requantize = "r" }\nkernels.mac =')
    )  # fmt: skip
    result = quantized(spec)
    assert all(proof.bits == 32 and not proof.overflowing_channels for proof in prove_accumulators(result))
    assert "accumulator_projection" not in [step.algorithm for step in result.steps]
    assert "kernels.mac has 16, so kernels.wide with 32 bits is taken for the same formats" in refusal(result.plan)
    slower = spec.kernels["wide"].model_copy(update={"macs_per_cycle": 8.0})
    faster = spec.kernels["mac"].model_copy(update={"macs_per_cycle": 32.0})
    costly = spec.model_copy(update={"kernels": {**spec.kernels, "wide": slower, "mac": faster}})
    found = quantized(costly)
    step = next(step for step in found.plan.steps if step.algorithm == "accumulator_projection")
    assert "kernels.wide with 32 bits takes 4 x the cycles" in step.verdict.sentence()
    assert all(proof.bits == 16 and not proof.overflowing_channels for proof in prove_accumulators(found))
