# SPDX-License-Identifier: Apache-2.0
"""Weights in training keep within a narrow accumulator: at every step, by Python integers, and when they are frozen."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qhw
from qhw.integer import prove_accumulators
from qhw.numerics import Grid, PerAxis, QParams
from qhw.schema import parse_target
from qhw_plugins.accumulator_aware import AccumulatorAwareQuantizer

TARGET = """
schema_version = 1
name = "acme/narrow"
formats.a = { bits = 8, signed = false, per = "tensor" }
formats.w = { bits = 8, signed = true, zero_point = ZERO, per = "PER" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = BITS, overflow = "saturate" }
requantize.r = { kind = "float32", rounding = "half_even" }
kernels.mac = { input = ["a"], weight = ["w"], output = ["a"], bias = "b", accumulator = "acc", requantize = "r" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.ConvTranspose = { kernels = ["mac"], fused = ["Relu"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Flatten = { same_scale = "input_output" }
fallback = "host"
"""


def target(bits: int = 16, per: str = "out_channel", zero: str = "0") -> Any:
    return parse_target(TARGET.replace("BITS", str(bits)).replace("PER", per).replace("ZERO", zero))


def network(norm: bool = True) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    norms = [nn.BatchNorm2d(8), nn.BatchNorm2d(6)] if norm else [nn.Identity(), nn.Identity()]
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norms[0], nn.ReLU(), nn.Conv2d(8, 6, 3), norms[1], nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 36, 4),
    )  # fmt: skip
    return net.eval(), torch.randn(64, 3, 8, 8), torch.randint(0, 4, (64,))


def quantizer(rows: Tensor, scale: float, limit: list[int]) -> AccumulatorAwareQuantizer:
    channels = len(rows)
    qparams = QParams(torch.full((channels,), scale), torch.zeros(channels, dtype=torch.int32), -128, 127, PerAxis(0))
    grid = Grid(-128, 127, zero_point=0)
    return AccumulatorAwareQuantizer(qparams, grid, torch.tensor(limit, dtype=torch.float32), "w")


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.floats(-20, 20, width=32), min_size=5, max_size=5), min_size=2, max_size=2),
    limit=st.lists(st.integers(0, 400), min_size=2, max_size=2),
)
def test_sums_of_codes_never_pass_their_limit(rows: list[list[float]], limit: list[int]) -> None:
    weight = torch.tensor(rows)
    module = quantizer(weight, 0.125, limit)
    codes = (module(weight).detach().double() / 0.125).tolist()
    nearest = [[min(127, max(-128, round(value / 0.125))) for value in row] for row in rows]
    for found, plain, most in zip(codes, nearest, limit, strict=True):
        assert all(code == int(code) for code in found)
        for sign in (1, -1):
            mine = [max(0, sign * int(code)) for code in found]
            other = [max(0, sign * code) for code in plain]
            assert sum(mine) <= most
            assert mine == other or sum(other) > most
            assert all(a <= b for a, b in zip(mine, other, strict=True))


def test_what_shrinks_has_the_gradient_of_shrinking() -> None:
    weight = torch.tensor([[8.0, 4.0, -2.0]], requires_grad=True)
    quantizer(weight, 0.125, [48])(weight).backward(torch.tensor([[1.0, 0.0, 1.0]]))
    # Positive codes 64 and 32 sum to 96 and are halved: y0 = w0 L s / (w0 + w1), dy0/dw0 = L s w1 / (w0 + w1)^2.
    share = 48 * 0.125 / 12.0**2
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, torch.tensor([[share * 4, -share * 8, 1.0]]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("per", ["tensor", "out_channel"])
@pytest.mark.parametrize("norm", [True, False])
def test_every_step_stays_in_the_bound_and_the_frozen_model_proves_it(per: str, norm: bool) -> None:
    net, x, y = network(norm)
    spec = target(16, per)
    result = qhw.quantize(net, spec, example_inputs=x[:2], calibration=x, pipeline="whitepaper-qat")
    qhw.trainable(result)
    bounded = [m for m in result.modules() if isinstance(m, AccumulatorAwareQuantizer)]
    assert len(bounded) == 3
    seen: dict[str, Tensor] = {}
    for module in bounded:
        module.register_forward_hook(lambda m, _, out: seen.__setitem__(m.name, (out / expand(m, out)).round()))
    optimizer = torch.optim.Adam(qhw.parameter_groups(result, 0.02, quantizer_lr=1e-4))
    result.train()
    for _ in range(15):
        optimizer.zero_grad()
        nn.functional.cross_entropy(result(x), y).backward()
        optimizer.step()
        for module in bounded:
            codes = seen[module.name].flatten(1).long()
            for row, limit in zip(codes.tolist(), module.limit.tolist(), strict=True):
                # An unsigned input spans 255 codes, wherever its zero point is.
                assert 255 * max(sum(c for c in row if c > 0), -sum(c for c in row if c < 0)) <= 2**15 - 1
                assert sum(c for c in row if c > 0) <= limit and -sum(c for c in row if c < 0) <= limit
    result.eval()
    frozen = qhw.freeze(result)
    assert not any(proof.overflowing_channels for proof in prove_accumulators(frozen))
    with torch.no_grad():
        result(x)
    for point in frozen.plan.points:
        if point.role == "weight":
            assert torch.equal(frozen.codes(point).float().abs(), seen[point.group].abs())
    assert all(report.algorithm != "accumulator_aware" or "3 sites" in report.summary for report in frozen.steps)


def expand(module: AccumulatorAwareQuantizer, like: Tensor) -> Tensor:
    scale = module.scale.detach()
    return scale.reshape(-1, *[1] * (like.dim() - 1)) if scale.dim() else scale


def reasons(spec: Any) -> str:
    net, x, _ = network()
    plan = qhw.plan(net, spec, x[:2], calibration=x, pipeline="whitepaper-qat")
    taken = [step for step in plan.steps if step.algorithm == "accumulator_aware"]
    if taken:
        return "taken"
    return next(r.verdict.sentence() for r in plan.refused if r.algorithm == "accumulator_aware")


def test_it_is_taken_where_sums_could_overflow_alone() -> None:
    assert reasons(target(16)) == "taken"
    assert "32 bits hold every sum" in reasons(target(32))
    assert "zero point" in reasons(target(16, zero='"free"'))
