# SPDX-License-Identifier: Apache-2.0
"""A strict target, changed field by field, and files judged on it."""

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from qhw.legality import CheckReport, judge
from qhw.schema import TargetSpec, parse_target
from qhw_plugins.onnx_reader import OnnxReader
from tests.quantized_files import OnnxFile

STRICT: dict[str, Any] = {
    "schema_version": 1,
    "name": "acme/strict",
    "fallback": "refuse",
    "formats": {
        "a8": {
            "bits": 8,
            "signed": True,
            "zero_point": 0,
            "per": "tensor",
            "scale": {"kind": "power_of_two", "exponent_min": -12, "exponent_max": 0},
        },
        "w8": {
            "codes": [-127, 127],
            "bits": 8,
            "zero_point": 0,
            "per": "out_channel",
            "scale": {"kind": "power_of_two"},
        },
    },
    "biases": {"b": {"bits": 32, "scale": "input*weight"}},
    "accumulators": {"sum": {"bits": 32, "overflow": "wrap"}},
    "requantize": {"r": {"kind": "shift", "rounding": "half_even", "shift": {"min": 0, "max": 15}}},
    "kernels": {
        "mac": {
            "input": ["a8"],
            "weight": ["w8"],
            "output": ["a8"],
            "bias": "b",
            "accumulator": "sum",
            "requantize": "r",
        },
        "move": {"input": ["a8"], "output": ["a8"]},
    },
    "operators": {
        "Conv": {"kernels": ["mac"], "fused": ["Relu"], "limits": {"kernel": {"max": 5.0}, "groups": ["1"]}},
        "Gemm": {"kernels": ["mac"], "fused": []},
        "Concat": {"kernels": ["move"], "same_scale": "all"},
        "MaxPool": {"kernels": ["move"], "same_scale": "input_output"},
        "Softmax": {"kernels": ["move"], "fixed_output": {"a8": {"scale": 0.0078125, "zero_point": 0}}},
        "Add": {"kernels": ["move"], "same_scale": "none", "fused": []},
    },
}


def changed(changes: Mapping[str, Any]) -> TargetSpec:
    """The strict target with fields replaced, by dotted path; None takes a field away."""
    data = copy.deepcopy(STRICT)
    for path, value in changes.items():
        *parents, last = path.split(".")
        here = data
        for part in parents:
            here = here.setdefault(part, {})
        if value is None:
            here.pop(last, None)
        else:
            here[last] = copy.deepcopy(value)
    return parse_target(json.dumps(data), name_of_file="strict.json")


Judge = Callable[..., CheckReport]


@pytest.fixture
def judged(tmp_path: Path) -> Judge:
    """Writes a file and judges it on the strict target with some fields changed."""

    def held(file: OnnxFile, changes: Mapping[str, Any] | None = None, **options: Any) -> CheckReport:
        artefact = OnnxReader().read(file.write(tmp_path), None)
        return judge(artefact, changed(changes or {}), "model.onnx", **options)

    return held


def broken(report: CheckReport) -> set[tuple[str, str]]:
    """Node and clause of every violation."""
    return {(one.node, one.clause) for one in report.violations}


@pytest.fixture
def broken_by(judged: Judge) -> Callable[..., set[tuple[str, str]]]:
    """Node and clause of every violation of a file."""

    def found(file: OnnxFile, changes: Mapping[str, Any] | None = None, **options: Any) -> set[tuple[str, str]]:
        return broken(judged(file, changes, **options))

    return found
