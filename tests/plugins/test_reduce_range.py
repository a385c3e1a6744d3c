# SPDX-License-Identifier: Apache-2.0
"""Weights are made to fit registers of two products: proven by hand, with little lost, and only where it is needed."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from examples import digits
from qhw.engine import QuantizedModel
from qhw.integer import IntegerModel, prove_accumulators
from qhw.schema import parse_target
from qhw_plugins.reduce_range import _Register

# As x86 without VNNI: unsigned bytes times signed ones, two products in 16 bits that saturate.
TARGET = """
schema_version = 1
name = "acme/pairs"
fallback = "host"
formats.a = { bits = 8, signed = SIGNED, per = "tensor" }
formats.w = { codes = [-127, 127], zero_point = 0, per = "PER" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = 32, overflow = "wrap" REGISTER }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "acc", requantize = "r" }
kernels.two = { input = ["a"], output = ["a"], bias = "none", accumulator = "wide", requantize = "r" }
accumulators.wide = { bits = 32, overflow = "wrap" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Add = { kernels = ["two"], fused = ["Relu"], rounding_order = "zero_point_before" }
operators.MaxPool = { same_scale = "input_output", kernels = ["two"] }
operators.GlobalAveragePool = { kernels = ["two"], rounding_order = "zero_point_after" }
operators.Flatten = { same_scale = "input_output" }
operators.Reshape = { same_scale = "input_output" }
"""


def target(
    bits: Any = 16,
    per: str = "out_channel",
    signed: bool = False,
    form: str = "unsigned",
    order: str = "channel_fastest",
    codes: str = "[-127, 127]",
    has_register: bool = True,
) -> Any:
    register = f', order = "{order}"' if order else ""
    operands = f', operands = "{form}"' if form else ""
    register += f', pairwise = {{ bits = {bits}, overflow = "saturate"{operands} }}'
    text = TARGET.replace("REGISTER", register if has_register else "").replace("PER", per)
    return parse_target(text.replace("SIGNED", str(signed).lower()).replace("[-127, 127]", codes))


def network() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2), nn.Flatten(), nn.Linear(6 * 16, 5),
    )  # fmt: skip
    return net.eval(), torch.randn(32, 3, 8, 8)


def quantized(spec: Any, **wishes: Any) -> Any:
    net, x = network()
    return qhw.quantize(net, spec, example_inputs=x[:2], calibration=x, pipeline="ranges-ptq", **wishes)


@settings(max_examples=200)
@given(
    st.lists(st.lists(st.integers(-127, 127), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(-255, 0), st.integers(0, 255), st.integers(12, 17), st.permutations(range(5)), st.booleans(),
)  # fmt: skip
def test_cut_codes_fit_by_python_integers_and_those_that_fit_stay(
    rows: list[list[int]], low: int, high: int, bits: int, order: list[int], is_known: bool
) -> None:
    register = _Register(((low, high),), 2 ** (bits - 1), torch.tensor(order) if is_known else None)
    found = register.cut(torch.tensor(rows, dtype=torch.float64), torch.ones(len(rows)).double(), (-127, 127))

    def fits(*weights: int) -> bool:
        highest = sum(max(w * low, w * high) for w in weights)
        lowest = sum(min(w * low, w * high) for w in weights)
        return -(2 ** (bits - 1)) <= lowest and highest <= 2 ** (bits - 1) - 1

    pairs = [order[i : i + 2] for i in range(0, 5, 2)] if is_known else list(itertools.combinations(range(5), 2))
    for before, after in zip(rows, found.long().tolist(), strict=True):
        assert all(0 <= a * (1 if b >= 0 else -1) <= abs(b) for a, b in zip(after, before, strict=True))
        for pair in pairs:
            assert fits(*(after[i] for i in pair))
            if is_known and fits(*(before[i] for i in pair)):
                assert [after[i] for i in pair] == [before[i] for i in pair]


@pytest.mark.parametrize("per", ["tensor", "out_channel"])
@pytest.mark.parametrize("form", ["unsigned", "stored", "centred", ""])
@pytest.mark.parametrize("order", ["channel_fastest", "kernel_fastest", ""])
def test_no_pair_can_overflow_any_more_and_sums_are_those_of_a_plain_accumulator(
    per: str, form: str, order: str
) -> None:
    spec = target(15 if form == "stored" else 16, per, form != "unsigned", form, order)
    before = list(prove_accumulators(quantized(spec, without=("reduce_range",)), witnesses=False))
    assert any(proof.overflowing_channels for proof in before)
    result = quantized(spec)
    proofs = list(prove_accumulators(result, witnesses=False))
    assert len(proofs) == 4
    assert not any(proof.overflowing_channels for proof in proofs)
    _, x = network()
    model = IntegerModel(result)
    codes = model.codes(x)
    weights = result.codes(next(p for p in result.plan.points if p.role == "weight")).numpy().astype(np.int64)
    x_q = next(iter(codes.values()))
    centred = x_q.numpy().astype(np.int64) - int(model.sites["0"].inputs[0].zero_point)
    bias = result.codes(next(p for p in result.plan.points if p.role == "bias")).numpy().astype(np.int64)
    padded = np.pad(centred, [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    expected = np.einsum("nchwij,ocij->nohw", windows, weights) + bias[:, None, None]
    found = model.accumulators("0", x_q).numpy()
    np.testing.assert_array_equal(found, expected)


def test_a_channel_is_changed_only_as_far_as_its_own_pairs_need() -> None:
    # Channel 0: 127 beside 1 needs nothing; channel 1: 127 beside 127 needs 128 in all.
    net = nn.Linear(4, 2, bias=False)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([[127.0, 1.0, -127.0, -1.0], [127.0, 127.0, 1.0, 0.0]]))
    x = torch.rand(64, 4)
    result = qhw.quantize(net, target(), example_inputs=x[:2], calibration=x, pipeline="ranges-ptq")
    weight = result.codes(next(p for p in result.plan.points if p.role == "weight")).tolist()
    assert weight[0] == [127, 1, -127, -1]
    assert sum(weight[1][:2]) <= 128 and min(weight[1][:2]) >= 63
    report = next(step for step in result.steps if step.algorithm == "reduce_range")
    assert report.sites["weight"]["channels"] == 1


def test_the_plan_says_why_and_where_it_is_not_needed() -> None:
    net, x = network()
    plan = qhw.plan(qhw.capture(net, x[:2]), target(), calibration=x, pipeline="ranges-ptq")
    step = next(step for step in plan.steps if step.algorithm == "reduce_range")
    assert step.stage == "fit" and set(step.sites) == {"0.weight", "2.weight", "4.weight", "6.weight"}
    said = plan.to_json()
    assert "accumulators.acc.pairwise.bits" in said and "{value} bits: two products could need 17" in said


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (target(has_register=False), "no register holds sums of two products"),
        (target(17), "17 bits hold every sum of two products that formats allow"),
        (target('"unknown"'), "its width is unknown: nothing to hold pairs to"),
        (target(codes="[-64, 64]"), "16 bits hold every sum of two products that formats allow"),
    ],
    ids=["no-register", "wide", "unknown", "seven-bits"],
)  # fmt: skip
def test_what_makes_it_needless_is_named(spec: Any, expected: str) -> None:
    net, x = network()
    plan = qhw.plan(qhw.capture(net, x[:2]), spec, calibration=x, pipeline="ranges-ptq")
    refused = next(r.verdict.sentence() for r in plan.refused if r.algorithm == "reduce_range")
    assert expected in refused


@pytest.mark.slow
def test_a_real_model_keeps_its_accuracy_and_its_codes_are_those_of_exact_sums() -> None:
    net, example = digits.model()
    samples, labels = (torch.cat(parts) for parts in zip(*digits.evaluation(), strict=True))
    kinds: dict[str, Any] = {
        "example_inputs": example,
        "calibration": list(digits.calibration()),
        "pipeline": "ranges-ptq",
    }

    def run(spec: Any, **wishes: Any) -> tuple[Any, float]:
        result = qhw.quantize(net, spec, **kinds, **wishes)
        model = IntegerModel(result)
        return result, float((model(samples).argmax(1) == labels).float().mean())

    fitted, accuracy = run(target())
    saturating, _ = run(target(), without=("reduce_range",))
    _, wide = run(target(has_register=False))
    with torch.no_grad():
        real = float((net(samples).argmax(1) == labels).float().mean())
    assert accuracy >= real - 0.01 and wide >= real - 0.01
    # The same weights in a plain accumulator give the same codes: no pair leaves its register.
    codes = IntegerModel(fitted).codes(samples)
    exact = IntegerModel(without_register(fitted)).codes(samples)
    assert all(torch.equal(codes[name], exact[name]) for name in codes)
    # Without the step they do not.
    codes = IntegerModel(saturating).codes(samples)
    exact = IntegerModel(without_register(saturating)).codes(samples)
    assert any(not torch.equal(codes[name], exact[name]) for name in codes)


def without_register(result: QuantizedModel) -> QuantizedModel:
    """The same codes and grids on a target whose accumulator has no register of pairs."""
    accumulators = result.target.accumulators | {"acc": result.target.accumulators["wide"]}
    spec = result.target.model_copy(update={"accumulators": accumulators})
    return QuantizedModel(result.float_graph, result.plan, spec, result.encodings())
