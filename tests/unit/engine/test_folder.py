# SPDX-License-Identifier: Apache-2.0
"""The result folder: whole or not at all, never over somebody's files, and no code run from it."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qhw.engine import QuantizedModel, is_result_folder, load_result, save_result, written_files
from qhw.errors import ExportError, ResultError

ROOT = Path(__file__).parents[3]
FILES = (
    "target.json",
    "plan.json",
    "graph.json",
    "tensors.safetensors",
    "samples.safetensors",
    "steps.json",
    "manifest.json",
)


@pytest.fixture
def saved(result: QuantizedModel, tmp_path: Path) -> Path:
    return save_result(result, tmp_path / "out")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def reseal(folder: Path) -> None:
    """Make the manifest's hashes right again, as somebody who tampers would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in manifest["files"]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_a_loaded_result_is_equal_bit_for_bit_and_saves_the_same_bytes(
    result: QuantizedModel, saved: Path, images: Tensor, tmp_path: Path
) -> None:
    again = load_result(saved)
    assert torch.equal(again(images), result(images))
    assert again.plan == result.plan and again.target == result.target and again.steps == result.steps
    assert again.provenance == result.provenance
    save_result(again, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(saved)
    assert sorted(contents(saved)) == sorted(FILES)


def test_nothing_else_is_left_beside_it(saved: Path) -> None:
    assert [path.name for path in saved.parent.iterdir()] == ["out"]
    assert (saved.stat().st_mode & 0o777) == 0o755


def test_an_earlier_result_is_replaced(result: QuantizedModel, saved: Path, tmp_path: Path) -> None:
    (saved / "artefacts").mkdir()
    (saved / "artefacts/model.onnx").write_text("exported later")
    save_result(result, saved)
    assert sorted(contents(saved)) == sorted(FILES)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_folder_is_taken(result: QuantizedModel, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert is_result_folder(save_result(result, tmp_path / "out"))


def foreign(place: Path) -> None:
    place.mkdir()
    (place / "thesis.txt").write_text("mine")


def file(place: Path) -> None:
    place.write_text("mine")


def link(place: Path) -> None:
    (place.parent / "elsewhere").mkdir()
    place.symlink_to(place.parent / "elsewhere")


def dangling(place: Path) -> None:
    place.symlink_to(place.parent / "nowhere")


def damaged(place: Path) -> None:
    place.mkdir()
    (place / "manifest.json").write_text("{")


@pytest.mark.parametrize(
    ("occupy", "message"),
    [
        (foreign, r"out: holds other files, and they are not overwritten\. Choose another --out\.$"),
        (file, r"out: is a file or a link, not a folder\. Choose another --out\.$"),
        (link, r"out: is a file or a link, not a folder\."),
        (dangling, r"out: is a file or a link, not a folder\."),
        (damaged, r"out: holds a result that is damaged or of another version, and it is not overwritten\. Remove it"),
    ],
)
def test_what_is_not_ours_is_left_alone(
    result: QuantizedModel, tmp_path: Path, occupy: Callable[[Path], None], message: str
) -> None:
    occupy(tmp_path / "out")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with pytest.raises(ResultError, match=message):
        save_result(result, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.rglob("*")) == before


def test_a_file_of_the_users_inside_an_earlier_result_is_left_alone(result: QuantizedModel, saved: Path) -> None:
    (saved / "notes.txt").write_text("mine")
    with pytest.raises(ResultError, match=r"out: holds 'notes\.txt', which is no part of the result, and it is not ov"):
        save_result(result, saved)
    assert (saved / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("blocked/out", r"'[^\n]*/blocked' is a file, not a folder"),
        ("blocked/deeper/out", r"'[^\n]*/blocked' is a file, not a folder"),
        ("x" * 300, r"File name too long"),
    ],
    ids=["below-a-file", "deeper", "name-too-long"],
)
def test_a_place_that_cannot_be_written(result: QuantizedModel, tmp_path: Path, place: str, why: str) -> None:
    (tmp_path / "blocked").write_text("a file")
    with pytest.raises(ResultError, match=rf": cannot be written: {why}\. Choose another --out\.$"):
        save_result(result, tmp_path / place)


def test_a_disk_that_fills_up_leaves_nothing(
    result: QuantizedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultError, match=r"out: cannot be written: No space left on device\. Nothing was kept\.$"):
        save_result(result, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_exporter_that_fails_leaves_the_old_result(result: QuantizedModel, saved: Path) -> None:
    before = contents(saved)

    def fail(inside: Path) -> None:
        (inside / "artefacts").mkdir()
        raise ExportError("no")

    with pytest.raises(ExportError, match="no"):
        save_result(result, saved, fail)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["out"]


KILLED = """
import sys, time
from pathlib import Path
from qhw.engine import load_result, save_result
result = load_result(Path(sys.argv[1]))
def hang(inside):
    print("inside", flush=True)
    time.sleep(60)
save_result(result, Path(sys.argv[2]), hang)
"""


@pytest.mark.parametrize("is_replaced", [False, True], ids=["nothing-there", "old-result-there"])
@pytest.mark.slow
def test_killed_half_way_there_is_no_folder_or_the_old_one(
    result: QuantizedModel, saved: Path, tmp_path: Path, is_replaced: bool
) -> None:
    place = tmp_path / "killed"
    if is_replaced:
        save_result(result, place)
    before = contents(place)
    paths = ":".join(str(ROOT / name) for name in (".", "plugins", "targets"))
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(saved), str(place)],
        env={"PYTHONPATH": paths, "PATH": "/usr/bin:/bin"},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stdout.readline() == b"inside\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert contents(place) == before
    assert place.exists() == is_replaced
    save_result(result, place)  # and the next run is not disturbed
    assert is_result_folder(place)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("how", ["missing", "truncated", "changed", "empty"])
def test_a_damaged_folder_is_refused_in_one_line(saved: Path, name: str, how: str) -> None:
    path = saved / name
    content = path.read_bytes()
    middle = len(content) // 2
    damage = {
        "truncated": content[:middle],
        "changed": content[:middle] + bytes([content[middle] ^ 0x55]) + content[middle + 1 :],
        "empty": b"",
    }
    path.unlink() if how == "missing" else path.write_bytes(damage[how])
    with pytest.raises(ResultError, match=r"^[^\n]*out[^\n]*(Quantize again|Give the folder)[^\n]*\.$"):
        load_result(saved)


@pytest.mark.parametrize("name", FILES[:-1])
@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"encodings": {"x": 1}, "steps": []}'],
    ids=["empty", "object", "list", "null", "no-text", "deep", "half-true"],
)
def test_files_with_matching_hashes_are_still_read_with_care(saved: Path, name: str, content: bytes) -> None:
    (saved / name).write_bytes(content)
    reseal(saved)
    with pytest.raises(ResultError, match=r"^[^\n]*out[^\n]*\.$"):
        load_result(saved)


