# SPDX-License-Identifier: Apache-2.0
"""`qhw target new`: the file it writes loads, lints and means what it says; nothing is overwritten."""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qhw.cli.target.starting_file import differing_file
from qhw.schema import diff, lint, load_target_file, open_fields, parse_target, read_target_file

Run = Callable[..., Any]
ROOT = Path(__file__).parents[3] / "targets" / "qhw_targets"
SECTIONS = ("formats", "biases", "accumulators", "requantize", "kernels", "operators", "boundary", "artefact")
MARKED = re.compile(r"# [a-z_.0-9]+(\.[A-Z]\w+)? = ")
BASES = ("google/litert-int8", "espressif/esp32-p4", "onnxruntime/cpu-x86-avx2", "whitepaper/generic-int8")


def test_a_new_target_is_complete_and_explained(qhw_run: Run, folder: Path) -> None:
    ran = qhw_run("target", "new", "acme/npu")
    assert (ran.status, ran.out) == (0, "npu.toml written. Next: edit it, then qhw target lint npu.toml\n")
    text = (folder / "npu.toml").read_text()
    spec = read_target_file(folder / "npu.toml").spec
    assert spec.name == "acme/npu" and all(getattr(spec, section) for section in SECTIONS)
    assert [str(found) for found in lint(spec) if found.severity != "info"] == []
    left = {".".join(map(str, field.path)) for field in open_fields(spec)}
    assert left == {"artefact.exporter", "artefact.executor", "cost"}
    for section in SECTIONS:
        before = text[: text.index(f"[{section}")].rstrip().splitlines()
        assert before[-1].startswith("# "), f"nothing explains {section}"
    assert all(len(line) <= 120 for line in text.splitlines())


def test_a_new_target_plans_and_computes(qhw_run: Run, folder: Path) -> None:
    qhw_run("target", "new", "acme/npu")
    ran = qhw_run("quantize", "net:model", "--target", "npu.toml", "--calibration", "net:batches", "--out", "out/net")
    assert ran.status == 0, ran.err
    verified = qhw_run("verify", "out/net", "--json")
    assert verified.status == 0 and json.loads(verified.out)["host"] == [], verified.err


@pytest.mark.parametrize("base", BASES)
def test_from_a_base_every_line_says_what_the_base_says(base: str) -> None:
    path = ROOT / f"{base}.toml"
    spec = load_target_file(path, find_base=lambda name: ROOT / f"{name}.toml")
    text = differing_file("acme/npu", base, spec)

    def find(name: str) -> Path:
        return ROOT / f"{name}.toml"

    head = text[: text.index("\n\n")] + "\n"
    assert diff(spec, parse_target(text, find_base=find)) == ()
    marked = [line[2:] for line in text.splitlines() if MARKED.match(line) and "TRM" not in line]
    assert len(marked) > 20
    for line in marked:
        assert tomllib.loads(line), line
    assert diff(spec, parse_target(head + "\n".join(marked), find_base=find)) == ()
    decisive = ("formats.", "accumulators.", "kernels.mac", "operators.Conv")
    assert all(any(line.startswith(start) for line in marked) for start in decisive)
    assert not any("source" in line for line in marked)


def test_a_line_without_its_mark_is_an_override(folder: Path) -> None:
    spec = load_target_file(ROOT / "google/litert-int8.toml")
    text = differing_file("acme/npu", "google/litert-int8", spec)
    old = "# accumulators.sum = { bits = 32"
    assert old in text
    changed = parse_target(text.replace(old, "accumulators.sum = { bits = 24"), find_base=lambda n: ROOT / f"{n}.toml")
    (one,) = diff(spec, changed)
    assert one.sentence().startswith("accumulator bits of ") and one.sentence().endswith(": 32 bits -> 24 bits")


def test_from_a_name_and_from_a_file(qhw_run: Run, folder: Path) -> None:
    assert qhw_run("target", "new", "acme/p4", "--from", "espressif/esp32-p4").status == 0
    assert tomllib.loads((folder / "p4.toml").read_text())["extends"] == "espressif/esp32-p4"
    (folder / "mine").mkdir()
    ran = qhw_run("target", "new", "acme/next", "--from", "tiny.toml", "--out", "mine/next.toml", "--json")
    assert json.loads(ran.out) == {"name": "acme/next", "file": "mine/next.toml", "extends": "tiny.toml"}
    assert tomllib.loads((folder / "mine/next.toml").read_text())["extends"] == "../tiny.toml"
    assert qhw_run("target", "diff", "tiny.toml", "mine/next.toml", "--exit-code").status == 0


MISTAKES = {
    "no vendor": (("npu",), "'npu': a target's name is vendor/chip, in lower-case letters, digits"),
    "two slashes": (("acme/npu/2",), "'acme/npu/2': a target's name is vendor/chip"),
    "a way out": (("../npu",), "'../npu': a target's name is vendor/chip"),
    "a way out within": (("acme/..",), "'acme/..': a target's name is vendor/chip"),
    "an absolute path": (("/etc/passwd",), "'/etc/passwd': a target's name is vendor/chip"),
    "capitals": (("Acme/NPU",), "'Acme/NPU': a target's name is vendor/chip"),
    "a quote": (('acme/n"pu',), "'acme/n\"pu': a target's name is vendor/chip"),
    "a line end": (("acme/npu\n",), "'acme/npu\\n': a target's name is vendor/chip"),
    "too long": ((f"acme/{'n' * 100}",), "at most 100 in all. Choose one, as acme/npu."),
    "file is there": (("acme/tiny",), "tiny.toml: exists already, and nothing is overwritten. Choose another --out."),
    "no such folder": (("acme/x", "--out", "no/x.toml"), "no/x.toml: cannot be written: No such file or directory."),
    "a folder": (("acme/x", "--out", "full.toml"), "full.toml: exists already, and nothing is overwritten."),
    "a link": (("acme/x", "--out", "link.toml"), "link.toml: exists already, and nothing is overwritten."),
    "no TOML": (("acme/x", "--out", "x.txt"), "--out x.txt: must end in .toml; got '.txt'. Rename it."),
    "no such base": (("acme/x", "--from", "google/litert"), "no target 'google/litert'. Closest: google/litert-"),
    "no such base file": (("acme/x", "--from", "none.toml"), "none.toml: cannot be read: No such file or directory."),
    "its own base": (
        ("acme/tiny", "--from", "tiny.toml", "--out", "x.toml"),
        "acme/tiny: is the name of the base, too.",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_a_mistake_is_one_line_and_writes_nothing(qhw_run: Run, folder: Path, case: str) -> None:
    (folder / "full.toml").mkdir()
    (folder / "link.toml").symlink_to(folder / "elsewhere.toml")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    arguments, message = MISTAKES[case]
    ran = qhw_run("target", "new", *arguments)
    assert ran.status == 1 and ran.out == ""
    assert ran.err.startswith("error: ") and message in ran.err and ran.err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
