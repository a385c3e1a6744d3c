# SPDX-License-Identifier: Apache-2.0
"""What each shipped target makes of small models, written by hand from its sources."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qhw
from qhw.decisions import QuantPlan
from qhw.graph import Graph, QuantPoint
from qhw.schema import load_target_file

Planner = Callable[[str, str], QuantPlan]
WHITEPAPER, ORT = "whitepaper/generic-int8", "onnxruntime/cpu-x86-vnni"
LITERT, ESP = "google/litert-int8", "espressif/esp32-p4"


@pytest.fixture
def made(plan: Callable[..., QuantPlan], targets_root: Path) -> Planner:
    return lambda target, model: plan(load_target_file(targets_root / f"{target}.toml"), model)


def written_by(plan: QuantPlan, *operators: str) -> list[QuantPoint]:
    """The activation points that operators write."""
    return [next(p for p in plan.points if p.role == "activation" and p.operator == name) for name in operators]


def groups(plan: QuantPlan, *operators: str) -> list[str]:
    return [point.group for point in written_by(plan, *operators)]


def placed(plan: QuantPlan, name: str) -> tuple[str, str | None]:
    operator = next(operator for operator in plan.operators if operator.name == name)
    return operator.where, operator.kernel


@pytest.mark.parametrize(
    ("target", "activation", "bias", "kernel"),
    [
        (WHITEPAPER, "a8", "wide", "mac"),
        (ORT, "u8", "wide", "mac_u8"),
        (LITERT, "a8", "wide", "mac"),
        (ESP, "s8", "narrow", "mac8"),
    ],
)
def test_convolution_takes_batch_norm_and_relu_along(
    made: Planner, target: str, activation: str, bias: str, kernel: str
) -> None:
    plan = made(target, "conv")
    assert [(p.name, p.role, p.format) for p in plan.points] == [
        ("x", "input", activation),
        ("conv.weight", "weight", "w8"),
        ("conv.bias", "bias", bias),
        ("conv", "activation", activation),
    ]
    assert placed(plan, "conv") == ("accelerator", kernel)
    assert next(op for op in plan.operators if op.name == "conv").members == ("conv", "relu")
    assert plan.point("conv").minimum == 0.0


@pytest.mark.parametrize("target", [WHITEPAPER, ORT, LITERT])
def test_relu6_is_fused_and_bounds_the_range(made: Planner, target: str) -> None:
    (point,) = written_by(made(target, "depthwise"), "depthwise")
    assert (point.minimum, point.maximum) == (0.0, 6.0)


def test_esp32_p4_fuses_relu_only_and_runs_no_grouped_convolution(made: Planner) -> None:
    plan = made(ESP, "depthwise")
    assert placed(plan, "depthwise") == ("accelerator", "mac8")
    assert placed(plan, "relu6") == ("accelerator", "elementwise8")
    assert placed(plan, "grouped") == ("host", None)
    grouped = next(operator for operator in plan.operators if operator.name == "grouped")
    assert grouped.subject == "operators.Conv.limits.groups"


@pytest.mark.parametrize("target", [WHITEPAPER, ORT, LITERT])
def test_sum_has_three_scales_and_takes_relu_along(made: Planner, target: str) -> None:
    plan = made(target, "residual")
    assert len(set(groups(plan, "left", "right", "add"))) == 3
    assert written_by(plan, "add")[0].minimum == 0.0


def test_esp32_p4_adds_codes_so_that_all_three_share_one_exponent(made: Planner) -> None:
    plan = made(ESP, "residual")
    assert len(set(groups(plan, "left", "right", "add"))) == 1
    assert groups(plan, "relu") != groups(plan, "add")


@pytest.mark.parametrize(("target", "scales"), [(WHITEPAPER, 3), (ORT, 3), (LITERT, 1), (ESP, 1)])
def test_concatenation(made: Planner, target: str, scales: int) -> None:
    plan = made(target, "branches")
    assert len(set(groups(plan, "left", "right", "concat"))) == scales


@pytest.mark.parametrize(
    ("target", "average_shares", "mean_shares"),
    [(WHITEPAPER, True, True), (ORT, False, False), (LITERT, True, False), (ESP, False, False)],
)
def test_pools(made: Planner, target: str, average_shares: bool, mean_shares: bool) -> None:
    plan = made(target, "pools")
    convolution, maximum, average, mean = groups(plan, "conv", "maximum", "average", plan.operators[-1].name)
    assert maximum == convolution
    assert (average == maximum) is average_shares
    assert (mean == average) is mean_shares


def test_litert_softmax_has_the_prescribed_parameters(made: Planner) -> None:
    (point,) = written_by(made(LITERT, "perceptron"), "softmax")
    assert point.fixed is not None
    assert (point.fixed.scale, point.fixed.zero_point) == (1 / 256, -128)


@pytest.mark.parametrize("target", [WHITEPAPER, ORT])
def test_softmax_elsewhere_is_quantized_within_zero_and_one(made: Planner, target: str) -> None:
    (point,) = written_by(made(target, "perceptron"), "softmax")
    assert (point.fixed, point.minimum, point.maximum) == (None, 0.0, 1.0)


def test_esp32_p4_softmax_gives_float(made: Planner) -> None:
    plan = made(ESP, "perceptron")
    assert placed(plan, "softmax") == ("accelerator", "to_float")
    assert [p.name for p in plan.points if p.role == "activation"] == ["hidden", "logits"]


@pytest.mark.parametrize("target", [WHITEPAPER, ORT, LITERT, ESP])
def test_transposed_operand_of_a_product_keeps_its_scale(made: Planner, target: str) -> None:
    plan = made(target, "product")
    query, key, transposed = groups(plan, "query", "key", "transpose")
    assert transposed == key != query
    assert not [point for point in plan.points if point.role == "bias" and point.operator == "matmul"]


def quantized(graph: Callable[[str], Graph], targets_root: Path, target: str, model: str) -> qhw.QuantizedModel:
    shape = {"residual": (3, 8, 8), "perceptron": (8,)}[model]
    data = torch.randn(64, *shape, generator=torch.Generator().manual_seed(1))
    return qhw.quantize(graph(model), targets_root / f"{target}.toml", calibration=[data])


def test_esp32_p4_scales_are_powers_of_two_around_code_zero(graph: Callable[[str], Graph], targets_root: Path) -> None:
    result = quantized(graph, targets_root, ESP, "residual")
    encodings = result.encodings()
    assert {"left.weight", "x"} <= set(encodings)
    for group, qparams in encodings.items():
        assert bool((qparams.zero_point == 0).all()), group
        exponents = [math.frexp(scale)[0] for scale in qparams.scale.flatten().tolist()]
        assert set(exponents) == {0.5}, group
    assert encodings["left.weight"].scale.shape == (4,)
    assert (encodings["left.weight"].quant_min, encodings["left.weight"].quant_max) == (-128, 127)
    assert (encodings["left.bias"].quant_min, encodings["left.bias"].quant_max) == (-(2**31), 2**31 - 1)


def test_litert_codes_and_bias_scales(graph: Callable[[str], Graph], targets_root: Path) -> None:
    encodings = quantized(graph, targets_root, LITERT, "perceptron").encodings()
    weight, bias, softmax = encodings["hidden.weight"], encodings["hidden.bias"], encodings["softmax"]
    assert (weight.quant_min, weight.quant_max) == (-127, 127)
    assert (softmax.quant_min, softmax.quant_max) == (-128, 127)
    assert (float(softmax.scale), int(softmax.zero_point)) == (1 / 256, -128)
    torch.testing.assert_close(bias.scale, encodings["x"].scale * weight.scale, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("target", "low", "high", "weight_low"),
    [(WHITEPAPER, 0, 255, -128), (ORT, 0, 255, -127), (LITERT, -128, 127, -127)],
)
def test_codes(
    graph: Callable[[str], Graph], targets_root: Path, target: str, low: int, high: int, weight_low: int
) -> None:
    encodings = quantized(graph, targets_root, target, "residual").encodings()
    assert (encodings["x"].quant_min, encodings["x"].quant_max) == (low, high)
    assert (encodings["left.weight"].quant_min, encodings["left.weight"].quant_max) == (weight_low, 127)
    assert int(encodings["add"].zero_point) == low  # nothing below the 0 of the fused ReLU


@pytest.mark.parametrize(("weight", "low", "scales"), [("w4", -8, 4), ("w4t", -8, 1), ("w3", -4, 4), ("w3t", -4, 1)])
def test_white_paper_weights_of_few_bits_on_request(
    graph: Callable[[str], Graph], targets_root: Path, weight: str, low: int, scales: int
) -> None:
    data = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    target, wishes = targets_root / f"{WHITEPAPER}.toml", {"*.weight": weight}
    result = qhw.quantize(graph("residual"), target, calibration=[data], pipeline="ranges-ptq", formats=wishes)
    found = result.encodings()["left.weight"]
    assert (found.quant_min, found.quant_max, found.scale.numel()) == (low, -low - 1, scales)
