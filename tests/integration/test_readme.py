# SPDX-License-Identifier: Apache-2.0
"""The README, followed to the letter: its target, its model, its commands, its Python, and what it says they print."""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qhw.cli import main
from qhw.schema import open_fields

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    """Fenced blocks of a language; "" for plain ones."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    return [text for name, text in fenced if name == language]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the files that the README tells to save, next to the examples."""
    (tmp_path / "tiny.toml").write_text(blocks("toml")[0])
    (tmp_path / "net.py").write_text(next(block for block in blocks("python") if "def batches" in block))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    sys.modules.pop("net", None)
    return tmp_path


def commands() -> Iterator[str]:
    for block in blocks(""):
        for line in block.splitlines():
            if line.startswith("qhw "):
                yield line.split("#")[0].strip()


def run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    status: object = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert status in (0, None), f"{command}: {captured.err}"
    return captured.out


def test_the_first_target_is_complete_in_a_dozen_lines(folder: Path) -> None:
    import qhw

    assert len(blocks("toml")[0].strip().splitlines()) <= 12
    target = qhw.load_target(folder / "tiny.toml")
    assert target.name == "acme/tiny"
    fields = {".".join(map(str, field.path)) for field in open_fields(target)}
    assert fields == {"artefact.exporter", "artefact.executor", "cost"}  # nothing that decides an integer


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = re.search(r"(?<!--out )\bout/\w+", command)
    if read is not None:  # an earlier one wrote it
        run(next(c for c in commands() if f"--out {read[0]}" in c), monkeypatch, capsys)
    assert run(command, monkeypatch, capsys)


def test_the_target_of_the_readme_is_verified_and_its_sums_are_those_shown(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize = next(c for c in commands() if c.endswith("--out out/tiny"))
    assert "Result in" in run(quantize, monkeypatch, capsys)
    rows = [line.split() for line in run("qhw verify out/tiny", monkeypatch, capsys).splitlines()]
    compared = [row for row in rows[1 : rows.index([])]]
    assert len(compared) > 10 and all(int(row[1].replace(",", "")) for row in compared)
    shown = next(block for block in blocks("") if block.startswith("operator "))
    assert sums(shown) == sums(run("qhw accumulators out/tiny", monkeypatch, capsys))


def sums(table: str) -> list[str]:
    """Lines of a table without their numbers, whose last digits are the machine's."""
    return [" ".join(re.sub(r"-?[\d,]*\d", "0", line).split()) for line in table.splitlines()]


def test_the_target_of_the_readme_without_its_arithmetic_is_planned_and_says_what_is_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "".join(line for line in blocks("toml")[0].splitlines(True) if not line.startswith(("biases", "requantize")))
    (folder / "tiny.toml").write_text(text.replace('bias = "b32", ', "").replace(', requantize = "mul"', ""))
    assert "Left open kernels.mac.bias absent" in " ".join(
        run("qhw target lint tiny.toml", monkeypatch, capsys).split()
    )
    run(next(c for c in commands() if c.endswith("--out out/tiny")), monkeypatch, capsys)
    monkeypatch.setattr(sys, "argv", ["qhw", "verify", "out/tiny"])
    with pytest.raises(SystemExit, match="1"):
        main()
    ran = capsys.readouterr()
    assert "kernels.mac.bias is not stated" in ran.err
    assert "10 operators cannot overflow" in " ".join(ran.out.split())


def test_the_plan_shown_is_the_plan_printed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = "qhw plan examples.digits:model --target espressif/esp32-p4 --calibration examples.digits:calibration"
    shown = next(block for block in blocks("") if block.startswith("espressif/esp32-p4 ·"))
    assert shown == run(command, monkeypatch, capsys)


def test_the_four_lines_of_python_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks("python") if "qhw.load_target" in block)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    images = torch.randn(16, 3, 8, 8)
    names = {"model": model, "example_inputs": images[:1], "loader": images.split(4)}
    exec(compile(code, "README.md", "exec"), names)  # noqa: S102 (our own README)
    assert (folder / "out" / "model.onnx").is_file()


def test_the_four_lines_of_python_take_a_file_as_target(folder: Path) -> None:
    code = next(block for block in blocks("python") if "qhw.load_target" in block)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU()).eval()
    images = torch.randn(16, 3, 8, 8)
    names = {"model": model, "example_inputs": images[:1], "loader": images.split(4)}
    exec(code.replace("onnxruntime/cpu-x86-vnni", "tiny.toml"), names)  # noqa: S102 (our own README)
    assert (folder / "out" / "model.onnx").is_file()


def test_the_training_of_the_readme_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, train = (next(b for b in blocks("python") if word in b) for word in ("qhw.load_target", "qhw.trainable"))
    torch.manual_seed(0)
    layers = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(), torch.nn.Flatten()
    model = torch.nn.Sequential(*layers, torch.nn.Linear(288, 4)).eval()
    images, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))
    names = {"model": model, "example_inputs": images[:1], "loader": images.split(8), "torch": torch}
    names["training"] = [(images, labels)] * 60
    exec(compile(first, "README.md", "exec"), names)  # noqa: S102 (our own README)
    before = torch.nn.functional.cross_entropy(names["result"](images), labels)
    exec(compile(train, "README.md", "exec"), names)  # noqa: S102
    assert torch.nn.functional.cross_entropy(names["result"](images), labels) < 0.7 * before


def test_the_plan_of_the_readmes_model_is_replayed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--calibration net:batches --out"
    assert run(f"qhw plan net:model --target google/litert-int8 {data} plan.json", monkeypatch, capsys)
    assert "Result in out" in run(f"qhw quantize net:model --plan plan.json {data} out/net", monkeypatch, capsys)


def test_nothing_is_left_to_fill_in() -> None:
    assert "_OUTPUT" not in README
