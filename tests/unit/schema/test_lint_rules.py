# SPDX-License-Identifier: Apache-2.0
"""Lint: rules that nothing can reach, and numbers that cannot hold together; each broken once, in words by hand."""

from functools import cache
from pathlib import Path

import pytest

from qhw.graph import ATEN_KINDS, KNOWN_KINDS
from qhw.schema import lint, parse_target
from qhw.schema.kinds import OPERATOR_KINDS

WHOLE = """\
schema_version = 1
name = "acme/whole"
fallback = "host"
formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
formats.a16 = { bits = 16, signed = true, zero_point = [0, 128], per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel", scale = { kind = "power_of_two" } }
biases.b = { bits = 32, scale = "input*weight" }
accumulators.acc = { bits = 32, overflow = "wrap" }
accumulators.long = { bits = 40 }
requantize.mul = { kind = "shift", rounding = "half_even", shift = { min = 0, max = 31 } }
operators.Conv = { kernels = ["mac", "wide"], fused = ["Relu"], limits = { kernel = { max = 7 }, stride = [1, 2] } }
operators.Gemm = { kernels = ["mac"] }
operators.Add = { kernels = ["two"], preshift_bits = { a8 = 20 } }
operators.Softmax = { kernels = ["two"], fixed_output.a8 = { scale = 0.0078125, zero_point = 0 } }
operators.MaxPool = { kernels = ["two"], same_scale = "input_output" }
boundary = { input_formats = ["a8"] }
clocks.fast = { clock_hz = 2e8, is_default = true }
clocks.slow = { clock_hz = 1e8 }
kernels.two = { input = ["a8"], output = ["a8"], accumulator = "acc" }
kernels.wide = { input = ["a16"], weight = ["w8"], output = ["a16"], accumulator = "long" }
[kernels.mac]
input = ["a8"]
weight = ["w8"]
output = ["a8"]
bias = "b"
accumulator = "acc"
requantize = "mul"
"""
CASES: dict[str, tuple[str, str, str]] = {
    "format listed twice": (
        '[kernels.mac]\ninput = ["a8"]',
        '[kernels.mac]\ninput = ["a8", "a8"]',
        'warning: kernels.mac.input: lists "a8" twice. Keep one.',
    ),
    "kernel listed three times": (
        'kernels = ["mac", "wide"]',
        'kernels = ["mac", "wide", "mac", "mac"]',
        'warning: operators.Conv.kernels: lists "mac" 3 times. Keep one.',
    ),
    "fusion listed twice, once as a chain": (
        'fused = ["Relu"]',
        'fused = ["Relu", ["Relu"]]',
        'warning: operators.Conv.fused: lists "Relu" twice. Keep one.',
    ),
    "limit listed twice": (
        "stride = [1, 2]",
        "stride = [1, 2, 2]",
        "warning: operators.Conv.limits.stride: lists 2 twice. Keep one.",
    ),
    "zero point listed twice": (
        "zero_point = [0, 128]",
        "zero_point = [0, 128, 0]",
        "warning: formats.a16.zero_point: lists 0 twice. Keep one.",
    ),
    "edge format listed twice": (
        'input_formats = ["a8"]',
        'input_formats = ["a8", "a8"]',
        'warning: boundary.input_formats: lists "a8" twice. Keep one.',
    ),
    "kernel that says the same as an earlier one": (
        'kernels = ["mac"] }',
        'kernels = ["mac", "again"] }\nkernels.again = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "b", '
        'accumulator = "acc", requantize = "mul" }',
        "warning: kernels.again: is never taken for Gemm: mac stands before it and says the same. Remove one, or "
        "say what "
        "differs.",
    ),
    "kernel of the same formats with other arithmetic": (
        'kernels = ["mac"] }',
        'kernels = ["mac", "again"] }\nkernels.again = { input = ["a8"], weight = ["w8"], output = ["a8"], '
        'accumulator = "acc" }',
        "warning: kernels.again: is never taken for Gemm: mac stands before it and takes the same formats, in as "
        "wide an "
        "accumulator. Remove one, or say what differs.",
    ),
    "weights without formats, in one kernel of two": (
        'kernels = ["mac", "wide"]',
        'kernels = ["mac", "two"]',
        "warning: kernels.two.weight: is never taken for Conv, which has weights: it lists no weight formats. State "
        "weight, or take it out.",
    ),
    "weights without formats, in all kernels": (
        'operators.Gemm = { kernels = ["mac"] }',
        'operators.Gemm = { kernels = ["two"] }',
        "error: kernels.two.weight: is never taken for Gemm, which has weights: it lists no weight formats. State "
        "weight, or take it out.",
    ),
    "chain of no operators": (
        'fused = ["Relu"]',
        'fused = ["Relu", []]',
        "warning: operators.Conv.fused: lists a chain of no operators. Remove it.",
    ),
    "chain with an operator of two tensors": (
        'fused = ["Relu"]',
        'fused = ["Relu", ["Add", "Relu"]]',
        'info: operators.Conv.fused: ["Add", "Relu"] is never taken yet: Add reads two tensors, and only chains '
        "along one "
        "are followed.",
    ),
    "chain with a Dropout": (
        'fused = ["Relu"]',
        'fused = ["Dropout"]',
        'info: operators.Conv.fused: "Dropout" is never met: a Dropout does nothing at inference.',
    ),
    "limit on what the operator does not have": (
        'operators.Softmax = { kernels = ["two"],',
        'operators.Softmax = { kernels = ["two"], limits = { kernel = [1, 3] },',
        "warning: operators.Softmax.limits.kernel: holds for nothing: a Softmax has no kernel. Remove it, or put "
        "it where "
        "it belongs.",
    ),
    "field that the operator does not read": (
        'operators.Softmax = { kernels = ["two"],',
        'operators.Softmax = { kernels = ["two"], mean_count = "ratio",',
        "warning: operators.Softmax.mean_count: holds for nothing: only AveragePool, GlobalAveragePool and ReduceMean "
        "read it. Remove it.",
    ),
    "fixed output of a format that no kernel gives": (
        "fixed_output.a8 = { scale = 0.0078125, zero_point = 0 }",
        "fixed_output.a16 = { scale = 0.0078125, zero_point = 0 }",
        "warning: operators.Softmax.fixed_output.a16: holds for nothing: no kernel of Softmax gives a16. Remove it, or "
        "list the format there.",
    ),
    "shift of a format that no kernel takes": (
        "preshift_bits = { a8 = 20 }",
        "preshift_bits = { a8 = 20, a16 = 15 }",
        "warning: operators.Add.preshift_bits.a16: holds for nothing: no kernel of Add takes a16. Remove it, or "
        "list the "
        "format there.",
    ),
    "edge format that no kernel takes": (
        'input_formats = ["a8"]',
        'output_formats = ["w8"]',
        "warning: boundary.output_formats: w8 is met nowhere: no kernel gives it. Remove it, or list it there.",
    ),
    "data on one scale beside weights that are free": (  # (-128, 127) / 128
        'zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }',
        'zero_point = 0, per = "tensor", scale = { kind = "fixed", values = [0.0078125] } }',
        "info: formats.a8.scale: data beyond [-1, 0.992188] is clipped. A chip that reads codes alone has no such "
        "scale: then state power_of_two, and same_scale where no multiplier or shift parts two tensors.",
    ),
    "limit without a value": (
        "kernel = { max = 7 }",
        "kernel = { max = 7, multiple_of = 8 }",
        "error: operators.Conv.limits.kernel: no value satisfies it, so no Conv runs: max 7, multiple of 8, a "
        "kernel is 1 "
        "or more. Correct it.",
    ),
    "limit below one": (
        "kernel = { max = 7 }",
        "kernel = { max = 0 }",
        "error: operators.Conv.limits.kernel: no value satisfies it, so no Conv runs: max 0, a kernel is 1 or more. "
        "Correct it.",
    ),
    "limit between two integers": (
        "kernel = { max = 7 }",
        "kernel = { min = 2.2, max = 2.8 }",
        "error: operators.Conv.limits.kernel: no value satisfies it, so no Conv runs: min 2.2, max 2.8, a kernel "
        "is 1 or "
        "more. Correct it.",
    ),
    "listed values outside their bounds": (
        "kernel = { max = 7 }",
        "kernel = { max = 7, values = [9, 11] }",
        "error: operators.Conv.limits.kernel: no value satisfies it, so no Conv runs: max 7, values 9, 11, a "
        "kernel is 1 "
        "or more. Correct it.",
    ),
    "one listed value that can never be": (
        "stride = [1, 2]",
        "stride = [0, 1, [1, 0]]",
        "warning: operators.Conv.limits.stride: 0, [1, 0] can never be: values 0, 1, [1, 0], a stride is 1 or more. "
        "Take it out.",
    ),
    "no scale within the bounds": (
        'formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel", scale = { kind = "power_of_two"',
        'formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel", scale = { kind = "power_of_two", '
        "min = 0.3, max = 0.4",
        "error: formats.w8.scale: no power of two lies within its bounds. Widen min and max, or exponent_min and "
        "exponent_max.",
    ),
    "fixed scale that is no power of two": (
        "scale = 0.0078125",
        "scale = 0.0079",
        "error: operators.Softmax.fixed_output.a8.scale: 0.0079 is no legal scale of format a8. Correct one of them.",
    ),
    "fixed zero point that is not allowed": (
        "scale = 0.0078125, zero_point = 0",
        "scale = 0.0078125, zero_point = -128",
        "error: operators.Softmax.fixed_output.a8.zero_point: -128 is no zero point of format a8, which has 0. Correct "
        "one.",
    ),
    "accumulator narrower than a product": (
        "accumulators.acc = { bits = 32",
        "accumulators.acc = { bits = 14",
        "warning: kernels.mac.accumulator: acc has 14 bits, and one product of its formats needs 15. Correct one.",
    ),
    "bias wider than its accumulator": (
        "biases.b = { bits = 32",
        "biases.b = { bits = 40",
        "info: kernels.mac.bias: b has 40 bits, and the accumulator it is added to 32; what is stored wider than it is "
        "added are storage_bits.",
    ),
    "bias of a sum on several scales": (
        'zero_point = 0, per = "out_channel", scale',
        'zero_point = 0, per = "group", group_size = 32, scale',
        "warning: kernels.mac.bias: b is in units of the sum, and with w8 a sum has a scale per group: nothing that "
        'has a bias is planned there. Give the bias a scale of its own (scale = "own"), or bits = "float".',
    ),
    "sum on several scales": (
        'zero_point = 0, per = "out_channel", scale',
        'zero_point = 0, per = "group", group_size = 32, scale',
        "info: kernels.mac.weight: with w8 a sum has a scale per group, and no field says how these become one: "
        "qhw verify and qhw golden cannot answer there.",
    ),
    "bias narrower than a product": (
        "biases.b = { bits = 32",
        "biases.b = { bits = 8",
        "info: kernels.mac.bias: b has 8 bits on the scale of products, of which the largest needs 15.",
    ),
    "pairs no narrower than the sum": (
        'overflow = "wrap" }',
        'overflow = "wrap", pairwise = { bits = 32 } }',
        "warning: accumulators.acc.pairwise.bits: has 32 bits, no fewer than the accumulator's 32. Leave "
        "pairwise out, or "
        "correct one.",
    ),
    "shifts that leave nothing": (
        "shift = { min = 0, max = 31 }",
        "shift = { min = 32, max = 40 }",
        "error: kernels.mac.requantize: mul shifts right by 32 or more, and sums have 32 bits: nothing is left "
        "of them.",
    ),
    "shifts to the left alone": (
        "shift = { min = 0, max = 31 }",
        "shift = { min = -31, max = -1 }",
        "warning: requantize.mul.shift.max: -1 only ever shifts left, and sums are wider than results. Is its "
        "sign wrong?",
    ),
    "ratios below all shifts": (
        "shift = { min = 0, max = 31 }",
        "shift = { min = 0, max = 2 }, ratio = { max = 0.125 }",
        "error: requantize.mul.ratio: no ratio is legal: at most 0.125, and shifts of at most 2 give 0.25 or "
        "more. Correct "
        "one.",
    ),
    "ratios above all shifts": (
        "shift = { min = 0, max = 31 }",
        "shift = { min = 1, max = 31 }, ratio = { min = 0.75 }",
        "error: requantize.mul.ratio: no ratio is legal: at least 0.75, and shifts from 1 give 0.5 or less. "
        "Correct one.",
    ),
    "inequality of scales without an exponent": (
        'accumulator = "long" }',
        'accumulator = "long", exponents = [{ terms = { input = 1 }, min = 0 }] }',
        "warning: kernels.wide.exponents.0: format a16 has scales that are no powers of two, which have no exponent. "
        "Remove one.",
    ),
    "inequality that no scales satisfy": (
        'requantize = "mul"\n',
        'requantize = "mul"\nexponents = [{ terms = { input = 1, output = -1 }, min = 9 }]\n',
        "error: kernels.mac.exponents.0: no scales satisfy it: the sum is at most 8, and min is 9. Correct one.",
    ),
    "inequality that all scales exceed": (
        'requantize = "mul"\n',
        'requantize = "mul"\nexponents = [{ terms = { input = 1, output = -1 }, max = -9 }]\n',
        "error: kernels.mac.exponents.0: no scales satisfy it: the sum is at least -8, and max is -9. Correct one.",
    ),
    "one scale for formats that have none in common": (
        'kernels.two = { input = ["a8"], output = ["a8"]',
        'kernels.two = { input = ["a8"], output = ["a16"]',
        "warning: kernels.two: MaxPool puts its tensors on one scale (same_scale), and no format stands in all of its "
        "lists. Correct one of them.",
    ),
    "two defaults": (
        "clock_hz = 1e8 }",
        "clock_hz = 1e8, is_default = true }",
        "warning: clocks.slow.is_default: fast is the default already. Keep one.",
    ),
    "clock in MHz": (
        "clock_hz = 1e8 }",
        "clock_hz = 100 }",
        "warning: clocks.slow.clock_hz: 100 is very little; the unit is hertz: 200 MHz are 200e6. Correct it.",
    ),
    "bandwidth in GB/s": (
        "clock_hz = 1e8 }",
        "clock_hz = 1e8 }\nmemories.sram = { bandwidth_bytes_per_s = 3.2 }",
        "warning: memories.sram.bandwidth_bytes_per_s: 3.2 is very little; the unit is bytes per second: 3.2 GB/s are "
        "3.2e9. Correct it.",
    ),
    "capacity in MB": (
        "clock_hz = 1e8 }",
        "clock_hz = 1e8 }\nmemories.sram = { capacity_bytes = 2 }",
        "warning: memories.sram.capacity_bytes: 2 is very little; the unit is bytes: 256 KiB are 262144. Correct it.",
    ),
    "peak in TOPS": (
        "clock_hz = 1e8 }",
        "clock_hz = 1e8 }\ncost = { peak_ops_per_s = 4 }",
        "warning: cost.peak_ops_per_s: 4 is very little; the unit is operations per second: 4 TOPS are 4e12. Correct "
        "it.",
    ),
    "softmax in fixed point without shifts to the left": (
        'kernels.two = { input = ["a8"], output = ["a8"], accumulator = "acc" }\n',
        'kernels.two = { input = ["a8"], output = ["a8"], accumulator = "acc", requantize = "fix" }\n'
        'requantize.fix = { kind = "fixed_point", rounding = "half_even", shift = { min = 0 } }\n'
        'operators.LogSoftmax = { kernels = ["two"], approximation = { kind = "fixed_point", integer_bits = 5 } }\n',
        "warning: kernels.two.requantize: LogSoftmax "
        "multiplies by 2^26 times the input's scale here, and shift.min = 0 "
        "allows no shift left. Give it a kernel with a requantize of its own.",
    ),
    "choice that the field does not follow": (
        "[kernels.mac]",
        '[[conflicts]]\nfield = "accumulators.acc.bits"\nreadings = [{ value = 32, source = "memory" }, { value = 40, '
        'source = "memory" }]\nchosen = 40\n[kernels.mac]',
        "warning: conflicts.0.chosen: chooses 40 for accumulators.acc.bits, which says 32. Correct one of them.",
    ),
}
BOUNDED = (
    'scale = { kind = "power_of_two" }',
    'scale = { kind = "power_of_two", exponent_min = -8, exponent_max = 0 }',
)


