# SPDX-License-Identifier: Apache-2.0
"""A small target as text, and what holds of whatever text a target file has: it loads, or is refused in our words."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pytest

from qhw.errors import TargetError
from qhw.schema import lint, parse_target, to_json

TINY = """\
schema_version = 1
name = "acme/tiny"
formats.a8 = { bits = 8, signed = true, per = "tensor" }
formats.w8 = { bits = 8, codes = [-127, 127], zero_point = 0, per = "out_channel" }
accumulators.acc = { bits = 32, overflow = "wrap" }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "acc" }
operators.Conv = { kernels = ["mac"], fused = ["Relu"] }
"""
SECONDS = 10.0


@contextlib.contextmanager
def soon() -> Iterator[None]:
    """What stands in it takes at most `SECONDS` of processor time."""
    start = time.process_time()
    yield
    assert time.process_time() - start < SECONDS


def refused(text: str, name: str = "my.toml") -> str:
    """The message a text is refused with."""
    with pytest.raises(TargetError) as caught:
        parse_target(text, name_of_file=name)
    return str(caught.value)


def check_lines(message: str) -> None:
    """Its lines are printable, of a size that people read, and in our own words."""
    lines = message.split("\n")
    assert all(line.isprintable() and len(line) <= 4000 for line in lines)
    assert len(lines) <= 52
    if len(lines) > 1:  # one line for each problem, and their number
        assert lines[-1].endswith(" problems.")
    for word in ("Traceback", "Input should", "pydantic", "NoneType"):
        assert word not in message


def check_loads_or_is_refused(text: str, name: str) -> None:
    """What loads also lints and round-trips to the byte; what does not says so, its file first; both soon."""
    with soon():
        try:
            spec = parse_target(text, name_of_file=name)
        except TargetError as error:
            check_lines(str(error))
            assert str(error).startswith(name)
            return
        lint(spec)
        again = parse_target(to_json(spec), name_of_file="again.json")
        assert again == spec and to_json(again) == to_json(spec)


def keys_of(value: Any) -> set[str]:
    """Every key of nested data."""
    if isinstance(value, dict):
        return {*value, *(name for held in value.values() for name in keys_of(held))}
    return {name for held in value for name in keys_of(held)} if isinstance(value, list) else set()
