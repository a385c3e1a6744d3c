# SPDX-License-Identifier: Apache-2.0
"""Schema versions: the frozen example sets every field and loads for ever; the page is current."""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from qhw.schema import Table, TargetSpec, lint, load_target_file, parse_target, target_json_schema, to_json
from qhw.schema.base import Problem
from qhw.schema.migrate import CURRENT_VERSION, STEPS, migrate
from qhw.schema.provenance import KEYED, SINGLE
from qhw.schema.reference import MODELS, render_reference

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "tests" / "data" / "schema"


def tables(value: Any) -> Iterator[Table]:
    """A table and every table inside it."""
    if isinstance(value, Table):
        yield value
        for name in type(value).model_fields:
            yield from tables(getattr(value, name))
    elif isinstance(value, dict):
        for held in value.values():
            yield from tables(held)
    elif isinstance(value, tuple):
        for held in value:
            yield from tables(held)


def all_models(model: type[BaseModel] = Table) -> set[type[BaseModel]]:
    """Every table there is."""
    return {below for child in model.__subclasses__() for below in {child, *all_models(child)}}


def test_the_frozen_example_sets_every_field_of_every_table() -> None:
    spec = load_target_file(FOLDER / "v1-example.toml")
    unset = {
        f"{model.__name__}.{name}"
        for model in all_models()
        for name, field in model.model_fields.items()
        if all(
            getattr(table, name) == field.get_default(call_default_factory=True)
            for table in tables(spec)
            if type(table) is model
        )
    }
    # Defaults that some table of the example holds beside others that do not; nested tables hand their source upward.
    assert {name for name in unset if not name.endswith(".source")} == {"TargetSpec.extends"}


def test_the_frozen_child_loads_over_the_example() -> None:
    spec = load_target_file(FOLDER / "v1-child.toml")
    assert spec.lineage == ("frozen/base", "frozen/v1-example")
    assert spec.accumulators["sum"].bits == "unknown"
    assert spec.source_of("accumulators.sum.kind") == ("searched: manual",)
    assert spec.source_of("kernels.mac.weight") == ("DOC",)
    assert spec.source_of("kernels.mac.output") == ("DOC@frozen/v1-example",)
    assert spec.conflicts[0].readings[0].source == "DOC@frozen/v1-example"
    assert spec.written_by("kernels.mac.input") == "frozen/base"
    assert spec.written_by("kernels.mac.output") == "frozen/v1-example"


def test_the_frozen_resolved_target_is_what_its_files_say() -> None:
    assert load_target_file(FOLDER / "v1-resolved.json") == load_target_file(FOLDER / "v1-child.toml")


@pytest.mark.parametrize("name", ["v1-example.toml", "v1-child.toml", "v1-resolved.json"])
def test_frozen_files_survive_json(name: str) -> None:
    spec = load_target_file(FOLDER / name)
    text = to_json(spec)
    again = parse_target(text, name_of_file="target.json")
    assert again == spec and to_json(again) == text


def test_every_recorded_field_of_the_example_is_named_by_lint() -> None:
    spec = load_target_file(FOLDER / "v1-example.toml")
    said = {finding.path for finding in lint(spec) if finding.message == "recorded, not used yet."}
    assert {"formats.a8.scale.rounding", "kernels.mac.simd_lanes", "operators.Conv.weight_axis", "valid_for"} <= said
    assert "formats.a8.scale.kind" not in said and "operators.Conv.limits.kernel" not in said


def test_migration_walks_every_step_and_keeps_every_field() -> None:
    data = tomllib.loads((FOLDER / "v1-example.toml").read_text())
    steps = {1: lambda old: {**old, "second": 2}, 2: lambda old: {**old, "third": 3}}
    result = migrate(data, steps=steps, current=3)
    assert result == {**data, "schema_version": 3, "second": 2, "third": 3}
    assert data["schema_version"] == 1


def test_the_current_version_needs_no_step() -> None:
    data = {"schema_version": CURRENT_VERSION, "name": "a/b"}
    assert migrate(data) == data
    assert set(STEPS) == set(range(1, CURRENT_VERSION))


def test_a_version_without_a_step_is_refused() -> None:
    result = migrate({"schema_version": 1}, steps={}, current=2)
    assert isinstance(result, Problem) and result.text == "must be from 1 to 2; got 1. Write schema_version = 2."


def test_every_field_is_described() -> None:
    silent = [f"{m.__name__}.{n}" for m in all_models() for n, f in m.model_fields.items() if not f.description]
    assert silent == []


def test_every_section_is_a_claim_section() -> None:
    own = {"schema_version", "name", "summary", "extends", "sources", "valid_for", "fallback", "conflicts", "source"}
    assert set(TargetSpec.model_fields) == {*own, "lineage", "inherited", *KEYED, *SINGLE}


def test_the_reference_page_is_current() -> None:
    assert (ROOT / "docs" / "target-reference.md").read_text() == render_reference()
    assert {model for _, model in MODELS} == all_models()


def test_the_json_schema_is_closed_and_marks_recorded_fields() -> None:
    schema = json.loads(json.dumps(target_json_schema()))
    assert schema["required"] == ["schema_version", "name"]
    assert schema["additionalProperties"] is False
    assert schema["$defs"]["Kernel"]["properties"]["simd_lanes"]["recorded"] is True
    assert "recorded" not in schema["$defs"]["Kernel"]["properties"]["input"]
    assert schema["$defs"]["Format"]["additionalProperties"] is False
