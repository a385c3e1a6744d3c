# SPDX-License-Identifier: Apache-2.0
"""The one direction of the arrows: who may import whom, what the core never names, what it does alone."""

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from qhw.extension import load_plugins

ROOT = Path(__file__).parents[2]
CORE = ROOT / "qhw"
# Each room imports only from itself and from those before it. `qhw` is the package's own __init__.py.
ORDER = (
    "errors",
    "wording",
    "schema",
    "numerics",
    "graph",
    "legality",
    "decisions",
    "roofline",
    "extension",
    "engine",
    "training",
    "integer",
    "vectors",
    "api",
    "checking",
    "costs",
    "evaluation",
    "verification",
    "comparison",
    "golden_vectors",
    "qhw",
    "testing",
    "cli",
    "__main__",
)
HEAVY = ("torch", "onnx", "onnxruntime", "onnxscript", "numpy")
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["entry-points"]["qhw"]
# Words of the field that are also names of shipped algorithms: how `legal_scale` rounds.
WORDS_OF_THE_FIELD = {"nearest"}
# Names of targets within their vendor's folder that are words of the language or of the field as well.
ORDINARY_WORDS = {"ascend", "cpu", "npu"}


def room_of(path: Path) -> str:
    """`qhw/graph/forms.py` -> graph; `qhw/api.py` -> api; `qhw/__init__.py` -> qhw."""
    first = path.relative_to(CORE).parts[0].removesuffix(".py")
    return "qhw" if first == "__init__" else first


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, str | None]]:
    """Module and name of every import, those inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((module, alias.name) for alias in node.names)


def imported_rooms(path: Path) -> Iterator[tuple[str, str]]:
    """Room and written form of everything of qhw that a file imports."""
    package = ".".join(path.relative_to(ROOT).parent.parts)
    for module, name in imports(ast.parse(path.read_text()), package):
        if module == "qhw" and name == "__version__":  # a constant that imports nothing
            continue
        if module == "qhw" and name is not None and (name in ORDER or (CORE / name).is_dir()):
            yield name, f"{module}.{name}"
        elif module == "qhw" or module.startswith("qhw."):
            yield (module.split(".")[1] if "." in module else "qhw"), module


def python(code: str, **variables: str) -> str:
    """What a fresh Python prints; it finds qhw and the shipped plugins in this checkout."""
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "plugins", ROOT / "targets")))
    environment = {**os.environ, "PYTHONPATH": paths, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room_of(path) for path in CORE.rglob("*.py")} - set(ORDER) == set()


def test_rooms_import_only_from_rooms_before_them() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {written}"
        for path in sorted(CORE.rglob("*.py"))
        for room, written in imported_rooms(path)
        if ORDER.index(room) > ORDER.index(room_of(path))
    ]
    assert wrong == []


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("import torch.nn", [("torch.nn", None)]),
        ("if TYPE_CHECKING:\n    from qhw.cli import main", [("qhw.cli", "main")]),
        ("def f():\n    from ..engine import run", [("qhw.engine", "run")]),
        ("from .forms import Form", [("qhw.graph.forms", "Form")]),
    ],
)
def test_the_search_for_imports(code: str, found: list[tuple[str, str | None]]) -> None:
    assert list(imports(ast.parse(code), "qhw.graph")) == found


def test_the_core_imports_no_shipped_plugin_and_no_target() -> None:
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in CORE.rglob("*.py")
        for module, _ in imports(ast.parse(path.read_text()), "qhw")
        if module.split(".")[0] in ("qhw_plugins", "qhw_targets", "plugins", "targets", "tests", "examples", "bench")
    ]
    assert wrong == []


def test_schema_imports_only_pydantic_and_the_standard_library() -> None:
    allowed = {*sys.stdlib_module_names, "pydantic", "pydantic_core", "qhw"}
    wrong = [
        f"{path.relative_to(ROOT)} imports {module}"
        for path in (CORE / "schema").rglob("*.py")
        for module, _ in imports(ast.parse(path.read_text()), "qhw.schema")
        if module.split(".")[0] not in allowed
    ]
    assert wrong == []


@pytest.mark.parametrize("module", ["qhw", "qhw.schema", "qhw.errors", "qhw.cli", "qhw.cli.app"])
def test_light_modules_do_not_load_heavy_ones(module: str) -> None:
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    assert python(code).strip() == "[]"


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "--help"], ["target", "schema"]], ids=" ".join)
def test_commands_that_need_no_model_do_not_wait_for_torch(arguments: list[str]) -> None:
    code = (
        f"import sys; sys.argv = ['qhw', *{arguments}]\n"
        "from qhw.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as ended:\n    assert not ended.code, ended.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    assert python(code).splitlines()[-1] == "[]"


def shipped_names() -> dict[str, set[str]]:
    """Names of everything that the shipped plugins register, by kind."""
    registry = load_plugins(block=(), entry_points=[EntryPoint(n, value, "qhw") for n, value in POINTS.items()])
    kinds = ("targets", "algorithms", "pipelines", "exporters", "executors", "readers")
    return {kind: set(getattr(registry, kind)) for kind in kinds}


def texts(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every string that is no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = {id(n.body[0].value) for n in ast.walk(tree) if isinstance(n, documented) and _starts_with_text(n)}  # type: ignore[attr-defined]
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.lineno, node.value


def _starts_with_text(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return bool(node.body) and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)


def test_the_core_names_no_shipped_thing() -> None:
    """No text of qhw/ is the name of a shipped algorithm, exporter, ..., and none holds a target's, its chip's."""
    names = shipped_names()
    assert all(names.values())
    words = set().union(*names.values()) - WORDS_OF_THE_FIELD
    parts = {part for name in names["targets"] for part in (name, name.split("/")[1])} - ORDINARY_WORDS
    chips = [re.compile(rf"\b{re.escape(part)}\b") for part in sorted(parts)]
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {text[:60]!r}"
        for path in sorted(CORE.rglob("*.py"))
        for line, text in texts(ast.parse(path.read_text()))
        if text in words or any(chip.search(text) for chip in chips)
    ]
    assert wrong == []


def test_no_module_outside_the_numerics_is_named_after_a_shipped_algorithm() -> None:
    words = shipped_names()["algorithms"]
    wrong = [path for path in CORE.rglob("*.py") if path.stem in words and room_of(path) != "numerics"]
    assert wrong == []


ALONE = """
import sys
sys.modules["qhw_plugins"] = sys.modules["qhw_targets"] = None  # importing them would raise
import torch
import qhw
from qhw.extension import default_registry
registry = default_registry()
print(len(registry.loaded), len(registry.algorithms), len(registry.targets))
target = qhw.load_target(sys.argv[1])
graph = qhw.capture(torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.ReLU()), torch.ones(1, 4))
print(target.name, *(operator.kind for operator in graph.operators))
try:
    qhw.plan(graph, target)
