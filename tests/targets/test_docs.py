# SPDX-License-Identifier: Apache-2.0
"""docs/targets.md: its example loads and does what it says, and every command it shows prints what it shows."""

import re
import sys
from pathlib import Path

import pytest

from qhw.cli import main
from qhw.extension import Registry
from qhw.schema import LimitRange, lint, parse_target

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "targets.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SHOWN = [text for language, text in BLOCKS if not language and text.startswith("$ qhw ")]


def toml(word: str) -> str:
    """The TOML block that holds a word."""
    return next(text for language, text in BLOCKS if language == "toml" and word in text)


def commands(block: str) -> list[tuple[str, str]]:
    """Each command of a block, and what it prints."""
    parts = [part.partition("\n") for part in re.split(r"^\$ ", block, flags=re.MULTILINE) if part]
    return [(command, output) for command, _, output in parts]


def named(block: str) -> object:
    """A block by its first command; one that captures a model takes long."""
    command = commands(block)[0][0]
    marks = [pytest.mark.slow] if " check " in command else []
    return pytest.param(block, id=command.replace("qhw target ", ""), marks=marks)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the file that the page tells to save, next to the examples."""
    (tmp_path / "broken.toml").write_text(toml("acme/broken"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT))
    return tmp_path


def printed(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit):
        main()
    return capsys.readouterr().out


@pytest.mark.parametrize("block", [named(block) for block in SHOWN])
def test_a_command_prints_what_the_page_shows(
    block: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three points on a line of their own stand for the rest."""
    for command, shown in commands(block):
        out = printed(command, monkeypatch, capsys)
        if shown.endswith("\n...\n"):
            assert out.startswith(shown.removesuffix("...\n")) and len(out) > len(shown)
        else:
            assert out == shown


def test_the_page_shows_every_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from qhw.cli.target import app

    known = {command.name for command in app.registered_commands} - {"schema"}
    shown = {command.split()[2] for block in SHOWN for command, _ in commands(block)}
    assert shown == known


def test_every_folder_of_the_library_is_named(targets_root: Path) -> None:
    folders = {path.parent.name for path in targets_root.glob("*/*.toml")}
    rows = re.findall(r"^\| `([\w-]+)` \| ", PAGE, re.MULTILINE)
    assert rows == sorted(folders)


def test_targets_that_the_page_names_are_there(registry: Registry) -> None:
    vendors = {name.partition("/")[0] for name in registry.target_names()}
    mentioned = {
        name for name in re.findall(r"[a-z0-9]+/[a-z0-9][a-z0-9.-]*", PAGE) if name.partition("/")[0] in vendors
    }
    assert mentioned - set(registry.target_names()) == set()
    assert len(mentioned) > 4


def test_the_example_of_extending_loads_without_warnings(registry: Registry) -> None:
    spec = parse_target(toml("extends ="), find_base=registry.target_path)
    assert [str(finding) for finding in lint(spec) if finding.severity != "info"] == []
    assert spec.requantize["rescale"].rounding == "half_to_plus_infinity"
    assert spec.requantize["rescale"].multiplier_bits == 31
    assert spec.operators["Softmax"].kernels == ()
    assert spec.operators["Conv"].fused == ("Relu", "Clip")
    assert spec.operators["Conv"].limits == {"kernel": LimitRange(max=7.0)}
