# SPDX-License-Identifier: Apache-2.0
"""Lint: what it says of a complete target, and of each thing that can be missing."""

from pathlib import Path

import pytest

from qhw.schema import lint, parse_target, read_target_file, recorded_fields

TINY = """\
schema_version = 1
name = "acme/tiny"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
accumulators.acc = { bits = 32, overflow = "wrap" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "acc" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
operators.Gemm = { kernels = ["mac"], fused = ["Relu"] }
"""


def said(text: str, **options: object) -> list[str]:
    """Every finding as it is printed."""
    return [str(finding) for finding in lint(parse_target(text), **options)]  # type: ignore[arg-type]


def test_the_small_complete_target_is_clean_but_for_information() -> None:
    assert said(TINY, known_kinds=("Conv", "Gemm", "Relu")) == [
        "info: fallback: is absent: where operators go that are not listed here is not said, and nothing is assumed.",
    ]


CASES = [
    (
        "no codes",
        "bits = 8, signed = true",
        "bits = 8",
        "error: formats.a8: a kernel uses it, and its codes are open. State bits and signed, or codes.",
    ),
    (
        "no granularity",
        ', per = "tensor"',
        "",
        'error: formats.a8: a kernel uses it, and per is absent. State per = "tensor", "out_channel" or "group".',
    ),
    (
        "no group size",
        'per = "out_channel"',
        'per = "group"',
        'error: formats.w8: per = "group" needs group_size. State it, or the sizes allowed.',
    ),
    (
        "no values",
        'per = "tensor"',
        'per = "tensor", scale = { kind = "fixed" }',
        'error: formats.a8.scale: kind = "fixed" needs values. State them.',
    ),
    (
        "unsigned weights with zero point 0",
        "codes = [-127, 127], zero_point = 0",
        "bits = 8, signed = false, zero_point = 0",
        "warning: kernels.mac.weight: no format holds a negative weight: w8 has codes [0, 255], none below its zero "
        "point. State signed codes, or free the zero point.",
    ),
    (
        "zero points at the lowest code",
        "codes = [-127, 127], zero_point = 0",
        "codes = [0, 3], zero_point = [0]",
        "warning: kernels.mac.weight: no format holds a negative weight: w8 has codes [0, 3], none below its zero "
        "point. State signed codes, or free the zero point.",
    ),
    (
        "weights of one bit",
        "codes = [-127, 127], zero_point = 0",
        "bits = 1, signed = true, zero_point = 0",
        "warning: kernels.mac.weight: w8 has 2 codes, too few for a weight's sign and 0.0. State at least 3 codes.",
    ),
    (
        "weights of two codes",
        "codes = [-127, 127]",
        "codes = [-1, 0]",
        "warning: kernels.mac.weight: w8 has 2 codes, too few for a weight's sign and 0.0. State at least 3 codes.",
    ),
    (
        "no legal format",
        "codes = [-127, 127], zero_point = 0",
        'kind = "palette"',
        "error: operators.Conv: has no legal format, none of its kernels can be planned. "
        'mac: weight w8: palette: absent; kind = "palette" needs it.',
    ),
    (
        "absent operand",
        ', output = ["a8"]',
        "",
        "error: operators.Gemm: has no legal format, none of its kernels can be planned. mac: output is absent.",
    ),
    (
        "unknown operand",
        'input = ["a8"]',
        'input = "unknown"',
        "error: operators.Conv: has no legal format, none of its kernels can be planned. mac: input is unknown.",
    ),
    (
        "unknown bits",
        "bits = 8, signed",
        'bits = "unknown", signed',
        "warning: formats.a8.bits: unknown: what depends on it cannot be planned.",
    ),
    (
        "unknown accumulator",
        "bits = 32",
        'bits = "unknown"',
        "info: accumulators.acc.bits: unknown: not published, and nothing is assumed in its place.",
    ),
    (
        "unused format",
        "accumulators.acc",
        "formats.old = { bits = 4 }\naccumulators.acc",
        "warning: formats.old: no kernel refers to it. Refer to it, or remove it.",
    ),
    (
        "unused kernel",
        "accumulators.acc",
        'kernels.old = { input = ["a8"] }\naccumulators.acc',
        "warning: kernels.old: no operator refers to it. Refer to it, or remove it.",
    ),
    (
        "unused accumulator",
        ', accumulator = "acc" }',
        " }",
        "warning: accumulators.acc: no kernel refers to it. Refer to it, or remove it.",
    ),
    (
        "operator that says nothing",
        "accumulators.acc",
        "operators.Reshape = {}\naccumulators.acc",
        "warning: operators.Reshape: names no kernels and no same_scale rule, so nothing says which formats it takes. "
        "State one of the two.",
    ),
    (
        "operator the hardware does not have",
        "accumulators.acc",
        "operators.Elu = { kernels = [] }\naccumulators.acc",
        "info: operators.Elu.kernels: is empty: this hardware does not have the operator.",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_what_is_missing_is_said(old: str, new: str, message: str) -> None:
    assert old in TINY and message not in said(TINY)
    assert message in said(TINY.replace(old, new))


@pytest.mark.parametrize(
    "form",
    [
        pytest.param("codes = [-1, 1], zero_point = 0", id="ternary"),
        pytest.param("bits = 8, signed = false", id="unsigned with no zero point stated"),
        pytest.param('bits = 8, signed = false, zero_point = "free"', id="unsigned with a free zero point"),
        pytest.param("bits = 8, signed = false, zero_point = 128", id="unsigned with zero point 128"),
        pytest.param("bits = 8, signed = false, zero_point = [0, 128]", id="one zero point of two is high enough"),
        pytest.param('bits = "unknown", signed = false, zero_point = 0', id="codes that are open"),
    ],
)
def test_weights_with_a_sign_and_three_codes_are_not_remarked(form: str) -> None:
    assert not [
        line for line in said(TINY.replace("codes = [-127, 127], zero_point = 0", form)) if "mac.weight" in line
    ]


def test_one_format_with_negative_weights_is_enough() -> None:
    extra = 'formats.u8 = { bits = 8, signed = false, zero_point = 0, per = "tensor" }\naccumulators.acc'
    text = TINY.replace("accumulators.acc", extra, 1)
    both = text.replace('weight = ["w8"]', 'weight = ["w8", "u8"]')
    assert not [line for line in said(both) if "mac.weight" in line]
    third = 'formats.u4 = { codes = [1, 15], zero_point = 1, per = "tensor" }\naccumulators.acc'
    neither = text.replace("accumulators.acc", third, 1).replace('weight = ["w8"]', 'weight = ["u8", "u4"]')
    assert (
        "warning: kernels.mac.weight: no format holds a negative weight: u8 has codes [0, 255]; u4 has codes [1, 15], "
        "none below their zero points. State signed codes, or free the zero point."
    ) in said(neither)


def test_data_movement_needs_no_kernel() -> None:
    text = f'{TINY}operators.Reshape = {{ same_scale = "input_output" }}\n'
    assert not [line for line in said(text) if "Reshape" in line]


def test_kinds_are_compared_with_those_there_are() -> None:
    lines = said(TINY.replace("Gemm", "Conv2d"), known_kinds=("Conv", "Gemm", "Relu"))
    assert "warning: operators.Conv2d: 'Conv2d' is not an operator kind qhw knows. Closest: Conv." in lines
    lines = said(TINY.replace('"Relu"', '["Add", "Relu6"]'), known_kinds=("Conv", "Gemm", "Relu", "Add"))
    assert "warning: operators.Gemm.fused: 'Relu6' is not an operator kind qhw knows. Closest: Relu." in lines


def test_sources_are_asked_for_only_where_a_file_has_some() -> None:
    text = TINY.replace('name = "acme/tiny"', 'name = "acme/tiny"\nsources = { DOC = "manual" }\nfallback = "host"')
    text = text.replace("zero_point = 0", 'zero_point = 0, source = { codes = "DOC", per = "memory" }')
    lines = said(text)
    assert "warning: fallback: no source beside fallback. Name one, or write memory." in lines
    assert "warning: formats.a8: no source beside bits, signed, per. Name one, or write memory." in lines
    assert "warning: formats.w8: no source beside zero_point. Name one, or write memory." in lines
    assert not [line for line in said(TINY) if "source" in line]


def test_findings_carry_their_place_and_come_by_severity(tmp_path: Path) -> None:
    path = tmp_path / "my.toml"
    path.write_text(TINY.replace(', per = "tensor"', "").replace("bits = 32, ", "bits = 32, signed = true, "))
    loaded = read_target_file(path)
    findings = lint(loaded.spec, loaded.located)
    assert [finding.severity for finding in findings] == ["error", "error", "error", "info", "info"]
    assert (findings[0].place, findings[0].path) == (f"{path}:3", "formats.a8")
    assert str(findings[-1]) == f"info: {path}:5  accumulators.acc.signed: recorded, not used yet."


def test_recorded_fields_are_those_marked_in_the_models() -> None:
    text = TINY.replace('per = "tensor"', 'per = "tensor", rounding = "to_odd", scale = { kind = "fixed_point" }')
    text = text.replace("bits = 32, ", "bits = 32, signed = true, ")
    text = text.replace("operators.Gemm = { ", "operators.Gemm = { limits = { rank = [2], rescale = { max = 2 } }, ")
    assert set(recorded_fields(parse_target(text))) == {
        ("formats", "a8", "rounding"),
        ("formats", "a8", "scale", "kind"),
        ("accumulators", "acc", "signed"),
        ("operators", "Gemm", "limits", "rescale"),
    }


def test_what_only_a_check_of_files_reads_is_said_so() -> None:
    text = TINY + 'network.static_shapes = true\nboundary.artefact_io = "integer"\n'
    lines = said(text)
    assert "info: network.static_shapes: recorded: only `qhw check` reads it." in lines
    assert "info: boundary.artefact_io: recorded, not used yet." in lines
    spec = parse_target(text)
    assert list(recorded_fields(spec, judged=True)) == [("network", "static_shapes")]
    assert list(recorded_fields(spec, judged=False)) == [("boundary", "artefact_io")]


def test_what_a_base_wrote_may_be_unused_in_a_child() -> None:
    child = 'schema_version = 1\nname = "acme/child"\nextends = "acme/tiny"\n'
    child += 'formats.w4 = { bits = 4, signed = true, zero_point = 0, per = "tensor" }\nkernels.mac.weight = ["w4"]\n'
    base = parse_target(TINY)

    def unused(text: str) -> list[str]:
        found = lint(parse_target(text, find_base=lambda name: base if name == "acme/tiny" else None))
        return [finding.path for finding in found if "refers to it" in finding.message]

    assert unused(child) == []
    assert unused(child + "formats.empty = {}\n") == ["formats.empty"]
    assert unused(child.replace('["w4"]', '["w8"]')) == ["formats.w4"]
    assert unused(child + "formats.w8.bits = 8\n") == ["formats.w8"]


def test_sources_that_no_claim_names_are_said(tmp_path: Path) -> None:
    text = TINY.replace(
        'name = "acme/tiny"', 'name = "acme/tiny"\nsources = { DOC = "manual", OLD = "draft", BOTH = "b" }'
    )
    text = text.replace("zero_point = 0", 'zero_point = 0, source = { codes = "DOC", "*" = "memory" }')
    text += (
        '[[conflicts]]\nfield = "formats.w8.codes"\nreadings = [{ value = "[-127, 127]", source = "DOC" }, '
        '{ value = "[-128, 127]", source = ["BOTH"] }]\n'
    )
    unnamed = "no claim names it. Name it beside what it says, or remove it."
    assert [line for line in said(text) if "claim names it" in line] == [f"warning: sources.OLD: {unnamed}"]
    (tmp_path / "base.toml").write_text(text)
    child = 'schema_version = 1\nname = "acme/child"\nextends = "base.toml"\n'
    assert not [f for f in lint(parse_target(child, folder=tmp_path)) if "claim names it" in f.message]


def test_a_kernel_without_integers_has_no_exact_form() -> None:
    floats = 'kind = "float", exponent_bits = 4, mantissa_bits = 3, finite_max = 448'
    wanted = (
        "info: kernels.mac: reads no integers: qhw verify, qhw golden and qhw accumulators have no exact form of it."
    )
    assert wanted in said(TINY.replace("codes = [-127, 127], zero_point = 0", floats))
    assert wanted not in said(TINY)


def test_a_kind_of_a_plugin_is_said_and_not_looked_for() -> None:
    text = TINY.replace("codes = [-127, 127], zero_point = 0", 'kind = "posit", parameters = { es = 1 }')
    wanted = (
        'info: formats.w8.kind: "posit" needs a plugin that brings it ("qhw plugin list"); lint does not look for one.'
    )
    assert wanted in said(text) and not [line for line in said(text) if line.startswith("error")]
    assert not [line for line in said(TINY) if "needs a plugin" in line]
