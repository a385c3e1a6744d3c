# SPDX-License-Identifier: Apache-2.0
"""The public surface is a list that is changed on purpose, and all of it is documented.

To change it: python -m tests.contract.test_public_api > tests/contract/public_api.txt
"""

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_name("public_api.txt")
HEAD = """\
# Every public name of qhw: what each package's __all__ holds. A name that leaves breaks somebody's code.
# Written by: python -m tests.contract.test_public_api > tests/contract/public_api.txt
"""


def public_modules() -> list[str]:
    """The package, its rooms, and the two modules that everybody may import."""
    rooms = [folder.name for folder in (ROOT / "qhw").iterdir() if (folder / "__init__.py").is_file()]
    return ["qhw", *sorted(f"qhw.{name}" for name in (*rooms, "errors"))]


def public_names(module: ModuleType) -> list[str]:
    return sorted(module.__all__)


def surface() -> str:
    """The list as it should be."""
    modules = [importlib.import_module(name) for name in public_modules()]
    return HEAD + "".join(f"{module.__name__}.{name}\n" for module in modules for name in public_names(module))


def test_the_public_names_are_those_of_the_list() -> None:
    now, agreed = set(surface().splitlines()), set(LIST.read_text(encoding="utf-8").splitlines())
    assert now == agreed, (
        f"Gone: {sorted(agreed - now) or 'none'}. New: {sorted(now - agreed) or 'none'}. If that is meant, run: "
        "python -m tests.contract.test_public_api > tests/contract/public_api.txt"
    )


@pytest.mark.parametrize("name", public_modules())
def test_every_public_name_exists_once_and_in_order(name: str) -> None:
    module = importlib.import_module(name)
    assert [word for word in module.__all__ if not hasattr(module, word)] == []
    assert len(set(module.__all__)) == len(module.__all__)
    assert [word for word in module.__all__ if word.startswith("_") and word != "__version__"] == []


def own_things(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """Public classes and functions, and the public methods and properties that a class defines itself."""
    for name in public_names(module):
        thing = getattr(module, name)
        if not (inspect.isclass(thing) or inspect.isfunction(thing)):
            continue
        yield f"{module.__name__}.{name}", thing
        for member, value in vars(thing).items() if inspect.isclass(thing) else ():
            called = value.__func__ if isinstance(value, classmethod | staticmethod) else value
            if not member.startswith("_") and (inspect.isfunction(called) or isinstance(called, property)):
                yield f"{module.__name__}.{name}.{member}", getattr(thing, member)


@pytest.mark.parametrize("name", public_modules())
def test_every_public_class_function_and_method_is_documented(name: str) -> None:
    # torch.nn.Module.forward has no docstring to inherit, and calling a module is calling that.
    module = importlib.import_module(name)
    bare = [path for path, thing in own_things(module) if not inspect.getdoc(thing) and not path.endswith(".forward")]
    assert bare == []


def test_a_room_that_is_imported_is_listed() -> None:
    assert {"qhw", "qhw.schema", "qhw.extension", "qhw.cli"} <= set(public_modules())


if __name__ == "__main__":
    print(surface(), end="")
