# SPDX-License-Identifier: Apache-2.0
"""Fields that a target leaves open: each is named, with the operators whose result it decides and who needs it."""

import pytest

from qhw.schema import open_fields, parse_target

WHOLE = """\
schema_version = 1
name = "acme/whole"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }
accumulators.acc = { bits = 32, overflow = "wrap" }
requantize.r = { kind = "fixed_point", rounding = "half_even", multiplier_bits = 31, shift = { min = -8, max = 31 } }
kernels.mac = { input = ["a8"], weight = ["w8"], bias = "b", output = ["a8"], accumulator = "acc", requantize = "r" }
kernels.map = { input = ["a8"], output = ["a8"], requantize = "r" }
operators.Conv = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Gemm = { kernels = ["mac"], rounding_order = "zero_point_after" }
operators.Add = { kernels = ["map"], rounding_order = "zero_point_after", preshift_bits = { a8 = 20 } }
operators.ReduceMean = { kernels = ["map"], rounding_order = "zero_point_after" }
operators.Relu = { kernels = ["map"], rounding_order = "zero_point_after" }
operators.Tanh = { kernels = ["map"], approximation = { kind = "table" } }
operators.MaxPool = { kernels = ["map"] }
operators.Reshape = { same_scale = "input_output" }
artefact = { exporter = "theirs", executor = "theirs" }
"""
EXACT = "qhw verify and qhw golden cannot answer for "
SUMS = "qhw verify, qhw golden and qhw accumulators cannot answer for "
EVERY = "Conv, Gemm, Add, ReduceMean and Relu"


def said(text: str) -> dict[str, str]:
    """But for figures of cost, which tests/unit/roofline/test_open_costs.py asks for."""
    fields = (field for field in open_fields(parse_target(text)) if "qhw cost" not in field.commands)
    return {".".join(map(str, field.path)): field.sentence() for field in fields}


def test_a_target_that_states_all_leaves_nothing_open() -> None:
    assert said(WHOLE) == {}


