# SPDX-License-Identifier: Apache-2.0
"""Which files count as targets, and which are refused."""

from pathlib import Path

import pytest

from qhw.errors import PluginError
from qhw.extension.plugin import PluginRecord
from qhw.extension.target_files import list_targets

ACME = PluginRecord("acme", "acme-qhw", "1.2")


def write(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("this is not even TOML: [")
    return path


def refusal(path: object) -> str:
    with pytest.raises(PluginError) as caught:
        list_targets(ACME, path)
    return str(caught.value)


def mistake(text: str) -> str:
    return f"plugin 'acme' (acme-qhw 1.2): plugin author: {text} To go on without it: QHW_BLOCK=acme"


def test_names_come_from_paths_in_order_and_files_are_not_opened(tmp_path: Path) -> None:
    tiny, big, other = (write(tmp_path / name) for name in ("acme/tiny.toml", "acme/big-2.toml", "ab.c/x_1.toml"))
    write(tmp_path / "acme/notes.md")
    write(tmp_path / ".git/config.toml")
    write(tmp_path / "acme/.#tiny.toml")
    (tmp_path / "__init__.py").touch()
    assert list_targets(ACME, tmp_path) == [("ab.c/x_1", other), ("acme/big-2", big), ("acme/tiny", tiny)]


def test_a_single_file_is_named_by_its_folder(tmp_path: Path) -> None:
    file = write(tmp_path / "acme/tiny.toml")
    write(tmp_path / "acme/other.toml")
    assert list_targets(ACME, file) == [("acme/tiny", file)]


def test_an_empty_folder_holds_no_targets(tmp_path: Path) -> None:
    assert list_targets(ACME, tmp_path) == []


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone") == mistake(
        f"qhw_register_targets names {tmp_path / 'gone'}, which is neither a folder nor a .toml file. "
        "List the files as package data, so that the wheel holds them."
    )


def test_text_is_no_path(tmp_path: Path) -> None:
    assert refusal(str(tmp_path)) == mistake(f"qhw_register_targets must return paths; got {str(tmp_path)!r}.")


@pytest.mark.parametrize("name", ["tiny.toml", "acme/v2/tiny.toml", "Acme/tiny.toml", "acme/tiny chip.toml"])
def test_a_file_at_another_place_or_name_is_refused(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name)
    assert refusal(tmp_path) == mistake(
        f"{file} must lie at <vendor>/<chip>.toml in {tmp_path}, in lower case letters, digits, '-', '_' and '.'."
    )


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    secret = write(tmp_path / "elsewhere/secret.toml")
    link = tmp_path / "targets/acme/tiny.toml"
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    sentence = mistake(f"{link} is a link out of {tmp_path / 'targets'}. Put a copy in its place.")
    assert refusal(tmp_path / "targets") == sentence
    assert refusal(link) == sentence


def test_a_link_to_a_folder_is_not_followed(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere/secret.toml")
    (tmp_path / "targets").mkdir()
    (tmp_path / "targets/acme").symlink_to(tmp_path / "elsewhere")
    assert list_targets(ACME, tmp_path / "targets") == []


def test_a_link_inside_the_folder_is_an_alias(tmp_path: Path) -> None:
    file = write(tmp_path / "acme/tiny.toml")
    (tmp_path / "acme/old.toml").symlink_to(file)
    assert list_targets(ACME, tmp_path) == [("acme/old", tmp_path / "acme/old.toml"), ("acme/tiny", file)]


def test_a_broken_link_and_a_folder_in_place_of_a_file_are_refused(tmp_path: Path) -> None:
    broken = tmp_path / "one/acme/tiny.toml"
    broken.parent.mkdir(parents=True)
    broken.symlink_to("nothing.toml")
    folder = tmp_path / "two/acme/tiny.toml"
    folder.mkdir(parents=True)
    assert refusal(tmp_path / "one") == mistake(f"{broken} is not a file. Remove it or rename it.")
    assert refusal(tmp_path / "two") == mistake(f"{folder} is not a file. Remove it or rename it.")