@pytest.mark.parametrize("content", ["{}", "[]", "null", '{"format_version": 2, "files": {}}', "[" * 100_000])
def test_a_manifest_of_nonsense(saved: Path, content: str) -> None:
    (saved / "manifest.json").write_text(content)
    with pytest.raises(ResultError, match=r"manifest\.json: (is damaged|format_version must be 1; got 2)"):
        load_result(saved)


def test_no_result_folder(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match=r"is no result folder \(no manifest\.json\)\. Give the folder that 'qhw"):
        load_result(tmp_path)


def edited(folder: Path, name: str, edit: Callable[[Any], Any]) -> None:
    data = json.loads((folder / name).read_text())
    edit(data)
    (folder / name).write_text(json.dumps(data))
    reseal(folder)


def call(target: str) -> Callable[[Any], None]:
    def edit(data: Any) -> None:
        node = next(node for node in data["nodes"] if node["op"] == "call_function")
        node["target"] = target

    return edit


@pytest.mark.parametrize("called", ["os.system", "builtins.eval", "aten.save.default", "operator.attrgetter"])
def test_a_graph_that_calls_what_is_not_allowed_is_refused_with_matching_hashes(saved: Path, called: str) -> None:
    edited(saved, "graph.json", call(called))
    with pytest.raises(ResultError, match=r"out: cannot be read: [^\n]*graph\.json: "):
        load_result(saved)


def test_code_in_a_name_is_not_run(saved: Path, tmp_path: Path) -> None:
    flag = tmp_path / "ran"
    edited(saved, "graph.json", lambda data: data["nodes"][0].update(name=f"x=open({str(flag)!r},'w')"))
    with pytest.raises(ResultError, match=r"out: cannot be read"):
        load_result(saved)
    assert not flag.exists()


def test_files_of_two_results_do_not_mix(saved: Path, result: QuantizedModel, tmp_path: Path) -> None:
    edited(saved, "target.json", lambda data: data.update(summary="another"))
    with pytest.raises(ResultError, match=r"target\.json and plan\.json do not belong together\. Quantize again\.$"):
        load_result(saved)


