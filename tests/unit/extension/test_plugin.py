# SPDX-License-Identifier: Apache-2.0
"""What a plugin's hooks must be before anything of it is used."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from qhw.errors import PluginError
from qhw.extension import PluginInfo, hookimpl
from qhw.extension.plugin import PluginRecord, adopt

ACME = PluginRecord("acme", "acme-qhw", "1.2")


class Good:
    @hookimpl
    def qhw_plugin_info(self) -> PluginInfo:
        return PluginInfo(api=1, summary="good")


def refusal(plugin: object) -> str:
    with pytest.raises(PluginError) as caught:
        adopt(ACME, plugin)
    return str(caught.value)


def mistake(text: str) -> str:
    return f"plugin 'acme' (acme-qhw 1.2): plugin author: {text} To go on without it: QHW_BLOCK=acme"


def test_a_good_plugin_is_recorded_with_its_summary_and_hooks() -> None:
    class Full(Good):
        @hookimpl
        def qhw_register_targets(self) -> list[Path]:
            return []

    assert adopt(ACME, Full()).record == PluginRecord(
        "acme", "acme-qhw", "1.2", "loaded", "good", ("qhw_plugin_info", "qhw_register_targets")
    )


@pytest.mark.parametrize("plugin", [SimpleNamespace(), None, 3], ids=["empty", "none", "number"])
def test_zero_hooks_are_refused(plugin: object) -> None:
    assert refusal(plugin) == mistake(
        "it has no hooks. Mark its functions with @hookimpl from qhw.extension, or let the entry point name the module "
        "that holds them."
    )


def test_a_hook_without_its_mark_is_refused() -> None:
    class Bare(Good):
        def qhw_register_targets(self) -> list[Path]:
            return []

    assert refusal(Bare()) == mistake("qhw_register_targets is not marked. Put @hookimpl from qhw.extension above it.")


def test_a_misspelt_hook_is_refused_with_the_closest() -> None:
    class Typo(Good):
        @hookimpl
        def qhw_register_target(self) -> list[Path]:
            return []

    assert refusal(Typo()) == mistake("no hook is called 'qhw_register_target'. Closest: qhw_register_targets.")


def test_a_misspelt_info_hook_is_called_misspelt_and_not_missing() -> None:
    class Typo:
        @hookimpl
        def qhw_plugin_inf(self) -> PluginInfo:
            return PluginInfo(api=1, summary="typo")

    assert refusal(Typo()) == mistake("no hook is called 'qhw_plugin_inf'. Closest: qhw_plugin_info.")


def test_a_hook_like_no_other_is_refused_with_all_hooks() -> None:
    class Odd(Good):
        @hookimpl
        def zzzz(self) -> None: ...

    assert refusal(Odd()) == mistake(
        "no hook is called 'zzzz'. Hooks: qhw_plan_ready, qhw_plugin_info, qhw_quantized, qhw_register_algorithms, "
        "qhw_register_executors, qhw_register_exporters, qhw_register_number_formats, qhw_register_pipelines, "
        "qhw_register_readers, "
        "qhw_register_targets."
    )


def test_an_optional_hook_of_another_version_is_passed_over() -> None:
    class Later(Good):
        @hookimpl(optionalhook=True)
        def qhw_hook_of_tomorrow(self) -> None: ...

    assert adopt(ACME, Later()).record.hooks == ("qhw_plugin_info",)


def test_the_misspelt_hook_is_named_even_beside_an_optional_one() -> None:
    class Both(Good):
        @hookimpl(optionalhook=True)
        def qhw_a_hook_of_tomorrow(self) -> None: ...

        @hookimpl
        def qhw_quantised(self, model: object) -> None: ...

    assert refusal(Both()) == mistake("no hook is called 'qhw_quantised'. Closest: qhw_quantized.")


def test_info_is_required() -> None:
    class Silent:
        @hookimpl
        def qhw_register_targets(self) -> list[Path]:
            return []

    assert refusal(Silent()) == mistake("qhw_plugin_info is missing. Return PluginInfo(api=1, summary=...) from it.")


def test_info_must_be_plugin_info() -> None:
    class Text:
        @hookimpl
        def qhw_plugin_info(self) -> dict[str, int]:
            return {"api": 1}

    assert refusal(Text()) == mistake("qhw_plugin_info must return PluginInfo(api=1, summary=...); got dict.")


def test_a_foreign_api_is_refused_before_its_hooks_are_judged() -> None:
    class Future:
        @hookimpl
        def qhw_plugin_info(self) -> PluginInfo:
            return PluginInfo(api=2, summary="future")

        @hookimpl
        def qhw_unheard_of(self) -> None: ...

        @hookimpl
        def qhw_plan_ready(self, plan: object, target: object, budget: object) -> None: ...

    assert refusal(Future()) == mistake(
        "it was written for plugin API 2; this qhw speaks 1. Install a version that fits."
    )


def test_an_argument_that_does_not_exist_is_refused_with_the_signature() -> None:
    class Foreign(Good):
        @hookimpl
        def qhw_plan_ready(self, plan: object, device: object) -> None: ...

    assert refusal(Foreign()) == mistake(
        "qhw_plan_ready has no argument 'device'. Its signature is qhw_plan_ready(plan, target)."
    )


def test_an_argument_with_a_default_is_refused_because_it_would_never_be_passed() -> None:
    class Default(Good):
        @hookimpl
        def qhw_plan_ready(self, plan: object, target: object = None) -> None: ...

    assert refusal(Default()) == mistake(
        "qhw_plan_ready: argument 'target' has a default and would never be passed. Write qhw_plan_ready(plan, target)."
    )


def test_fewer_arguments_are_welcome() -> None:
    heard = []

    class Short(Good):
        @hookimpl
        def qhw_plan_ready(self, target: object) -> None:
            heard.append(target)

    adopt(ACME, Short()).call("qhw_plan_ready", plan="the plan", target="the target")
    assert heard == ["the target"]


def test_a_hook_implemented_twice_is_refused() -> None:
    class Twice(Good):
        @hookimpl
        def qhw_register_targets(self) -> list[Path]:
            return []

        @hookimpl(specname="qhw_register_targets")
        def more_targets(self) -> list[Path]:
            return []

    assert refusal(Twice()) == mistake("qhw_register_targets is implemented 2 times. Keep one.")


def test_a_wrapper_is_refused() -> None:
    class Wrapper(Good):
        @hookimpl(wrapper=True)
        def qhw_register_targets(self):  # type: ignore[no-untyped-def]
            return (yield)

    assert refusal(Wrapper()) == mistake(
        "qhw_register_targets is a hook wrapper; qhw has none. Write qhw_register_targets()."
    )


def test_info_that_raises_is_named_and_chained() -> None:
    class Broken:
        @hookimpl
        def qhw_plugin_info(self) -> PluginInfo:
            raise RuntimeError("no\nlicence.")

    with pytest.raises(PluginError, match="^" + re.escape("plugin 'acme' (acme-qhw 1.2): ")) as caught:
        adopt(ACME, Broken())
    assert str(caught.value) == (
        "plugin 'acme' (acme-qhw 1.2): qhw_plugin_info raised: RuntimeError: no licence. "
        "Reinstall or repair it, or go on without it: QHW_BLOCK=acme"
    )
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_a_class_in_place_of_an_object_is_refused() -> None:
    assert refusal(Good) == mistake("the entry point names the class Good. Name a module or an object.")


def test_a_record_without_version_reads_well() -> None:
    assert PluginRecord("mine", "given by the caller", "").label == "plugin 'mine' (given by the caller)"
