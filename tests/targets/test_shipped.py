# SPDX-License-Identifier: Apache-2.0
"""Every shipped target: it loads, says where each claim comes from, and can be planned with, or says why not."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qhw.decisions import QuantPlan
from qhw.errors import PlanError
from qhw.extension import Registry
from qhw.graph.kinds import KNOWN_KINDS, VIEW_KINDS
from qhw.schema import WEIGHTED_KINDS, TargetSpec, lint, to_json
from tests.host_reasons import explains, is_runnable, obstacles

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"
FILES = sorted(ROOT.glob("*/*.toml"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]
MODELS = ("conv", "depthwise", "residual", "branches", "pools", "perceptron", "product")
SECTIONS = (
    *("formats", "biases", "accumulators", "requantize", "kernels", "operators", "memories", "clocks"),
    *("boundary", "artefact", "network", "cost"),
)
TOLD_BY_QHW = ("artefact.exporter", "artefact.executor")  # names of our plugins, not claims about hardware
# A commit, a paper, a release, a date; a web page has its address.
REVISION = re.compile(r" @ \S|arXiv|https?://|\d+\.\d+|\b20\d\d\b|[Rr]evision \S")
NOT_PLANNED = "unknown: what depends on it cannot be planned."
NO_KERNEL = "has no legal format, none of its kernels can be planned."
# Refused for another reason than an operator the file does not have: (target, model) -> what the one line says.
REFUSED: dict[tuple[str, str], str] = {}

each_file = pytest.mark.parametrize("file", FILES, ids=NAMES)
Planner = Callable[..., QuantPlan]


def leaves(value: Any, path: tuple[str, ...]) -> Iterator[str]:
    """Dotted paths of all values a JSON form sets, `source` left out; a list is one value."""
    if isinstance(value, dict):
        for key, held in value.items():
            if key != "source":
                yield from leaves(held, (*path, key))
    elif value is not None:
        yield ".".join(path)


def tags(value: Any, below_source: bool = False) -> Iterator[str]:
    """Every tag that stands in a `source`."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield from tags(held, below_source or key == "source")
    elif isinstance(value, list):
        for held in value:
            yield from tags(held, below_source)
    elif below_source and isinstance(value, str):
        yield value


def test_the_first_targets_are_shipped() -> None:
    assert {
        "whitepaper/generic-int8",
        "onnxruntime/cpu-x86-vnni",
        "onnxruntime/cpu-x86-avx2",
        "google/litert-int8",
        "espressif/esp32-p4",
    } <= set(NAMES)


@each_file
def test_name_is_the_path_and_the_registry_finds_it(file: Path, spec: TargetSpec, registry: Registry) -> None:
    assert spec.name == file.relative_to(ROOT).with_suffix("").as_posix()
    assert registry.target_path(spec.name).samefile(file)
    assert spec.summary is not None and len(spec.summary) <= 120
    assert spec.written_by("summary") == spec.name


@each_file
def test_lint_finds_nothing_but_what_nobody_published_or_qhw_cannot_plan(file: Path, spec: TargetSpec) -> None:
    found = [item for item in lint(spec, known_kinds=KNOWN_KINDS) if item.severity != "info"]
    searched = {p for p in spec.unknown_fields() if any(t.startswith("searched: ") for t in spec.source_of(p))}
    found = [item for item in found if not (item.message == NOT_PLANNED and item.path in searched)]
    # Which reasons are good enough is tested with the operators.
    assert [str(item) for item in found if not item.message.startswith(NO_KERNEL)] == []


@each_file
def test_json_round_trip_is_exact(file: Path, spec: TargetSpec) -> None:
    text = to_json(spec)
    again = TargetSpec.model_validate_json(text)
    assert again == spec
    assert to_json(again) == text


