# SPDX-License-Identifier: Apache-2.0
"""A target file, and the files it extends, as one validated `TargetSpec`."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from pathlib import PureWindowsPath
from typing import Any

from pydantic import ValidationError

from qhw.errors import TargetError
from qhw.schema.base import Path, Problem
from qhw.schema.extend import merge_target
from qhw.schema.locate import Lines
from qhw.schema.messages import MAX_ERRORS, one_line, problems_of, shown
from qhw.schema.migrate import migrate
from qhw.schema.provenance import normalise
from qhw.schema.read import MAX_BYTES, decode, dotted, parse
from qhw.schema.spec import TargetSpec
from qhw.schema.write import plain_data

__all__ = ["MAX_EXTENDS", "FindBase", "LoadedTarget", "Located", "load_target_file", "parse_target", "read_target_file"]

MAX_EXTENDS = 16
MAX_PROBLEMS = 50

FindBase = Callable[[str], "FilePath | TargetSpec | Mapping[str, Any] | None"]
"""Where the base of a name is: its file, its data, or None for a name nobody knows. It may raise `TargetError`."""


@dataclass(frozen=True)
class Layer:
    """One file of a chain: what messages call it, what identifies it, its data, its lines, and its folder.

    `within` is the folder that relative paths in `extends` stay in: the one above that of the chain's first file, since
    targets lie at <vendor>/<chip>.toml.
    """

    label: str
    identity: str
    data: dict[str, Any]
    lines: Lines | None
    folder: FilePath | None
    within: FilePath | None = None


@dataclass(frozen=True)
class Located:
    """Where the leaves of a resolved target are written: its file first, then those it extends."""

    layers: tuple[Layer, ...]

    def place(self, path: Path) -> str:
        """`file:line` of a field, of its nearest table, or the file alone."""
        best, found = 0, self.layers[0].label
        for layer in self.layers:
            count, line = layer.lines.nearest(path) if layer.lines is not None else (_depth(layer.data, path), None)
            if count > best:
                best, found = count, layer.label if line is None else f"{layer.label}:{line}"
        return found


@dataclass(frozen=True)
class ExtendsPlace:
    """Where a layer says what it extends; looked for when a message needs it, as most never do."""

    layer: Layer

    def __str__(self) -> str:
        return Located((self.layer,)).place(("extends",))


@dataclass(frozen=True)
class LoadedTarget:
    """A target and the places of its fields, for messages about it."""

    spec: TargetSpec
    located: Located


def load_target_file(path: FilePath | str, *, find_base: FindBase | None = None) -> TargetSpec:
    """The resolved target a .toml or .json file describes.

    Args:
        path: The file.
        find_base: Finds the targets that `extends` names; without it only relative paths can be extended.

    Raises:
        TargetError: the file cannot be read, or does not describe a target. One line per problem, with its place.
    """
    return read_target_file(path, find_base=find_base).spec


def read_target_file(path: FilePath | str, *, find_base: FindBase | None = None) -> LoadedTarget:
    """As `load_target_file`, with the places of the fields beside the target."""
    return _resolve(_read_layer(FilePath(path), str(path)), find_base)


def parse_target(
    text: str, *, name_of_file: str = "<text>", find_base: FindBase | None = None, folder: FilePath | None = None
) -> TargetSpec:
    """The resolved target a text describes.

    Args:
        text: TOML, or JSON where `name_of_file` ends in .json.
        name_of_file: What messages call the text.
        find_base: As for `load_target_file`.
        folder: Where a relative path in `extends` starts; without it such a path is refused.

    Raises:
        TargetError: the text does not describe a target.
    """
    return _resolve(
        _text_layer(text, one_line(name_of_file), identity=f"text {name_of_file}", folder=folder), find_base
    ).spec


def _text_layer(
    text: str, label: str, *, identity: str, folder: FilePath | None, within: FilePath | None = None
) -> Layer:
    try:
        raw = text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TargetError(f"{label}: must be Unicode text; got half of a surrogate pair. Correct it.") from error
    decode(raw, label)
    is_json = label.endswith(".json")
    data = parse(text, label, is_json=is_json)
    return Layer(label, identity, data, None if is_json else Lines(text), folder, within)


def _read_layer(path: FilePath, label: str, within: FilePath | None = None) -> Layer:
    label = one_line(label)
    if path.suffix not in (".toml", ".json"):
        raise TargetError(f"{label}: must end in .toml or .json; got '{path.suffix}'. Rename it.")
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for ever
            raise TargetError(f"{label}: must be a file; got a folder or a device. Check the path.")
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        identity = os.fspath(path.resolve())
        root = path.parent.resolve().parent if within is None else within
    except (OSError, ValueError, RuntimeError) as error:
        reason = one_line(getattr(error, "strerror", None) or str(error))
        raise TargetError(f"{label}: cannot be read: {reason}. Check the path.") from error
    if len(raw) > MAX_BYTES:
        raise TargetError(f"{label}: must be at most {MAX_BYTES} bytes. A target is text written by people.")
    return _text_layer(decode(raw, label), label, identity=identity, folder=path.parent, within=root)


def _resolve(first: Layer, find_base: FindBase | None) -> LoadedTarget:
    chain = [_current(first)]
    while True:
        base = _base_of(chain, find_base)
        if base is None:
            break
        chain.append(_current(base))
    data: dict[str, Any] = {}
    problems: list[tuple[str, Problem]] = []
    for layer in reversed(chain):
        layer_data, found = normalise(layer.data)
        problems.extend((Located((layer,)).place(problem.path), problem) for problem in found)
        data = merge_target(data, layer_data) if data else layer_data
    data.pop("extends", None)
    located = Located(tuple(chain))
    try:
        spec = TargetSpec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        invalid = problems_of(error, TargetSpec, data)
        problems.extend((located.place(problem.path), problem) for problem in invalid)
    if problems:
        raise TargetError(_listed(problems))
    return LoadedTarget(spec, located)


def _current(layer: Layer) -> Layer:
    data = migrate(layer.data)
    if isinstance(data, Problem):
        raise TargetError(_line(Located((layer,)).place(data.path), data))
    return replace(layer, data=data)


def _base_of(chain: list[Layer], find_base: FindBase | None) -> Layer | None:
    layer = chain[-1]
    base = layer.data.get("extends")
    if base is None:
        return None
    where = ExtendsPlace(layer)
    if not isinstance(base, str) or not base or "\0" in base:
        raise TargetError(
            f"{where}  extends: must be a target's name or a relative path to a .toml file; got {shown(base)}."
        )
    is_path = base.endswith((".toml", ".json"))
    found = _relative_base(base, layer, where) if is_path else _named_base(base, where, find_base)
    names = [item.label for item in chain]
    if any(found.identity == item.identity for item in chain):
        raise TargetError(f"{where}  extends: goes round in a circle: {' -> '.join([*names, found.label])}. Break it.")
    if len(chain) > MAX_EXTENDS:
        raise TargetError(f"{where}  extends: more than {MAX_EXTENDS} targets extend each other. Shorten the chain.")
    name = found.data.get("name")
    if isinstance(name, str) and any(name == item.data.get("name") for item in chain):
        raise TargetError(
            f"{where}  extends: {_quoted(base)} has the name of the target that extends it, {_quoted(name)}. "
            "Rename one."
        )
    return found


def _relative_base(base: str, layer: Layer, where: ExtendsPlace) -> Layer:
    if FilePath(base).is_absolute() or "\\" in base or PureWindowsPath(base).drive:
        raise TargetError(
            f"{where}  extends: a path must be relative to its file, with / between folders; got {shown(base)}."
        )
    if layer.folder is None:
        raise TargetError(
            f"{where}  extends: {_quoted(base)} is relative, and this text has no folder. Extend a target by its name."
        )
    path = layer.folder / base
    within = layer.folder.resolve().parent if layer.within is None else layer.within
    _check_inside(path, within, base, where)
    try:
        return _read_layer(path, str(path), within)
    except TargetError as error:
        if _is_file(path):
            raise
        raise TargetError(f"{where}  extends: {_quoted(base)} cannot be read. {error}") from error


def _is_file(path: FilePath) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that no system takes
        return False


def _check_inside(path: FilePath, within: FilePath, base: str, where: ExtendsPlace) -> None:
    """A file that came from elsewhere must not make this machine read its other files."""
    try:
        is_inside = path.resolve().is_relative_to(within)
    except (OSError, ValueError, RuntimeError):
        is_inside = True  # reading it says what is wrong
    if not is_inside:
        raise TargetError(
            f"{where}  extends: must stay in the targets folder, {one_line(str(within))}; {_quoted(base)} leads out of "
            "it. Copy that file into the folder, or extend a target by its name."
        )


def _named_base(base: str, where: ExtendsPlace, find_base: FindBase | None) -> Layer:
    if find_base is None:
        raise TargetError(
            f"{where}  extends: the target {_quoted(base)} is unknown here. Give a relative path that ends in .toml."
        )
    try:
        found = find_base(base)
    except TargetError as error:
        raise TargetError(f"{where}  extends: {one_line(str(error))}") from error
    if found is None:
        raise TargetError(
            f"{where}  extends: the target {_quoted(base)} is unknown. Correct the name, or give a relative path."
        )
    if isinstance(found, FilePath):
        return _read_layer(found, str(found))
    try:
        text = json.dumps(plain_data(found) if isinstance(found, TargetSpec) else dict(found))
    except (TypeError, ValueError, RecursionError) as error:
        raise TargetError(
            f"{one_line(base, 60)}: must be data that JSON can hold: {error}. Correct what registers it."
        ) from error
    label = one_line(base, 100)
    return Layer(label, f"target {base}", parse(text, label, is_json=True), None, None)


def _quoted(text: str) -> str:
    return f"'{one_line(text, 60)}'"


def _depth(data: Any, path: Path) -> int:
    for count, part in enumerate(path):
        if not (isinstance(data, dict) and part in data):
            return count
        data = data[part]
    return len(path)


def _line(place: str, problem: Problem) -> str:
    text = f"{place}  {dotted(problem.path)}: {problem.text}" if problem.path else f"{place}: {problem.text}"
    return one_line(text)


def _listed(problems: Iterable[tuple[str, Problem]]) -> str:
    lines = list(dict.fromkeys(_line(place, problem) for place, problem in problems))
    if len(lines) == 1:
        return lines[0]
    more = [f"... and {len(lines) - MAX_PROBLEMS} more"] if len(lines) > MAX_PROBLEMS else []
    least = "At least " if len(lines) >= MAX_ERRORS else ""
    return "\n".join([*lines[:MAX_PROBLEMS], *more, f"{least}{len(lines)} problems."])