def test_the_plan_names_the_target_beside_it(saved: Path) -> None:
    edited(saved, "plan.json", lambda data: data.update(target="acme/big"))
    with pytest.raises(ResultError, match=r"target\.json and plan\.json do not belong together\. Quantize again\.$"):
        load_result(saved)


@pytest.mark.parametrize("name", ["target.json", "plan.json"])
def test_a_cut_file_is_restored_not_corrected(saved: Path, name: str) -> None:
    (saved / name).write_bytes((saved / name).read_bytes()[:100])
    reseal(saved)
    what = name.removesuffix(".json")
    message = rf"{what}\.json: is damaged, and no {what} any more\. Restore the file, or quantize again\.$"
    with pytest.raises(ResultError, match=message):
        load_result(saved)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fc.weight", r"tensors\.safetensors: 'fc\.weight' holds NaN or infinite values\. Quantize again, or restore"),
        ("qparams/fc/scale", r"out: cannot be read: .*scale"),
    ],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_a_tensor_that_is_not_finite_is_refused(saved: Path, name: str, message: str, value: float) -> None:
    tensors = load_file(saved / "tensors.safetensors")
    tensors[name].view(-1)[0] = value
    save_file(tensors, saved / "tensors.safetensors")
    reseal(saved)
    with pytest.raises(ResultError, match=message):
        load_result(saved)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["encodings"].pop("fc"), r"no scale for 'fc'"),
        (lambda data: data["encodings"]["fc"].update(quant_max=-500), r"quant_min must be below quant_max"),
        (lambda data: data["encodings"]["fc"].update(granularity={"kind": "per_row"}), r"saved form is damaged"),
        (lambda data: data["steps"][0].update(stage="cook"), r"ValidationError: 1 validation error for StepReport"),
    ],
    ids=["group-missing", "codes-reversed", "granularity-unknown", "stage-unknown"],
)
def test_encodings_that_do_not_fit(saved: Path, edit: Callable[[Any], Any], message: str) -> None:
    edited(saved, "steps.json", edit)
    with pytest.raises(ResultError, match=rf"^[^\n]*{message}[^\n]*$"):
        load_result(saved)


def test_channels_last_and_overlapping_weights_load_to_the_same_bits(
    quantize: Callable[..., QuantizedModel], images: Tensor, tmp_path: Path
) -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 16, 3)
            self.fc = nn.Linear(16, 4, bias=False)
            base = torch.randn(4, 16)
            self.fc.weight = nn.Parameter(base)
            self.register_buffer("row", base[1])  # one storage with the weight

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.conv(x).mean((2, 3)) + self.row)  # type: ignore[no-any-return]

    model = Views().eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    result = quantize(model, images[:40])
    again = load_result(save_result(result, tmp_path / "out"))
    assert torch.equal(again(images), result(images))


def test_a_dict_of_outputs_keeps_its_order(
    quantize: Callable[..., QuantizedModel], images: Tensor, tmp_path: Path
) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            y = self.conv(x)
            return {"logits": y.mean((2, 3)), "feat": {"b": y, "a": y + 1}}

    result = quantize(Heads().eval(), images[:40])
    for model in (result, load_result(save_result(result, tmp_path / "out"))):
        outputs = model(images[:2])
        assert (list(outputs), list(outputs["feat"])) == (["logits", "feat"], ["b", "a"])


def test_paths_hold_no_sign_that_a_file_system_refuses(saved: Path) -> None:
    for path in saved.rglob("*"):
        assert not set(path.name) & set('<>:"\\|?*') and path.name == path.name.rstrip(". ")


def test_files_are_put_in_place_together(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    (tmp_path / "a.bin").write_text("old")
    with written_files(tmp_path) as inside:
        (inside / "a.bin").write_text("new")
        (inside / "deep").mkdir()
        (inside / "deep/b.bin").write_text("b")
        assert (tmp_path / "a.bin").read_text() == "old"
    assert contents(tmp_path) == {"kept.txt": b"kept", "a.bin": b"new", "deep/b.bin": b"b"}


def test_files_that_fail_leave_the_folder_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_text("old")
    with (
        pytest.raises(ResultError, match=r"cannot be written: No space left\. Nothing was kept\."),
        written_files(tmp_path) as inside,
    ):
        (inside / "a.bin").write_text("new")
        raise OSError(28, "No space left")
    assert contents(tmp_path) == {"a.bin": b"old"}
    with (
        pytest.raises(ResultError, match=r"cannot be written: '[^\n]*a\.bin' is a file, not a folder\. Choose another"),
        written_files(tmp_path / "a.bin"),
    ):
        pass
