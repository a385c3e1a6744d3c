# SPDX-License-Identifier: Apache-2.0
"""Number formats of plugins: found by name, held to their interface, one name each."""

from typing import Any

import pytest

from qhw.errors import PluginError
from qhw.extension import NumberFormat, hookimpl, load_plugins
from qhw.extension.check import class_problem
from qhw.numerics import ElementSet, ListedElements
from qhw.schema import Format

PLUGIN = """
from qhw.extension import NumberFormat
from qhw.numerics import ListedElements

class Kind(NumberFormat):
    name = "{name}"
    summary = "Numbers."

    def problem(self, spec):
        return None

    def elements(self, spec):
        return ListedElements((-1.0, 0.0, 1.0), (-1, 0, 1))

@hookimpl
def qhw_register_number_formats():
    return [Kind]
"""


class Good(NumberFormat):
    name = "good"
    summary = "Numbers."

    def problem(self, spec: Format) -> str | None:
        return None

    def elements(self, spec: Format) -> ElementSet:
        return ListedElements((-1.0, 1.0), (-1, 1))


def test_a_number_format_is_found_by_name_with_where_it_comes_from(site: Any) -> None:
    site.install("one", PLUGIN.format(name="ternary"), version="3.4")
    registry = load_plugins(entry_points=site.entry_points())
    assert registry.number_format("ternary").__name__ == "Kind"
    entry = registry.number_formats["ternary"]
    assert (entry.plugin, entry.version) == ("one", "3.4")
    assert registry.provided_by("one") == {"number_formats": ("ternary",)}
    with pytest.raises(PluginError, match=r"^no number format 'ternery'\. Closest: ternary\. Known: ternary\.$"):
        registry.number_format("ternery")


def test_two_number_formats_of_one_name_are_refused_naming_both(site: Any) -> None:
    site.install("two", PLUGIN.format(name="same"), version="2.0")
    site.install("one", PLUGIN.format(name="same"), version="1.0")
    with pytest.raises(PluginError, match=r"'same' comes from plugin 'one' \(one-dist 1\.0\) and from plugin 'two'"):
        load_plugins(entry_points=site.entry_points())


def test_a_number_format_is_held_to_its_interface() -> None:
    assert class_problem(Good, NumberFormat) is None
    wrong = type("Bad", (Good,), {"problem": lambda self: None})
    assert class_problem(wrong, NumberFormat) == "Bad.problem must take (self, spec); got (self)."
    busy = type("Bad", (Good,), {"__init__": lambda self, options: None})
    assert class_problem(busy, NumberFormat) == "Bad.__init__ must take no arguments; work belongs in the call."


@pytest.mark.parametrize("name", ["integer", "unknown"])
def test_words_of_the_schema_are_no_names(name: str) -> None:
    reserved = type("Bad", (Good,), {"name": name})
    found = class_problem(reserved, NumberFormat)
    assert found == f"Bad.name must be a word of its own; got '{name}', which needs no plugin."


def test_the_hook_returns_classes() -> None:
    class Plugin:
        @hookimpl
        def qhw_register_number_formats(self) -> list[Any]:
            return [Good()]

        @hookimpl
        def qhw_plugin_info(self) -> Any:
            from qhw.extension import PluginInfo

            return PluginInfo(api=1, summary="numbers")

    with pytest.raises(PluginError, match="a Good was returned; it must be a class derived from NumberFormat"):
        load_plugins(block=(), entry_points=(), extra=[("odd", Plugin())])
