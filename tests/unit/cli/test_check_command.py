# SPDX-License-Identifier: Apache-2.0
"""`qhw check`: exit status for CI, the summary first, JSON, and files that cannot be read."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.quantized_files import conv_file, grid

TARGET = "onnxruntime/cpu-x86-vnni"
LEGAL = {"x": grid(0.02, 7, "uint8"), "y": grid(0.05, 0, "uint8"), "w": grid([0.01] * 4)}


@pytest.fixture
def legal(tmp_path: Path) -> Path:
    return conv_file(**LEGAL).write(tmp_path, "legal.onnx")  # type: ignore[arg-type]


@pytest.fixture
def illegal(tmp_path: Path) -> Path:
    return conv_file(**{**LEGAL, "w": grid([0.01] * 4, [0, 3, 0, 0])}).write(tmp_path, "bad.onnx")  # type: ignore[arg-type]


def test_a_legal_model_exits_with_0(legal: Path, qhw_run: Any) -> None:
    done = qhw_run("check", str(legal), "--target", TARGET)
    assert (done.status, done.err) == (0, "")
    assert done.out.splitlines()[:2] == [
        f"{legal} (ONNX QDQ) on {TARGET}: legal",
        "1 operator judged: 1 legal, 0 illegal, 0 cannot be judged; 0 on the host; nothing left open",
    ]


def test_a_violation_exits_with_1_and_names_node_clause_value_and_fix(illegal: Path, qhw_run: Any) -> None:
    done = qhw_run("check", str(illegal), "-t", TARGET)
    assert done.status == 1
    lines = done.out.splitlines()
    assert lines[1].startswith("1 operator judged: 0 legal, 1 illegal")
    assert lines[2] == "1 violation of 1 clause"
    assert lines[4:] == [
        "formats.w8.zero_point  1 operator",
        "  must be 0. Quantize it symmetrically.",
        "    conv, w: zero point 3 (1 of 4 zero points)",
    ]


def test_json_says_the_same(illegal: Path, qhw_run: Any) -> None:
    done = qhw_run("check", str(illegal), "-t", TARGET, "--json")
    data = json.loads(done.out)
    assert (done.status, data["is_legal"], data["target"], data["counts"]["illegal"]) == (1, False, TARGET, 1)
    assert [(one["node"], one["clause"]) for one in data["violations"]] == [("conv", "formats.w8.zero_point")]


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["text", "json"])
def test_a_file_that_cannot_be_read_exits_with_2(flags: list[str], tmp_path: Path, qhw_run: Any) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 10)
    done = qhw_run("check", str(path), "-t", TARGET, *flags)
    assert done.status == 2
    assert done.err == f"error: {path}: is no ONNX model: its bytes do not parse. Export it again.\n"
    assert bool(flags) == ("ArtefactError" in done.out)


def test_a_result_folder_is_told_its_artefact(tmp_path: Path, qhw_run: Any) -> None:
    artefact = tmp_path / "out/artefacts/model.onnx"
    artefact.parent.mkdir(parents=True)
    artefact.touch()
    ran = qhw_run("check", str(tmp_path / "out"), "-t", TARGET)
    assert (ran.status, ran.err.endswith(f"got a folder or a device. Its artefact: {artefact}\n")) == (2, True)


def test_a_form_that_nobody_reads_lists_the_readers(tmp_path: Path, qhw_run: Any) -> None:
    path = tmp_path / "model.bin"
    path.write_bytes(b"hello")
    done = qhw_run("check", str(path), "-t", TARGET)
    assert done.status == 2
    assert done.err.startswith(f"error: {path}: is of no form that can be read. Readers: AIMET encodings")


def test_the_host_can_be_refused(tmp_path: Path, qhw_run: Any) -> None:
    path = conv_file(w=None, bias=None).write(tmp_path)
    allowed = json.loads(qhw_run("check", str(path), "-t", TARGET, "--json").out)
    refused = json.loads(qhw_run("check", str(path), "-t", TARGET, "--no-host", "--json").out)
    assert (allowed["is_legal"], allowed["counts"]["host"]) == (True, 1)
    assert (refused["is_legal"], len(refused["violations"])) == (False, 1)


def test_a_model_of_which_nothing_is_judged_does_not_pass(tmp_path: Path, qhw_run: Any) -> None:
    path = conv_file(x=None, y=None, w=None, bias=None).write(tmp_path)
    done = qhw_run("check", str(path), "-t", TARGET)
    assert done.status == 1
    assert done.out.splitlines()[0] == f"{path} (ONNX QDQ) on {TARGET}: nothing judged"
    assert done.out.splitlines()[2].startswith("No operator was held to a kernel of the target")
    assert json.loads(qhw_run("check", str(path), "-t", TARGET, "--json").out)["is_judged"] is False
