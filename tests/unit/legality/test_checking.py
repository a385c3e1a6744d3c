# SPDX-License-Identifier: Apache-2.0
"""`qhw.check`: which reader a file goes to, and readers and files that fail."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qhw.checking import check
from qhw.errors import ArtefactError, PluginError
from qhw.extension import Entry, PluginRecord
from tests.unit.legality.conftest import changed


class Failing:
    """A stranger's reader that foresaw less than it is given."""

    summary = "ACME (.acme)."

    def recognizes(self, path: Path, head: bytes) -> bool:
        return head.startswith(b"ACME")

    def read(self, path: Path, model: Path | None) -> Any:
        raise KeyError("no\nsuch table")


def refusal(path: Path, **readers: type[Failing]) -> str:
    registry: Any = SimpleNamespace(
        readers={
            name: Entry(name, reader, PluginRecord(name, f"{name}-dist", "1.0")) for name, reader in readers.items()
        }
    )
    with pytest.raises((ArtefactError, PluginError)) as caught:
        check(path, changed({}), registry=registry)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_reader_that_fails_is_named_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.acme"
    path.write_bytes(b"ACME")
    assert refusal(path, acme=Failing).startswith(
        f"{path}: reader 'acme' cannot make sense of it: KeyError: 'no\\nsuch table'. Export the file again"
    )


def test_a_reader_that_answers_nonsense_or_fails_at_the_first_bytes_is_named(tmp_path: Path) -> None:
    class Silent(Failing):
        def read(self, path: Path, model: Path | None) -> Any:
            return None

    class Blind(Failing):
        def recognizes(self, path: Path, head: bytes) -> bool:
            raise IndexError("no byte")

    path = tmp_path / "model.acme"
    path.write_bytes(b"ACME")
    author = "plugin 'acme' (acme-dist 1.0): plugin author: reader 'acme': "
    assert refusal(path, acme=Silent).startswith(f"{author}read must return Artefact; got NoneType.")
    assert refusal(path, acme=Blind).startswith(f"{author}recognizes raised IndexError: no byte. Repair it;")


def test_files_that_no_reader_is_asked_for(tmp_path: Path) -> None:
    assert "must be a file; got a folder or a device" in refusal(tmp_path, acme=Failing)
    assert "cannot be read: No such file or directory. Check the path." in refusal(tmp_path / "none", acme=Failing)
    assert "cannot be read: embedded null" in refusal(tmp_path / "a\0b", acme=Failing)
    path = tmp_path / "other"
    path.write_bytes(b"other")
    assert refusal(path, acme=Failing) == f"{path}: is of no form that can be read. Readers: ACME (.acme)."


def test_without_readers_there_is_nothing_to_ask(tmp_path: Path) -> None:
    assert refusal(tmp_path / "model.onnx").startswith("no loaded plugin reads quantized models.")
