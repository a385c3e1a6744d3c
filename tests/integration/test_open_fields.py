# SPDX-License-Identifier: Apache-2.0
"""Lint and the integer room agree on which fields decide: what is listed as open is what is refused, and by name."""

import pytest
import torch
from torch import nn

import qhw
from qhw.engine import QuantizedModel
from qhw.graph import Graph
from qhw.integer import Obstacle, lower
from qhw.integer.lower import _FORMS, _IN_FIXED_POINT
from qhw.integer.tables import lower_table
from qhw.schema import open_fields, parse_target
from qhw.schema.open_fields import FUNCTION_KINDS

BASE = """\
schema_version = 1
name = "acme/whole"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = BITS, overflow = "wrap" }
requantize.r = { REQUANTIZE }
kernels.mac = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"], accumulator = "acc", requantize = "r" }
kernels.map = { input = ["a8"], output = ["a8"], requantize = "r" }
operators.Conv = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Add = { kernels = ["map"], rounding_order = "zero_point_after", preshift_bits = { a8 = 20 } }
operators.GlobalAveragePool = { kernels = ["map"], rounding_order = "zero_point_after" }
operators.Tanh = { kernels = ["map"], approximation = { kind = "table" } }
operators.Flatten = { same_scale = "input_output" }
artefact = { exporter = "theirs", executor = "theirs" }
"""
FIXED = 'kind = "fixed_point", rounding = "half_even", multiplier_bits = 31, shift = { min = -40, max = 31 }'
FLOAT = 'kind = "float32", rounding = "half_even"'


class Net(nn.Module):
    """Convolutions with a sum, a table and a mean behind them, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.tanh(self.left(x)) + self.right(x)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    return qhw.capture(Net().eval(), torch.randn(2, 3, 8, 8))


def quantized(graph: Graph, text: str) -> QuantizedModel:
    data = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) + 1
    return qhw.quantize(graph, parse_target(text), calibration=data, pipeline="ranges-ptq", without=NO_REPAIR)


NO_REPAIR = ("accumulator_projection", "requantization_fit")


def listed(text: str) -> list[str]:
    fields = open_fields(parse_target(text))
    return [".".join(map(str, field.path)) for field in fields if "qhw verify" in field.commands]


def refused(result: QuantizedModel) -> tuple[Obstacle, ...]:
    return lower(result)[1]


def base(requantize: str, bits: str = "32") -> str:
    return BASE.replace("REQUANTIZE", requantize).replace("BITS", bits)


@pytest.mark.parametrize("requantize", [FIXED, FLOAT], ids=["fixed point", "float32"])
def test_a_target_that_states_all_is_computed(graph: Graph, requantize: str) -> None:
    assert listed(base(requantize)) == []
    assert refused(quantized(graph, base(requantize))) == ()


CASES = {
    "kernels.mac.bias": ('bias = "b", ', ""),
    "biases.b.applied": (', applied = "before_requantize"', ""),
    "biases.b.bits": ("biases.b = { bits = 32, ", "biases.b = { "),
    "kernels.mac.accumulator": (', accumulator = "acc"', ""),
    "accumulators.acc.bits": ("acc = { bits = 32", 'acc = { bits = "unknown"'),
    "kernels.mac.requantize": ('accumulator = "acc", requantize = "r"', 'accumulator = "acc"'),
    "kernels.map.requantize": ('output = ["a8"], requantize = "r"', 'output = ["a8"]'),
    "requantize.r.kind": ('kind = "fixed_point", ', ""),
    "requantize.r.rounding": ('rounding = "half_even", ', ""),
    "requantize.r.multiplier_bits": ("multiplier_bits = 31, ", ""),
    "requantize.r.shift": (", shift = { min = -40, max = 31 }", ""),
    "operators.Conv.rounding_order": (
        'Conv = { kernels = ["mac"], rounding_order = "zero_point_after" }',
        'Conv = { kernels = ["mac"], rounding_order = "unknown" }',
    ),
    "operators.Conv.ratio": ('Conv = { kernels = ["mac"]', 'Conv = { kernels = ["mac"], ratio = "unknown"'),
    "operators.GlobalAveragePool.mean_count": (
        'GlobalAveragePool = { kernels = ["map"]', 'GlobalAveragePool = { kernels = ["map"], mean_count = "unknown"'
    ),
    "operators.Add.preshift_bits": (", preshift_bits = { a8 = 20 }", ""),
    "operators.Tanh.approximation": (', approximation = { kind = "table" }', ""),
}  # fmt: skip


@pytest.mark.parametrize("field", CASES)
def test_a_field_that_is_open_is_listed_and_refused_by_the_same_name(graph: Graph, field: str) -> None:
    old, new = CASES[field]
    assert old in base(FIXED)
    text = base(FIXED).replace(old, new)
    assert listed(text) == [field]
    reasons = [obstacle.reason for obstacle in refused(quantized(graph, text))]
    assert reasons and all(field in reason for reason in reasons), reasons


SHIFT = (
    'kind = "shift", rounding = "half_even", shift = { min = -40, max = 40 }, '
    'align = { to = "SIDE", rounding = "floor", shift = { min = -20, max = 20 } }'
)
POWER = 'per = "tensor", scale = { kind = "power_of_two" }'
ALIGNED = {
    "requantize.r.align": (', align = { to = "finer", rounding = "floor", shift = { min = -20, max = 20 } }', ""),
    "requantize.r.align.to": ('to = "finer", ', ""),
    "requantize.r.align.rounding": ('rounding = "floor", ', ""),
    "requantize.r.align.shift": ('"floor", shift = { min = -20, max = 20 }', '"floor"'),
    "requantize.r.align.shift.min": ("min = -20, ", ""),
    "requantize.r.align.shift.max": (", max = 20", ""),
    "kernels.map.accumulator": ('output = ["a8"], accumulator = "acc"', 'output = ["a8"]'),
}


class Sum(nn.Module):
    """Of two inputs on scales that are apart."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


