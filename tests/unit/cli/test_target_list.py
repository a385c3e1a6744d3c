# SPDX-License-Identifier: Apache-2.0
"""`qhw target list` and `show`: what is said of each target, whose word it is, and that no torch is waited for."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qhw.extension import Entry, PluginRecord, Registry

Run = Callable[..., Any]
ROOT = Path(__file__).parents[3]
VNNI = {
    "name": "onnxruntime/cpu-x86-vnni",
    "vendor": "onnxruntime",
    "extends": None,
    "artefact": "ONNX QDQ",
    "exporter": "onnx_qdq",
    "verified_by": "onnxruntime",
    "numbers": ["int8", "uint8"],
}
ZOO = {
    "acme/shift": """
        formats.s8 = { bits = 8, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
        formats.s16 = { bits = 16, signed = true, zero_point = 0, per = "tensor", scale = { kind = "power_of_two" } }
        accumulators.narrow = { bits = 20, overflow = "saturate" }
        accumulators.wide = { bits = 40, overflow = "saturate" }
        kernels.mac8 = { input = ["s8"], weight = ["s8"], output = ["s8"], accumulator = "narrow" }
        kernels.mac16 = { input = ["s16"], weight = ["s16"], output = ["s16"], accumulator = "wide" }
        operators.Conv = { kernels = ["mac8", "mac16"] }
        artefact = { file_format = "a file format with a long name", executor = "chip" }""",
    "acme/many": """
        formats.a8 = { bits = 8, signed = false, per = "tensor" }
        formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel" }
        formats.w4 = { bits = 4, signed = true, zero_point = 0, per = "group", group_size = 32 }
        formats.w3 = { bits = 3, signed = true, zero_point = 0, per = "tensor" }
        formats.w2 = { bits = 2, signed = true, zero_point = 0, per = "tensor" }
        accumulators.one = { bits = 32, overflow = "wrap" }
        accumulators.other = { bits = "per_layer" }
        kernels.mac = { input = ["a8"], weight = ["w8", "w4", "w3", "w2"], output = ["a8"], accumulator = "one" }
        kernels.made = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "other" }
        kernels.open = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "unknown" }
        operators.Gemm = { kernels = ["mac", "made", "open"] }""",
    "zeta/none": "",
    "zeta/broken": "formats.a8 = { bits = 0 }",
}


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four targets of two vendors in place of those that are installed; one of them cannot be read."""
    entries = {}
    for name, text in ZOO.items():
        path = tmp_path / f"{name.replace('/', '-')}.toml"
        path.write_text(f'schema_version = 1\nname = "{name}"\n' + "\n".join(map(str.strip, text.splitlines())))
        entries[name] = Entry(name, path, PluginRecord("zoo", "zoo", "1"))
    monkeypatch.setattr("qhw.extension.load_target_plugins", lambda: Registry(targets=entries))


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_a_line_says_what_decides(qhw_run: Run, zoo: None) -> None:
    ran = qhw_run("target", "list")
    head, *rows = [cells(line) for line in ran.out.splitlines()[:4]]
    assert head == ["target", "artefact", "weights", "activations", "accumulator", "verified by"]
    assert rows == [
        ["acme/shift", "a file format w...", "int8 int16 2^k", "int8 int16 2^k", "20 40 saturate", "chip"],
        ["acme/many", "-", "int8 int4 int3 +1 /group", "uint8 asym", "32 per layer wrap", "nothing here"],
        ["zeta/none", "-", "-", "-", "unknown", "nothing here"],
    ]
    assert "3 targets of 2 vendors. One in full: qhw target show NAME" in ran.out
    assert ran.status == 0 and len(ran.err.splitlines()) == 1
    assert ran.err.startswith("warning: left out: zeta/broken: ") and "formats.a8.bits: must be an integer" in ran.err


def test_the_shipped_targets_as_data(qhw_run: Run) -> None:
    facts = {fact["name"]: fact for fact in json.loads(qhw_run("target", "list", "--json").out)}
    files = (ROOT / "targets/qhw_targets").glob("*/*.toml")
    assert set(facts) == {f"{path.parent.name}/{path.stem}" for path in files}
    vnni = facts["onnxruntime/cpu-x86-vnni"]
    assert {key: vnni[key] for key in VNNI} == VNNI
    assert vnni["words"] == ["int8 uint8 /channel asym", "uint8 int8 asym", "32 wrap"]
    assert vnni["activations"] == ["uint8, free zero point, per tensor", "int8, free zero point, per tensor"]
    assert facts["onnxruntime/cpu-x86-avx2"]["extends"] == "onnxruntime/cpu-x86-vnni"
    assert all(fact["summary"] and len(fact) == len(vnni) for fact in facts.values())


def test_filters(qhw_run: Run, zoo: None) -> None:
    def names(*options: str) -> list[str]:
        return [fact["name"] for fact in json.loads(qhw_run("target", "list", *options, "--json").out)]

    assert names("--vendor", "acme") == ["acme/shift", "acme/many"]
    assert names("--vendor", "zeta", "--vendor", "acme") == ["acme/shift", "acme/many", "zeta/none"]
    assert names("--with", "int8") == ["acme/shift", "acme/many"]
    assert names("--with", "int8", "--with", "int4") == ["acme/many"]
    assert names("--with", "int16", "--with", "uint8") == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--vendor", "acne"), "--vendor: no target is of vendor 'acne'. Closest: acme. There are: acme, zeta."),
        (("--with", "Int4"), "--with: no target is of numbers 'Int4'. Closest: int4. There are: int16, int2,"),
    ],
)
def test_a_filter_that_nothing_meets_is_a_mistake(
    qhw_run: Run, zoo: None, options: tuple[str, ...], message: str
) -> None:
    ran = qhw_run("target", "list", *options)
    assert ran.status == 1 and ran.out == ""
    assert f"error: {message}" in ran.err and ran.err.count("\n") == 1


