# SPDX-License-Identifier: Apache-2.0
"""Loading: every fault names plugin, distribution and version, and nothing depends on the order of installation."""

import sys
from importlib import metadata
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qhw.errors import PluginError
from qhw.extension import PluginRecord, Registry, default_registry, load_plugins, reset_default_registry

ALGORITHM = """
from qhw.extension import Algorithm

class Nearest(Algorithm):
    name = "{name}"
    stage = "round"
    summary = "Rounds to the nearest code."

    def survey(self, graph, points, target, resources):
        return None

    def apply(self, work, step, context):
        return None

@hookimpl
def qhw_register_algorithms():
    return [Nearest]
"""

EXPORTER = """
from qhw.extension import Exporter

class Writer(Exporter):
    name = "{name}"
    summary = "Writes."

    def check(self, result):
        return ()

    def export(self, result, folder):
        return ()

@hookimpl
def qhw_register_exporters():
    return [Writer]
"""

EXECUTOR = """
from qhw.extension import Executor

class Runner(Executor):
    name = "{name}"
    summary = "Runs."

    def available(self):
        return None

    def load(self, artefact):
        return list

    def versions(self):
        return {{}}

@hookimpl
def qhw_register_executors():
    return [Runner]
"""

PIPELINE = """
from qhw.decisions import Pipeline

@hookimpl
def qhw_register_pipelines():
    return [Pipeline(name="{name}", summary="A pipeline.", is_default={default}, stages=())]
"""

TARGETS = """
from pathlib import Path

@hookimpl
def qhw_register_targets():
    return [Path(__file__).parent / "{folder}"]
"""


def refusal(site: Any) -> str:
    with pytest.raises(PluginError) as caught:
        load_plugins(entry_points=site.entry_points())
    return str(caught.value)


def names(registry: Registry) -> list[tuple[str, str]]:
    return [(record.name, record.state) for record in registry.plugins]


def test_what_plugins_bring_is_found_by_name_with_where_it_comes_from(site: Any) -> None:
    (site.folder / "chips/acme").mkdir(parents=True)
    (site.folder / "chips/acme/tiny.toml").touch()
    body = ALGORITHM.format(name="nearest") + EXPORTER.format(name="writer") + EXECUTOR.format(name="runner")
    site.install("one", body, version="3.4")
    site.install("two", PIPELINE.format(name="ptq", default=True) + TARGETS.format(folder="chips"))
    registry = load_plugins(entry_points=site.entry_points())
    assert registry.algorithm("nearest").__name__ == "Nearest"
    entry = registry.algorithms["nearest"]
    assert (entry.name, entry.plugin, entry.distribution, entry.version) == ("nearest", "one", "one-dist", "3.4")
    assert registry.exporter("writer").__name__ == "Writer"
    assert registry.executor("runner").__name__ == "Runner"
    assert registry.pipeline("ptq") == registry.default_pipeline()
    assert registry.target_path("acme/tiny") == site.folder / "chips/acme/tiny.toml"
    assert registry.plugins == (
        PluginRecord(
            "one",
            "one-dist",
            "3.4",
            "loaded",
            "one for tests",
            ("qhw_plugin_info", "qhw_register_algorithms", "qhw_register_executors", "qhw_register_exporters"),
        ),
        PluginRecord(
            "two",
            "two-dist",
            "1.2",
            "loaded",
            "two for tests",
            ("qhw_plugin_info", "qhw_register_pipelines", "qhw_register_targets"),
        ),
    )
    assert registry.provided_by("one") == {
        "algorithms": ("nearest",),
        "exporters": ("writer",),
        "executors": ("runner",),
    }
    assert registry.provided_by("two") == {"targets": ("acme/tiny",), "pipelines": ("ptq",)}


def test_installed_plugins_are_found_by_their_group(site: Any) -> None:
    site.install("installed_for_this_test")
    (site.folder / "installed_for_this_test_dist-1.2.dist-info/entry_points.txt").write_text(
        "[qhw]\ninstalled_for_this_test = installed_for_this_test_dist_plugin\n[console_scripts]\nother = nowhere\n"
    )
    others = {point.name for point in metadata.entry_points(group="qhw")} - {"installed_for_this_test"}
    registry = load_plugins(block=others)
    assert ("installed_for_this_test", "loaded") in names(registry)
    assert "other" not in dict(names(registry))