@cache
def said(text: str) -> list[str]:
    return [str(finding) for finding in lint(parse_target(text))]


def test_the_whole_target_is_clean() -> None:
    found = said(WHOLE)
    assert [line for line in found if not line.endswith("recorded, not used yet.")] == []


@pytest.mark.parametrize("case", CASES)
def test_a_rule_broken(case: str) -> None:
    old, new, message = CASES[case]
    whole = WHOLE.replace(*BOUNDED) if "no scales satisfy" in message else WHOLE
    assert old in whole
    assert message not in said(whole)
    assert message in said(whole.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('kernels = ["mac"] }', 'kernels = ["mac", "roomy"] }', id="a kernel with a wider accumulator"),
        pytest.param('kernels = ["mac"] }', 'kernels = ["bare", "mac"] }', id="a kernel behind one without a bias"),
        pytest.param("stride = [1, 2]", 'stride = "any"', id="no limit"),
        pytest.param("kernel = { max = 7 }", "kernel = { min = 3, max = 9, multiple_of = 4 }", id="4 or 8"),
        pytest.param("kernel = { max = 7 }", 'groups = ["1", "channels"]', id="words"),
        pytest.param("kernel = { max = 7 }", "rank = { max = 4 }", id="a rank"),
        pytest.param("accumulators.acc = { bits = 32", "accumulators.acc = { bits = 15", id="just a product"),
        pytest.param(
            "shift = { min = 0, max = 31 }", "shift = { min = 0, max = 2 }, ratio = { max = 0.25 }", id="one ratio"
        ),
    ],
)
def test_what_is_reached_is_not_remarked(old: str, new: str) -> None:
    more = (
        'kernels.roomy = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "b", accumulator = "long" }\n'
        'kernels.bare = { input = ["a8"], weight = ["w8"], output = ["a8"], bias = "none", accumulator = "acc" }\n'
    )
    assert old in WHOLE
    text = WHOLE.replace(old, new, 1).replace("[kernels.mac]", f"{more}[kernels.mac]")
    used = [line for line in said(text) if "no operator refers" not in line and not line.startswith("info")]
    assert used == []


