# SPDX-License-Identifier: Apache-2.0
"""A stranger's distribution extends qhw from its own wheel, and takes nothing along when it goes."""

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from qhw.extension import Registry, load_plugins
from qhw.graph.kinds import KNOWN_KINDS
from qhw.numerics import Histogram
from qhw.schema import lint, read_target_file
from tests.installed import ROOT, Environment, build, make_environment

ACME = ROOT / "tests/data/third_party/qhw-acme"
NPU = ACME / "qhw_acme/targets/acme/npu.toml"
BLOCKED = {"QHW_BLOCK": "acme"}
TUTORIAL = (ROOT / "docs/plugins.md").read_text(encoding="utf-8")

MODEL = """\
import torch
from torch import nn

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10)), torch.ones(1, 1, 8, 8)
"""


def samples() -> np.ndarray:
    """512 images of -1 and 1 in equal parts, with one 100 among their 32,768 values."""
    images = np.tile(np.array([-1, 1], np.float32), 512 * 32).reshape(512, 1, 8, 8)
    images[7, 0, 0, 1] = 100
    return images


# In this process, not installed: what the package itself does.


@pytest.fixture
def acme(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ACME))
    import qhw_acme  # type: ignore[import-not-found]

    return qhw_acme


def registry_with(acme: ModuleType) -> Registry:
    return load_plugins(block=(), entry_points=(), extra=[("acme", acme)])


def test_the_package_brings_one_thing_of_each_kind(acme: ModuleType) -> None:
    assert registry_with(acme).provided_by("acme") == {
        "targets": ("acme/npu",),
        "algorithms": ("acme_percentile",),
        "pipelines": ("acme-fast",),
        "exporters": ("acme_json",),
    }


def test_its_target_is_complete() -> None:
    loaded = read_target_file(NPU)
    findings = lint(loaded.spec, loaded.located, known_kinds=KNOWN_KINDS)
    assert {(finding.severity, finding.message) for finding in findings} <= {("info", "recorded, not used yet.")}
    assert loaded.spec.lineage == () and loaded.spec.fallback == "host"


@pytest.mark.parametrize(
    ("outside", "low", "high"),
    [
        # The largest magnitude, 100, lies below 2**7, so a bin is 2**7 / 8192 = 1/64 wide.
        pytest.param(0.0, -1.0, 100.0, id="nothing-outside-is-the-exact-range"),
        pytest.param(1e-6, -1.0, 100.0, id="a-share-below-one-value-clips-nothing"),
        pytest.param(1e-4, -1.0, 1 + 1 / 64, id="one-outlier-goes-and-the-bin-of-the-rest-stays-whole"),
    ],
)
def test_percentile_range(acme: ModuleType, outside: float, low: float, high: float) -> None:
    histogram = Histogram()
    histogram.update(torch.from_numpy(samples()))
    found = acme.percentile.percentile_range(histogram, outside)
    assert (found[0].item(), found[1].item()) == (low, high)


def test_its_exporter_refuses_what_its_compiler_cannot_read(acme: ModuleType) -> None:
    result = SimpleNamespace(
        encodings=lambda: {"x": SimpleNamespace(bits=16)},
        groups=lambda: ("x",),
        plan=SimpleNamespace(points=[SimpleNamespace(role="activation", group="x", format="a16")]),
    )
    (problem,) = registry_with(acme).exporter("acme_json")().check(result)
    assert problem == "formats.a16 has 16 bits and ACME's compiler reads 8. Choose another with --format"


def blocks(language: str) -> list[str]:
    """The tutorial's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL, flags=re.M | re.S)


def test_the_tutorial_shows_the_package_as_it_is() -> None:
    shown = dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", TUTORIAL, flags=re.M | re.S))
    kept = {file.relative_to(ACME).as_posix(): file for suffix in ("py", "toml") for file in ACME.rglob(f"*.{suffix}")}
    assert shown == {name: file.read_text().split("\n", 1)[1] for name, file in kept.items()}


def test_the_tutorials_test_without_installing_holds(acme: ModuleType) -> None:
    (code,) = [block for block in blocks("python") if block.startswith("import qhw_acme")]
    assert "assert registry.target_names()" in code
    exec(code, {})  # noqa: S102  (our own documentation)


# Installed, from wheels, in an environment of its own.


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheels of qhw and of the stranger."""
    return build(ROOT, tmp_path_factory.mktemp("qhw"))[1], build(ACME, tmp_path_factory.mktemp("acme"))[1]


