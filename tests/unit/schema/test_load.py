# SPDX-License-Identifier: Apache-2.0
"""Loading: what a good file gives, and the message of every kind of bad one."""

import os
import re
from pathlib import Path

import pytest

from qhw.errors import TargetError
from qhw.schema import load_target_file, parse_target, to_json
from tests.target_texts import TINY, refused


def test_a_small_target_loads() -> None:
    spec = parse_target(TINY)
    assert (spec.schema_version, spec.name, spec.fallback) == (1, "acme/tiny", None)
    assert spec.kernels["mac"].weight == ("w8",)
    assert spec.operators["Conv"].fused == ("Relu",)


def test_json_round_trip_is_exact() -> None:
    spec = parse_target(TINY)
    text = to_json(spec)
    again = parse_target(text, name_of_file="target.json")
    assert again == spec and to_json(again) == text


CASES = [
    (
        "wrong type",
        "bits = 8, signed",
        'bits = "8", signed',
        'my.toml:3  formats.a8.bits: must be an integer from 1 to 64 or "unknown"; got "8". Remove the quotes.',
    ),
    (
        "real number for an integer",
        "bits = 32",
        "bits = 32.0",
        'my.toml:5  accumulators.acc.bits: must be an integer from 1 to 128, "per_layer" or "unknown"; got 32.0. '
        "Write 32.",
    ),
    (
        "out of range",
        "bits = 8, signed",
        "bits = 65, signed",
        'my.toml:3  formats.a8.bits: must be an integer from 1 to 64 or "unknown"; got 65.',
    ),
    (
        "misspelt word",
        '"out_channel"',
        '"out_chanel"',
        'my.toml:4  formats.w8.per: must be "tensor", "out_channel", "group", "row", "block" or "unknown"; '
        'got "out_chanel". Closest: out_channel.',
    ),
    (
        "code outside the bits",
        "[-127, 127]",
        "[-127, 300]",
        "my.toml:4  formats.w8.codes: upper code 300 does not fit 8 bits (signed: at most 127). "
        "Use [-127, 127], or bits = 16.",
    ),
    (
        "4 bits with codes up to 127",
        "bits = 8, codes",
        "bits = 4, codes",
        "my.toml:4  formats.w8.codes: upper code 127 does not fit 4 bits (signed: at most 7). "
        "Use [-8, 7], or bits = 8.",
    ),
    (
        "zero point that is no code",
        "zero_point = 0",
        "zero_point = 128",
        "my.toml:4  formats.w8.zero_point: 128 is not a code of this format (-127 to 127). Use one, or widen codes.",
    ),
    (
        "undefined kernel",
        'kernels = ["mac"]',
        'kernels = ["mac9"]',
        "my.toml:7  operators.Conv.kernels: 'mac9' is not defined. Kernels here: mac. Closest: mac.",
    ),
    (
        "undefined format",
        'output = ["a8"]',
        'output = ["a16"]',
        "my.toml:6  kernels.mac.output: 'a16' is not defined. Formats here: a8, w8.",
    ),
    (
        "undefined bias",
        'accumulator = "acc" }',
        'accumulator = "acc", bias = "b32" }',
        "my.toml:6  kernels.mac.bias: 'b32' is not defined. No biases are defined here.",
    ),
    (
        "undefined tag",
        'overflow = "wrap"',
        'overflow = "wrap", source = "PIE"',
        "my.toml:5  accumulators.acc.source: 'PIE' is not a tag of sources. "
        "Tags here: memory, derived: ..., searched: ....",
    ),
    (
        "source of a field that is not there",
        'overflow = "wrap"',
        'overflow = "wrap", source = { overflw = "memory" }',
        "my.toml:5  accumulators.acc.source.overflw: 'overflw' is not a field this table sets, "
        "so it has nothing to source. Closest: overflow.",
    ),
    (
        "negative scale",
        'per = "tensor" }',
        'per = "tensor", scale = { min = -1 } }',
        'my.toml:3  formats.a8.scale.min: must be a number above 0 or "unknown"; got -1.',
    ),
    (
        "min above max",
        'per = "tensor" }',
        'per = "tensor", scale = { min = 2, max = 1 } }',
        "my.toml:3  formats.a8.scale.min: min must not exceed max; got 2.0 and 1.0. Swap them.",
    ),
    (
        "unknown attribute",
        'fused = ["Relu"]',
        "limits = { kernal = [1] }",
        'my.toml:7  operators.Conv.limits.kernal: the key must be "kernel", "stride", "dilation", "groups", "padding", '
        '"in_channels", "out_channels", "rank", "inputs", "outputs", "height", "width", "axis", "elements", '
        '"reduced_elements", "depth_multiplier", "mode", "slope" or "rescale"; got "kernal". Closest: kernel.',
    ),
    (
        "word the attribute does not know",
        'fused = ["Relu"]',
        'limits = { groups = ["depthwise"] }',
        'my.toml:7  operators.Conv.limits.groups: must list integers or "1" or "channels"; got "depthwise".',
    ),
    (
        "id that is not one",
        "formats.a8 =",
        "formats.A8 =",
        'my.toml:3  formats.A8: the key must be an id such as "w8" (a lower-case letter, then lower-case letters, '
        'digits, _); got "A8".',
    ),
    (
        "operator kind that is not one",
        "operators.Conv",
        "operators.conv2d",
        'my.toml:7  operators.conv2d: the key must be an operator kind such as "Conv" (a capital, then letters and '
        'digits); got "conv2d".',
    ),
    (
        "name that is no path",
        '"acme/tiny"',
        '"../tiny"',
        'my.toml:2  name: must be a name like "vendor/chip" (lower-case letters, digits, . _ -, one slash); '
        'got "../tiny".',
    ),
    (
        "date",
        "bits = 32",
        "bits = 1979-05-27",
        "my.toml:5  accumulators.acc.bits: must not be a date; no field holds one. Write it as a text.",
    ),
    (
        "infinity",
        "bits = 32",
        "bits = inf",
        "my.toml:5  accumulators.acc.bits: must be a finite number; got inf. Leave the field out.",
    ),
    (
        "not a number",
        "bits = 32",
        "bits = nan",
        "my.toml:5  accumulators.acc.bits: must be a finite number; got nan. Leave the field out.",
    ),
    (
        "huge integer",
        "bits = 32",
        f"bits = 0x{'f' * 100}",
        "my.toml:5  accumulators.acc.bits: must fit 64 bits; got an integer of 400 bits. Use a smaller one.",
    ),
    (
        "newer schema",
        "schema_version = 1",
        "schema_version = 2",
        "my.toml:1  schema_version: is 2, newer than this qhw reads (up to 1). Install a newer qhw.",
    ),
    (
        "schema that is no integer",
        "schema_version = 1",
        "schema_version = true",
        "my.toml:1  schema_version: must be an integer; got bool. Write schema_version = 1.",
    ),
    (
        "schema before the first",
        "schema_version = 1",
        "schema_version = 0",
        "my.toml:1  schema_version: must be from 1 to 1; got 0. Write schema_version = 1.",
    ),
    (
        "no schema version",
        "schema_version = 1\n",
        "",
        "my.toml  schema_version: is missing. Write schema_version = 1 as the first line.",
    ),
    ("no name", 'name = "acme/tiny"\n', "", "my.toml  name: is missing. Write it."),
    (
        "conflict with one side",
        'name = "acme/tiny"',
        'name = "acme/tiny"\nconflicts = [{ field = "fallback", readings = [{ value = 1 }] }]',
        "my.toml:3  conflicts.0.readings: a conflict has two readings or more; got 1.",
    ),
    (
        "conflict about nothing",
        'name = "acme/tiny"',
        'name = "acme/tiny"\nconflicts = [{ field = "formats.a9.bits", readings = [{ value = 1 }, { value = 2 }] }]',
        "my.toml:3  conflicts.0.field: 'formats.a9.bits' is no field here: no 'a9'.",
    ),
]