QUICK = [
    ("list",),
    ("show", "espressif/esp32-p4"),
    ("diff", "google/litert-int8", "espressif/esp32-p4"),
    ("lint", "onnxruntime/cpu-x86-avx2"),
]


@pytest.mark.parametrize("arguments", QUICK, ids=lambda arguments: arguments[0])
def test_no_torch_is_waited_for(arguments: tuple[str, ...]) -> None:
    code = (
        f"import sys; sys.argv = ['qhw', 'target', *{list(arguments)}]\nfrom qhw.cli import main\n"
        "try:\n    main()\nexcept SystemExit as ended:\n    assert not ended.code, ended.code\n"
        "print([name for name in ('torch', 'numpy', 'onnx') if name in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], text=True, capture_output=True, timeout=60, env=environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


BASE = """\
schema_version = 1
name = "acme/base"
summary = "the base"
fallback = "host"
source = { fallback = "memory" }
sources = { DOC = "manual", ERR = "errata" }
formats.a8 = { bits = 8, signed = true, per = "tensor", source = { "*" = "DOC", per = ["ERR", "memory"] } }
kernels.mac = { input = ["a8"], output = ["a8"], source = "DOC" }
operators.Relu = { kernels = ["mac"], source = "DOC" }
valid_for = { silicon = ["B0", "C0"] }
[[conflicts]]
field = "formats.a8.bits"
readings = [{ value = 8, source = "DOC" }, { value = 9, source = ["ERR", "memory"] }]
chosen = 8
why = "newer"
"""
CHILD = """\
schema_version = 1
name = "acme/child"
extends = "base.toml"
sources = { MINE = "measured" }
formats.a8 = { signed = false, source = "MINE" }
operators.Relu.limits = { rank = { max = 4 } }
"""


@pytest.fixture
def family(folder: Path) -> None:
    (folder / "base.toml").write_text(BASE)
    (folder / "child.toml").write_text(CHILD)


def test_each_value_is_shown_with_its_source_and_its_writer(qhw_run: Run, family: None) -> None:
    assert qhw_run("target", "show", "child.toml").out.splitlines() == [
        "acme/child  the base",
        "extends acme/base; what a base wrote is marked with its name",
        "",
        "valid_for",
        "  silicon               B0, C0",
        "",
        "formats",
        "  a8                    bits = 8   [DOC]   <- acme/base",
        "                        signed = false   [MINE]",
        '                        per = "tensor"   [ERR, memory]   <- acme/base',
        "",
        "kernels",
        '  mac                   input = ["a8"], output = ["a8"]   [DOC]   <- acme/base',
        "",
        "operators",
        '  Relu                  kernels = ["mac"]   [DOC]   <- acme/base',
        "                        limits.rank.max = 4.0",
        "",
        "fallback",
        "                        host   [memory]   <- acme/base",
        "",
        "sources",
        "  DOC                   manual",
        "  ERR                   errata",
        "  MINE                  measured",
        "",
        "conflicts",
        "  formats.a8.bits       8 (DOC); 9 (ERR, memory); chosen 8, because newer   <- acme/base",
    ]
    own = qhw_run("target", "show", "base.toml").out
    assert "<-" not in own and "extends" not in own


def test_a_part_is_shown_alone(qhw_run: Run, family: None) -> None:
    out = qhw_run("target", "show", "child.toml", "operators.Relu").out
    assert [line.strip() for line in out.strip().splitlines()] == [
        "operators",
        'Relu                  kernels = ["mac"]   [DOC]   <- acme/base',
        "limits.rank.max = 4.0",
    ]
    assert qhw_run("target", "show", "child.toml", "formats").out.strip().startswith("formats\n  a8 ")
    data = json.loads(qhw_run("target", "show", "child.toml", "formats.a8", "--json").out)
    assert data["formats"]["a8"]["signed"] is False and list(data) == ["formats"]


def test_as_json_the_target_is_one_that_loads_again(qhw_run: Run, family: None, folder: Path) -> None:
    out = qhw_run("target", "show", "child.toml", "--json").out
    (folder / "again.json").write_text(out)
    assert qhw_run("target", "show", "again.json", "--json").out == out
    assert json.loads(out)["inherited"]["formats.a8.bits"] == "acme/base"


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("operators.Rely", "'acme/child' has no 'operators.Rely'. Closest: operators.Relu. There are: operators.Relu."),
        (
            "format",
            "'acme/child' has no 'format'. Closest: formats. There are: valid_for, formats, kernels, operators,",
        ),
        ("fallback.host", "'acme/child' has no 'fallback.host'. There are: fallback."),
        ("sources", "'acme/child' has no 'sources'."),
    ],
)
def test_a_part_that_is_not_there(qhw_run: Run, family: None, part: str, message: str) -> None:
    ran = qhw_run("target", "show", "child.toml", part)
    assert ran.status == 1 and f"error: {message}" in ran.err and ran.err.count("\n") == 1