def test_what_a_base_wrote_for_its_own_formats_is_not_remarked(tmp_path: Path) -> None:
    base = tmp_path / "base.toml"
    base.write_text(WHOLE)
    child = (
        'schema_version = 1\nname = "acme/child"\nextends = "base.toml"\n'
        'kernels.two = { input = ["a16"], output = ["a16"] }\n'
    )

    def warned(more: str) -> list[str]:
        spec = parse_target(child + more, folder=tmp_path)
        return [finding.path for finding in lint(spec) if "holds for nothing" in finding.message]

    assert warned("") == []
    assert warned("operators.Add.preshift_bits = { a8 = 19 }\n") == ["operators.Add.preshift_bits.a8"]


def test_a_fixed_output_that_nothing_gives_any_more_is_no_contradiction(tmp_path: Path) -> None:
    """Of a format whose scales a child restricts, while it takes the operator's kernels away."""
    (tmp_path / "base.toml").write_text(WHOLE)
    child = (
        'schema_version = 1\nname = "acme/child"\nextends = "base.toml"\nformats.a8.scale = { exponent_max = -8 }\n'
        "operators.Softmax = { kernels = KERNELS }\n"
    )
    for kernels, expected in (('["two"]', ["operators.Softmax.fixed_output.a8.scale"]), ("[]", [])):
        spec = parse_target(child.replace("KERNELS", kernels), folder=tmp_path)
        assert [found.path for found in lint(spec) if "no legal scale" in found.message] == expected


