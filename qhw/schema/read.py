# SPDX-License-Identifier: Apache-2.0
"""Bytes of a target file as plain data: text, TOML or JSON, and nothing in it that the schema could not hold."""

import json
import math
import re
import tomllib
from collections import Counter
from typing import Any

from qhw.errors import TargetError
from qhw.schema.base import Path, Problem
from qhw.schema.locate import Lines
from qhw.schema.messages import one_line

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_VALUES", "decode", "dotted", "parse"]

MAX_BYTES = 2**20
MAX_DEPTH = 32
MAX_VALUES = 20_000  # some ten times as many as the largest description of an accelerator has
# A key of more parts than that: tomllib's time grows with the square of their number (60,000: minutes).
DEEP_KEY = re.compile(
    r"""(?<![\w\\-])(?:(?:[\w-]++|"(?:[^"\\\n]|\\.){0,200}+"|'[^'\n]{0,200}+')[ \t]*+\.[ \t]*+){%d}""".replace(
        "%d", str(MAX_DEPTH)
    )
)
TOML_PLACE = re.compile(r" ?\(at line (\d+), column (\d+)\)$")


def decode(raw: bytes, label: str) -> str:
    """The text of a file, or the byte that makes it none."""
    if len(raw) > MAX_BYTES:
        raise TargetError(
            f"{label}: must be at most {MAX_BYTES} bytes; got {len(raw)}. A target is text written by people."
        )
    if raw.startswith(b"\xef\xbb\xbf"):
        raise TargetError(f"{label}:1: must start without a byte order mark. Save it as plain UTF-8.")
    if b"\0" in raw:
        line = raw.count(b"\n", 0, raw.index(b"\0")) + 1
        raise TargetError(f"{label}:{line}: must be text; got a NUL byte. Is this a TOML file?")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        byte = raw[error.start]
        raise TargetError(f"{label}:{line}: must be UTF-8; got the byte 0x{byte:02x}. Save it as UTF-8.") from error


def parse(text: str, label: str, *, is_json: bool) -> dict[str, Any]:
    """The table a text holds, with every value one that the schema can hold."""
    deep = None if is_json else DEEP_KEY.search(text)
    if deep is not None:
        at = text.count("\n", 0, deep.start()) + 1
        raise TargetError(f"{label}:{at}: nests deeper than {MAX_DEPTH} tables or lists. Flatten it.")
    try:
        data = (
            json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant) if is_json else tomllib.loads(text)
        )
    except RecursionError as error:
        raise TargetError(f"{label}: nests deeper than {MAX_DEPTH} tables or lists. Flatten it.") from error
    except json.JSONDecodeError as error:
        raise TargetError(f"{label}:{error.lineno}: not valid JSON: {error.msg}. Correct this line.") from error
    except ValueError as error:
        raise TargetError(_syntax_message(label, error, is_json=is_json)) from error
    if not isinstance(data, dict):
        kind = "null" if data is None else type(data).__name__
        raise TargetError(f"{label}: must hold one table; got {kind}.")
    wrong = _first_wrong_value(data)
    if wrong is not None:
        line = Lines(text).nearest(wrong.path)[1] if wrong.path and not is_json else None
        place = label if line is None else f"{label}:{line}"
        raise TargetError(f"{place}  {dotted(wrong.path)}: {wrong.text}" if wrong.path else f"{place}: {wrong.text}")
    return {key: _without_nulls(held) for key, held in data.items() if held is not None}


def dotted(path: Path) -> str:
    """A path as text: `formats.w8.codes.1`. A part that is no name is cut to 60 characters."""
    return one_line(".".join(one_line(str(part), 64) for part in path[:8]))


def _syntax_message(label: str, error: ValueError, *, is_json: bool) -> str:
    text = one_line(" ".join(str(error).split()))
    kind = "JSON" if is_json else "TOML"
    if text.startswith("Exceeds the limit"):  # Python's own, on the digits of an integer
        return f"{label}: must fit 64 bits; got an integer of more than 4300 digits. Use a smaller one."
    place = TOML_PLACE.search(text)
    if place:
        return f"{label}:{place[1]}: not valid TOML: {text[: place.start()]}, at column {place[2]}. Correct this line."
    text = text[:200].removesuffix(".")
    return f"{label}: not valid {kind}: {text}. Correct the file."


def _without_nulls(value: Any) -> Any:
    """JSON's null says what an absent field says."""
    if isinstance(value, dict):
        return {key: _without_nulls(held) for key, held in value.items() if held is not None}
    return [_without_nulls(held) for held in value] if isinstance(value, list) else value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        twice = next(key for key in data if counts[key] > 1)
        raise ValueError(f"the key {twice[:60]!r} stands twice in one table")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number")


def _first_wrong_value(data: dict[str, Any]) -> Problem | None:
    todo: list[tuple[Path, Any]] = [((), data)]
    count = 0
    while todo:
        path, value = todo.pop()
        count += 1
        if count > MAX_VALUES:
            return Problem(
                (), f"must hold at most {MAX_VALUES} values and tables; it holds more. Leave out what is none."
            )
        if len(path) > MAX_DEPTH:
            return Problem(path[:4], f"nests deeper than {MAX_DEPTH} tables or lists. Flatten it.")
        if isinstance(value, dict):
            todo.extend(((*path, key), held) for key, held in value.items())
            wrong = next((text for key in value if (text := _wrong_scalar(key))), None)
        elif isinstance(value, list):
            todo.extend(((*path, index), held) for index, held in enumerate(value))
            wrong = None
        else:
            wrong = _wrong_scalar(value)
        if wrong is not None:
            return Problem(path, wrong)
    return None


def _wrong_scalar(value: Any) -> str | None:
    if isinstance(value, str):
        is_text = value.isascii() or not any(0xD800 <= ord(char) <= 0xDFFF for char in value)
        return None if is_text else "must be Unicode text; got half of a surrogate pair. Correct it."
    if value is None or isinstance(value, bool):
        return None
    if isinstance(value, float):
        return None if math.isfinite(value) else f"must be a finite number; got {value}. Leave the field out."
    if isinstance(value, int):
        fits = -(2**63) <= value < 2**63
        return None if fits else f"must fit 64 bits; got an integer of {value.bit_length()} bits. Use a smaller one."
    return f"must not be a {type(value).__name__}; no field holds one. Write it as a text."
