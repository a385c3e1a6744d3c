# SPDX-License-Identifier: Apache-2.0
"""The digits model on hand-written targets of other numbers: floats, blocks, palettes, code sets; its accuracy."""

from pathlib import Path
from typing import Any

import pytest
import torch

import qhw
from examples import digits
from qhw.engine import SilentProgress, quantized_bytes
from qhw.graph import Graph
from qhw.schema import parse_target

HEAD = """
schema_version = 1
name = "acme/numbers"
biases.b = { bits = "float" }
accumulators.sum = { kind = "float", bits = 32 }
kernels.mac = { input = ["x"], weight = ["w"], bias = "b", output = ["x"], accumulator = "sum" }
operators.Conv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.DepthwiseConv = { kernels = ["mac"], fused = ["Relu", "Clip"] }
operators.Gemm = { kernels = ["mac"] }
fallback = "host"
"""
E4M3 = 'kind = "float", exponent_bits = 4, mantissa_bits = 3, finite_max = 448.0'
E2M1 = 'kind = "float", exponent_bits = 2, mantissa_bits = 1, finite_max = 6.0'
FLOAT16 = (
    'kind = "float", exponent_bits = 5, mantissa_bits = 10, finite_max = 65504.0, per = "tensor", '
    'scale = { kind = "fixed", values = [1.0] }'
)


def blocks(elements: str) -> str:
    shared = f'{elements}, per = "group", group_size = 32'
    live = f'{shared}, scale = {{ kind = "e8m0", dynamic = true }}'
    return f'formats.x = {{ {live} }}\nformats.w = {{ {shared}, scale = {{ kind = "e8m0" }} }}'


# Formats; least accuracy of the simulation in %, the float model has 99.6; bytes of weights per weight, about.
CASES: dict[str, tuple[str, float, float]] = {
    "fp8 e4m3": (f'formats.x = {{ {E4M3}, per = "tensor" }}\nformats.w = {{ {E4M3}, per = "out_channel" }}', 99.0, 1.0),
    "mxfp8": (blocks(E4M3), 99.0, 1.0),
    "mxfp4": (blocks(E2M1), 95.0, 0.5),
    "palette of 4 bits": (
        f"formats.x = {{ {FLOAT16} }}\n"
        'formats.w = { kind = "palette", palette = { index_bits = 4, entry = "float16" } }',
        98.0,
        0.5,
    ),
    "ternary": (
        f'formats.x = {{ {FLOAT16} }}\nformats.w = {{ code_set = [-1, 0, 1], zero_point = 0, per = "out_channel" }}',
        0.0,
        0.25,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.set_num_threads(1)
    model, example = digits.model()
    return qhw.capture(model, example)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_digits_keep_their_accuracy(graph: Graph, name: str, tmp_path: Path, record_property: Any) -> None:
    formats, least, per_weight = CASES[name]
    target = parse_target(f"{HEAD}{formats}\n")
    plan = qhw.plan(graph, target, calibration=digits.calibration(), pipeline="ranges-ptq")
    assert plan.accelerator_macs == plan.total_macs
    result = qhw.quantize(graph, plan, calibration=digits.calibration(), target=target, progress=SilentProgress())
    float_score, simulated = qhw.evaluate(graph, result, digits.evaluation())
    record_property("accuracy", simulated.value)
    print(f"{name}: float {float_score.value}, simulated {simulated.value}, {quantized_bytes(result)} bytes")
    assert simulated.value >= least
    weights = sum(graph.tensor(p.tensor).numel() for p in plan.points if p.role == "weight")
    assert quantized_bytes(result) < weights * per_weight * 1.25 + 4 * 1500  # scales, tables, float biases
    qhw.save(result, tmp_path / "out", artefact=False)
    images, _ = next(iter(digits.evaluation()))
    assert torch.equal(qhw.load(tmp_path / "out")(images[:32]), result(images[:32]))