def test_a_reading_that_a_child_replaces_is_no_contradiction(tmp_path: Path) -> None:
    old, new, _ = CASES["choice that the field does not follow"]
    (tmp_path / "base.toml").write_text(WHOLE.replace(old, new, 1).replace("chosen = 40", "chosen = 32"))
    child = 'schema_version = 1\nname = "acme/child"\nextends = "base.toml"\naccumulators.acc = { bits = 24 }\n'
    assert not [found for found in lint(parse_target(child, folder=tmp_path)) if "chooses" in found.message]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        pytest.param('per = "out_channel", scale = { kind = "power_of_two" }',
                     'per = "out_channel", scale = { kind = "fixed", values = [0.5] }', id="weights are fixed, too"),
        pytest.param('output = ["a8"]\nbias', 'output = ["a16"]\nbias', id="results have another format"),
        pytest.param('weight = ["w8"]\noutput', "output", id="no weights"),
    ],
)  # fmt: skip
def test_data_on_one_scale_that_nothing_can_take_up_is_not_remarked(old: str, new: str) -> None:
    free, fixed, message = CASES["data on one scale beside weights that are free"]
    assert old in WHOLE
    assert message not in said(WHOLE.replace(free, fixed, 1).replace(old, new, 1))


def test_the_kinds_are_those_of_the_graph() -> None:
    assert KNOWN_KINDS == OPERATOR_KINDS == tuple(sorted(OPERATOR_KINDS))
    assert {rule.kind for rule in ATEN_KINDS.values()} <= set(OPERATOR_KINDS)
