# SPDX-License-Identifier: Apache-2.0
"""What two targets say otherwise: sentences written by hand, and what is no difference."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qhw.schema import Difference, TargetSpec, diff, load_target_file, parse_target, to_json
from qhw.schema.content import ABSENT

ROOT = Path(__file__).parents[3] / "targets" / "qhw_targets"
BASE = """\
schema_version = 1
name = "acme/one"
fallback = "host"
formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor" }
formats.a16 = { bits = 16, signed = true, zero_point = 0, per = "tensor" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
formats.w8t = { codes = [-127, 127], zero_point = 0, per = "tensor" }
biases.wide = { bits = 32, scale = "input*weight" }
accumulators.acc = { bits = 32, overflow = "wrap" }
requantize.mul = { kind = "fixed_point", multiplier_bits = 31, rounding = "half_even" }
kernels.two = { input = ["a8"], output = ["a8"], accumulator = "acc" }
operators.Conv = { kernels = ["mac"], fused = ["Relu", ["Add", "Relu"]], limits = { kernel = { max = 7 } } }
operators.Gemm = { kernels = ["mac"] }
operators.MatMul = { kernels = ["two"] }
operators.Softmax = { kernels = ["two"], fixed_output.a8 = { scale = 0.0078125, zero_point = 0 } }
operators.Reshape = { same_scale = "input_output" }
operators.Elu = { kernels = [] }
boundary = { outputs = "quantized", input_formats = ["a16"] }
memories.sram = { capacity_bytes = 1024 }
clocks.main = { clock_hz = 1e8, bandwidth_bytes_per_s = { sram = 1e9 } }
artefact = { file_format = "DLC" }
[kernels.mac]
input = ["a8"]
weight = ["w8", "w8t"]
output = ["a8"]
bias = "wide"
accumulator = "acc"
requantize = "mul"
"""
A8 = "formats.a8 = { bits = 8, signed = true, zero_point = 0"
W8 = "formats.w8 = { codes = [-127, 127], zero_point = 0"
TWO = 'kernels.two = { input = ["a8"], output = ["a8"]'
RESHAPE = 'operators.Reshape = { same_scale = "input_output" }\n'
UNUSED = "formats.a16 = { bits = 16"


def spec(*changes: tuple[str, str], text: str = BASE) -> TargetSpec:
    """The base with each first occurrence of a text replaced."""
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new, 1)
    return parse_target(text)


def told(*changes: tuple[str, str]) -> list[str]:
    return [one.sentence() for one in diff(spec(), spec(*changes))]


CASES: dict[str, tuple[list[tuple[str, str]], list[str]]] = {
    "an operator comes": (
        [("operators.Elu = { kernels = [] }", 'operators.Elu = { kernels = ["two"] }')],
        ["adds Elu"],
    ),
    "an operator goes": ([(RESHAPE, "")], ["Reshape is gone"]),
    "two operators go": (
        [(RESHAPE, ""), ('operators.MatMul = { kernels = ["two"] }', "")],
        ["MatMul and Reshape are gone"],
    ),
    "an operator that is not listed is one without kernels": ([("operators.Elu = { kernels = [] }\n", "")], []),
    "an operator is unknown": (
        [('operators.MatMul = { kernels = ["two"] }', 'operators.MatMul = { kernels = "unknown" }')],
        ["MatMul: runs -> unknown"],
    ),
    "a wider activation": (
        [(TWO, TWO.replace('"a8"', '"a8", "a16"'))],
        ["adds int16 activations for MatMul and Softmax"],
    ),
    "a granularity goes": (
        [('weight = ["w8", "w8t"]', 'weight = ["w8t"]')],
        ["weights of Conv and Gemm: per out channel is gone"],
    ),
    "a granularity comes": (
        [
            ("biases.wide", W8.replace("w8", "g") + ', per = "group", group_size = 32 }\nbiases.wide'),
            ('weight = ["w8", "w8t"]', 'weight = ["w8", "w8t", "g"]'),
        ],
        ["weights of Conv and Gemm: adds per group of 32"],
    ),
    "signedness": (
        [("formats.a8 = { bits = 8, signed = true", "formats.a8 = { bits = 8, signed = false")],
        [
            "activations of Conv, Gemm, MatMul and Softmax: int8 -> uint8",
            "fixed output int8 of Softmax: scale 0.0078125, zero point 0 -> not stated",
            "fixed output uint8 of Softmax: not stated -> scale 0.0078125, zero point 0",
        ],
    ),
    "codes": (
        [
            ("formats.w8 = { codes = [-127, 127]", "formats.w8 = { codes = [-128, 127]"),
            ("formats.w8t = { codes = [-127, 127]", "formats.w8t = { codes = [-128, 127]"),
        ],
        ["weights of Conv and Gemm: int8 [-127, 127] -> int8"],
    ),
    "zero point": (
        [(A8, A8.replace("= 0", '= "free"'))],
        ["activations of Conv, Gemm, MatMul and Softmax: zero point 0 -> free zero point"],
    ),
    "scale": (
        [
            (
                'formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor"',
                'formats.a8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = '
                '"power_of_two" }',
            )
        ],
        ["activations of Conv, Gemm, MatMul and Softmax: any scale -> power-of-two scale"],
    ),
    "one of two formats in all": (
        [(W8, 'formats.w8 = { bits = 4, signed = true, zero_point = "free"')],
        [
            "weights of Conv and Gemm: int8 [-127, 127], zero point 0, per out channel is gone",
            "weights of Conv and Gemm: adds int4, free zero point, per out channel",
        ],
    ),
    "accumulator": (
        [("accumulators.acc = { bits = 32", "accumulators.acc = { bits = 24")],
        ["accumulator bits of Conv, Gemm, MatMul and Softmax: 32 bits -> 24 bits"],
    ),
    "accumulator unknown": (
        [('output = ["a8"], accumulator = "acc" }', 'output = ["a8"], accumulator = "unknown" }')],
        ["accumulator of MatMul and Softmax: 32 bits, wrap -> unknown"],
    ),
    "bias": (
        [('bias = "wide"', 'bias = "none"')],
        ["bias of Conv and Gemm: 32 bits, scale input*weight -> none"],
    ),
    "requantize": (
        [('rounding = "half_even"', 'rounding = "floor"')],
        ["requantize rounding of Conv and Gemm: half_even -> floor"],
    ),
    "what a kernel costs": (
        [('requantize = "mul"', 'requantize = "mul"\nmacs_per_cycle = 64.0')],
        ["macs per cycle of Conv and Gemm: not stated -> 64"],
    ),
    "what a format costs": (
        [("formats.a8 = { bits = 8", "formats.a8 = { preference_cost = 2.0, bits = 8")],
        ["activations preference cost of Conv, Gemm, MatMul and Softmax: not stated -> 2"],
    ),
    "a limit": ([("max = 7", "max = 11")], ["limits kernel max of Conv: 7 -> 11"]),
    "a limit goes": (
        [("limits = { kernel = { max = 7 } }", "limits = {}")],
        ["limits kernel of Conv: max 7 -> not stated"],
    ),
    "a limit comes": (
        [
            (
                'operators.Gemm = { kernels = ["mac"] }',
                'operators.Gemm = { kernels = ["mac"], limits.rank = { max = 1 } }',
            )
        ],
        ["limits rank of Gemm: not stated -> max 1"],
    ),
    "fusions": (
        [('fused = ["Relu", ["Add", "Relu"]]', 'fused = [["Add", "Relu"], "Clip"]')],
        ["fused of Conv: Relu is gone", "fused of Conv: adds Clip"],
    ),
    "a fixed output": (
        [("scale = 0.0078125", "scale = 0.00390625")],
        ["fixed output int8 scale of Softmax: 0.0078125 -> 0.00390625"],
    ),
    "same scale": (
        [('same_scale = "input_output"', 'same_scale = "none"')],
        ["same scale of Reshape: input_output -> none"],
    ),
    "fallback": ([('fallback = "host"', 'fallback = "refuse"')], ["fallback: host -> refuse"]),
    "boundary": ([('outputs = "quantized"', 'outputs = "float"')], ["boundary outputs: quantized -> float"]),
    "boundary format": (
        [('input_formats = ["a16"]', 'input_formats = ["a8"]')],
        ["boundary input formats: int16, zero point 0, per tensor -> int8, zero point 0, per tensor"],
    ),
    "memory": ([("capacity_bytes = 1024", "capacity_bytes = 2048")], ["memories sram capacity bytes: 1024 -> 2048"]),
    "clock": ([("clock_hz = 1e8", "clock_hz = 2e8")], ["clocks main clock hz: 1e+08 -> 2e+08"]),
    "artefact": ([('file_format = "DLC"', 'file_format = "HEF"')], ["artefact file format: DLC -> HEF"]),
    "a format that no operator and no edge uses": (
        [(UNUSED, "formats.old = { bits = 12 }\nformats.a16 = { bits = 16")],
        [],
    ),
    "a summary, a source": ([("schema_version = 1", 'schema_version = 1\nsummary = "x"\nsources = { D = "d" }')], []),
}


@pytest.mark.parametrize("case", CASES)
def test_a_change_in_words(case: str) -> None:
    changes, expected = CASES[case]
    assert told(*changes) == expected


def test_a_whole_table_is_told_without_what_its_absence_means_alone() -> None:
    """1 is not the `true` that absence means of another field, nor is "refuse" the word of another table."""
    rest = 'scale = "input*weight", max_channels = 1, required = true, out_of_range = WORD }'
    full, usual = (
        spec(('scale = "input*weight" }', rest.replace("WORD", word))) for word in ('"refuse"', '"enlarge_scale"')
    )
    none = spec(('bias = "wide"', 'bias = "none"'))
    told_in_full = "bias of Conv and Gemm: 32 bits, scale input*weight, max channels 1, required yes"
    assert [one.sentence() for one in diff(full, none)] == [f"{told_in_full}, out of range refuse -> none"]
    assert [one.sentence() for one in diff(usual, none)] == [f"{told_in_full} -> none"]


def test_two_kernels_of_which_one_changes_are_told_apart_by_their_formats() -> None:
    wide = 'kernels.wide = { input = ["a16"], weight = ["w8"], output = ["a16"], accumulator = "long" }\n'
    conv = 'operators.Conv = { kernels = ["mac"'
    both = spec((conv, f'accumulators.long = {{ bits = 40 }}\n{wide}{conv}, "wide"'))
    longer = TargetSpec.model_validate_json(to_json(both).replace('"bits": 40', '"bits": 64'))
    assert [one.sentence() for one in diff(both, longer)] == [
        "accumulator bits of Conv with int16 x int8 [-127, 127]: 40 bits -> 64 bits"
    ]
    swapped = TargetSpec.model_validate_json(re.sub(r'"mac",\s+"wide"', '"wide", "mac"', to_json(both)))
    assert [one.sentence() for one in diff(both, swapped)] == [
        "preferred of Conv: int8 x int8 [-127, 127] -> int16 x int8 [-127, 127]"
    ]


def test_what_may_stand_together_counts_where_every_format_stays() -> None:
    """a8 x w8 and a16 x w8t on one side; on the other each with the other's weight as well."""
    apart = (
        'kernels.one = { input = ["a8"], weight = ["w8"], output = ["a8"] }\n'
        'kernels.other = { input = ["a16"], weight = ["w8t"], output = ["a8"] }\n'
        'operators.Gemm = { kernels = ["one", "other"] }'
    )
    freely = apart.replace('input = ["a16"], weight = ["w8t"]', 'input = ["a16"], weight = ["w8t", "w8"]')
    old, new = (spec(('operators.Gemm = { kernels = ["mac"] }', text)) for text in (apart, freely))
    assert [one.sentence() for one in diff(old, new)] == ["combinations of Gemm: adds int16 x int8 [-127, 127] -> int8"]


def test_numbers_that_differ_do_not_hide_the_arithmetic() -> None:
    narrow = ("accumulators.acc = { bits = 32", "accumulators.acc = { bits = 20")
    unsigned = (
        'signed = true, zero_point = 0, per = "tensor" }\nformats.a16',
        'signed = false, per = "tensor" }\nformats.a16',
    )
    sentences = told(narrow, unsigned)
    sides = "int8 x int8 [-127, 127] against uint8 x int8 [-127, 127]"
    assert f"accumulator bits of Conv and Gemm with {sides}: 32 bits -> 20 bits" in sentences


def test_one_kernel_with_two_formats_is_two_kernels_with_one_each() -> None:
    one = 'kernels.two = { input = ["a8", "a16"], output = ["a8"], accumulator = "acc" }'
    two = (
        'kernels.narrow = { input = ["a8"], weight = ["a8", "a16"], output = ["a8"], accumulator = "acc" }\n'
        'kernels.broad = { input = ["a16"], weight = ["a8", "a16"], output = ["a8"], accumulator = "acc" }'
    )
    line = 'kernels.two = { input = ["a8"], output = ["a8"], accumulator = "acc" }'
    softmax = next(line for line in BASE.splitlines() if line.startswith("operators.Softmax"))
    split = spec((line, two), (softmax, ""), ('["two"]', '["narrow", "broad"]'))
    assert diff(spec((line, one), (softmax, "")), split) == ()


def test_a_special_kind_that_runs_as_the_general_one_is_no_difference() -> None:
    conv = next(line for line in BASE.splitlines() if line.startswith("operators.Conv"))
    own = spec((conv, f"{conv}\n{conv.replace('Conv', 'DepthwiseConv')}"))
    assert diff(spec(), own) == ()
    none = spec(("operators.Gemm", "operators.DepthwiseConv = { kernels = [] }\noperators.Gemm"))
    assert [one.sentence() for one in diff(spec(), none)] == ["DepthwiseConv is gone"]


def test_ways_to_write_the_same() -> None:
    same = [
        ("formats.w8 = { codes = [-127, 127]", "formats.w8 = { bits = 8, signed = true, codes = [-127, 127]"),
        ("limits = { kernel = { max = 7 } }", 'limits = { kernel = { max = 7 }, stride = "any" }'),
        ('kind = "fixed_point"', 'regrid = "ratio", kind = "fixed_point"'),
        ("formats.a8 = { bits = 8, signed = true", 'formats.a8 = { kind = "integer", scale = {}, codes = [-128, 127]'),
    ]
    assert diff(spec(), spec(*same)) == ()
    limits = ("limits = { kernel = { max = 7 } }", "limits = { groups = GROUPS }")
    listed, table = (spec(limits, ("GROUPS", text)) for text in ('["1", 4, 2]', '{ values = [2, "1", 4] }'))
    assert diff(listed, table) == ()


def test_absence_means_what_the_descriptions_say() -> None:
    for model, fields in ABSENT.items():
        for name, meaning in fields.items():
            description = str(model.model_fields[name].description)
            assert "bsent" in description, (model, name)
            spelled = {"refuse": "refused", "integer": "integers", True: "signed"}
            assert spelled.get(meaning, meaning) in description, (model, name, description)


def test_a_difference_as_data() -> None:
    (one,) = diff(spec(), spec(("max = 7", "max = 11")))
    assert one == Difference("rules", "limits.kernel.max", ("Conv",), "changed", 7.0, 11.0)
    (one,) = diff(spec(), spec(('weight = ["w8", "w8t"]', 'weight = ["w8t"]')))
    assert one == Difference("formats", "weights", ("Conv", "Gemm"), "removed", "per out channel", None)


FILES = sorted(ROOT.glob("*/*.toml"))
SHIPPED = {path.relative_to(ROOT).with_suffix("").as_posix(): path for path in FILES}
SOME = [SHIPPED[name] for name in ("google/litert-int8", "espressif/esp32-p4", "onnxruntime/cpu-x86-avx2")]


@cache
def shipped(path: Path) -> TargetSpec:
    return load_target_file(path, find_base=SHIPPED.get)


def renamed(data: Any, names: dict[str, str]) -> Any:
    """Every id of the target under another name, wherever it is named."""
    if isinstance(data, dict):
        return {names.get(key, key): renamed(held, names) for key, held in data.items()}
    if isinstance(data, list):
        return [renamed(held, names) for held in data]
    return names.get(data, data) if isinstance(data, str) else data


@pytest.mark.parametrize("path", SOME, ids=lambda path: path.stem)
def test_ids_are_no_difference(path: Path) -> None:
    target = shipped(path)
    data = json.loads(to_json(target))
    bare = {key: data[key] for key in data if key not in ("conflicts", "inherited", "lineage", "source", "sources")}
    bare = json.loads(re.sub(r'"source": (\{[^}]*\}|"[^"]*"|\[[^\]]*\]),?', "", json.dumps(bare)).replace(", }", "}"))
    sections = ("formats", "biases", "accumulators", "requantize", "kernels", "memories", "clocks")
    names = {name: f"other_{index}" for index, name in enumerate(n for s in sections for n in bare.get(s, ()))}
    words = {"shift", "stride"} & set(names)  # ids that are also names of fields
    names = {name: other for name, other in names.items() if name not in words}
    other = TargetSpec.model_validate_json(json.dumps(renamed(bare, names)))
    assert names and diff(target, other) == () and diff(other, target) == ()


@pytest.mark.parametrize("path", FILES, ids=list(SHIPPED))
def test_a_target_does_not_differ_from_itself(path: Path) -> None:
    assert diff(shipped(path), shipped(path)) == ()


@settings(max_examples=12, deadline=None)
@given(st.sampled_from(FILES), st.sampled_from(FILES))
def test_the_way_back_is_the_way_there_reversed(one: Path, other: Path) -> None:
    there, back = diff(shipped(one), shipped(other)), diff(shipped(other), shipped(one))
    turned = {"added": "removed", "removed": "added", "changed": "changed"}

    def told_back(one: Difference) -> tuple[Any, ...]:
        return turned[one.change], one.after, one.before

    def facts(found: tuple[Difference, ...], turn: bool) -> set[str]:
        return {
            json.dumps([d.section, d.subject, kind, *(told_back(d) if turn else (d.change, d.before, d.after))])
            for d in found
            for kind in d.kinds or ("",)
        }

    assert facts(there, True) == facts(back, False)


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    if isinstance(value, dict):
        return [leaf for key, held in value.items() if key != "source" for leaf in leaves(held, (*path, key))]
    return [(path, value)]


CHANGED: dict[type, Any] = {int: lambda v: v + 1, float: lambda v: v * 0.5, bool: lambda v: not v}
SECTIONS = ("formats", "biases", "accumulators", "requantize", "operators", "boundary")


@pytest.mark.parametrize("section", SECTIONS)
def test_no_leaf_changes_unseen(section: str) -> None:
    """Every number, flag and rounding of a section, changed alone, is a difference, where an operator uses it."""
    target = shipped(SHIPPED["google/litert-int8"])
    data = json.loads(to_json(target))
    tried = False
    some = {kind: data["operators"][kind] for kind in ("Conv", "Add", "AveragePool", "Softmax")}
    for path, value in leaves(some if section == "operators" else data[section], (section,)):
        new = CHANGED.get(type(value), lambda _: "unknown")(value)
        if value == "unknown":
            continue
        copy = json.loads(json.dumps(data))
        here = copy
        for key in path[:-1]:
            here = here[key]
        here[path[-1]] = new
        try:
            other = TargetSpec.model_validate_json(json.dumps(copy))
        except ValueError:
            continue  # the change contradicts another field
        tried = True
        assert diff(target, other), path
    assert tried