@pytest.mark.parametrize(("old", "new", "message"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_bad_file_is_refused_in_one_line(old: str, new: str, message: str) -> None:
    assert TINY.count(old) >= 1
    assert refused(TINY.replace(old, new, 1)) == message


def test_a_misspelt_field_gets_the_closest_and_all_fields() -> None:
    message = refused(TINY.replace("overflow", "overfow"))
    assert message == (
        "my.toml:5  accumulators.acc.overfow: there is no such field. Closest: overflow. "
        "Fields here: kind, bits, signed, overflow, products_per_step, order, bias_added, pairwise, mantissa_bits, "
        "promotion_interval, source."
    )


def test_all_problems_are_listed_and_counted() -> None:
    message = refused(TINY.replace("bits = 32", 'bits = "wide"').replace('"tensor"', '"tensors"'))
    assert message.splitlines() == [
        'my.toml:3  formats.a8.per: must be "tensor", "out_channel", "group", "row", "block" or "unknown"; '
        'got "tensors". Closest: tensor.',
        'my.toml:5  accumulators.acc.bits: must be an integer from 1 to 128, "per_layer" or "unknown"; got "wide".',
        "2 problems.",
    ]


def test_a_syntax_error_has_its_line() -> None:
    message = refused(TINY.replace("bits = 32", "bits = "))
    assert re.fullmatch(r"my\.toml:5: not valid TOML: .+, at column \d+\. Correct this line\.", message)


def test_a_json_syntax_error_has_its_line() -> None:
    assert refused("{\n  'a': 1\n}", "my.json").startswith("my.json:2: not valid JSON: ")


def test_json_refuses_what_toml_refuses() -> None:
    assert refused('{"a": NaN}', "my.json") == "my.json: not valid JSON: NaN is not a number. Correct the file."
    assert refused('{"a": 1, "a": 2}', "my.json") == (
        "my.json: not valid JSON: the key 'a' stands twice in one table. Correct the file."
    )
    assert refused("[1]", "my.json") == "my.json: must hold one table; got list."


@pytest.mark.parametrize("opening", ["[", "{a="])
@pytest.mark.parametrize("depth", [33, 5000])
def test_deep_nesting_is_refused(opening: str, depth: int) -> None:
    closing = {"[": "]", "{a=": "}"}[opening]
    assert "nests deeper than 32 tables or lists. Flatten it." in refused(
        f"{TINY}\nx = {opening * depth}1{closing * depth}"
    )


def test_deep_json_is_refused() -> None:
    assert refused("[" * 100_000, "my.json") == "my.json: nests deeper than 32 tables or lists. Flatten it."


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'schema_version = 1\nname = "a\0b/c"', ":2: must be text; got a NUL byte. Is this a TOML file?"),
        (b"schema_version = 1\n\xff", ":2: must be UTF-8; got the byte 0xff. Save it as UTF-8."),
        (b"\xef\xbb\xbfschema_version = 1", ":1: must start without a byte order mark. Save it as plain UTF-8."),
        (b"#" * (2**20 + 1), ": must be at most 1048576 bytes. A target is text written by people."),
        (b"", "  schema_version: is missing. Write schema_version = 1 as the first line."),
    ],
    ids=["NUL byte", "not UTF-8", "byte order mark", "too large", "empty"],
)
def test_bytes_that_are_no_text_are_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "my.toml"
    path.write_bytes(raw)
    with pytest.raises(TargetError) as caught:
        load_target_file(path)
    assert str(caught.value) == f"{path}{message}"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match=r"gone\.toml: cannot be read: No such file or directory\. Check the path\."):
        load_target_file(tmp_path / "gone.toml")
    with pytest.raises(TargetError, match=r"gone\.yaml: must end in \.toml or \.json; got '\.yaml'\. Rename it\."):
        load_target_file(tmp_path / "gone.yaml")
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(TargetError, match=r"pipe\.toml: must be a file"):
        load_target_file(tmp_path / "pipe.toml")
    (tmp_path / "folder.toml").mkdir()
    with pytest.raises(TargetError, match=r"folder\.toml: must be a file; got a folder or a device\. Check the path\."):
        load_target_file(tmp_path / "folder.toml")


def test_the_validator_s_own_wording_never_shows() -> None:
    text = "schema_version = 1\nname = 3\nformats = 4\nkernels.k = { input = 'x', exponents = [{}] }\noperators = [1]"
    message = refused(text)
    for word in ("Input should", "valid", "type=", "pydantic", "Extra", "literal["):
        assert word not in message
    assert message.splitlines()[-1] == "6 problems."