@each_file
def test_every_claim_has_a_source(file: Path, spec: TargetSpec) -> None:
    data = json.loads(to_json(spec))
    claims = [path for section in SECTIONS for path in leaves(data.get(section), (section,)) if path.count(".")]
    assert len(claims) > 10
    assert spec.fallback is not None
    claims.append("fallback")
    assert [path for path in claims if not spec.source_of(path) and path not in TOLD_BY_QHW] == []


@each_file
def test_unknown_is_said_with_what_was_searched(file: Path, spec: TargetSpec) -> None:
    for path in spec.unknown_fields():
        if path.split(".")[0] in (*SECTIONS, "fallback"):
            assert any(tag.startswith("searched: ") for tag in spec.source_of(path)), path


@each_file
def test_every_source_is_cited_and_names_a_revision(file: Path, spec: TargetSpec) -> None:
    own = {tag: text for tag, text in spec.sources.items() if spec.written_by(f"sources.{tag}") == spec.name}
    assert set(own) - set(tags(json.loads(to_json(spec)))) == set()
    for tag, document in own.items():
        assert REVISION.search(document), f"{tag}: {document}"


@each_file
def test_every_operator_has_a_legal_kernel_or_says_why_not(file: Path, spec: TargetSpec) -> None:
    for kind, operator in spec.operators.items():
        if operator.kernels is None:
            assert operator.same_scale not in (None, "none"), f"{kind}: no kernels, and no rule for its scale"
            continue
        if operator.kernels in ((), "unknown") or operator.output == "float":
            continue
        reasons = [obstacles(spec, spec.kernels[name]) for name in operator.kernels]
        if all(reasons):
            text = " ".join(reason for listed in reasons for reason in listed)
            assert "recorded, not used yet" in text or "unknown" in text, f"{kind}: {text}"


@each_file
@pytest.mark.parametrize("model", MODELS)
def test_small_models_plan_or_are_refused_for_what_the_file_says(
    file: Path, spec: TargetSpec, model: str, plan: Planner
) -> None:
    lenient = spec.model_copy(update={"fallback": "host"}) if spec.fallback == "refuse" else spec
    if (spec.name, model) in REFUSED:
        with pytest.raises(PlanError, match=REFUSED[spec.name, model]) as caught:
            plan(lenient, model)
        assert "\n" not in str(caught.value)
        return
    made = plan(lenient, model)
    hosted = [op for op in made.operators if op.where == "host" and op.kind not in VIEW_KINDS]
    for operator in hosted:
        assert operator.reason and explains(spec, operator), f"{operator.name}: {operator.subject}: {operator.reason}"
    if spec.fallback == "refuse" and hosted:
        with pytest.raises(PlanError, match=re.escape(f"{hosted[0].name} ({hosted[0].kind}: ")) as caught:
            plan(spec, model)
        assert "\n" not in str(caught.value)
    run = [op for op in made.operators if op.where == "accelerator" and op.members]
    assert all(is_runnable(spec, operator.kind) for operator in run)
    assert bool(made.points) is bool(run)
    for point in made.points:
        assert point.format in (spec.biases if point.role == "bias" else spec.formats), point.name
        assert point.format in point.legal, point.name
    assert QuantPlan.from_json(made.to_json()) == made


@each_file
def test_weights_are_put_on_a_format_of_their_kernel_and_every_other_one_can_be_demanded(
    file: Path, spec: TargetSpec, plan: Planner
) -> None:
    lenient = spec.model_copy(update={"fallback": "host"})
    for model in ("residual", "perceptron"):
        made = plan(lenient, model)
        legal: set[str] | None = None
        for operator in made.operators:
            if operator.kind in WEIGHTED_KINDS and operator.where == "accelerator":
                listed = spec.kernels[operator.kernel or ""].weight
                assert made.point(f"{operator.name}.weight").format in (listed or ())
                here = set(made.point(f"{operator.name}.weight").legal)
                legal = here if legal is None else legal & here
        for wanted in sorted(legal or ()):
            points = plan(lenient, model, {"*.weight": wanted}).points
            assert {point.format for point in points if point.role == "weight"} == {wanted}
