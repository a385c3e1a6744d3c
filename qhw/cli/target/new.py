# SPDX-License-Identifier: Apache-2.0
"""`qhw target new`: a commented file to start from, on its own or from a base."""

import os
from pathlib import Path
from typing import Annotated

import typer

from qhw.cli.console import print_json
from qhw.cli.options import AsJson
from qhw.wording import argument

__all__ = ["new_target"]

NameArgument = Annotated[str, typer.Argument(metavar="VENDOR/CHIP", help="The new target's name, as acme/npu.")]
FromOption = Annotated[
    str | None,
    typer.Option("--from", metavar="TARGET", help="The target it differs from: a name, or a path to a .toml file."),
]
FileOption = Annotated[
    Path | None, typer.Option("--out", "-o", metavar="FILE", help="The file to write. Absent: CHIP.toml, here.")
]


def new_target(name: NameArgument, base: FromOption = None, out: FileOption = None, as_json: AsJson = False) -> None:
    """Write a starting file for a target of your own: complete and explained, or what differs from a base.

    Nothing is overwritten. What the file says is an example until you have read your documents.

    Example: qhw target new acme/npu --from google/litert-int8
    """
    from qhw.cli.target.load import Shelf
    from qhw.cli.target.starting_file import complete_file, differing_file
    from qhw.errors import TargetError

    _check_name(name)
    path = Path(f"{name.partition('/')[2]}.toml") if out is None else out
    if path.suffix != ".toml":
        raise TargetError(f"--out {path}: must end in .toml; got '{path.suffix}'. Rename it.")
    if base is None:
        text = complete_file(name)
    else:
        shelf = Shelf()
        spec = shelf.load(base).spec
        if spec.name == name:
            raise TargetError(f"{name}: is the name of the base, too. Choose another one.")
        is_file = base.endswith((".toml", ".json"))
        text = differing_file(name, _relative(Path(base), path) if is_file else base, spec)
    _write(path, text)
    if as_json:
        print_json({"name": name, "file": str(path), "extends": base})
    else:
        print(f"{path} written. Next: edit it, then qhw target lint {argument(path)}")


def _check_name(name: str) -> None:
    from qhw.errors import TargetError
    from qhw.extension.names import TARGET_NAME

    if not TARGET_NAME.fullmatch(name) or len(name) > 100:
        raise TargetError(
            f"{name[:120]!r}: a target's name is vendor/chip, in lower-case letters, digits, '-', '_' and '.', at most "
            "100 in all. Choose one, as acme/npu."
        )


def _relative(base: Path, path: Path) -> str:
    """The way from the new file to its base, as `extends` wants it."""
    from qhw.errors import TargetError

    try:
        return Path(os.path.relpath(base.absolute(), path.absolute().parent)).as_posix()
    except ValueError as error:  # two drives
        raise TargetError(
            f"--from {base}: no relative path leads there from {path}. Put the file elsewhere."
        ) from error


def _write(path: Path, text: str) -> None:
    from qhw.errors import TargetError

    try:
        with path.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
    except FileExistsError as error:
        raise TargetError(f"{path}: exists already, and nothing is overwritten. Choose another --out.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise TargetError(f"{path}: cannot be written: {reason}. Choose another --out.") from error
