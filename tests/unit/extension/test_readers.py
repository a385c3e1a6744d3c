# SPDX-License-Identifier: Apache-2.0
"""Readers of quantized models' files: found by name, held to their interface, one name each."""

from pathlib import Path
from typing import Any

import pytest

from qhw.errors import PluginError
from qhw.extension import ArtefactReader, load_plugins
from qhw.extension.check import class_problem
from qhw.legality import Artefact

READER = """
from qhw.extension import ArtefactReader

class Reader(ArtefactReader):
    name = "{name}"
    summary = "Reads."

    def recognizes(self, path, head):
        return head.startswith(b"ACME")

    def read(self, path, model):
        return None

@hookimpl
def qhw_register_readers():
    return [Reader]
"""


class Good(ArtefactReader):
    name = "good"
    summary = "Reads."

    def recognizes(self, path: Path, head: bytes) -> bool:
        return True

    def read(self, path: Path, model: Path | None) -> Artefact:
        return Artefact(form="ACME")


def test_a_reader_is_found_by_name_with_where_it_comes_from(site: Any) -> None:
    site.install("one", READER.format(name="acme"), version="3.4")
    registry = load_plugins(entry_points=site.entry_points())
    assert registry.reader("acme").__name__ == "Reader"
    entry = registry.readers["acme"]
    assert (entry.name, entry.plugin, entry.distribution, entry.version) == ("acme", "one", "one-dist", "3.4")
    assert registry.provided_by("one") == {"readers": ("acme",)}
    with pytest.raises(PluginError, match=r"^no reader 'acne'\. Closest: acme\. Known: acme\.$"):
        registry.reader("acne")


def test_two_readers_of_one_name_are_refused_naming_both(site: Any) -> None:
    site.install("two", READER.format(name="same"), version="2.0")
    site.install("one", READER.format(name="same"), version="1.0")
    with pytest.raises(PluginError) as caught:
        load_plugins(entry_points=site.entry_points())
    assert str(caught.value) == (
        "reader 'same' comes from plugin 'one' (one-dist 1.0) and from plugin 'two' (two-dist 2.0). "
        "Go on without one: QHW_BLOCK=one or QHW_BLOCK=two"
    )


def test_a_reader_is_held_to_its_methods() -> None:
    assert class_problem(Good, ArtefactReader) is None
    wrong = type("Bad", (Good,), {"read": lambda self, path: None})
    assert class_problem(wrong, ArtefactReader) == "Bad.read must take (self, path, model); got (self, path)."
    busy = type("Bad", (Good,), {"__init__": lambda self, threads: None})
    assert class_problem(busy, ArtefactReader) == "Bad.__init__ must take no arguments; work belongs in the call."