CASES = {
    "no bias": ('bias = "b", ', "", "kernels.mac.bias", f"absent: {SUMS}Conv and Gemm, where they have a bias"),
    "unknown bias": (
        'bias = "b", ', 'bias = "unknown", ', "kernels.mac.bias",
        f"unknown: {SUMS}Conv and Gemm, where they have a bias",
    ),
    "bias of unknown bits": (
        "biases.b = { bits = 32, ", "biases.b = { ", "biases.b.bits",
        f"absent: {SUMS}Conv and Gemm, where they have a bias",
    ),
    "no place of the bias": (
        ', applied = "before_requantize"', "", "biases.b.applied",
        f"absent: {EXACT}Conv and Gemm, where they have a bias",
    ),
    "no accumulator": (', accumulator = "acc"', "", "kernels.mac.accumulator", f"absent: {SUMS}Conv and Gemm"),
    "accumulator of unknown width": (
        "acc = { bits = 32", 'acc = { bits = "unknown"', "accumulators.acc.bits", f"unknown: {SUMS}Conv and Gemm"
    ),
    "unknown overflow": (
        'overflow = "wrap"', 'overflow = "unknown"', "accumulators.acc.overflow",
        f"unknown: {EXACT}Conv and Gemm, where a sum may not fit",
    ),
    "unknown pairs": (
        'overflow = "wrap"', 'overflow = "wrap", pairwise = "unknown"', "accumulators.acc.pairwise",
        f"unknown: {EXACT}Conv and Gemm",
    ),
    "no requantization": (
        'accumulator = "acc", requantize = "r"', 'accumulator = "acc"', "kernels.mac.requantize",
        f"absent: {EXACT}Conv and Gemm",
    ),
    "no kind": ('kind = "fixed_point", ', "", "requantize.r.kind", f"absent: {EXACT}{EVERY}"),
    "no rounding": ('rounding = "half_even", ', "", "requantize.r.rounding", f"absent: {EXACT}{EVERY}"),
    "no multiplier bits": ("multiplier_bits = 31, ", "", "requantize.r.multiplier_bits", f"absent: {EXACT}{EVERY}"),
    "no shift": (", shift = { min = -8, max = 31 }", "", "requantize.r.shift", f"absent: {EXACT}{EVERY}"),
    "no longest shift": (
        ", max = 31", "", "requantize.r.shift.max", f"absent: {EXACT}{EVERY}, where they shift right"
    ),
    "unknown regridding": (
        "multiplier_bits = 31", 'multiplier_bits = 31, regrid = "unknown"', "requantize.r.regrid",
        f"unknown: {EXACT}{EVERY}",
    ),
    "no order": (
        'Gemm = { kernels = ["mac"], rounding_order = "zero_point_after" }', 'Gemm = { kernels = ["mac"] }',
        "operators.Gemm.rounding_order", f"absent: {EXACT}Gemm, where a zero point is not 0",
    ),
    "unknown ratio": (
        'Gemm = { kernels = ["mac"]', 'Gemm = { kernels = ["mac"], ratio = "unknown"', "operators.Gemm.ratio",
        f"unknown: {EXACT}Gemm",
    ),
    "unknown mean": (
        'ReduceMean = { kernels = ["map"]', 'ReduceMean = { kernels = ["map"], mean_count = "unknown"',
        "operators.ReduceMean.mean_count", f"unknown: {EXACT}ReduceMean",
    ),
    "no pre-shift": (
        ", preshift_bits = { a8 = 20 }", "", "operators.Add.preshift_bits", f"absent: {EXACT}Add"
    ),
    "no function": (
        ', approximation = { kind = "table" }', "", "operators.Tanh.approximation", f"absent: {EXACT}Tanh"
    ),
    "function of no kind": (
        'approximation = { kind = "table" }', "approximation = {}", "operators.Tanh.approximation.kind",
        f"absent: {EXACT}Tanh",
    ),
    "fixed point without bits": (
        'Tanh = { kernels = ["map"], approximation = { kind = "table" } }',
        'Softmax = { kernels = ["map"], approximation = { kind = "fixed_point", integer_bits = 5 } }',
        "operators.Softmax.approximation.sum_integer_bits",
        f"absent: {EXACT}Softmax",
    ),
    "table with holes": (
        'Tanh = { kernels = ["map"], approximation = { kind = "table" } }',
        'Log = { kernels = ["map"], approximation = { kind = "table" } }',
        "operators.Log.approximation.outside",
        f"absent: {EXACT}Log, where operands have codes without a value",
    ),
    "table of unknown quotient": (
        'approximation = { kind = "table" }',
        'approximation = { kind = "table", quotient = "unknown" }',
        "operators.Tanh.approximation.quotient",
        f"unknown: {EXACT}Tanh",
    ),
    "saturating in steps of unknown size": (
        'overflow = "wrap"',
        'overflow = "saturate", order = "channel_fastest", bias_added = "last"',
        "accumulators.acc.products_per_step",
        f"absent: {EXACT}Conv and Gemm, where a sum may not fit",
    ),
    "saturating in an unknown order": (
        'overflow = "wrap"',
        'overflow = "saturate", products_per_step = 1, bias_added = "last"',
        "accumulators.acc.order",
        f"absent: {EXACT}Conv and Gemm, where a sum may not fit",
    ),
    "saturating with a bias at an unknown time": (
        'overflow = "wrap"',
        'overflow = "saturate", products_per_step = "all", bias_added = "unknown"',
        "accumulators.acc.bias_added",
        f"unknown: {EXACT}Conv and Gemm, where a sum may not fit",
    ),
    "pairs of unknown operands": (
        'overflow = "wrap"',
        'overflow = "wrap", order = "channel_fastest", pairwise = { bits = 16, overflow = "saturate" }',
        "accumulators.acc.pairwise.operands",
        f"absent: {EXACT}Conv and Gemm, where two products may not fit",
    ),
    "bias of its own scale": (
        'biases.b = { bits = 32, scale = "input*weight", applied = "before_requantize" }',
        'biases.b = { bits = 32, scale = "own", applied = "before_requantize" }',
        "biases.b.align",
        f"absent: {EXACT}Conv and Gemm, where the bias has another scale than the sum",
    ),
    "no executor": (
        ', executor = "theirs"', "", "artefact.executor",
        "absent: qhw verify cannot run the artefact, and compares with the simulation alone",
    ),
    "no exporter": (
        'exporter = "theirs", ', "", "artefact.exporter",
        "absent: qhw quantize writes a portable artefact, not the toolchain's own",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_an_open_field_is_named_with_those_who_need_it(case: str) -> None:
    old, new, path, sentence = CASES[case]
    assert old in WHOLE
    assert said(WHOLE.replace(old, new)) == {path: sentence}


def test_what_does_not_decide_is_not_named() -> None:
    symmetric = WHOLE.replace(
        'bits = 8, signed = true, per = "tensor"', 'codes = [-127, 127], zero_point = 0, per = "tensor"'
    )
    assert said(symmetric.replace(', rounding_order = "zero_point_after"', "")) == {}
    by_float = WHOLE.replace('kind = "fixed_point"', 'kind = "float32"').replace(", multiplier_bits = 31", "")
    assert (
        said(by_float.replace(", shift = { min = -8, max = 31 }", "").replace(", preshift_bits = { a8 = 20 }", ""))
        == {}
    )
    assert said(WHOLE.replace('bias = "b"', 'bias = "none"').replace("biases.b = { bits = 32, ", "biases.b = { ")) == {}
    own = WHOLE.replace('rounding = "half_even", ', "").replace(
        'rounding_order = "zero_point_after"', 'rounding = "half_even", rounding_order = "zero_point_after"'
    )
    assert said(own) == {}
    for rule in ("inputs", "all"):  # on one scale nothing is shifted first, and a sum is rescaled once
        without = WHOLE.replace("preshift_bits = { a8 = 20 }", f'same_scale = "{rule}"')
        assert said(without) == {"kernels.map.accumulator": f"absent: {EXACT}Add"}
        assert said(without.replace("kernels.map = {", 'kernels.map = { accumulator = "acc",')) == {}
    only_recorded = WHOLE.replace("requantize.r = { ", 'requantize.r = { shift_per = "unknown", ')
    assert said(only_recorded) == {}


def test_of_kernels_without_integers_no_arithmetic_is_asked_for() -> None:
    """No field would make their result exact; one kernel of integers beside them still needs its own."""
    floats = WHOLE.replace(
        "codes = [-127, 127], zero_point = 0", 'kind = "float", exponent_bits = 4, mantissa_bits = 3'
    )
    bare = floats.replace(', bias = "b", output = ["a8"], accumulator = "acc", requantize = "r"', ', output = ["a8"]')
    assert said(bare) == {}
    assert said(bare.replace('weight = ["w8"]', 'weight = ["w8", "a8"]')).keys() >= {"kernels.mac.accumulator"}


def test_an_operator_that_the_hardware_does_not_have_needs_nothing() -> None:
    for kernels in ("[]", '"unknown"'):
        assert (
            said(
                WHOLE.replace(
                    'Tanh = { kernels = ["map"], approximation = { kind = "table" } }',
                    f"Tanh = {{ kernels = {kernels} }}",
                )
            )
            == {}
        )
