# SPDX-License-Identifier: Apache-2.0
"""Every shipped target: it loads, says where each claim comes from, and can be planned with."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qhw.decisions import QuantPlan
from qhw.extension import Registry
from qhw.graph.kinds import KNOWN_KINDS
from qhw.schema import TargetSpec, lint, load_target_file, to_json

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"
FILES = sorted(ROOT.glob("*/*.toml"))
NAMES = [path.relative_to(ROOT).with_suffix("").as_posix() for path in FILES]
MODELS = ("conv", "depthwise", "residual", "branches", "pools", "perceptron", "product")
SECTIONS = (
    *("formats", "biases", "accumulators", "requantize", "kernels", "operators", "memories", "clocks"),
    *("boundary", "artefact", "network", "cost"),
)
TOLD_BY_QHW = ("artefact.exporter", "artefact.executor")  # names of our plugins, not claims about hardware

pytestmark = pytest.mark.parametrize("file", FILES, ids=NAMES)
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


def test_four_targets_are_shipped(file: Path) -> None:
    assert {
        "whitepaper/generic-int8",
        "onnxruntime/cpu-x86-vnni",
        "google/litert-int8",
        "espressif/esp32-p4",
    } <= set(NAMES)


def test_name_is_the_path_and_the_registry_finds_it(file: Path, registry: Registry) -> None:
    spec = load_target_file(file)
    assert spec.name == file.relative_to(ROOT).with_suffix("").as_posix()
    assert registry.target_path(spec.name).samefile(file)
    assert spec.summary is not None and len(spec.summary) <= 120


def test_lint_finds_no_error_and_no_warning(file: Path) -> None:
    found = lint(load_target_file(file), known_kinds=KNOWN_KINDS)
    assert [str(finding) for finding in found if finding.severity != "info"] == []


def test_json_round_trip_is_exact(file: Path) -> None:
    spec = load_target_file(file)
    text = to_json(spec)
    again = TargetSpec.model_validate_json(text)
    assert again == spec
    assert to_json(again) == text


def test_every_claim_has_a_source(file: Path) -> None:
    spec = load_target_file(file)
    data = json.loads(to_json(spec))
    claims = [path for section in SECTIONS for path in leaves(data.get(section), (section,)) if path.count(".")]
    claims.append("fallback")
    assert len(claims) > 100
    assert [path for path in claims if not spec.source_of(path) and path not in TOLD_BY_QHW] == []


def test_unknown_is_said_with_what_was_searched(file: Path) -> None:
    spec = load_target_file(file)
    data = json.loads(to_json(spec))
    unknown = [path for path in spec.unknown_fields() if path.split(".")[0] in (*SECTIONS, "fallback")]
    assert unknown and all(path.split(".")[0] in data for path in unknown)
    for path in unknown:
        assert any(tag.startswith("searched: ") for tag in spec.source_of(path)), path


def test_every_source_is_cited_and_names_a_revision(file: Path) -> None:
    spec = load_target_file(file)
    cited = set(tags(json.loads(to_json(spec))))
    assert set(spec.sources) - cited == set()
    for tag, document in spec.sources.items():
        assert any(mark in document for mark in (" @ ", "arXiv", "1.32.0")), f"{tag}: {document}"


def test_every_operator_can_be_planned_or_only_moves_data(file: Path) -> None:
    spec = load_target_file(file)
    for kind, operator in spec.operators.items():
        if operator.kernels is None:
            assert operator.same_scale == "input_output", f"{kind}: no kernels, and no rule for its scale"
        elif operator.output != "float":
            kernels = [spec.kernels[name] for name in operator.kernels]
            formats = [name for kernel in kernels for name in kernel.formats()]
            assert kernels and all(spec.formats[name].is_plannable for name in formats), kind


@pytest.mark.parametrize("model", MODELS)
def test_small_models_plan_with_every_point_in_a_legal_format(file: Path, model: str, plan: Planner) -> None:
    spec = load_target_file(file)
    made = plan(spec, model)
    assert made.target == spec.name
    assert made.points
    for point in made.points:
        table = spec.biases if point.role == "bias" else spec.formats
        assert point.format in table, point.name
    weights = [point for point in made.points if point.role == "weight"]
    assert all(spec.formats[point.format].zero_point == 0 for point in weights)
    assert all(spec.formats[point.format].per == "out_channel" for point in weights)
    assert QuantPlan.from_json(made.to_json()) == made


def test_per_tensor_weights_can_be_demanded(file: Path, plan: Planner) -> None:
    made = plan(load_target_file(file), "residual", {"*.weight": "w8t"})
    assert {point.format for point in made.points if point.role == "weight"} == {"w8t"}
