# SPDX-License-Identifier: Apache-2.0
"""Whatever a file holds, loading gives a target or a `TargetError`, never anything else."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qhw.errors import TargetError
from qhw.schema import TargetSpec, load_target_file, parse_target, to_json
from qhw.schema.locate import Lines
from tests.target_texts import check_loads_or_is_refused, keys_of

EXAMPLE = (Path(__file__).parents[2] / "data" / "schema" / "v1-example.toml").read_text()
DATA: dict[str, Any] = json.loads(to_json(parse_target(EXAMPLE)))


NAMES = st.sampled_from(sorted(keys_of(DATA) | {"source", "*", "extends", "", "a.b"}))
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(["unknown", "free", "a8"]),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(NAMES, inner, max_size=4)),
    max_leaves=12,
)


@settings(deadline=None)
@given(raw=st.binary(max_size=200))
def test_any_bytes_load_or_are_refused(raw: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.toml"
    path.write_bytes(raw)
    with contextlib.suppress(TargetError):
        assert isinstance(load_target_file(path), TargetSpec)


@settings(deadline=None)
@given(at=st.integers(0, len(EXAMPLE) - 1), length=st.integers(0, 20), text=st.text(max_size=6))
def test_a_damaged_file_loads_or_is_refused(at: int, length: int, text: str) -> None:
    check_loads_or_is_refused(EXAMPLE[:at] + text + EXAMPLE[at + length :], "my.toml")


@settings(deadline=None)
@given(tree=st.dictionaries(NAMES, TREES, max_size=6))
def test_any_nested_data_loads_or_is_refused(tree: dict[str, Any]) -> None:
    check_loads_or_is_refused(json.dumps({"schema_version": 1, "name": "a/b", **tree}), "my.json")


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=300, deadline=None)
@given(data=st.data())
def test_any_field_of_a_full_target_may_hold_anything(data: st.DataObject) -> None:
    full = json.loads(json.dumps(DATA))
    here: Any = full
    while True:
        key = data.draw(st.sampled_from(sorted(here)) if isinstance(here, dict) else st.integers(0, len(here) - 1))
        below = here[key]
        if not isinstance(below, dict | list) or not below or data.draw(st.booleans()):
            break
        here = below
    here[key] = data.draw(TREES)
    check_loads_or_is_refused(json.dumps(full), "my.json")


@settings(deadline=None)
@given(st.text(alphabet="a=b.[]{}\",#\n'\\ 1", max_size=60))
def test_looking_for_lines_never_fails(text: str) -> None:
    lines = Lines(text)
    assert lines.of(("no", "such", "path", 3)) is None
    assert lines.nearest(("a",))[0] in (0, 1)
