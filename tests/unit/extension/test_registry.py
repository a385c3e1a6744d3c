# SPDX-License-Identifier: Apache-2.0
"""Looking things up, and telling plugins what happened."""

from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import pytest

from qhw.decisions import Pipeline
from qhw.errors import PluginError, TargetError
from qhw.extension import Entry, PluginInfo, PluginRecord, Registry, hookimpl, load_plugins

ACME = PluginRecord("acme", "acme-qhw", "1.2")


def pipeline(name: str, *, is_default: bool = False) -> Entry[Pipeline]:
    return Entry(name, Pipeline(name=name, summary="A pipeline.", is_default=is_default, stages=()), ACME)


class Listener:
    """Writes down what it hears, with its own name."""

    def __init__(self, name: str, heard: list[tuple[str, object]]) -> None:
        self.name, self.heard = name, heard

    @hookimpl
    def qhw_plugin_info(self) -> PluginInfo:
        return PluginInfo(api=1, summary="listens")

    @hookimpl
    def qhw_plan_ready(self, plan: object, target: object) -> None:
        self.heard.append((self.name, (plan, target)))

    @hookimpl
    def qhw_quantized(self, model: object, plan: object, report: object) -> None:
        self.heard.append((self.name, (model, plan, report)))


def test_targets_are_looked_up_by_name() -> None:
    registry = Registry(targets={"acme/tiny": Entry("acme/tiny", Path("tiny.toml"), ACME)})
    assert registry.target_names() == ("acme/tiny",)
    assert registry.target_path("acme/tiny") == Path("tiny.toml")


def test_an_unknown_target_is_a_target_error_with_the_closest() -> None:
    name = "espressif/esp32-p4"
    registry = Registry(targets={name: Entry(name, Path("p4.toml"), ACME)})
    with pytest.raises(
        TargetError, match=r"^no target 'esspressif/esp32'\. Closest: espressif/esp32-p4\. All: qhw target list$"
    ):
        registry.target_path("esspressif/esp32")


@pytest.mark.parametrize("kind", ["algorithm", "pipeline", "exporter", "executor"])
def test_an_unknown_name_lists_the_closest_and_the_known(kind: str) -> None:
    known: Any = {name: Entry(name, object(), ACME) for name in ("minmax", "mse")}
    registry = Registry(**{f"{kind}s": known})
    assert getattr(registry, kind)("mse") is known["mse"].value
    with pytest.raises(PluginError, match=rf"^no {kind} 'mimax'\. Closest: minmax\. Known: minmax, mse\.$"):
        getattr(registry, kind)("mimax")


def test_the_default_pipeline_is_the_one_that_says_so() -> None:
    registry = Registry(pipelines={"a": pipeline("a"), "b": pipeline("b", is_default=True)})
    assert registry.default_pipeline().name == "b"


def test_no_default_pipeline_says_what_to_do() -> None:
    with pytest.raises(PluginError, match=r"^no pipeline is the default\. Name one with --pipeline\. Known: a\.$"):
        Registry(pipelines={"a": pipeline("a")}).default_pipeline()
    with pytest.raises(PluginError, match=r"Known: none; see 'qhw plugin list' for what QHW_BLOCK leaves out\.$"):
        Registry().default_pipeline()


def test_a_registry_cannot_be_changed() -> None:
    registry = load_plugins(entry_points=())
    with pytest.raises(FrozenInstanceError, match="cannot assign to field 'plugins'"):
        registry.plugins = ()  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        registry.targets["acme/tiny"] = Entry("acme/tiny", Path("x"), ACME)  # type: ignore[index]


def test_plugins_hear_in_order_of_name_and_get_the_very_objects() -> None:
    heard: list[tuple[str, object]] = []
    extra = [(name, Listener(name, heard)) for name in ("b", "c", "a")]
    registry = load_plugins(entry_points=(), extra=extra)
    plan, target, model, report = object(), object(), object(), ()
    registry.plan_ready(plan, target)  # type: ignore[arg-type]
    assert heard == [(name, (plan, target)) for name in ("a", "b", "c")]
    heard.clear()
    registry.quantized(model, plan, report)  # type: ignore[arg-type]
    assert heard == [(name, (model, plan, report)) for name in ("a", "b", "c")]


def test_a_listener_that_raises_is_named_and_chained() -> None:
    class Veto(Listener):
        @hookimpl
        def qhw_plan_ready(self, plan: object, target: object) -> None:
            raise ValueError("too many float islands")

    registry = load_plugins(entry_points=(), extra=[("veto", Veto("veto", []))])
    with pytest.raises(PluginError) as caught:
        registry.plan_ready(None, None)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "plugin 'veto' (given by the caller): qhw_plan_ready raised: ValueError: too many float islands. "
        "Reinstall or repair it, or go on without it: QHW_BLOCK=veto"
    )
    assert isinstance(caught.value.__cause__, ValueError)


def test_a_listener_that_returns_something_is_refused() -> None:
    class Answer(Listener):
        @hookimpl
        def qhw_quantized(self, model: object) -> object:  # type: ignore[override]
            return model

    registry = load_plugins(entry_points=(), extra=[("answer", Answer("answer", []))])
    with pytest.raises(PluginError) as caught:
        registry.quantized("model", None, ())  # type: ignore[arg-type]
    assert str(caught.value) == (
        "plugin 'answer' (given by the caller): plugin author: qhw_quantized must return nothing; got str. "
        "What it returns would be lost. To go on without it: QHW_BLOCK=answer"
    )