def test_a_plugin_may_be_given_without_being_installed(site: Any) -> None:
    site.install("given", ALGORITHM.format(name="nearest"))
    module = site.entry_points()[0].load()
    registry = load_plugins(entry_points=(), extra=[("mine", module)])
    assert registry.algorithms["nearest"].record.label == "plugin 'mine' (given by the caller)"


def test_a_broken_import_names_plugin_distribution_and_version(site: Any) -> None:
    site.install("broken", "import module_that_is_missing")
    with pytest.raises(PluginError) as caught:
        load_plugins(entry_points=site.entry_points())
    assert str(caught.value) == (
        "plugin 'broken' (broken-dist 1.2): import of 'broken_dist_plugin' failed: ModuleNotFoundError: "
        "No module named 'module_that_is_missing'. Reinstall or repair it, or go on without it: QHW_BLOCK=broken"
    )
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("raise SystemExit(3)", "SystemExit: 3."),
        ("def (", "SyntaxError: invalid syntax (broken_dist_plugin.py, line 7)."),
        ("1 / 0", "ZeroDivisionError: division by zero."),
    ],
    ids=["exits", "does not parse", "computes"],
)
def test_no_fault_at_import_gets_past_the_loader(site: Any, body: str, fault: str) -> None:
    site.install("broken", body)
    assert f"import of 'broken_dist_plugin' failed: {fault} Reinstall" in refusal(site)


