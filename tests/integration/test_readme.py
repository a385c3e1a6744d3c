# SPDX-License-Identifier: Apache-2.0
"""The README, followed to the letter: its target, its model, its commands, its Python, and what it says they print."""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from qhw.cli import main

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
    monkeypatch.setattr(sys, "argv", command.split())
    status: object = 0
    try:
        main()
    except SystemExit as ended:
        status = ended.code
    captured = capsys.readouterr()
    assert status in (0, None), f"{command}: {captured.err}"
    return captured.out


def test_the_first_target_is_complete_in_under_ten_lines(folder: Path) -> None:
    import qhw

    assert len(blocks("toml")[0].strip().splitlines()) < 10
    assert qhw.load_target(folder / "tiny.toml").name == "acme/tiny"


@pytest.mark.parametrize("command", list(commands()))
def test_every_command_runs(
    command: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "out/net" in command and "--out out/net" not in command:  # it reads what an earlier one wrote
        run(next(c for c in commands() if "--out out/net" in c), monkeypatch, capsys)
    assert run(command, monkeypatch, capsys)


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


def test_the_plan_of_the_readmes_model_is_replayed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = "--calibration net:batches --out"
    assert run(f"qhw plan net:model --target google/litert-int8 {data} plan.json", monkeypatch, capsys)
    assert "Result in out" in run(f"qhw quantize net:model --plan plan.json {data} out/net", monkeypatch, capsys)


def test_nothing_is_left_to_fill_in() -> None:
    assert "_OUTPUT" not in README
