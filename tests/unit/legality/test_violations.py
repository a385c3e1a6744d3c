# SPDX-License-Identifier: Apache-2.0
"""One operator, legal as it stands; then one thing is broken at a time, and the clause and the node are named.

The legal convolution: input scale 2^-5, weights 2^-7, output 2^-4, so that the shift is 5 + 7 - 4 = 8.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.quantized_files import CODES, OnnxFile, conv_file, gemm_file, grid

Broken = Callable[..., set[tuple[str, str]]]

# 27 products of 127 * 127 reach 435,483 < 2^19; with input codes down to -128 they reach 438,912 < 2^19, too.
FULL = np.full((4, 3, 3, 3), 127)

CASES: dict[str, tuple[OnnxFile, dict[str, Any], set[tuple[str, str]]]] = {
    "asymmetric weights": (conv_file(w=grid([2.0**-7] * 4, [0, 0, 3, 0])), {}, {("conv", "formats.w8.zero_point")}),
    "asymmetric input": (conv_file(x=grid(2.0**-5, 7)), {}, {("conv", "formats.a8.zero_point")}),
    "zero point not among those allowed": (
        conv_file(y=grid(2.0**-4, 5)),
        {"formats.a8.zero_point": [0, 4]},
        {("conv", "formats.a8.zero_point")},
    ),
    "unsigned input": (conv_file(x=grid(2.0**-5, 0, "uint8")), {}, {("conv", "kernels.mac.input")}),
    "int16 output": (conv_file(y=grid(2.0**-12, 0, "int16")), {}, {("conv", "kernels.mac.output")}),
    "int4 weights": (
        conv_file(codes=CODES.clip(-8, 7), w=grid([2.0**-7] * 4, 0, "int4")),
        {},
        {("conv", "kernels.mac.weight")},
    ),
    "real weights": (conv_file(w=None), {}, {("conv", "kernels.mac.weight")}),
    "real input": (conv_file(x=None, bias_grid=grid([2.0**-12] * 4, 0, "int32")), {}, {("conv", "kernels.mac.input")}),
    "real output": (conv_file(y=None), {"boundary.outputs": "quantized"}, {("conv", "kernels.mac.output")}),
    "code -128": (
        conv_file(codes=np.where(CODES == 10, -128, CODES)),
        {},
        {("conv", "formats.w8.codes")},
    ),
    "code outside of a set": (
        conv_file(),
        {"formats.w8": {"code_set": [-1, 1], "bits": 8, "signed": True, "zero_point": 0, "per": "out_channel"}},
        {("conv", "formats.w8.code_set")},
    ),
    "one scale per channel where one per tensor": (
        conv_file(),
        {"formats.w8.per": "tensor"},
        {("conv", "formats.w8.per")},
    ),
    "scales along the input channels": (
        conv_file(w=grid([2.0**-7] * 3, axis=1), bias_grid=grid(2.0**-12, 0, "int32")),
        {},
        {("conv", "formats.w8.per")},
    ),
    "groups where one scale per channel": (
        gemm_file(w=grid(np.full((4, 2), 2.0**-7), axis=1, block_size=4)),
        {},
        {("gemm", "formats.w8.per")},
    ),
    "groups of another size": (
        gemm_file(w=grid(np.full((4, 2), 2.0**-7), axis=1, block_size=4)),
        {"formats.w8.per": "group", "formats.w8.group_size": 8},
        {("gemm", "formats.w8.group_size")},
    ),
    "scale no power of two": (conv_file(x=grid(0.03)), {}, {("conv", "formats.a8.scale.kind")}),
    "scale below the smallest exponent": (
        conv_file(x=grid(2.0**-14)),
        {},
        {("conv", "formats.a8.scale.exponent_min")},
    ),
    "scale above the largest exponent": (
        conv_file(y=grid(2.0)),
        {},
        {("conv", "formats.a8.scale.exponent_max")},
    ),
    "scale not enumerated": (
        conv_file(),
        {"formats.w8.scale": {"kind": "enumerated", "values": [0.5, 0.25]}},
        {("conv", "formats.w8.scale.values")},
    ),
    "scale below a bound": (
        conv_file(),
        {"formats.w8.scale": {"kind": "float32", "min": 0.01}},
        {("conv", "formats.w8.scale.min")},
    ),
    "scale above a bound": (
        conv_file(),
        {"formats.w8.scale": {"kind": "float32", "max": 0.001}},
        {("conv", "formats.w8.scale.max")},
    ),
    "dead channel of scale 0": (
        conv_file(w=grid([2.0**-7, 0.0, 2.0**-7, 2.0**-7]), bias=None),
        {},
        {("conv", "formats.w8.scale")},
    ),
    "bias too wide": (
        conv_file(bias=(40000, 0, 0, 0)),
        {"biases.b.bits": 16},
        {("conv", "biases.b.bits")},
    ),
    "bias with another scale": (
        conv_file(bias_grid=grid([2.0**-12, 2.0**-12, 2.0**-11, 2.0**-12], 0, "int32")),
        {},
        {("conv", "biases.b.scale")},
    ),
    "bias in real numbers": (
        conv_file(bias=(0.5, 0.0, 0.0, 0.0), is_bias_real=True),
        {},
        {("conv", "biases.b.bits")},
    ),
    "bias with a zero point": (
        conv_file(bias_grid=grid([2.0**-12] * 4, [0, 0, 1, 0], "int16")),
        {},
        {("conv", "biases.b.zero_point")},
    ),
    "bias of its own with a scale per channel": (
        conv_file(w=grid([2.0**-7, 2.0**-7, 2.0**-8, 2.0**-7])),
        {"biases.b.scale": "own", "biases.b.per": "tensor"},
        {("conv", "biases.b.per")},
    ),
    "bias of its own that no shift brings to the sum": (
        conv_file(bias_grid=grid(3 * 2.0**-12, 0, "int32")),
        {"biases.b.scale": "own", "biases.b.per": "tensor", "biases.b.align": "shift"},
        {("conv", "biases.b.align")},
    ),
    "bias where none can be added": (conv_file(), {"kernels.mac.bias": "none"}, {("conv", "kernels.mac.bias")}),
    "bias of too many channels": (conv_file(), {"biases.b.max_channels": 3}, {("conv", "biases.b.max_channels")}),
    "shift too long": (conv_file(y=grid(1.0)), {"requantize.r.shift.max": 11}, {("conv", "requantize.r.shift.max")}),
    "shift too short": (
        conv_file(y=grid(2.0**-12)),
        {"requantize.r.shift.min": 1},
        {("conv", "requantize.r.shift.min")},
    ),
    "multiplier too small": (
        # 2^-12 / 2^-4 = 2^-8 = 0.5 * 2^-7: a right shift of 7.
        conv_file(),
        {
            "requantize.r": {
                "kind": "fixed_point",
                "rounding": "half_even",
                "multiplier_bits": 15,
                "shift": {"min": 0, "max": 6},
            }
        },
        {("conv", "requantize.r.shift.max")},
    ),
    "ratio out of bounds": (
        conv_file(),
        {"requantize.r": {"kind": "float32", "rounding": "half_even", "ratio": {"min": 0.01, "max": 1.0}}},
        {("conv", "requantize.r.ratio.min")},
    ),
    "one multiplier for all channels": (
        conv_file(w=grid([2.0**-7, 2.0**-7, 2.0**-8, 2.0**-7])),
        {"requantize.r.per": "tensor"},
        {("conv", "requantize.r.per")},
    ),
    "ratio that is no shift": (
        conv_file(x=grid(0.03)),
        {"formats.a8.scale": {"kind": "float32"}},
        {("conv", "requantize.r.kind")},
    ),
    "exponents out of bounds": (
        # -5 - 7 + 4 = -8
        conv_file(),
        {"kernels.mac.exponents": [{"name": "cut", "terms": {"input": 1, "weight": 1, "output": -1}, "min": -7}]},
        {("conv", "kernels.mac.exponents.0.min")},
    ),
    "weights sum to too much": (
        # Rows of 27 codes of 127: 3429.
        conv_file(codes=FULL),
        {"kernels.mac.weight_abs_sum_max": 3428},
        {("conv", "kernels.mac.weight_abs_sum_max")},
    ),
    "accumulator overflows": (
        conv_file(codes=FULL, bias=None),
        {"accumulators.sum.bits": 19},
        {("conv", "accumulators.sum.bits")},
    ),
    "pairs of products overflow": (
        # 2 * 127 * 128 = 32512 fits 16 bits; of unsigned codes, 2 * 127 * 255 = 64770 does not.
        conv_file(codes=FULL, bias=None),
        {"accumulators.sum.pairwise": {"bits": 16, "overflow": "saturate", "operands": "unsigned"}},
        {("conv", "accumulators.sum.pairwise.bits")},
    ),
    "kernel too large": (
        conv_file(codes=np.ones((4, 3, 7, 7), int)),
        {},
        {("conv", "operators.Conv.limits.kernel")},
    ),
    "groups not allowed": (
        conv_file(codes=CODES[:, :1], group=3, bias=None, w=grid([2.0**-7] * 4)),
        {},
        {("conv", "operators.Conv.limits.groups")},
    ),
    "operator that is not there": (gemm_file(), {"operators.Gemm": None}, {("gemm", "operators.Gemm")}),
    "operator without kernels": (gemm_file(), {"operators.Gemm.kernels": []}, {("gemm", "operators.Gemm.kernels")}),
    "function that is not computed along": (
        conv_file(behind=["Sigmoid"]),
        {},
        {("conv", "operators.Conv.fused")},
    ),
    "chain longer than what is computed along": (
        conv_file(behind=["Relu", "Sigmoid"]),
        {},
        {("conv", "operators.Conv.fused")},
    ),
    "kernel with fusions of its own": (
        conv_file(behind=["Relu"]),
        {"kernels.mac.fused": []},
        {("conv", "kernels.mac.fused")},
    ),
    "width changes": (
        conv_file(y=grid(2.0**-4, 0, "int16")),
        {
            "operators.Conv.may_change_precision": False,
            "formats.a16": {"bits": 16, "signed": True, "zero_point": 0, "per": "tensor"},
            "kernels.mac.output": ["a16"],
        },
        {("conv", "operators.Conv.may_change_precision")},
    ),
    "old opset": (conv_file(opset=19), {"artefact.opset_min": 21}, {("", "artefact.opset_min")}),
    "too many weights": (conv_file(), {"network.max_weight_bytes": 107}, {("", "network.max_weight_bytes")}),
}


@pytest.mark.parametrize("case", CASES)
def test_one_broken_thing_is_named_with_its_clause_and_its_node(case: str, broken_by: Broken) -> None:
    file, changes, expected = CASES[case]
    assert broken_by(file, changes) == expected


@pytest.mark.parametrize(
    "file",
    [
        conv_file(),
        conv_file(bias=None),
        conv_file(behind=["Relu"]),
        conv_file(w=grid(2.0**-7), bias_grid=grid([2.0**-12] * 4, 0, "int32")),
        conv_file(codes=np.where(CODES == 10, -127, CODES)),
        gemm_file(),
    ],
    ids=["as it is", "without a bias", "with a Relu", "one scale for all channels", "lowest code", "product"],
)
def test_what_is_legal_is_judged_legal_and_nothing_is_left_open(file: OnnxFile, judged: Any) -> None:
    report = judged(file)
    assert (report.violations, report.unjudged) == ((), ())
    assert report.is_legal
    assert report.count("legal") == 1


def test_a_message_says_where_what_must_hold_what_was_got_and_what_to_do(judged: Any) -> None:
    (violation,) = judged(conv_file(w=grid([2.0**-7] * 4, [0, 0, 3, 0]))).violations
    assert violation.message == (
        "conv: w: formats.w8.zero_point must be 0; got zero point 3 (1 of 4 zero points). Quantize it symmetrically."
    )


def test_the_width_that_a_sum_needs_is_exact(broken_by: Broken) -> None:
    """Rows of 27 codes of 127 and inputs from -128: -438,912 needs 20 bits, and 19 are one too few."""
    file = conv_file(codes=FULL, bias=None)
    assert broken_by(file, {"accumulators.sum.bits": 20}) == set()
    assert broken_by(file, {"accumulators.sum.bits": 19}) == {("conv", "accumulators.sum.bits")}


def test_the_bias_counts_in_a_sum(broken_by: Broken) -> None:
    """438,912 + 85,376 = 524,288 = 2^19: -2^19 still fits 20 bits, one more does not."""
    for code, expected in ((-85376, set()), (-85377, {("conv", "accumulators.sum.bits")})):
        file = conv_file(codes=FULL, bias=(code, 0, 0, 0))
        assert broken_by(file, {"accumulators.sum.bits": 20}) == expected


def test_two_kernels_the_nearest_one_is_held_against(judged: Any) -> None:
    """int16 input and output and 8-bit weights are one thing away from the wide kernel, and two from the other."""
    wide = {"bits": 16, "signed": True, "zero_point": 0, "per": "tensor", "scale": {"kind": "power_of_two"}}
    changes = {
        "formats.a16": wide,
        "kernels.wide": {
            "input": ["a16"],
            "weight": ["w8"],
            "output": ["a16"],
            "accumulator": "sum",
            "requantize": "r",
        },
        "operators.Conv.kernels": ["mac", "wide"],
    }
    file = conv_file(x=grid(2.0**-5, 3, "int16"), y=grid(2.0**-4, 0, "int16"), bias=None)
    report = judged(file, changes)
    assert [(one.clause, one.tensor) for one in report.violations] == [("formats.a16.zero_point", "x")]
    assert report.operators[0].kernel == "wide"