def test_what_a_plugin_prints_while_it_loads_is_kept_from_standard_output(
    site: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    site.install("chatty", "print('licence found')\n" + ALGORITHM.format(name="nearest"))
    assert list(load_plugins(entry_points=site.entry_points()).algorithms) == ["nearest"]
    assert capsys.readouterr() == ("", "licence found\n")


def test_a_broken_plugin_can_be_blocked_and_the_rest_works(site: Any) -> None:
    site.install("broken", "import module_that_is_missing")
    site.install("good", ALGORITHM.format(name="nearest"))
    registry = load_plugins(block=["broken"], entry_points=site.entry_points())
    assert names(registry) == [("broken", "blocked"), ("good", "loaded")]
    assert list(registry.algorithms) == ["nearest"]


def test_blocked_plugins_are_not_imported(site: Any) -> None:
    site.install("blocked")
    load_plugins(block=["blocked"], entry_points=site.entry_points())
    assert "blocked_dist_plugin" not in sys.modules


def test_the_block_list_is_read_from_the_environment_at_call_time(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("one")
    site.install("two")
    assert names(load_plugins(entry_points=site.entry_points())) == [("one", "loaded"), ("two", "loaded")]
    monkeypatch.setenv("QHW_BLOCK", " two ,, three,")
    registry = load_plugins(entry_points=site.entry_points())
    assert names(registry) == [("one", "loaded"), ("two", "blocked")]
    assert registry.unmatched_blocks == ("three",)


def test_a_given_block_list_replaces_the_environment(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("one")
    site.install("two")
    monkeypatch.setenv("QHW_BLOCK", "one")
    assert names(load_plugins(block="two", entry_points=site.entry_points())) == [("one", "loaded"), ("two", "blocked")]


def test_all_blocked_is_an_empty_registry_that_still_answers(site: Any) -> None:
    site.install("one", ALGORITHM.format(name="nearest"))
    registry = load_plugins(block="one", entry_points=site.entry_points())
    assert registry.target_names() == ()
    assert dict(registry.algorithms) == {}
    registry.plan_ready(plan=None, target=None)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="no algorithm 'nearest': no loaded plugin brings any"):
        registry.algorithm("nearest")


def test_a_plugin_with_zero_hooks_is_refused(site: Any) -> None:
    site.install("empty", "x = 1", info=False)
    assert refusal(site).startswith("plugin 'empty' (empty-dist 1.2): plugin author: it has no hooks.")


def test_two_plugins_of_one_name_are_refused_naming_both(site: Any) -> None:
    site.install("range", dist="acme-range", version="1.0")
    site.install("range", dist="beta-range", version="2.0")
    assert refusal(site) == (
        "two plugins are called 'range': plugin 'range' (acme-range 1.0) and plugin 'range' (beta-range 2.0). "
        "Uninstall one, or go on without both: QHW_BLOCK=range"
    )
    assert names(load_plugins(block="range", entry_points=site.entry_points())) == [("range", "blocked")] * 2


def test_one_module_behind_two_names_is_refused(site: Any) -> None:
    site.install("one")
    (site.folder / "one_dist-1.2.dist-info/entry_points.txt").write_text(
        "[qhw]\none = one_dist_plugin\nuno = one_dist_plugin\n"
    )
    assert refusal(site) == (
        "plugin 'uno' (one-dist 1.2): plugin author: it is the same object as plugin 'one' (one-dist 1.2). "
        "Keep one entry point. To go on without it: QHW_BLOCK=uno"
    )


@pytest.mark.parametrize(
    ("kind", "template"), [("algorithm", ALGORITHM), ("exporter", EXPORTER), ("executor", EXECUTOR)]
)
def test_two_classes_of_one_name_are_refused_naming_both(site: Any, kind: str, template: str) -> None:
    site.install("two", template.format(name="same"), version="2.0")
    site.install("one", template.format(name="same"), version="1.0")
    assert refusal(site) == (
        f"{kind} 'same' comes from plugin 'one' (one-dist 1.0) and from plugin 'two' (two-dist 2.0). "
        "Go on without one: QHW_BLOCK=one or QHW_BLOCK=two"
    )


def test_two_pipelines_of_one_name_are_refused_naming_both(site: Any) -> None:
    site.install("one", PIPELINE.format(name="same", default=False))
    site.install("two", PIPELINE.format(name="same", default=False))
    assert refusal(site).startswith(
        "pipeline 'same' comes from plugin 'one' (one-dist 1.2) and from plugin 'two' (two-dist 1.2)."
    )


def test_two_default_pipelines_are_refused_naming_both(site: Any) -> None:
    site.install("one", PIPELINE.format(name="p", default=True))
    site.install("two", PIPELINE.format(name="q", default=True))
    assert refusal(site) == (
        "pipelines 'p' from plugin 'one' (one-dist 1.2) and 'q' from plugin 'two' (two-dist 1.2) both say "
        "is_default=True. Go on without one: QHW_BLOCK=one or QHW_BLOCK=two"
    )


def test_two_targets_of_one_name_are_refused_naming_both(site: Any) -> None:
    for folder in ("a", "b"):
        (site.folder / folder / "acme").mkdir(parents=True)
        (site.folder / folder / "acme/tiny.toml").touch()
    site.install("one", TARGETS.format(folder="a"))
    site.install("two", TARGETS.format(folder="b"))
    assert refusal(site).startswith(
        "target 'acme/tiny' comes from plugin 'one' (one-dist 1.2) and from plugin 'two' (two-dist 1.2)."
    )


def test_one_plugin_that_registers_a_name_twice_is_its_authors_mistake(site: Any) -> None:
    site.install("one", ALGORITHM.format(name="nearest").replace("[Nearest]", "[Nearest, Nearest]"))
    assert refusal(site) == (
        "plugin 'one' (one-dist 1.2): plugin author: algorithm 'nearest' is registered twice. Rename or remove one. "
        "To go on without it: QHW_BLOCK=one"
    )


@pytest.mark.parametrize(("returned", "got"), [("(Nearest,)", "tuple"), ("None", "NoneType"), ("Nearest", "ABCMeta")])
def test_a_registration_hook_returns_a_list(site: Any, returned: str, got: str) -> None:
    site.install("one", ALGORITHM.format(name="nearest").replace("[Nearest]", returned))
    assert refusal(site) == (
        f"plugin 'one' (one-dist 1.2): plugin author: qhw_register_algorithms must return a list; got {got}. "
        "To go on without it: QHW_BLOCK=one"
    )


def test_a_class_that_breaks_its_interface_is_refused(site: Any) -> None:
    site.install("one", ALGORITHM.format(name="Nearest"))
    assert refusal(site) == (
        "plugin 'one' (one-dist 1.2): plugin author: Nearest.name must match [a-z][a-z0-9_]*; got 'Nearest'. "
        "To go on without it: QHW_BLOCK=one"
    )


def test_a_pipeline_must_be_a_pipeline(site: Any) -> None:
    site.install("one", "@hookimpl\ndef qhw_register_pipelines():\n    return [{'name': 'p'}]\n")
    assert refusal(site) == (
        "plugin 'one' (one-dist 1.2): plugin author: qhw_register_pipelines must return Pipeline objects; "
        "got {'name': 'p'}. To go on without it: QHW_BLOCK=one"
    )


def test_a_registration_hook_that_raises_is_named_and_chained(site: Any) -> None:
    site.install("one", "@hookimpl\ndef qhw_register_exporters():\n    raise KeyError('secret')\n")
    with pytest.raises(PluginError) as caught:
        load_plugins(entry_points=site.entry_points())
    assert str(caught.value) == (
        "plugin 'one' (one-dist 1.2): qhw_register_exporters raised: KeyError: 'secret'. "
        "Reinstall or repair it, or go on without it: QHW_BLOCK=one"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_damaged_metadata_is_said_and_does_not_stop_loading(site: Any) -> None:
    site.install("one")
    (site.folder / "one_dist-1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\n")
    assert load_plugins(entry_points=site.entry_points()).plugins[0].label == (
        "plugin 'one' (unknown name unknown version)"
    )


@given(order=st.permutations(range(4)))
@settings(max_examples=24, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_of_discovery_changes_the_registry(site: Any, order: list[int]) -> None:
    if not site.entry_points():
        site.install("delta", ALGORITHM.format(name="aaa"))
        site.install("alpha", ALGORITHM.format(name="zzz"))
        site.install("gamma", PIPELINE.format(name="p", default=False))
        site.install("beta", PIPELINE.format(name="o", default=True))
    points = sorted(site.entry_points(), key=lambda point: point.name)
    registry = load_plugins(entry_points=[points[i] for i in order])
    assert names(registry) == [(name, "loaded") for name in ("alpha", "beta", "delta", "gamma")]
    assert [(e.name, e.plugin) for e in registry.algorithms.values()] == [("aaa", "delta"), ("zzz", "alpha")]
    assert [(e.name, e.plugin) for e in registry.pipelines.values()] == [("o", "beta"), ("p", "gamma")]
    assert [plugin.record.name for plugin in registry.loaded] == ["alpha", "beta", "delta", "gamma"]


@given(order=st.permutations(range(3)))
@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_order_of_discovery_changes_which_fault_is_told(site: Any, order: list[int]) -> None:
    if not site.entry_points():
        site.install("bad_b", "1 / 0")
        site.install("bad_a", "1 / 0")
        site.install("bad_c", "x = 1", info=False)
    points = sorted(site.entry_points(), key=lambda point: point.name)
    with pytest.raises(PluginError, match=r"^plugin 'bad_a' \(bad_a-dist 1\.2\): import of"):
        load_plugins(entry_points=[points[i] for i in order])


def test_the_default_registry_is_loaded_once_per_block_list(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("one")
    site.install("two")
    monkeypatch.setattr(metadata, "entry_points", lambda group: site.entry_points() if group == "qhw" else [])
    reset_default_registry()
    try:
        first = default_registry()
        assert names(first) == [("one", "loaded"), ("two", "loaded")]
        assert default_registry() is first
        monkeypatch.setenv("QHW_BLOCK", "one")
        assert names(default_registry()) == [("one", "blocked"), ("two", "loaded")]
        monkeypatch.delenv("QHW_BLOCK")
        reset_default_registry()
        assert default_registry() is not first
    finally:
        reset_default_registry()


def test_a_default_registry_that_failed_is_tried_again(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site.install("one", "import module_that_comes_later_dist_plugin")
    monkeypatch.setattr(metadata, "entry_points", lambda group: site.entry_points())
    reset_default_registry()
    try:
        with pytest.raises(PluginError, match="No module named 'module_that_comes_later_dist_plugin'"):
            default_registry()
        (site.folder / "module_that_comes_later_dist_plugin.py").touch()
        sys.path_importer_cache.clear()
        assert names(default_registry()) == [("one", "loaded")]
    finally:
        reset_default_registry()
