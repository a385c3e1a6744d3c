# SPDX-License-Identifier: Apache-2.0
"""Every field that only the integer executor reads, changed in the text of a target: its arithmetic follows."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel, SilentProgress
from qhw.graph import Graph
from qhw.integer import lower
from qhw.schema import parse_target
from tests.integer_support import FunctionOf

TARGET = """
schema_version = 1
name = "acme/npu"
fallback = "host"
formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", rounding = "half_even" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.z8 = { bits = 8, signed = true, per = "tensor" }
formats.p8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
biases.wide = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.sum = { kind = "integer", bits = 12, overflow = "wrap" }
accumulators.total = { bits = 32, overflow = "wrap" }
requantize.own = { kind = "fixed_point", rounding = "double", multiplier_bits = 31, shift = { min = -30, max = 31 } }
requantize.tight = { kind = "fixed_point", rounding = "double", multiplier_bits = 31, shift = { min = 20, max = 31 }, out_of_range = "zero_scale" }
requantize.steps = { kind = "fixed_point", multiplier_bits = 15, shift = { min = -29, max = 31 }, stages = [{ operation = "multiply", rounding = "floor" }, { operation = "shift", rounding = "half_even" }] }
requantize.power = { kind = "shift", rounding = "half_even", shift = { min = 0, max = 31 }, align = { to = "coarser", rounding = "half_even", shift = { min = 0, max = 31 } } }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "wide", accumulator = "sum", requantize = "own" }
kernels.two = { input = ["a8"], output = ["a8"], bias = "none", accumulator = "total", requantize = "own" }
kernels.far = { input = ["a8"], output = ["a8"], bias = "none", accumulator = "total", requantize = "tight" }
kernels.free = { input = ["z8"], output = ["z8"], bias = "none", accumulator = "total", requantize = "own" }
kernels.staged = { input = ["a8"], output = ["a8"], bias = "none", requantize = "steps" }
kernels.power = { input = ["p8"], output = ["p8"], bias = "none", accumulator = "total", requantize = "power" }
operators.Conv = { kernels = ["mac"] }
operators.Add = { kernels = ["two"], preshift_bits = { a8 = 20 } }
operators.Concat = { kernels = ["free"], rounding_order = "zero_point_after" }
operators.LeakyRelu = { kernels = ["staged"] }
operators.Mul = { kernels = ["far"] }
operators.Sub = { kernels = ["power"] }
operators.AveragePool = { kernels = ["two"], same_scale = "input_output", rounding = "half_even" }
operators.ReduceMean = { kernels = ["two"], mean_count = "multiplier", ratio = "float64" }
operators.Clip = { kernels = ["two"], same_scale = "input_output" }
operators.Sigmoid = { kernels = ["two"], approximation = { kind = "table", entries = 256 } }
"""  # noqa: E501
IMAGE = torch.randn(8, 4, 8, 7, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[Callable[..., Tensor] | nn.Module, int]] = {
    "conv": (nn.Conv2d(4, 8, 3), 1),
    "add": (lambda x, y: x + y, 2),
    "mul": (lambda x, y: x * y, 2),
    "sub": (lambda x, y: x - y, 2),
    "join": (lambda x, y: torch.cat([x, y], 1), 2),
    "leaky": (lambda x: F.leaky_relu(x, 0.1), 1),
    "pool": (lambda x: F.avg_pool2d(x, 2), 1),
    "mean": (lambda x: x.mean((2, 3)), 1),
    "clip": (lambda x: x.clamp(-1.0, 0.5), 1),
    "sigmoid": (torch.sigmoid, 1),
}


NO_REPAIR = ("requantization_fit",)  # which would choose scales whose multipliers are all legal


@pytest.fixture(scope="module")
def graphs() -> dict[str, tuple[Graph, dict[str, Tensor]]]:
    """The models, captured once."""
    torch.manual_seed(0)
    found = {}
    for name, (function, count) in MODELS.items():
        inputs = (IMAGE, 3 * IMAGE.flip(0))[:count]
        graph = qhw.capture(FunctionOf(function).eval(), inputs)
        found[name] = graph, dict(zip(graph.inputs, inputs, strict=True))
    return found


def outcome(text: str, graph: Graph, batch: dict[str, Tensor]) -> Any:
    """What the one operator computes with, as plain data; the reason where it has no exact form."""
    # Grids are those of a wide accumulator: what is fitted to a narrow one would not show its overflow.
    wide = parse_target(TARGET.replace("bits = 12", "bits = 32"))
    plan = qhw.plan(graph, wide, calibration=batch, prefer=("min_max", "min_max_weights"), without=NO_REPAIR)
    grids = qhw.quantize(graph, plan, calibration=batch, target=wide, progress=SilentProgress()).encodings()
    found, obstacles = lower(QuantizedModel(graph, plan, parse_target(text), grids))
    if obstacles:
        return obstacles[0].reason
    (form,) = (form for _, form in found.values())
    codes = torch.randint(-128, 128, IMAGE.shape, generator=torch.Generator().manual_seed(1)).float()
    return form.run([codes] * len(batch)).flatten().tolist(), str(form.facts)


CHANGES = [
    ("accumulators.sum.bits", "conv", "bits = 12", "bits = 11"),
    ("accumulators.sum.kind", "conv", 'kind = "integer", bits', 'kind = "float", bits'),
    ("accumulators.sum.overflow", "conv", 'bits = 12, overflow = "wrap"', 'bits = 12, overflow = "saturate"'),
    ("requantize.own.kind", "conv",
     'own = { kind = "fixed_point", rounding = "double", multiplier_bits = 31, shift = { min = -30, max = 31 } }',
     'own = { kind = "float64", rounding = "half_even" }'),
    ("requantize.own.rounding", "conv", 'own = { kind = "fixed_point", rounding = "double"',
     'own = { kind = "fixed_point", rounding = "floor"'),
    ("requantize.own.multiplier_bits", "conv", "multiplier_bits = 31, shift = { min = -30",
     "multiplier_bits = 30, shift = { min = -30"),
    ("requantize.own.shift", "conv", "shift = { min = -30, max = 31 }", 'shift = "unknown"'),
    ("requantize.tight.shift.min", "mul", "min = 20", "min = 0"),
    ("requantize.own.shift.max", "conv", "shift = { min = -30, max = 31 }", "shift = { min = -30, max = -29 }"),
    ("requantize.tight.out_of_range", "mul", 'out_of_range = "zero_scale"', 'out_of_range = "saturate"'),
    ("operators.Add.preshift_bits", "add", "Add = { kernels = [\"two\"], preshift_bits = { a8 = 20 }",
     "Add = { kernels = [\"two\"], preshift_bits = { a8 = 8 }"),
    ("operators.Concat.rounding_order", "join", "zero_point_after", "zero_point_before"),
    ("requantize.steps.stages.rounding", "leaky",
     '"multiply", rounding = "floor"', '"multiply", rounding = "half_even"'),
    ("requantize.steps.stages.operation", "leaky",
     '{ operation = "multiply", rounding = "floor" }, { operation = "shift", rounding = "half_even" }',
     '{ operation = "shift", rounding = "half_even" }, { operation = "multiply", rounding = "floor" }'),
    ("requantize.power.align.to", "sub", 'to = "coarser"', 'to = "finer"'),
    ("requantize.power.align.rounding", "sub", 'rounding = "half_even", shift = { min = 0, max = 31 } }',
     'rounding = "floor", shift = { min = 0, max = 31 } }'),
    ("requantize.power.align.shift.min", "sub", 'rounding = "half_even", shift = { min = 0, max = 31 } }',
     'rounding = "half_even", shift = { min = 9, max = 31 } }'),
    ("requantize.power.align.shift.max", "sub", 'rounding = "half_even", shift = { min = 0, max = 31 } }',
     'rounding = "half_even", shift = { min = 0, max = 0 } }'),
    ("operators.AveragePool.rounding", "pool", 'same_scale = "input_output", rounding = "half_even"',
     'same_scale = "input_output", rounding = "half_away_from_zero"'),
    ("operators.ReduceMean.mean_count", "mean", 'mean_count = "multiplier"', 'mean_count = "ratio"'),
    ("operators.ReduceMean.ratio", "mean", 'ratio = "float64"', 'ratio = "float32"'),
    ("formats.a8.rounding", "sigmoid", 'rounding = "half_even" }\nformats.w8', 'rounding = "floor" }\nformats.w8'),
    ("operators.Sigmoid.approximation.kind", "sigmoid", 'kind = "table"', 'kind = "hard"'),
    ("operators.Sigmoid.approximation.entries", "sigmoid", "entries = 256", "entries = 64"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "old", "new"), [change[1:] for change in CHANGES], ids=[c[0] for c in CHANGES])
def test_the_arithmetic_follows_the_field(model: str, old: str, new: str, graphs: Any) -> None:
    assert TARGET.count(old) == 1, "the change does not apply to this text, or to several places"
    assert outcome(TARGET, *graphs[model]) != outcome(TARGET.replace(old, new), *graphs[model])
