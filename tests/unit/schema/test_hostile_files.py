# SPDX-License-Identifier: Apache-2.0
"""Files made to break a reader: each ends soon, in printable lines, with nothing read that it has no business with.

The bound of every test is ten seconds of processor time (`soon`); the worst file found takes a fifth of it on one core
of 2020.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qhw.errors import TargetError
from qhw.schema import TargetSpec, load_target_file, parse_target, to_json
from tests.target_texts import check_lines, check_loads_or_is_refused, keys_of, refused, soon

HEAD = 'schema_version = 1\nname = "acme/tiny"\n'
SHIPPED = sorted(path.read_text() for path in (Path(__file__).parents[3] / "targets" / "qhw_targets").glob("*/*.toml"))


def message_of(text: str, name: str = "my.toml") -> str:
    """The message a text is refused with, whose lines must be printable and of a size that people read."""
    with soon():
        message = refused(text, name)
    check_lines(message)
    return message


def many(form: str, count: int) -> str:
    return HEAD + "\n".join(form.replace("N", str(number)) for number in range(count))


LARGE = [
    ("10 MB", "#" * 10_000_000, "must be at most 1048576 bytes; got 10000000. A target is text written by people."),
    (
        "a key of 300,000 parts",
        HEAD + "a." * 300_000 + "b = 1",
        ":3: nests deeper than 32 tables or lists. Flatten it.",
    ),
    (
        "a header of 300,000 parts",
        f"{HEAD}[{'a.' * 300_000}b]",
        ":3: nests deeper than 32 tables or lists. Flatten it.",
    ),
    ("quoted parts", HEAD + '"a" . ' * 100_000 + "b = 1", ":3: nests deeper than 32 tables or lists. Flatten it."),
    ("a key of 1 MB", HEAD + "a" * 10**6 + " = 1", f":3  {'a' * 61}...: there is no such field."),
    ("a text of 1 MB", f'{HEAD}summary = "{"a" * 10**6}"', "must be text of 1 to 400 characters; got"),
    ("an integer of 3.6 million bits", f"{HEAD}cost.power_w = 0x{'f' * 900_000}", "got an integer of 3600000 bits."),
    ("100,000 values", f"{HEAD}formats.x.code_set = [{'1,' * 100_000}]", "must hold at most 20000 values and tables"),
    ("6,000 unknown fields", many("kN = 1", 6000), "At least 1000 problems."),
    ("6,000 wrong values", many("formats.fN.bits = 'x'", 6000), "problems."),
    ("3,000 undefined names", many("formats.fN.bits = 8\nkernels.kN.input = ['gN']", 3000), "200 problems."),
    ("9,000 sources of nothing", many("formats.f.source.sN = 'memory'", 9000), "9000 problems."),
    ("9,000 wrong codes", f"{HEAD}formats.f.code_set = [{'0.5,' * 9000}]", "problems."),
    ("opened and never closed", HEAD + "x = " + "[" * 500_000, "nests deeper than 32 tables or lists. Flatten it."),
    ("tables in tables", f"{HEAD}x = {'{a=' * 90_000}1{'}' * 90_000}", "nests deeper than 32 tables or lists."),
    ("half-open strings", HEAD + r"\"" * 400_000, "not valid TOML: "),
]


@pytest.mark.parametrize(("text", "words"), [case[1:] for case in LARGE], ids=[case[0] for case in LARGE])
def test_a_large_file_is_refused_soon(text: str, words: str) -> None:
    assert words in message_of(text)


LARGE_JSON = [
    ("deep", "[" * 10**6, "my.json: nests deeper than 32 tables or lists. Flatten it."),
    (
        "twice, late",
        "{" + "".join(f'"k{i}": 1, ' for i in range(50_000)) + '"k0": 2}',
        "the key 'k0' stands twice in one table",
    ),
    ("1e999", '{"schema_version": 1e999}', "schema_version: must be a finite number; got inf. Leave the field out."),
    ("null", "null", "my.json: must hold one table; got null."),
    ("-Infinity", '{"a": -Infinity}', "-Infinity is not a number"),
    ("5,000 digits", f'{{"a": {"9" * 5000}}}', "must fit 64 bits; got an integer of more than 4300 digits."),
    ("__proto__", '{"schema_version": 1, "name": "a/b", "__proto__": {}, "constructor": {}}', "2 problems."),
    ("a name twice", '{"schema_version": 1, "name": "a/b", "name": "a/c"}', "the key 'name' stands twice in one table"),
    ("half a pair", '{"schema_version": 1, "name": "\\ud800"}', "name: must be Unicode text; got half of a surrogate"),
    (
        "half a pair as a key",
        '{"schema_version": 1, "\\ud800": 1}',
        "must be Unicode text; got half of a surrogate pair.",
    ),
]


@pytest.mark.parametrize(("text", "words"), [case[1:] for case in LARGE_JSON], ids=[case[0] for case in LARGE_JSON])
def test_a_hostile_json_file_is_refused_soon(text: str, words: str) -> None:
    assert words in message_of(text, "my.json")


ESCAPES = "a\\nb\\u001b[31m\\u2028\\u202e\\u0085c"


@pytest.mark.parametrize(
    "lines",
    [
        f'"{ESCAPES}" = 1',
        f'formats."{ESCAPES}".bits = 8',
        f'sources."{ESCAPES}" = "x"',
        f'summary = ["{ESCAPES}"]',
        f'fallback = "{ESCAPES}"',
        f'extends = "{ESCAPES}"',
        f'extends = "{ESCAPES}.toml"',
        f'operators.Add.limits.groups = ["{ESCAPES}"]',
        f'operators.Add.kernels = ["{ESCAPES}"]',
        f'formats.x = {{ bits = 8, source = "{ESCAPES}" }}',
        f'formats.x = {{ bits = 8, source = {{ "{ESCAPES}" = "memory" }} }}',
        f'conflicts = [{{ field = "{ESCAPES}", readings = [{{ value = 1 }}, {{ value = 2 }}], chosen = "{ESCAPES}" }}]',
    ],
)
def test_what_moves_the_cursor_is_escaped(lines: str) -> None:
    """Text of a file cannot forge lines of the message, colour a terminal, or turn its direction."""
    message = message_of(HEAD + lines)
    assert "\n" not in message and "a\\nb\\x1b" in message


def test_a_file_name_cannot_forge_lines(tmp_path: Path) -> None:
    path = tmp_path / "a\nname: is fine.toml"
    path.write_text("x = 1")
    with pytest.raises(TargetError) as caught:
        load_target_file(path)
    check_lines(str(caught.value))
    assert "a\\nname: is fine.toml  schema_version: is missing." in str(caught.value)


def chain(folder: Path, count: int) -> Path:
    """A file that extends another, which extends another, ..., `count` in all; returns the first."""
    for number in range(count):
        base = f'extends = "t{number + 1}.toml"' if number + 1 < count else ""
        (folder / f"t{number}.toml").write_text(f'schema_version = 1\nname = "a/t{number}"\n{base}')
    return folder / "t0.toml"


def test_200_files_that_extend_each_other_are_refused(tmp_path: Path) -> None:
    with (
        soon(),
        pytest.raises(TargetError, match=r"extends: more than 16 targets extend each other\. Shorten") as caught,
    ):
        load_target_file(chain(tmp_path, 200))
    check_lines(str(caught.value))
    for path in tmp_path.iterdir():
        path.unlink()
    assert len(load_target_file(chain(tmp_path, 17)).lineage) == 16


def test_large_files_that_extend_each_other_are_merged_soon(tmp_path: Path) -> None:
    path = chain(tmp_path, 4)
    for index, part in enumerate(sorted(tmp_path.iterdir())):
        part.write_text(part.read_text() + "".join(f"\nformats.f{n}.bits = {index + 1}" for n in range(2000)))
    with soon():
        spec = load_target_file(path)
    assert spec.formats["f1999"].bits == 1 and len(spec.formats) == 2000


@pytest.mark.parametrize("links", [("b", "a"), ("b", "c", "a"), ("a",)])
def test_a_circle_is_refused(tmp_path: Path, links: tuple[str, ...]) -> None:
    names = ("a", *links[:-1])
    for name, base in zip(names, links, strict=True):
        text = f'schema_version = 1\nname = "x/{name}"\nextends = "{base}.toml"'
        (tmp_path / f"{name}.toml").write_text(text)
    with pytest.raises(TargetError, match=r"extends: goes round in a circle: .*a\.toml -> .*a\.toml\. Break it\."):
        load_target_file(tmp_path / "a.toml")


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """targets/acme/my.toml is yet to be written; a secret lies beside targets/."""
    (tmp_path / "targets" / "acme").mkdir(parents=True)
    (tmp_path / "targets" / "other").mkdir()
    base = 'schema_version = 1\nname = "other/base"\naccumulators.acc.bits = 32\n'
    (tmp_path / "targets" / "other" / "base.toml").write_text(base)
    (tmp_path / "secret.toml").write_text("password = 'xyzzy'\n")
    (tmp_path / "targets" / "acme" / "link.toml").symlink_to(tmp_path / "secret.toml")
    (tmp_path / "targets" / "acme" / "way").symlink_to(tmp_path)
    (tmp_path / "targets" / "acme" / "good.toml").symlink_to(tmp_path / "targets" / "other" / "base.toml")
    return tmp_path


@pytest.mark.parametrize(
    ("base", "words"),
    [
        ("../../secret.toml", "must stay in the targets folder, "),
        ("../acme/../../secret.toml", "must stay in the targets folder, "),
        ("link.toml", "must stay in the targets folder, "),
        ("way/secret.toml", "must stay in the targets folder, "),
        ("../../../../../../../../etc/gone.toml", "must stay in the targets folder, "),
        ("/etc/gone.toml", "a path must be relative to its file, with / between folders; got"),
        ("//server/share/x.toml", "a path must be relative to its file, with / between folders; got"),
        ("C:/x.toml", "a path must be relative to its file, with / between folders; got"),
        ("C:x.toml", "a path must be relative to its file, with / between folders; got"),
        ("..\\\\..\\\\secret.toml", "a path must be relative to its file, with / between folders; got"),
        ("\\\\\\\\server\\\\share\\\\x.toml", "a path must be relative to its file, with / between folders; got"),
        ("file:///etc/passwd.toml", "cannot be read"),
        ("~/x.toml", "cannot be read"),
        ("..", "the target '..' is unknown here."),
        ("", 'must be a target\'s name or a relative path to a .toml file; got "".'),
        ("a\\u0000.toml", "must be a target's name or a relative path to a .toml file; got"),
        ("x" * 300 + ".toml", "cannot be read"),
    ],
)
def test_only_files_of_the_targets_folder_are_read(folders: Path, base: str, words: str) -> None:
    path = folders / "targets" / "acme" / "my.toml"
    path.write_text(f'schema_version = 1\nname = "acme/my"\nextends = "{base}"\n')
    with pytest.raises(TargetError) as caught:
        load_target_file(path)
    check_lines(str(caught.value))
    assert str(caught.value).startswith(f"{path}:3  extends: ") and words in str(caught.value)
    assert "xyzzy" not in str(caught.value) and "password" not in str(caught.value)


@pytest.mark.parametrize("base", ["../other/base.toml", "good.toml", "./../other/base.toml"])
def test_files_of_the_targets_folder_are_read(folders: Path, base: str) -> None:
    path = folders / "targets" / "acme" / "my.toml"
    path.write_text(f'schema_version = 1\nname = "acme/my"\nextends = "{base}"\n')
    assert load_target_file(path).accumulators["acc"].bits == 32


def test_a_base_cannot_lead_out_either(folders: Path) -> None:
    """What a chain may read is decided where it begins, not anew by each file."""
    (folders / "inner.toml").write_text('schema_version = 1\nname = "x/inner"\nextends = "../x/secret.toml"\n')
    middle = folders / "targets" / "acme" / "middle.toml"
    middle.write_text('schema_version = 1\nname = "x/middle"\nextends = "../../inner.toml"\n')
    path = folders / "targets" / "acme" / "my.toml"
    path.write_text('schema_version = 1\nname = "acme/my"\nextends = "middle.toml"\n')
    with pytest.raises(TargetError, match=r"middle\.toml:3  extends: must stay in the targets folder"):
        load_target_file(path)


def test_a_file_of_10_mb_is_not_read_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "large.toml"
    path.write_bytes(b"# " + b"x" * 10_000_000)
    with soon(), pytest.raises(TargetError, match=r"large\.toml: must be at most 1048576 bytes\. A target is text"):
        load_target_file(path)


def test_what_is_no_file_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "loop.toml").symlink_to(tmp_path / "loop.toml")
    (tmp_path / "zero.toml").symlink_to("/dev/zero")
    (tmp_path / "folder.toml").mkdir()
    for name in ("loop", "zero", "folder", "gone", "a\0b", "x" * 300):
        with soon(), pytest.raises(TargetError) as caught:
            load_target_file(tmp_path / f"{name}.toml")
        check_lines(str(caught.value))
    if os.geteuid():  # a superuser may read everything
        (tmp_path / "locked.toml").touch(0o000)
        with pytest.raises(TargetError, match=r"locked\.toml: cannot be read: Permission denied\. Check the path\."):
            load_target_file(tmp_path / "locked.toml")


EXAMPLE = (Path(__file__).parents[2] / "data" / "schema" / "v1-example.toml").read_text()
NAMES = st.sampled_from(sorted(keys_of(json.loads(to_json(parse_target(EXAMPLE))))))
WORDS = [
    "unknown",
    "any",
    "none",
    "free",
    "*",
    "memory",
    "derived: x",
    "__class__",
    "constructor",
    "a/b",
    "../a.toml",
    "",
]
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(WORDS), NAMES
)
KEYS = st.one_of(NAMES, st.sampled_from(WORDS), st.text(max_size=4))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=4)),
    max_leaves=15,
)
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@MANY
@given(tree=st.dictionaries(KEYS, TREES, max_size=6))
def test_any_json_loads_or_is_refused(tree: dict[str, Any]) -> None:
    check_loads_or_is_refused(json.dumps({"schema_version": 1, "name": "a/b", **tree}), "my.json")


@MANY
@given(text=st.text(max_size=80))
def test_any_text_loads_or_is_refused(text: str) -> None:
    check_loads_or_is_refused(text, "my.toml")
    check_loads_or_is_refused(text, "my.json")


def test_any_bytes_load_or_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "random.json"

    @MANY
    @given(raw=st.binary(max_size=200))
    def check(raw: bytes) -> None:
        path.write_bytes(raw)
        try:
            assert isinstance(load_target_file(path), TargetSpec)
        except TargetError as error:
            check_lines(str(error))

    check()


@settings(MANY, max_examples=20)
@given(data=st.data())
def test_damaged_shipped_files_load_or_are_refused(data: st.DataObject) -> None:
    """Lines dropped, doubled and exchanged, and a few characters overwritten."""
    lines = data.draw(st.sampled_from(SHIPPED)).splitlines()[:150]
    for _ in range(data.draw(st.integers(1, 4))):
        here, there = data.draw(st.integers(0, len(lines) - 1)), data.draw(st.integers(0, len(lines) - 1))
        lines[here] = data.draw(
            st.one_of(
                st.just(lines[there]),
                st.just(""),
                st.builds(
                    lambda at, new, here=here: lines[here][:at] + new + lines[here][at + 1 :], st.integers(0, 40), KEYS
                ),
                st.builds(lambda key, tree: f"{json.dumps(key)} = {json.dumps(tree)}", KEYS, TREES),
            )
        )
    check_loads_or_is_refused("\n".join(lines), "my.toml")
