# SPDX-License-Identifier: Apache-2.0
"""A hook without its documentation, or without a test, fails here; so does an example that does not work."""

import inspect
import re
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from qhw.decisions import Step, StepReport, Verdict
from qhw.errors import PluginError
from qhw.extension import PluginInfo, Registry, hookimpl, hookspecs, load_plugins

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs/hooks.md").read_text()
SPECS = {name: function for name, function in vars(hookspecs).items() if hasattr(function, "qhw_spec")}


def signature(function: Any) -> str:
    parsed = inspect.signature(function)
    arguments = ", ".join(f"{p.name}: {p.annotation}" for p in parsed.parameters.values())
    return f"{function.__name__}({arguments}) -> {parsed.return_annotation}"


def section(name: str) -> str:
    """The text under a hook's heading."""
    return re.split(rf"^### `{name}\(.*$", TEXT, flags=re.M)[1].split("\n#", 1)[0]


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, flags=re.M | re.S)


def load(code: str, folder: Path) -> Registry:
    """The code as the only plugin, called 'example'; with info of our own where the example shows none."""
    module = ModuleType("example")
    module.__file__ = str(folder / "example.py")
    exec(code, vars(module))  # noqa: S102  (our own documentation)
    if not hasattr(module, "qhw_plugin_info"):
        vars(module)["qhw_plugin_info"] = hookimpl(lambda: PluginInfo(api=1, summary="example"))
    return load_plugins(block=(), entry_points=(), extra=[("example", module)])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A package folder with one target in it."""
    (tmp_path / "targets/acme").mkdir(parents=True)
    (tmp_path / "targets/acme/tiny.toml").touch()
    return tmp_path


def test_there_are_hooks_and_all_are_called_qhw() -> None:
    assert len(SPECS) == len([name for name in vars(hookspecs) if name.startswith("qhw_")]) > 0


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_is_documented_with_its_exact_signature(name: str) -> None:
    assert f"\n### `{signature(SPECS[name])}`\n" in TEXT


def test_only_hooks_that_exist_are_documented() -> None:
    assert set(re.findall(r"^### `(\w+)", TEXT, flags=re.M)) == set(SPECS)


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_says_its_kind_and_when_it_is_called(name: str) -> None:
    kind = "Notify" if SPECS[name].__annotations__["return"] == "None" else "Collect"
    assert section(name).strip().startswith(f"{'Info' if name == 'qhw_plugin_info' else kind}. Called ")


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_and_argument_is_described_in_its_docstring(name: str) -> None:
    doc = inspect.getdoc(SPECS[name]) or ""
    missing = [p for p in inspect.signature(SPECS[name]).parameters if f"\n    {p}: " not in doc]
    assert missing == []
    assert ("Returns:" in doc) == (SPECS[name].__annotations__["return"] != "None")


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_is_implemented_by_a_test(name: str) -> None:
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert any(f"def {name}(" in path.read_text() for path in files)


@pytest.mark.parametrize("name", SPECS)
def test_every_hook_has_an_example_that_loads(name: str, folder: Path) -> None:
    (code,) = blocks(section(name))
    assert name in load(code, folder).plugins[0].hooks


def test_the_ten_line_plugin_brings_its_target(folder: Path) -> None:
    code = blocks(TEXT)[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert load(code, folder).target_path("acme/tiny") == folder / "targets/acme/tiny.toml"


def test_the_tutorial_algorithm_works(folder: Path) -> None:
    from qhw.graph import capture

    model = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 1e-7]]))
    graph = capture(model, (torch.zeros(2, 2),))
    algorithm = load(blocks(TEXT)[1], folder).algorithm("clear_dust")()
    survey = algorithm.survey(graph, None, None, None)  # type: ignore[arg-type]
    (site,) = survey.taken
    assert site.verdict.sentence().startswith("1 weights below the threshold (")
    step = Step(stage="prepare", algorithm="clear_dust", sites=(site.name,), verdict=Verdict(taken=True))
    report = algorithm.apply(SimpleNamespace(graph=graph), step, None)
    assert report.sites == {site.name: {"zeroed": 1}}
    assert graph.tensor(graph.operator(site.name).weight or "").tolist() == [[0.5, 0.0]]
    assert algorithm.survey(graph, None, None, None).taken == ()  # type: ignore[arg-type]


def test_the_plan_ready_example_refuses_a_plan_that_runs_on_the_host(folder: Path) -> None:
    registry = load(blocks(section("qhw_plan_ready"))[0], folder)
    registry.plan_ready(SimpleNamespace(accelerator_macs=90, total_macs=100), None)  # type: ignore[arg-type]
    with pytest.raises(PluginError, match="less than 90 % of the MACs run on the accelerator"):
        registry.plan_ready(SimpleNamespace(accelerator_macs=89, total_macs=100), None)  # type: ignore[arg-type]


def test_the_quantized_example_logs_each_step(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    registry = load(blocks(section("qhw_quantized"))[0], folder)
    report = (StepReport(stage="round", algorithm="nearest", summary="2 layers"),)
    with caplog.at_level("INFO", logger="acme"):
        registry.quantized(None, SimpleNamespace(target="acme/tiny"), report)  # type: ignore[arg-type]
    assert caplog.messages == ["acme/tiny: nearest: 2 layers"]


def test_the_exporter_and_executor_examples_do_what_they_say(folder: Path) -> None:
    exporter = load(blocks(section("qhw_register_exporters"))[0], folder).exporter("plan_text")()
    result = SimpleNamespace(plan=SimpleNamespace(to_json=lambda: "{}"))
    assert exporter.check(result) == ()
    assert [path.read_text() for path in exporter.export(result, folder)] == ["{}"]
    executor = load(blocks(section("qhw_register_executors"))[0], folder).executor("acme_runtime")()
    assert executor.available() == "acme_runtime is not installed; pip install acme-runtime"


def test_the_number_format_example_makes_powers_of_two(folder: Path) -> None:
    powers = load(blocks(section("qhw_register_number_formats"))[0], folder).number_format("powers")()
    spec: Any = SimpleNamespace(parameters={"octaves": 2})
    assert powers.problem(spec) is None
    elements: Any = powers.elements(spec)
    assert elements.round_to(torch.tensor([-9.0, -0.7, 0.2, 0.3, 0.8])).tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert powers.problem(SimpleNamespace(parameters=None)) == (  # type: ignore[arg-type]
        "parameters.octaves: must be an integer of 1 or more; got None"
    )


def test_the_pipeline_and_refusing_algorithm_examples_say_what_they_say(folder: Path) -> None:
    pipeline = load(blocks(section("qhw_register_pipelines"))[0], folder).pipeline("acme-fast")
    assert [preference.stage for preference in pipeline.stages] == ["prepare", "round"]
    never = load(blocks(section("qhw_register_algorithms"))[0], folder).algorithm("never")()
    target: Any = SimpleNamespace(name="acme/tiny")
    survey = never.survey(None, None, target, None)  # type: ignore[arg-type]
    assert survey.verdict.sentence() == "acme/tiny needs no such rounding (name)"
