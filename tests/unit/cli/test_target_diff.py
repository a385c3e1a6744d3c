# SPDX-License-Identifier: Apache-2.0
"""`qhw target diff`: sentences by section, data, exit status."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Run = Callable[..., Any]


@pytest.fixture
def other(folder: Path) -> None:
    """The target of the folder with another name, other ids, and four differences."""
    text = (folder / "tiny.toml").read_text().replace("acme/tiny", "acme/other").replace("w8", "weights")
    text = text.replace('output = ["a8"], accumulator = "acc"', 'output = ["a8"], accumulator = "unknown"')
    text = text.replace('fused = ["Relu"] }\noperators.Gemm', 'fused = ["Relu", "Clip"] }\noperators.Gemm')
    (folder / "other.toml").write_text(
        text + 'operators.Reshape = { same_scale = "input_output" }\nfallback = "host"\n'
    )


def test_differences_in_sections(qhw_run: Run, other: None) -> None:
    ran = qhw_run("target", "diff", "tiny.toml", "other.toml")
    assert ran.status == 0
    assert ran.out == (
        "acme/tiny -> acme/other\n\nOperators\n  + adds Reshape\n\n"
        "Arithmetic\n  ~ accumulator of Conv and Gemm: 32 bits, wrap -> unknown\n\n"
        "Rules of operators\n  + fused of Conv: adds Clip\n\n"
        "The target\n  ~ fallback: not stated -> host\n\n4 differences.\n"
    )


def test_differences_as_data(qhw_run: Run, other: None) -> None:
    data = json.loads(qhw_run("target", "diff", "tiny.toml", "other.toml", "--json").out)
    assert (data["from"], data["to"], len(data["differences"])) == ("acme/tiny", "acme/other", 4)
    assert data["differences"][1] == {
        "section": "arithmetic",
        "subject": "accumulator",
        "kinds": ["Conv", "Gemm"],
        "change": "changed",
        "before": {"kind": "integer", "bits": 32, "signed": True, "overflow": "wrap"},
        "after": "unknown",
        "where": "",
        "text": "accumulator of Conv and Gemm: 32 bits, wrap -> unknown",
    }


def test_exit_status(qhw_run: Run, other: None) -> None:
    same = qhw_run("target", "diff", "tiny.toml", "tiny.toml", "--exit-code")
    assert (same.status, same.out) == (0, "acme/tiny -> acme/tiny\n\nNo difference: both mean the same.\n")
    assert qhw_run("target", "diff", "tiny.toml", "other.toml", "--exit-code").status == 1
    assert qhw_run("target", "diff", "tiny.toml", "other.toml", "--exit-code", "--json").status == 1


def test_a_target_that_is_not_there(qhw_run: Run) -> None:
    ran = qhw_run("target", "diff", "tiny.toml", "google/litert")
    assert ran.status == 1 and ran.err.startswith("error: no target 'google/litert'. Closest: google/litert-")
    assert ran.err.count("\n") == 1 and ran.out == ""
