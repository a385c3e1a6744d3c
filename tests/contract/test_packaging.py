# SPDX-License-Identifier: Apache-2.0
"""What is shipped: the wheel holds every module and target and nothing else, and works where it is installed."""

import ast
import importlib
import re
import tarfile
import tomllib
import zipfile
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest

from qhw.extension import load_plugins
from tests.installed import ROOT, build, make_environment

PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ENTRY_POINTS: dict[str, str] = PROJECT["project"]["entry-points"]["qhw"]
# Package -> folder that holds it; the import path equals the path below that folder.
PACKAGES = {"qhw": ROOT, "qhw_plugins": ROOT / "plugins", "qhw_targets": ROOT / "targets"}
SHIPPED = (".py", ".toml", ".json", ".typed")


def sources() -> dict[str, bytes]:
    """Every file that belongs into the wheel, as it is named there."""
    return {
        file.relative_to(home).as_posix(): file.read_bytes()
        for package, home in PACKAGES.items()
        for file in (home / package).rglob("*")
        if file.suffix in SHIPPED and "__pycache__" not in file.parts
    }


def plugin_modules() -> set[str]:
    """Modules that say that they are a plugin."""
    found = set()
    for package in ("qhw_plugins", "qhw_targets"):
        home = PACKAGES[package]
        for file in (home / package).rglob("*.py"):
            functions = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
            if any(name.startswith("qhw_") for name in functions):
                parts = file.relative_to(home).with_suffix("").parts
                found.add(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_there_is_something_to_ship() -> None:
    names = sources()
    assert {"qhw/__init__.py", "qhw/py.typed", "qhw_plugins/py.typed", "qhw_targets/py.typed"} <= set(names)
    assert [name for name in names if name.startswith("qhw_targets/") and name.endswith(".toml")]


def test_every_plugin_module_has_one_entry_point_and_every_entry_point_a_module() -> None:
    assert sorted(ENTRY_POINTS.values()) == sorted(plugin_modules())


@pytest.mark.parametrize("name", ENTRY_POINTS)
def test_entry_points_name_modules_that_can_be_imported(name: str) -> None:
    module = importlib.import_module(ENTRY_POINTS[name])
    assert hasattr(module, "qhw_plugin_info")


def test_every_folder_with_modules_is_a_package() -> None:
    """`namespaces = false`: without its __init__.py a folder would be missing from the wheel."""
    folders = {file.parent for package, home in PACKAGES.items() for file in (home / package).rglob("*.py")}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").is_file()] == []


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source archive and wheel."""
    return build(ROOT, tmp_path_factory.mktemp("build"))


@pytest.mark.slow
def test_the_wheel_holds_every_source_file_and_nothing_else(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if ".dist-info/" not in name}
    expected = sources()
    assert sorted(expected.keys() - held.keys()) == []
    assert sorted(held.keys() - expected.keys()) == []
    assert [name for name in expected if expected[name] != held[name]] == []


@pytest.mark.slow
def test_the_wheel_states_entry_points_licence_and_version(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as wheel:
        (folder,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
        points = ConfigParser()
        points.read_string(wheel.read(f"{folder}/entry_points.txt").decode())
        metadata = wheel.read(f"{folder}/METADATA").decode()
        licence = wheel.read(f"{folder}/licenses/LICENSE")
    assert dict(points["qhw"]) == ENTRY_POINTS
    assert dict(points["console_scripts"]) == {"qhw": "qhw.cli:main"}
    assert f"\nVersion: {PROJECT['project']['version']}\n" in metadata
    assert licence == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_the_source_archive_holds_what_the_wheel_needs_and_no_tests(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    needed = {f"{PACKAGES[name.split('/')[0]].relative_to(ROOT).as_posix()}/{name}" for name in sources()}
    needed = {name.removeprefix("./") for name in needed} | {"pyproject.toml", "README.md", "LICENSE"}
    assert sorted(needed - held) == []
    assert [name for name in held if name.split("/")[0] in ("tests", "bench", "examples", "out")] == []


@pytest.mark.slow
def test_the_installed_wheel_works_from_another_folder(built: tuple[Path, Path], tmp_path: Path) -> None:
    environment = make_environment(tmp_path, built[1])
    where = environment.python("-c", "import qhw, qhw_plugins, qhw_targets; print(*map(str, qhw_targets.__path__))")
    assert where.stdout.startswith(str(environment.site_packages))
    listed = environment.run("qhw", "target", "list").stdout
    targets = [name.removeprefix("qhw_targets/").removesuffix(".toml") for name in sources() if name.endswith(".toml")]
    assert [name for name in targets if name not in listed] == []
    version = environment.run("qhw", "--version").stdout.split()
    assert version == ["qhw", PROJECT["project"]["version"]]


def test_every_shipped_algorithm_is_in_the_catalogue() -> None:
    text = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    shipped = [name for name, entry in load_plugins().algorithms.items() if entry.record.distribution == "qhw"]
    assert [name for name in shipped if f"`{name}`" not in text] == []
    named = re.findall(r"`((?:unit|plugins|integration)/[\w/]+\.py)`", text)
    assert [name for name in named if not (ROOT / "tests" / name).is_file()] == []
