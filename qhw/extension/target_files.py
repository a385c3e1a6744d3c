# SPDX-License-Identifier: Apache-2.0
"""Which targets a plugin's folders hold, by file name alone: no file is opened here."""

from pathlib import Path

from qhw.extension.names import TARGET_NAME
from qhw.extension.plugin import PluginRecord


def list_targets(record: PluginRecord, path: object) -> list[tuple[str, Path]]:
    """Names and files of the targets under one registered path, in order of name.

    Links to folders are not followed; entries whose name starts with a dot are passed over.

    Args:
        record: The plugin, for messages.
        path: What it registered: a folder with `<vendor>/<chip>.toml` in it, or one such file.

    Raises:
        PluginError: no such folder or file, a file at another depth or with another name, a link out of the folder.
    """
    if not isinstance(path, Path):
        raise record.author_error(f"qhw_register_targets must return paths; got {path!r}.")
    if path.is_file() and path.suffix == ".toml":
        file = path.absolute()
        return [(_target_name(record, file, file.parent.parent), file)]
    if not path.is_dir():
        raise record.author_error(
            f"qhw_register_targets names {path}, which is neither a folder nor a .toml file. "
            "List the files as package data, so that the wheel holds them."
        )
    root = path.absolute()
    files = (file for file in root.rglob("*.toml") if not any(p.startswith(".") for p in file.relative_to(root).parts))
    return [(_target_name(record, file, root), file) for file in sorted(files)]


def _target_name(record: PluginRecord, file: Path, root: Path) -> str:
    if not file.resolve().is_relative_to(root.resolve()):
        raise record.author_error(f"{file} is a link out of {root}. Put a copy in its place.")
    if not file.is_file():
        raise record.author_error(f"{file} is not a file. Remove it or rename it.")
    name = file.relative_to(root).with_suffix("").as_posix()
    if not TARGET_NAME.fullmatch(name):
        raise record.author_error(
            f"{file} must lie at <vendor>/<chip>.toml in {root}, in lower case letters, digits, '-', '_' and '.'."
        )
    return name
