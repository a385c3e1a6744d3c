# SPDX-License-Identifier: Apache-2.0
"""What the targets of CPUs, microcontrollers and small NPUs decide, written by hand from their sources."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from qhw.decisions import Overrides, QuantPlan, Resources
from qhw.engine import select
from qhw.engine.grids import grid_of
from qhw.errors import PlanError
from qhw.extension import Registry
from qhw.graph import QuantPoint, capture
from qhw.schema import TargetSpec, load_target_file

Planner = Callable[..., QuantPlan]


@pytest.fixture
def spec(targets_root: Path, registry: Registry) -> Callable[[str], TargetSpec]:
    return lambda name: load_target_file(targets_root / f"{name}.toml", find_base=registry.target_path)


def written(plan: QuantPlan, operator: str) -> QuantPoint:
    return next(p for p in plan.points if p.role == "activation" and p.operator == operator)


def kernel(plan: QuantPlan, operator: str) -> str | None:
    return next(op.kernel for op in plan.operators if op.name == operator)


@pytest.mark.parametrize(
    ("target", "model", "operator", "chosen"),
    [
        ("google/litert-16x8", "conv", "conv", "mac"),
        ("google/xnnpack", "product", "matmul", "matmul"),
        ("google/coral-edgetpu", "conv", "conv", "mac"),
        ("arm/cmsis-nn", "perceptron", "hidden", "fully_connected"),
        ("arm/ethos-u55", "conv", "conv", "mac"),
        ("arm/ethos-u85", "product", "matmul", "matmul"),
        ("onnxruntime/cpu-arm", "residual", "add", "sum_u8"),
        ("openvino/npu", "depthwise", "depthwise", "mac_w2"),
    ],
)
def test_kernel(
    target: str, model: str, operator: str, chosen: str, spec: Callable[[str], TargetSpec], plan: Planner
) -> None:
    assert kernel(plan(spec(target), model), operator) == chosen


@pytest.mark.parametrize(
    ("target", "weight", "codes", "per"),
    [
        ("google/litert-16x8", "w8", (-127, 127), "out_channel"),
        ("arm/cmsis-nn-16x8", "w8t", (-127, 127), "tensor"),
        ("arm/ethos-u55", "w8", (-127, 127), "out_channel"),
        ("openvino/cpu", "w8", (-127, 127), "out_channel"),
    ],
)
def test_weights_of_a_layer(
    target: str, weight: str, codes: tuple[int, int], per: str, spec: Callable[[str], TargetSpec], plan: Planner
) -> None:
    point = plan(spec(target), "perceptron").point("hidden.weight")
    form = spec(target).formats[weight]
    assert (point.format, form.quant_min, form.quant_max, form.per) == (weight, *codes, per)


@pytest.mark.parametrize(
    ("target", "wish", "codes"),
    [
        ("arm/cmsis-nn", "w4", (-8, 7)),
        ("arm/ethos-u55-tosa", "w4", (-7, 7)),
        ("openvino/npu", "w4t", (-8, 7)),
    ],
)
def test_four_bits_on_request(
    target: str, wish: str, codes: tuple[int, int], spec: Callable[[str], TargetSpec], plan: Planner
) -> None:
    chip = spec(target)
    assert plan(chip, "residual", {"*.weight": wish}).point("left.weight").format == wish
    assert (grid_of(chip, wish).quant_min, grid_of(chip, wish).quant_max) == codes


@pytest.mark.parametrize("target", ["arm/ethos-u55", "arm/ethos-u65", "google/litert-16x8", "google/coral-edgetpu"])
def test_four_bits_are_refused_where_no_kernel_has_them_or_taken(
    target: str, spec: Callable[[str], TargetSpec], plan: Planner
) -> None:
    if target == "google/litert-16x8":  # static 4-bit weights for int16 activations are in its quantizer's policy
        assert plan(spec(target), "residual", {"*.weight": "w4"}).point("left.weight").format == "w4"
        return
    with pytest.raises(PlanError, match=r"no kernel of Conv holds weights in 'w4'"):
        plan(spec(target), "residual", {"*.weight": "w4"})


def test_sixteen_bit_results_of_functions_are_prescribed(spec: Callable[[str], TargetSpec], plan: Planner) -> None:
    fixed = written(plan(spec("google/litert-16x8"), "perceptron"), "softmax").fixed
    assert fixed is not None and (fixed.scale, fixed.zero_point) == (1 / 32768, 0)


@pytest.mark.parametrize(("target", "shared"), [("openvino/cpu", False), ("openvino/npu", True)])
def test_operands_of_a_sum_share_a_scale_on_the_npu(
    target: str, shared: bool, spec: Callable[[str], TargetSpec], plan: Planner
) -> None:
    made = plan(spec(target), "residual")
    assert (written(made, "left").group == written(made, "right").group) is shared


def test_tosa_refuses_a_network_with_one_operator_too_many(spec: Callable[[str], TargetSpec], plan: Planner) -> None:
    with pytest.raises(PlanError, match=r"runs whole models only .*softmax \(Softmax: "):
        plan(spec("arm/ethos-u55-tosa"), "perceptron")
    assert plan(spec("arm/ethos-u55"), "perceptron").point("softmax").format == "a8"


class Strided(nn.Module):
    """A convolution that strides by four, and one behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 4, 4, stride=4)
        self.mixed = nn.Conv2d(4, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mixed(torch.nn.functional.leaky_relu(self.patches(x)))


def where(target: TargetSpec, registry: Registry) -> dict[str, str]:
    torch.manual_seed(0)
    graph = capture(Strided().eval(), torch.randn(2, 3, 8, 8))
    made = select(graph, target, registry, Resources(calibration=True), Overrides())
    return {op.kind + str(i): op.where for i, op in enumerate(made.operators)}


@pytest.mark.parametrize(("target", "first"), [("arm/ethos-u55", "host"), ("arm/ethos-u85", "accelerator")])
def test_long_strides_are_for_ethos_u85(
    target: str, first: str, spec: Callable[[str], TargetSpec], registry: Registry
) -> None:
    found = where(spec(target), registry)
    assert (found["Conv0"], found["Conv2"]) == (first, "accelerator")


def test_edge_tpu_runs_nothing_behind_the_first_operator_that_it_does_not_have(
    spec: Callable[[str], TargetSpec], registry: Registry
) -> None:
    assert where(spec("google/coral-edgetpu"), registry) == {
        "Conv0": "accelerator",
        "LeakyRelu1": "host",
        "Conv2": "host",
    }


@pytest.mark.parametrize(("target", "bits"), [("arm/ethos-u55", 40), ("arm/ethos-u85", 48), ("google/litert-16x8", 48)])
def test_bits_of_a_bias(target: str, bits: int, spec: Callable[[str], TargetSpec]) -> None:
    assert spec(target).biases["wide"].bits == bits


def test_ethos_u85_says_that_sums_and_scaling_are_unknown(spec: Callable[[str], TargetSpec], plan: Planner) -> None:
    notes = {note.subject for note in plan(spec("arm/ethos-u85"), "conv").notes}
    assert {"kernels.mac.accumulator", "kernels.mac.requantize"} <= notes