@pytest.fixture(scope="module")
def installed(wheels: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Environment]:
    """An environment with both."""
    environment = make_environment(tmp_path_factory.mktemp("both"), *wheels)
    write_inputs(environment.work)
    yield environment
    environment.uninstall("qhw-acme")


def write_inputs(work: Path) -> None:
    (work / "small.py").write_text(MODEL)
    np.savez(work / "data.npz", input=samples())


def facts(environment: Environment, *arguments: str, **settings: Any) -> Any:
    """What a command of the installed qhw prints as JSON."""
    return json.loads(environment.run("qhw", *arguments, "--json", **settings).stdout)


def plan(environment: Environment, target: str, *arguments: str, **settings: Any) -> Any:
    return facts(environment, "plan", "small:model", "-t", target, "-c", "data.npz", *arguments, **settings)


def chosen(made: Any, stage: str) -> list[str]:
    return [step["algorithm"] for step in made["steps"] if step["stage"] == stage]


def refusal(made: Any, algorithm: str) -> dict[str, Any]:
    """The one reason for which a plan does without an algorithm."""
    (verdict,) = [item["verdict"] for item in made["refused"] if item["algorithm"] == algorithm]
    (reason,) = verdict["reasons"]
    return dict(reason)


def core_files(environment: Environment) -> dict[str, str]:
    """Every file of the installed qhw, with its hash."""
    home = environment.site_packages
    files = [file for folder in home.glob("qhw*") if "acme" not in folder.name for file in folder.rglob("*")]
    return {
        str(file.relative_to(home)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in files
        if file.is_file() and file.suffix != ".pyc"
    }


@pytest.mark.slow
def test_it_is_listed_with_its_distribution_and_version(installed: Environment) -> None:
    where = installed.python("-c", "import qhw, qhw_acme; print(qhw.__file__, qhw_acme.__file__)").stdout
    assert where.count(str(installed.folder)) == 2
    (entry,) = [p for p in facts(installed, "plugin", "list") if p["name"] == "acme"]
    assert entry["brings"]["targets"] == ["acme/npu"]
    assert (entry["state"], entry["distribution"], entry["version"]) == ("loaded", "qhw-acme", "1.2.3")
    assert "qhw-acme 1.2.3" in installed.run("qhw", "plugin", "list").stdout


@pytest.mark.slow
def test_its_target_is_listed_and_passes_lint(installed: Environment) -> None:
    assert "acme/npu" in [target["name"] for target in facts(installed, "target", "list")]
    findings = facts(installed, "target", "lint", "acme/npu")
    # It says no rounding order; lint names who needs one.
    assert {finding["severity"] for finding in findings} <= {"info", "open"}


@pytest.mark.slow
def test_the_plan_prefers_its_algorithm_and_says_why_not_the_shipped_one(installed: Environment) -> None:
    made = plan(installed, "acme/npu")
    assert (made["pipeline"], made["notes"]) == ("whitepaper-ptq", [])
    assert chosen(made, "activation_range") == ["acme_percentile"]
    for shipped in ("cross_entropy", "mse", "min_max"):
        reason = refusal(made, shipped)
        assert reason["value"] == ["acme_percentile"]
        assert "{value}, which comes first" in reason["rule"]
    text = installed.run("qhw", "plan", "small:model", "-t", "acme/npu", "-c", "data.npz").stdout
    assert "tuned on ACME's chips, as acme/npu is one (name)" in text
    assert "acme_percentile" in text.split("Refused")[1]


@pytest.mark.slow
def test_it_has_a_rank_in_the_other_shipped_pipeline_too(installed: Environment) -> None:
    made = plan(installed, "acme/npu", "--pipeline", "ranges-ptq")
    assert (made["pipeline"], chosen(made, "activation_range")) == ("ranges-ptq", ["acme_percentile"])
    for shipped in ("mse", "min_max"):
        assert refusal(made, shipped)["value"] == ["acme_percentile"]


@pytest.mark.slow
def test_on_other_targets_the_shipped_algorithm_stays(installed: Environment) -> None:
    made = plan(installed, "whitepaper/generic-int8")
    assert chosen(made, "activation_range") == ["cross_entropy", "mse"]
    reason = refusal(made, "acme_percentile")
    assert (reason["subject"], reason["value"]) == ("name", "whitepaper/generic-int8")


@pytest.mark.slow
def test_the_users_wish_comes_before_its_rank(installed: Environment) -> None:
    made = plan(installed, "acme/npu", "--prefer", "min_max")
    assert chosen(made, "activation_range") == ["min_max"]
    assert refusal(made, "acme_percentile")["value"] == ["min_max"]


@pytest.mark.slow
def test_its_pipeline_is_used_by_name(installed: Environment) -> None:
    made = plan(installed, "acme/npu", "--pipeline", "acme-fast")
    assert (made["pipeline"], chosen(made, "weight_range")) == ("acme-fast", ["min_max_weights"])


@pytest.mark.slow
def test_quantize_writes_the_file_of_its_exporter(installed: Environment) -> None:
    installed.run("qhw", "quantize", "small:model", "-t", "acme/npu", "-c", "data.npz", "--out", "out")
    (file,) = (installed.work / "out/artefacts").iterdir()
    assert file.name == "encodings.json"
    written = json.loads(file.read_text())
    assert written["target"] == "acme/npu"
    (given,) = [tensor for tensor in written["tensors"].values() if tensor["role"] == "input"]
    # The range is [-1, 65/64], so scale = 129/64 / 255, and zero_point = -128 + round(1 / scale) = -128 + 127.
    assert given["scale"] == [float(np.float32(129 / 64 / 255))]
    assert (given["zero_point"], given["codes"]) == ([-1], [-128, 127])
    weights = [tensor for tensor in written["tensors"].values() if tensor["role"] == "weight"]
    assert [len(weight["scale"]) for weight in weights] == [4, 10]


@pytest.mark.slow
def test_the_tutorials_commands_do_what_it_says(installed: Environment) -> None:
    shutil.copytree(ACME / "qhw_acme", installed.work / "tutorial/qhw_acme")
    here = replace(installed, work=installed.work / "tutorial")
    (model,) = [block for block in blocks("python") if "def calibration" in block]
    (here.work / "small.py").write_text(model)
    printed = []
    for line in "".join(blocks("sh")).splitlines():
        words = shlex.split(line)
        if words[0] in ("qhw", "QHW_BLOCK=acme"):
            variables = BLOCKED if words.pop(0) == "QHW_BLOCK=acme" else None
            printed.append(here.run("qhw", *(word for word in words if word != "qhw"), variables=variables).stdout)
    assert len(printed) == 5
    (plan_shown,) = blocks("text")
    lines = [line for line in plan_shown.splitlines() if line != "..."]
    assert len(lines) == 4
    assert [line for line in lines if line not in printed[2].splitlines()] == []
    assert (here.work / "out/artefacts/encodings.json").is_file()
    assert "blocked by QHW_BLOCK" in printed[4]


@pytest.mark.slow
def test_blocking_takes_all_of_it_out(installed: Environment) -> None:
    (entry,) = [p for p in facts(installed, "plugin", "list", variables=BLOCKED) if p["name"] == "acme"]
    assert (entry["state"], entry["brings"]) == ("blocked", {})
    refused = installed.run("qhw", "target", "show", "acme/npu", fails=True, variables=BLOCKED)
    assert refused.stderr.startswith("error: no target 'acme/npu'.")
    made = plan(installed, str(NPU), variables=BLOCKED)
    assert chosen(made, "activation_range") == ["cross_entropy", "mse"]
    assert "acme_percentile" not in [item["algorithm"] for item in made["refused"]]


@pytest.mark.slow
def test_coming_and_going_leaves_the_core_as_it_was(wheels: tuple[Path, Path], tmp_path: Path) -> None:
    core, stranger = wheels
    environment = make_environment(tmp_path, core)
    write_inputs(environment.work)
    before, plan_before = core_files(environment), plan(environment, "onnxruntime/cpu-x86-vnni")
    assert any(name.endswith("__init__.py") for name in before)
    assert chosen(plan_before, "activation_range") == ["cross_entropy", "mse"]

    environment.install(stranger)
    assert core_files(environment) == before
    assert plan(environment, "onnxruntime/cpu-x86-vnni", variables=BLOCKED) == plan_before

    environment.uninstall("qhw-acme")
    assert core_files(environment) == before
    assert "acme" not in [entry["name"] for entry in facts(environment, "plugin", "list")]
    assert plan(environment, "onnxruntime/cpu-x86-vnni") == plan_before