except qhw.QhwError as error:
    print(error)
"""


def test_without_any_plugin_the_core_loads_a_target_and_captures_a_model() -> None:
    target = ROOT / "targets/qhw_targets/whitepaper/generic-int8.toml"
    code = ALONE.replace("sys.argv[1]", repr(str(target)))
    blocked = ",".join({*POINTS, *(point.name for point in importlib.metadata.entry_points(group="qhw"))})
    counts, facts, refused = python(code, QHW_BLOCK=blocked).splitlines()
    assert counts == "0 0 0"
    assert facts == "whitepaper/generic-int8 Gemm Relu"
    assert refused.startswith("no pipeline is the default.")


STRANGERS = ("plugins", "targets", "tests/data/third_party")


def public_names() -> dict[str, set[str]]:
    """Importable module of qhw -> names that others may take from it."""
    rooms = ["qhw", *(f"qhw.{folder.name}" for folder in CORE.iterdir() if (folder / "__init__.py").is_file())]
    rooms += ["qhw.errors"]
    return {room: set(importlib.import_module(room).__all__) for room in rooms}


def test_plugins_use_public_names_only() -> None:
    public = public_names()
    wrong = [
        f"{path.relative_to(ROOT)}: {module}: {name}"
        for folder in STRANGERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for module, name in imports(ast.parse(path.read_text()), "")
        if module.split(".")[0] == "qhw" and name not in {None, *public.get(module, ())}
    ]
    assert wrong == []


def test_plugins_touch_no_private_attribute_of_qhw() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for folder in STRANGERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and re.match(r"_[^_]", node.attr)
        if ast.unparse(node.value) not in ("self", "cls", "other", "torch")
    ]
    assert wrong == []
