# SPDX-License-Identifier: Apache-2.0
"""What a validation error means to the person who wrote the file: a field path, what it may hold, what it held."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from qhw.schema.base import Path, Problem, Says
from qhw.schema.closest import closest
from qhw.schema.words import joined

__all__ = ["MAX_ERRORS", "describe", "field_type", "members", "one_line", "problems_of", "shown"]

MAX_ERRORS = 1000  # a file with more is broken as a whole; words for each would take minutes

TIES = ("nearest", "round", "round_nearest", "half", "half_up", "round_half_up", "rounding", "standard")
"""Words for roundings to nearest that do not say where ties go."""
TRUTH = ("true", "false")
NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}


def one_line(text: str, most: int = 4000) -> str:
    """Text of a file as one printable line: what is no printable character is escaped, what is too long is cut.

    Example:
        >>> one_line("a\\nb")
        'a\\\\nb'
    """
    if len(text) > most:
        text = text[: most - 3] + "..."
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def problems_of(error: ValidationError, model: type[BaseModel], data: Any) -> tuple[Problem, ...]:
    """Each problem of a failed validation once, the most exact path first where a field may be of several kinds.

    Of many errors only the first 1,000 are read.
    """
    found: dict[Path, Problem] = {}
    for item in error.errors(include_url=False, include_input=False)[:MAX_ERRORS]:
        if item["type"] == "qhw_rules":
            base = _path_in(item["loc"], data)
            for problem in item["ctx"]["problems"]:
                path = (*base, *problem.path)
                found.setdefault((*path, problem.text), Problem(path, problem.text))
            continue
        path = _path_in(item["loc"], data)
        kind = item["type"]
        if kind == "missing":
            path = (*path, item["loc"][-1])
            found.setdefault(path, Problem(path, "is missing. Write it."))
        elif kind == "extra_forbidden":
            found.setdefault(path, Problem(path, _no_such_field(model, path)))
        elif item["loc"] and item["loc"][-1] == "[key]":
            found.setdefault(path, Problem(path, _bad_key(model, path)))
        else:
            found.setdefault(path, Problem(path, _bad_value(model, path, data)))
    above = {path[:count] for path in found for count in range(len(path))}
    return tuple(problem for path, problem in found.items() if path not in above)


def describe(annotation: Any) -> str:
    """What a field may hold, in words: `an integer from 1 to 64 or "unknown"`."""
    return joined(dict.fromkeys(_alternatives(annotation)), "or")


def shown(value: Any) -> str:
    """A value as the file spells it, at most 60 characters."""
    if isinstance(value, bool):
        text = "true" if value else "false"
    elif isinstance(value, str):
        text = '"' + value[:100].encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
    elif isinstance(value, dict):
        text = "a table" if value else "an empty table"
    elif isinstance(value, list):
        text = "[" + ", ".join(shown(item) for item in value[:20]) + ("" if len(value) <= 20 else ", ...") + "]"
    else:
        text = "nothing" if value is None else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _path_in(loc: tuple[int | str, ...], data: Any) -> Path:
    path: list[str | int] = []
    for part in loc:
        if (isinstance(data, dict) and part in data) or (
            isinstance(data, list) and isinstance(part, int) and part < len(data)
        ):
            path.append(part)
            data = data[part]  # type: ignore[index]
    return tuple(path)


def _no_such_field(model: type[BaseModel], path: Path) -> str:
    owner = next((step for step in _steps(model, path[:-1]) if _is_model(step)), model)
    fields = [name for name in owner.model_fields if name not in ("source", "lineage", "inherited")] + ["source"]
    near = closest(str(path[-1]), fields)
    return "there is no such field." + (f" Closest: {near}." if near else "") + f" Fields here: {', '.join(fields)}."


def _bad_key(model: type[BaseModel], path: Path) -> str:
    for step in _steps(model, path[:-1]):
        if get_origin(step) is dict:
            keys = get_args(step)[0]
            near = closest(str(path[-1]), get_args(keys)) if get_origin(keys) is Literal else None
            return f"the key must be {describe(keys)}; got {shown(path[-1])}." + (f" Closest: {near}." if near else "")
    return f"the key is not allowed; got {shown(path[-1])}."


def _bad_value(model: type[BaseModel], path: Path, data: Any) -> str:
    for part in path:
        data = data[part]
    steps = tuple(_steps(model, path)) if path else (model,)
    allowed = describe(Union[steps]) if steps else "something else"  # noqa: UP007
    hint = _advice(model, path, steps, data)
    return f"must be {allowed}; got {shown(data)}.{' ' if hint else ''}{hint}"


def _advice(model: type[BaseModel], path: Path, steps: tuple[Any, ...], data: Any) -> str:
    """How to write what was probably meant, one sentence; empty where nothing tells."""
    types = [get_args(step)[0] if get_origin(step) is Annotated else step for step in steps]
    words = [word for step in steps for word in _words(step)]
    if isinstance(data, str) and data.lower() in TIES and "half_even" in words:
        return "Say where ties go: half_even, half_away_from_zero or half_to_plus_infinity."
    if isinstance(data, str) and (near := closest(data, words)):
        return f"Closest: {near}."
    table = next((step for step in types if _is_model(step)), None)
    if table is not None and not isinstance(data, dict | list) and _is_below_ids(model, path, table):
        return f"A name comes before it: {'.'.join(map(str, path[:-1]))}.<name>.{path[-1]}."
    if any(get_origin(step) is tuple for step in types) and not isinstance(data, dict | list):
        plain = data.strip() if isinstance(data, str) else data
        return f"Write [{plain if _is_number(plain) else shown(data)}]."
    if table is not None and not isinstance(data, dict):
        kinds = _words(field_type(table.model_fields["kind"])) if "kind" in table.model_fields else []
        if data in kinds:
            return f"Write {{ kind = {shown(data)} }}."
        return f"Fields of it: {', '.join(name for name in table.model_fields if name != 'source')}."
    keyed = next((step for step in types if get_origin(step) is dict), None)
    if keyed is not None and not isinstance(data, dict):
        return f"Write {{ <name> = {shown(data)} }}, a name being {describe(get_args(keyed)[0])}."
    if isinstance(data, list) and len(data) == 1 and isinstance(data[0], str) and (str in types or words):
        return f"Write {shown(data[0])}."
    if isinstance(data, str) and ((_is_number(data) and {int, float} & {*types}) or (bool in types and data in TRUTH)):
        return "Remove the quotes."
    if isinstance(data, float) and data.is_integer() and "integer" in describe(Union[steps]):  # noqa: UP007
        return f"Write {int(data)}."
    return ""


def _is_below_ids(model: type[BaseModel], path: Path, table: type[BaseModel]) -> bool:
    """Whether a field of a table stands where the name of such a table belongs, as in `formats.bits = 8`."""
    above = _steps(model, path[:-1]) if path else ()
    return any(get_origin(step) is dict for step in above) and path[-1] in table.model_fields


def _is_number(text: Any) -> bool:
    try:
        float(text)
    except (TypeError, ValueError):
        return False
    return not isinstance(text, bool)


def _words(annotation: Any) -> list[str]:
    return [
        word
        for part in members(annotation)
        if get_origin(part) is Literal
        for word in get_args(part)
        if isinstance(word, str)
    ]


def _is_model(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def members(annotation: Any) -> Iterator[Any]:
    """The alternatives of a union, each with its own `Says` kept."""
    if get_origin(annotation) in (Union, types.UnionType):
        for part in get_args(annotation):
            yield from members(part)
    elif get_origin(annotation) is Annotated and not any(isinstance(item, Says) for item in annotation.__metadata__):
        yield from members(get_args(annotation)[0])
    elif annotation is not type(None):
        yield annotation


def _steps(annotation: Any, path: Path) -> Iterator[Any]:
    """Every alternative an annotation leaves for the value at a path."""
    for part in members(annotation):
        if not path:
            yield part
            continue
        if get_origin(part) is Annotated:
            part = get_args(part)[0]
        if _is_model(part) and path[0] in part.model_fields:
            yield from _steps(field_type(part.model_fields[path[0]]), path[1:])
        elif get_origin(part) is dict:
            yield from _steps(get_args(part)[1], path[1:])
        elif get_origin(part) is tuple and isinstance(path[0], int):
            yield from _steps(get_args(part)[0], path[1:])
        elif get_origin(part) in (Union, types.UnionType):
            yield from _steps(part, path)


def field_type(field: FieldInfo) -> Any:
    """A field's annotation; Pydantic moves the metadata of a plain `Annotated` field out of it."""
    annotation: Any = field.annotation
    said = next((item for item in field.metadata if isinstance(item, Says)), None)
    return annotation if said is None else Annotated[annotation, said]


def _alternatives(annotation: Any) -> Iterator[str]:
    for part in members(annotation):
        if get_origin(part) is Annotated:
            yield next(item.text for item in part.__metadata__ if isinstance(item, Says))
        elif get_origin(part) is Literal:
            yield from (f'"{word}"' if isinstance(word, str) else str(word) for word in get_args(part))
        elif get_origin(part) is tuple:
            yield f"a list, each {describe(get_args(part)[0])}"
        elif get_origin(part) is dict or _is_model(part):
            yield "a table"
        else:
            yield NAMES.get(part, str(part))