@pytest.mark.parametrize("side", ["finer", "coarser"])
@pytest.mark.parametrize("field", ALIGNED)
def test_what_a_sum_by_shifts_leaves_open_is_listed_and_refused_by_the_same_name(field: str, side: str) -> None:
    old, new = (part.replace('"finer"', f'"{side}"') for part in ALIGNED[field])
    whole = base(SHIFT.replace("SIDE", side)).replace('per = "tensor"', POWER).replace(
        'map = { input = ["a8"], output = ["a8"]', 'map = { input = ["a8"], output = ["a8"], accumulator = "acc"'
    )  # fmt: skip
    whole = "\n".join(line for line in whole.splitlines() if not line.startswith(("operators.C", "operators.Gemm")))
    assert old in whole
    x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1)) + 1
    for text, fields in ((whole, []), (whole.replace(old, new), [field])):
        is_needed = (field, side) not in (
            ("requantize.r.align.rounding", "finer"),
            ("requantize.r.align.shift.min", "coarser"),
            ("requantize.r.align.shift.max", "finer"),
        )
        wanted = fields if is_needed else []
        assert [name for name in listed(text) if "Global" not in name and "rounding_order" not in name] == wanted
        result = qhw.quantize(
            Sum(), parse_target(text), example_inputs=(x, 16 * x), calibration=[(x, 16 * x)], pipeline="ranges-ptq",
            without=NO_REPAIR,
        )  # fmt: skip
        reasons = [obstacle.reason for obstacle in refused(result)]
        assert len(reasons) == len(wanted) and all(field in reason for reason in reasons), reasons


def test_an_overflow_that_is_open_decides_only_where_a_sum_may_not_fit(graph: Graph) -> None:
    field = "accumulators.acc.overflow"
    for bits, is_refused in (("32", False), ("12", True)):
        text = base(FIXED, bits).replace('overflow = "wrap"', 'overflow = "unknown"')
        assert listed(text) == [field]
        assert any("overflow" in obstacle.reason for obstacle in refused(quantized(graph, text))) is is_refused


def test_the_kinds_that_need_an_approximation_are_those_of_the_integer_room() -> None:
    by_table = {kind for kind, form in _FORMS.items() if form is lower_table}
    assert by_table | set(_IN_FIXED_POINT) == FUNCTION_KINDS


SOFTMAX = (
    'Softmax = { kernels = ["map"], approximation = { kind = "fixed_point", integer_bits = 5, sum_integer_bits = 12 } }'
)


@pytest.mark.parametrize(
    "field", ["integer_bits = 5, ", ", sum_integer_bits = 12"], ids=["of a distance", "of the sum"]
)
def test_bits_of_a_softmax_in_fixed_point_are_listed_and_refused_by_the_same_name(field: str) -> None:
    torch.manual_seed(0)
    graph = qhw.capture(nn.Sequential(nn.Linear(4, 5), nn.Softmax(-1)).eval(), torch.randn(2, 4))
    text = base(FIXED).replace("operators.Flatten", f"operators.{SOFTMAX}\noperators.Flatten").replace(field, "")
    name = f"operators.Softmax.approximation.{field.strip(', ').partition(' ')[0]}"
    assert listed(text) == [name]
    result = qhw.quantize(
        graph, parse_target(text), calibration=torch.randn(40, 4), pipeline="ranges-ptq", without=NO_REPAIR
    )
    reasons = [obstacle.reason for obstacle in refused(result)]
    assert reasons and all(name in reason for reason in reasons), reasons


STATED = 'products_per_step = 4, order = "channel_fastest", bias_added = "last"'


@pytest.mark.parametrize("field", ["products_per_step = 4, ", 'order = "channel_fastest", ', ', bias_added = "last"'])
def test_how_a_sum_saturates_is_listed_and_refused_by_the_same_name(graph: Graph, field: str) -> None:
    whole = base(FIXED, "12").replace('overflow = "wrap"', f'overflow = "saturate", {STATED}')
    assert listed(whole) == [] and refused(quantized(graph, whole)) == ()
    text, name = whole.replace(field, ""), f"accumulators.acc.{field.strip(', ').partition(' ')[0]}"
    assert listed(text) == [name]
    reasons = [obstacle.reason for obstacle in refused(quantized(graph, text))]
    assert reasons and all(name in reason for reason in reasons), reasons
