# SPDX-License-Identifier: Apache-2.0
"""Activations whose scales the hardware computes: planned without a range, simulated live, refused for integers."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, quantized_bytes
from qhw.errors import ExportError, IntegerError, PlanError
from qhw.extension import Registry
from qhw.graph import Graph
from qhw.numerics import DynamicQuantizer, PerGroup
from qhw.schema import TargetSpec, parse_target
from qhw_plugins import float_format, learned_ranges, onnx_qdq

E2M1 = 'kind = "float", exponent_bits = 2, mantissa_bits = 1, finite_max = 6.0, per = "group", group_size = 32'
MXFP4 = f"""
schema_version = 1
name = "acme/mxfp4"
formats.live = {{ {E2M1}, scale = {{ kind = "e8m0", dynamic = true }} }}
formats.w = {{ {E2M1}, scale = {{ kind = "e8m0" }} }}
biases.b = {{ bits = "float" }}
accumulators.acc = {{ kind = "float", bits = 32 }}
kernels.mac = {{ input = ["live"], weight = ["w"], bias = "b", output = ["live"], accumulator = "acc" }}
operators.Conv = {{ kernels = ["mac"], fused = ["Relu"] }}
operators.Gemm = {{ kernels = ["mac"], fused = ["Relu"] }}
fallback = "host"
"""
BY_ROW = """
schema_version = 1
name = "acme/rows"
formats.live = { bits = 8, signed = true, per = "row", scale = { dynamic = true } }
formats.w = { bits = 8, signed = true, zero_point = 0, per = "out_channel" }
biases.b = { bits = "float" }
kernels.mac = { input = ["live"], weight = ["w"], bias = "b", output = ["live"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
fallback = "host"
"""


@pytest.fixture(scope="module")
def numbers(load: Callable[..., Registry]) -> Registry:
    extra = ("float_format", float_format), ("onnx_qdq", onnx_qdq), ("learned_ranges", learned_ranges)
    return load(*extra)


@pytest.fixture(scope="module")
def spec() -> TargetSpec:
    return parse_target(MXFP4)


@pytest.fixture(scope="module")
def result(graph: Graph, images: Tensor, numbers: Registry, spec: TargetSpec) -> QuantizedModel:
    return qhw.quantize(graph, spec, calibration=images[:64], registry=numbers)


def test_live_scales_need_no_calibration(graph: Graph, numbers: Registry, spec: TargetSpec) -> None:
    plan = qhw.plan(graph, spec, registry=numbers)
    assert {point.role for point in plan.points if point.is_dynamic} == {"input", "activation"}
    assert [step.stage for step in plan.steps if step.stage == "activation_range"] == []


def test_a_convolution_has_blocks_of_channels_and_a_linear_layer_blocks_of_what_it_reads(
    result: QuantizedModel,
) -> None:
    made = {
        point.name: (module.axis, module.block, module.reduced)
        for point in result.plan.points
        if isinstance(module := result.quantizer(point.name), DynamicQuantizer)
    }
    # The network: conv1 -> conv2 -> host's sin -> flattened [4, 4, 4] -> fc
    assert made["x"] == (1, 32, None) and made["conv1"] == (1, 32, None)
    assert (-1, 32, 64) in made.values()
    weight = result.quantizer("fc.weight").qparams
    assert weight.granularity == PerGroup(1, 32) and tuple(weight.scale.shape) == (5, 2)


def test_live_scales_follow_the_data(result: QuantizedModel, images: Tensor) -> None:
    first = result(images[:4])
    # All shared exponents are powers of two: twice the input is twice the output of what is linear and has no bias.
    quantizer = result.quantizer("x")
    assert torch.equal(quantizer(2 * images[:4]), 2 * quantizer(images[:4]))
    alone = torch.cat([result(image[None]) for image in images[:4]])
    assert torch.allclose(alone, first, atol=1e-5)


def test_live_scales_are_saved_and_copied(
    result: QuantizedModel, images: Tensor, numbers: Registry, tmp_path: Path
) -> None:
    qhw.save(result, tmp_path / "out", artefact=False, registry=numbers)
    loaded = qhw.load(tmp_path / "out", registry=numbers)
    assert torch.equal(loaded(images[:8]), result(images[:8]))
    assert torch.equal(deepcopy(result)(images[:8]), result(images[:8]))


def test_both_factors_of_a_product_are_cut_along_what_it_sums_up(numbers: Registry) -> None:
    class Product(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a @ b

    x, y = torch.randn(2, 3, 40), torch.randn(2, 40, 5)
    graph = qhw.capture(Product().eval(), (x, y))
    text = MXFP4 + 'kernels.mm = { input = ["live"], weight = ["live"], output = ["live"] }\n'
    target = parse_target(text + 'operators.MatMul = { kernels = ["mm"] }\n')
    result = qhw.quantize(graph, target, registry=numbers)
    found = [result.quantizer(p.name) for p in result.plan.points if p.role == "input"]
    assert [q.axis for q in found if isinstance(q, DynamicQuantizer)] == [-1, -2]


def test_live_scales_cost_no_bytes(images: Tensor, numbers: Registry, spec: TargetSpec) -> None:
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3)).eval(), images[:2])
    small = qhw.quantize(graph, spec, registry=numbers)
    # 108 codes of 4 bits, 36 blocks of 3 channels with a byte each, 4 float biases
    assert quantized_bytes(small) == 54 + 36 + 16


def test_integers_and_their_exporters_say_no(
    result: QuantizedModel, images: Tensor, numbers: Registry, tmp_path: Path
) -> None:
    with pytest.raises(IntegerError, match="has no integer form"):
        qhw.verify(result, images[:2], registry=numbers)
    with pytest.raises(ExportError, match=r"formats\.live\.scale\.dynamic: this form cannot say that scales"):
        qhw.export(result, tmp_path, registry=numbers)


def test_rows_of_integers_are_simulated_and_refused_likewise(images: Tensor, numbers: Registry, tmp_path: Path) -> None:
    graph = qhw.capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), images[:2])
    result = qhw.quantize(graph, parse_target(BY_ROW), registry=numbers)
    x = images[:2]
    low, high = x.flatten(1).min(1).values, x.flatten(1).max(1).values
    step = ((high - low) / 255)[:, None]
    point = next(p.name for p in result.plan.points if p.role == "input")
    found = result.quantizer(point)(x.flatten(1))
    assert bool(((found - x.flatten(1)).abs() <= step * 0.5001).all()) and len(found[0].unique()) <= 256
    with pytest.raises(
        IntegerError, match=r"scales of its input are computed at run time \(formats\.live\.scale\.dynamic\)"
    ):
        qhw.verify(result, x, registry=numbers)
    with pytest.raises(ExportError, match=r"formats\.live\.scale\.dynamic: this form cannot say that"):
        qhw.export(result, tmp_path, registry=numbers)


@pytest.mark.parametrize("rule", ['scale = "input*weight"', 'scale = "own", align = "shift"'])
def test_an_integer_bias_in_units_of_live_sums_is_refused(rule: str, images: Tensor, numbers: Registry) -> None:
    graph = qhw.capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), images[:2])
    text = BY_ROW.replace('bits = "float"', f"bits = 32, {rule}")
    with pytest.raises(PlanError, match=r"1\.bias: an integer bias in units of input\*weight .* computed at run time"):
        qhw.plan(graph, parse_target(text), registry=numbers)


def test_a_bias_of_its_own_scale_that_meets_no_live_sum_is_planned(images: Tensor, numbers: Registry) -> None:
    graph = qhw.capture(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval(), images[:2])
    made = qhw.plan(graph, parse_target(BY_ROW.replace('bits = "float"', 'bits = 32, scale = "own"')), registry=numbers)
    assert [point.name for point in made.points if point.role == "bias"] == ["1.bias"]


def test_live_scales_stay_live_in_training(graph: Graph, images: Tensor, numbers: Registry, spec: TargetSpec) -> None:
    result = qhw.quantize(graph, spec, calibration=images[:32], registry=numbers)
    before = result(images[:4])
    training = qhw.trainable(result, prefer=("learned_ranges",), pipeline="ranges-ptq", registry=numbers)
    assert isinstance(training.quantizer("x"), DynamicQuantizer)
    training.train()
    training(images[:4]).square().sum().backward()
    grads = [p.grad for p in training.parameters() if p.grad is not None]
    assert grads and all(bool(g.isfinite().all()) for g in grads)
    frozen = qhw.freeze(deepcopy(training), registry=numbers)
    assert torch.allclose(frozen(images[:4]), before, atol=1e-4)
