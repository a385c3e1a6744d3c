# SPDX-License-Identifier: Apache-2.0
"""`extends`: laws of the merge, chains and cycles, and sources that follow their leaves."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qhw.errors import TargetError
from qhw.schema import TargetSpec, load_target_file, parse_target, read_target_file, to_json
from qhw.schema.extend import merge

KEYS = st.sampled_from(["a", "b", "c"])
SCALARS = st.one_of(st.integers(0, 9), st.lists(st.integers(0, 9), max_size=2))
# Two levels of tables, and scalars or lists below: a table never meets a scalar of the same name, as in the schema.
TREES = st.dictionaries(KEYS, st.dictionaries(KEYS, SCALARS, max_size=3), max_size=3)


@given(TREES, TREES)
def test_the_child_wins_and_lists_replace(base: dict[str, Any], child: dict[str, Any]) -> None:
    merged = merge(base, child)
    assert set(merged) == set(base) | set(child)
    for key in merged:
        for leaf in {*base.get(key, {}), *child.get(key, {})}:
            wanted = child[key][leaf] if leaf in child.get(key, {}) else base[key][leaf]
            assert merged[key][leaf] == wanted


@given(TREES, TREES, TREES)
def test_a_chain_merges_alike_from_either_end(a: dict[str, Any], b: dict[str, Any], c: dict[str, Any]) -> None:
    assert merge(merge(a, b), c) == merge(a, merge(b, c))


@given(TREES)
def test_nothing_is_changed_by_nothing(tree: dict[str, Any]) -> None:
    assert merge(tree, {}) == tree and merge({}, tree) == tree and merge(tree, tree) == tree


@st.composite
def claims(draw: st.DrawFn, tag: str) -> dict[str, Any]:
    """An accumulator table as a file may write it, some of its leaves with a source."""
    fields = {"bits": st.integers(8, 64), "overflow": st.sampled_from(["wrap", "exact"]), "mantissa_bits": st.just(14)}
    table: dict[str, Any] = draw(st.fixed_dictionaries({}, optional=fields))
    sourced = draw(st.sets(st.sampled_from(sorted(table)))) if table else set()
    source: Any = draw(st.sampled_from([None, tag, {name: tag for name in sorted(sourced)}]))
    return table if source is None else {**table, "source": source}


@given(base=claims("BASE"), child=claims("CHILD"))
def test_a_leaf_and_its_source_come_from_the_same_file(base: dict[str, Any], child: dict[str, Any]) -> None:
    data = {"schema_version": 1, "name": "x/base", "sources": {"BASE": "b"}, "accumulators": {"sum": base}}
    file = {"schema_version": 1, "name": "x/child", "extends": "x/base", "sources": {"CHILD": "c"}}
    text = json.dumps({**file, "accumulators": {"sum": child}})
    spec = parse_target(text, name_of_file="child.json", find_base=lambda name: data)
    for field in {*base, *child} - {"source"}:
        writer, tag = (child, "CHILD") if field in child else (base, "BASE")
        source = writer.get("source")
        path = f"accumulators.sum.{field}"
        assert getattr(spec.accumulators["sum"], field) == writer[field]
        assert spec.source_of(path) == (
            (tag,) if source == tag or (isinstance(source, dict) and field in source) else ()
        )
        assert spec.written_by(path) == ("x/child" if field in child else "x/base")


BASE = """\
schema_version = 1
name = "acme/base"
sources = { DOC = "manual, revision 1", CODE = "driver.c" }
formats.a8 = { bits = 8, signed = true, per = "tensor", source = "DOC" }
formats.w8 = { codes = [-127, 127], zero_point = 0, per = "out_channel", source = "CODE" }
accumulators.sum = { bits = 32, overflow = "wrap", source = { "*" = "DOC", overflow = "memory" } }
kernels.mac = { input = ["a8"], weight = ["w8"], output = ["a8"], accumulator = "sum", source = "DOC" }
operators.Conv = { kernels = ["mac"], fused = ["Relu", "Clip"], source = "DOC" }
"""
MIDDLE = """\
schema_version = 1
name = "acme/middle"
extends = "base.toml"
sources = { DOC = "manual, revision 2" }
accumulators.sum = { bits = 40, source = "DOC" }
"""
CHILD = """\
schema_version = 1
name = "acme/child"
extends = "middle.toml"
sources = { DOC = "manual, revision 3" }
accumulators.sum = { overflow = "unknown" }
operators.Conv = { fused = ["Relu"], source = "DOC" }
"""


@pytest.fixture
def child(tmp_path: Path) -> Path:
    for name, text in (("base", BASE), ("middle", MIDDLE), ("child", CHILD)):
        (tmp_path / f"{name}.toml").write_text(text)
    return tmp_path / "child.toml"


def test_fields_merge_and_lists_replace_along_a_chain(child: Path) -> None:
    spec = load_target_file(child)
    assert (spec.name, spec.extends, spec.lineage) == ("acme/child", None, ("acme/base", "acme/middle"))
    assert (spec.accumulators["sum"].bits, spec.accumulators["sum"].overflow) == (40, "unknown")
    assert spec.operators["Conv"].fused == ("Relu",)
    assert spec.kernels["mac"].input == ("a8",)


def test_each_leaf_keeps_its_source_and_its_writer(child: Path) -> None:
    spec = load_target_file(child)
    assert spec.sources == {
        "DOC@acme/base": "manual, revision 1",
        "DOC@acme/middle": "manual, revision 2",
        "CODE": "driver.c",
        "DOC": "manual, revision 3",
    }
    expected = {
        "formats.a8.bits": (("DOC@acme/base",), "acme/base"),
        "formats.w8.codes": (("CODE",), "acme/base"),
        "accumulators.sum.bits": (("DOC@acme/middle",), "acme/middle"),
        "accumulators.sum.overflow": ((), "acme/child"),
        "operators.Conv.kernels": (("DOC@acme/base",), "acme/base"),
        "operators.Conv.fused": (("DOC",), "acme/child"),
        "sources.DOC@acme/middle": ((), "acme/middle"),
    }
    assert {path: (spec.source_of(path), spec.written_by(path)) for path in expected} == expected


def test_a_resolved_chain_survives_json(child: Path) -> None:
    spec = load_target_file(child)
    again = parse_target(to_json(spec), name_of_file="target.json")
    assert again == spec and to_json(again) == to_json(spec)


def test_a_resolved_base_gives_the_same_as_its_files(child: Path) -> None:
    resolved = load_target_file(child.parent / "middle.toml")
    text = CHILD.replace("middle.toml", "acme/middle")
    assert parse_target(text, find_base=lambda name: resolved) == load_target_file(child)
    (child.parent / "middle.json").write_text(to_json(resolved))
    child.write_text(CHILD.replace("middle.toml", "middle.json"))
    assert load_target_file(child) == parse_target(text, find_base=lambda name: resolved)


def test_a_base_is_found_by_name(tmp_path: Path) -> None:
    path = tmp_path / "somewhere.toml"
    path.write_text(BASE)
    asked: list[str] = []

    def find_base(name: str) -> Path:
        asked.append(name)
        return path

    spec = parse_target(MIDDLE.replace("base.toml", "acme/base"), find_base=find_base)
    assert asked == ["acme/base"] and spec.accumulators["sum"].bits == 40


def test_an_error_in_a_base_is_placed_in_the_base(child: Path) -> None:
    base = child.parent / "base.toml"
    base.write_text(BASE.replace("codes = [-127, 127]", "codes = [127, -127]"))
    with pytest.raises(TargetError) as caught:
        load_target_file(child)
    assert str(caught.value) == (
        f"{base}:5  formats.w8.codes: the lower code must be below the upper; got [127, -127]. Swap them."
    )


def test_places_name_the_file_that_wrote_the_field(child: Path) -> None:
    located = read_target_file(child).located
    assert located.place(("operators", "Conv", "fused")) == f"{child}:6"
    assert located.place(("accumulators", "sum", "bits")) == f"{child.parent / 'middle.toml'}:5"
    assert located.place(("operators", "Conv", "kernels")) == f"{child.parent / 'base.toml'}:8"


def conflict(field: str, why: str) -> str:
    readings = ", ".join(f'{{ value = {value}, source = "memory" }}' for value in (1, 2))
    return f'[[conflicts]]\nfield = "{field}"\nreadings = [{readings}]\nwhy = "{why}"\n'


def test_conflicts_of_a_base_stay_where_the_child_leaves_the_field_alone(child: Path) -> None:
    about = ("formats.a8.bits", "accumulators.sum.overflow", "operators.Conv", "operators.Conv.kernels")
    base = "".join(conflict(field, "base") for field in about)
    (child.parent / "base.toml").write_text(BASE + base)
    (child.parent / "middle.toml").write_text(MIDDLE + conflict("formats.a8.bits", "middle"))
    child.write_text(CHILD + conflict("accumulators.sum.bits", "child"))
    spec = load_target_file(child)
    # The child states overflow, and a part of operators.Conv; the middle one reads the bits of a8 in its own way.
    wanted = {"operators.Conv.kernels": "base", "formats.a8.bits": "middle", "accumulators.sum.bits": "child"}
    assert [(entry.field, entry.why) for entry in spec.conflicts] == list(wanted.items())
    assert {field: spec.written_by(f"conflicts.{field}") for field in wanted} == {
        field: f"acme/{why}" for field, why in wanted.items()
    }
    assert parse_target(to_json(spec), name_of_file="target.json") == spec


def test_a_cycle_is_refused_by_its_names(tmp_path: Path) -> None:
    for name, base in (("a", "b"), ("b", "c"), ("c", "a")):
        (tmp_path / f"{name}.toml").write_text(f'schema_version = 1\nname = "x/{name}"\nextends = "{base}.toml"\n')
    files = " -> ".join(str(tmp_path / f"{name}.toml") for name in "abca")
    with pytest.raises(TargetError) as caught:
        load_target_file(tmp_path / "a.toml")
    assert str(caught.value) == f"{tmp_path / 'c.toml'}:3  extends: goes round in a circle: {files}. Break it."


def test_a_cycle_through_names_is_refused() -> None:
    data = {
        name: {"schema_version": 1, "name": name, "extends": base} for name, base in (("x/a", "x/b"), ("x/b", "x/a"))
    }
    text = 'schema_version = 1\nname = "x/mine"\nextends = "x/a"'
    with pytest.raises(TargetError, match=r"x/b  extends: goes round in a circle: <text> -> x/a -> x/b -> x/a\."):
        parse_target(text, find_base=data.get)


def test_a_target_that_extends_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('schema_version = 1\nname = "x/a"\nextends = "a.toml"\n')
    with pytest.raises(
        TargetError, match=r"a\.toml:3  extends: goes round in a circle: .*a\.toml -> .*a\.toml\. Break it"
    ):
        load_target_file(path)


def test_a_chain_has_an_end() -> None:
    def find_base(name: str) -> dict[str, Any]:
        return {"schema_version": 1, "name": name, "extends": f"x/n{int(name[3:]) + 1}"}

    with pytest.raises(TargetError, match=r"extends: more than 16 targets extend each other\. Shorten the chain\."):
        parse_target('schema_version = 1\nname = "x/mine"\nextends = "x/n0"', find_base=find_base)


def test_a_base_of_the_same_name_is_refused() -> None:
    text = 'schema_version = 1\nname = "x/a"\nextends = "x/a"'
    with pytest.raises(
        TargetError, match=r"extends: 'x/a' has the name of the target that extends it, 'x/a'\. Rename one"
    ):
        parse_target(text, find_base=lambda name: {"schema_version": 1, "name": "x/a"})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            '"x/none"',
            r"my\.toml:3  extends: the target 'x/none' is unknown\. Correct the name, or give a relative path\.",
        ),
        ('"/etc/base.toml"', r"my\.toml:3  extends: a path must be relative to its file"),
        ('"base.toml"', r"my\.toml:3  extends: 'base\.toml' is relative, and this text has no folder"),
        ("3", r"my\.toml:3  extends: must be a target's name or a relative path to a \.toml file; got 3\."),
        ('""', r"my\.toml:3  extends: must be a target's name or a relative path"),
    ],
)
def test_a_base_that_cannot_be_found_is_named(value: str, message: str) -> None:
    text = f'schema_version = 1\nname = "x/a"\nextends = {value}\n'
    with pytest.raises(TargetError, match=message):
        parse_target(text, name_of_file="my.toml", find_base=lambda name: None)


def test_a_missing_base_file_is_named_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('schema_version = 1\nname = "x/a"\nextends = "../gone.toml"\n')
    with pytest.raises(TargetError, match=r"a\.toml:3  extends: '\.\./gone\.toml' cannot be read\. .*No such file"):
        load_target_file(path)


def test_the_finder_s_own_message_is_kept() -> None:
    def find_base(name: str) -> TargetSpec:
        raise TargetError(f"target '{name}' is unknown. Closest: acme/tiny.")

    with pytest.raises(TargetError, match=r"my\.toml:3  extends: target 'acme/tyni' is unknown\. Closest: acme/tiny\."):
        parse_target(
            'schema_version = 1\nname = "x/a"\nextends = "acme/tyni"', name_of_file="my.toml", find_base=find_base
        )


def test_without_a_finder_names_cannot_be_extended() -> None:
    with pytest.raises(TargetError, match=r"extends: the target 'x/b' is unknown here\. Give a relative path"):
        parse_target('schema_version = 1\nname = "x/a"\nextends = "x/b"')


def test_the_design_s_child_says_only_what_differs() -> None:
    base = {
        "schema_version": 1,
        "name": "arm/ethos-u55",
        "formats": {name: {"bits": 16, "signed": name == "a16", "per": "tensor"} for name in ("a16", "a16u")},
        "kernels": {"mac8": {"input": ["a16"], "output": ["a16"]}, "mac16": {"input": ["a16"], "output": ["a16"]}},
    }
    text = """
schema_version = 1
name = "arm/ethos-u85"
extends = "arm/ethos-u55"
sources = { U85 = "supported operators" }
kernels.mac8  = { accumulator = "unknown", requantize = "unknown", source = "searched: not published" }
kernels.mac16 = { input = ["a16", "a16u"], weight_abs_sum_max = 2130706432, source = "U85" }
"""
    spec = parse_target(text, find_base=lambda name: base)
    assert spec.kernels["mac8"].unknown_fields() == ("accumulator", "requantize")
    assert spec.kernels["mac16"].input == ("a16", "a16u") and spec.kernels["mac16"].output == ("a16",)
    assert spec.source_of("kernels.mac16.input") == ("U85",) and spec.source_of("kernels.mac16.output") == ()
