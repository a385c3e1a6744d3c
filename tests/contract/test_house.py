# SPDX-License-Identifier: Apache-2.0
"""House rules that a reader of one file cannot see broken: licence lines, sizes, names, tests that cannot fail."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("qhw", "plugins", "targets", "tests", "examples", "bench")
SPDX = "# SPDX-License-Identifier: Apache-2.0"
MAX_LINES, MAX_TEST_LINES = 500, 900
EMPTY_NAMES = {"utils", "util", "helpers", "helper", "common", "misc"}
OPEN_WORK = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")
RUNS_CODE = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "subprocess", "runpy"}
RUNS_CODE_CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "torch.load"}


def files(*suffixes: str) -> list[Path]:
    """Our files of these kinds, in the order of their names."""
    found = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if "__pycache__" not in path.parts]
    return sorted(path for path in (*found, *ROOT.glob("*"), *ROOT.glob("docs/*")) if path.suffix in suffixes)


def named(paths: list[Path]) -> list[str]:
    return [path.relative_to(ROOT).as_posix() for path in paths]


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def is_test(path: Path) -> bool:
    return path.is_relative_to(ROOT / "tests")


def test_the_search_finds_files_of_every_folder() -> None:
    found = files(".py")
    assert [folder for folder in FOLDERS if not any(path.is_relative_to(ROOT / folder) for path in found)] == []
    assert ROOT / "pyproject.toml" in files(".toml")


def test_every_file_starts_with_its_licence() -> None:
    assert named([path for path in files(".py", ".toml") if lines(path)[:1] != [SPDX]]) == []


def test_every_module_says_what_it_is_for() -> None:
    assert named([path for path in files(".py") if ast.get_docstring(ast.parse(path.read_text())) is None]) == []


def test_no_file_is_too_long_to_read() -> None:
    long = [path for path in files(".py") if len(lines(path)) > (MAX_TEST_LINES if is_test(path) else MAX_LINES)]
    assert named(long) == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    paths = files(".py")
    assert named([path for path in paths if EMPTY_NAMES & {path.stem, *path.relative_to(ROOT).parts[:-1]}]) == []


def test_no_work_is_left_open_in_comments() -> None:
    paths = files(".py", ".toml", ".md")
    assert named([path for path in paths if OPEN_WORK.search(path.read_text(encoding="utf-8"))]) == []


def code_runners(tree: ast.AST) -> Iterator[str]:
    """Calls and imports through which data could run as code, or other programs start."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in RUNS_CODE)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            yield str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in RUNS_CODE_CALLS:
            yield ast.unparse(node.func)


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import pickle", ["pickle"]),
        ("from subprocess import run", ["subprocess"]),
        ("eval('1')", ["eval"]),
        ("import os\nos.system('ls')", ["os.system"]),
        ("model.eval()", []),
        ("re.compile('x')", []),
    ],
)
def test_the_search_for_running_code(code: str, found: list[str]) -> None:
    assert list(code_runners(ast.parse(code))) == found


def test_nothing_shipped_can_run_code_from_data() -> None:
    shipped = [path for path in files(".py") if not is_test(path) and path.parts[len(ROOT.parts)] in FOLDERS[:3]]
    bad = {path: list(code_runners(ast.parse(path.read_text()))) for path in shipped}
    assert {path.relative_to(ROOT).as_posix(): what for path, what in bad.items() if what} == {}


def can_fail(function: ast.AST, helpers: frozenset[str] = frozenset()) -> bool:
    """Whether a test has an assertion, an expected error, or a call of something that checks."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func).rpartition(".")[2]
            if name in ("raises", "warns", "fail") or name.startswith(("check", "assert")) or name in helpers:
                return True
    return False


def idle_tests(code: str) -> list[str]:
    """Names of the tests that pass whatever happens. A function of the same file counts as a check when it is one."""
    functions = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.FunctionDef)]
    helpers = frozenset(item.name for item in functions if not item.name.startswith("test_") and can_fail(item))
    return [item.name for item in functions if item.name.startswith("test_") and not can_fail(item, helpers)]


@pytest.mark.parametrize(
    ("body", "idle"),
    [
        ("assert x", []),
        ("with pytest.raises(ValueError):\n        f()", []),
        ("np.testing.assert_array_equal(x, y)", []),
        ("check_scale(x)", []),
        ("refused(x)\ndef refused(x):\n    assert x", []),
        ("refused(x)\ndef refused(x):\n    return x", ["test_x"]),
        ("f(x)", ["test_x"]),
        ("x == y", ["test_x"]),
    ],
)
def test_the_search_for_tests_that_cannot_fail(body: str, idle: list[str]) -> None:
    assert idle_tests(f"def test_x():\n    {body}") == idle


def test_every_test_can_fail() -> None:
    tests = [path for path in files(".py") if is_test(path) and path.name.startswith("test_")]
    idle = {path.relative_to(ROOT).as_posix(): idle_tests(path.read_text()) for path in tests}
    assert {name: found for name, found in idle.items() if found} == {}
