# SPDX-License-Identifier: Apache-2.0
"""`qhw target check`: who runs each operator of one model, in which formats, and when the model is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Run = Callable[..., Any]
CHECK = ("target", "check", "tiny.toml", "--model", "net:model")


def test_coverage_in_words(qhw_run: Run) -> None:
    """Convolution: 8 x 3 x 9 x 36 MACs; linear: 8 x 4; the target has no pooling."""
    ran = qhw_run(*CHECK)
    assert ran.status == 0, ran.err
    assert ran.out.splitlines() == [
        "acme/tiny · net:model",
        "",
        "On the accelerator    100.0 % of 7.81 k MACs; 3 of 6 operators, 1 folded into others",
        "  on the host         GlobalAveragePool: the target does not list it (operators.GlobalAveragePool): 3",
        "",
        "operator  kind       kernels  weights  results  MACs",
        "0         Conv+Relu  mac      w8       a8       7.78 k",
        "5         Gemm       mac      w8       a8       32",
        "",
        "Formats",
        "  a8                    int8, free zero point, per tensor",
        "  w8                    int8 [-127, 127], zero point 0, per out channel",
    ]


def test_coverage_as_data(qhw_run: Run) -> None:
    data = json.loads(qhw_run(*CHECK, "--json").out)
    assert (data["target"], data["macs"], data["accelerator_macs"], data["refused"]) == ("acme/tiny", 7808, 7808, None)
    assert data["accelerator_share"] == 1.0
    by_name = {one["name"]: one for one in data["operators"]}
    conv, pool = by_name["0"], by_name["3"]
    assert (conv["where"], conv["kernel"], conv["kernels"], conv["members"]) == (
        "accelerator",
        "mac",
        ["mac"],
        ["0", "2"],
    )
    assert (conv["weight_formats"], conv["result_formats"]) == (["w8"], ["a8"])
    assert (pool["where"], pool["reason"]) == ("host", "the target does not list it")
    assert data["inputs"] == [{"name": "input", "formats": ["a8"]}, {"name": "3", "formats": ["a8"]}]


def test_what_else_is_legal_comes_behind_what_is_taken(qhw_run: Run, folder: Path) -> None:
    text = (folder / "tiny.toml").read_text()
    text = text.replace('weight = ["w8"]', 'weight = ["w8", "w4"]').replace(
        "accumulators.acc", 'formats.w4 = { bits = 4, signed = true, zero_point = 0, per = "tensor" }\naccumulators.acc'
    )
    (folder / "more.toml").write_text(text)
    data = json.loads(qhw_run("target", "check", "more.toml", "--model", "net:model", "--json").out)
    assert [one["weight_formats"] for one in data["operators"] if one["weight_formats"]] == [["w8", "w4"]] * 2


def test_a_model_that_the_target_refuses(qhw_run: Run, folder: Path) -> None:
    """Whole networks only: what would run and what would not is said all the same."""
    (folder / "whole.toml").write_text((folder / "tiny.toml").read_text() + 'fallback = "refuse"\n')
    check = ("target", "check", "whole.toml", "--model", "net:model")
    ran = qhw_run(*check)
    assert ran.status == 1 and ran.err == ""
    assert "100.0 % of 7.81 k MACs" in ran.out and "GlobalAveragePool: the target does not list it" in ran.out
    words = " ".join(ran.out.split())
    assert (
        "Refused 'acme/tiny' runs whole models only (fallback = \"refuse\"), and cannot run 3 (GlobalAveragePool:"
        in words
    )
    data = json.loads(qhw_run(*check, "--json").out)
    assert "runs whole models only" in data["refused"] and len(data["operators"]) == 6


def test_a_target_that_runs_nothing_of_it(qhw_run: Run, folder: Path) -> None:
    text = "\n".join(
        line for line in (folder / "tiny.toml").read_text().splitlines() if not line.startswith("operators")
    )
    (folder / "nothing.toml").write_text(f'{text}\noperators.Elu = {{ kernels = ["mac"] }}\n')
    ran = qhw_run("target", "check", "nothing.toml", "--model", "net:model")
    assert "On the accelerator    0.0 % of 7.81 k MACs; 0 of 6 operators" in ran.out
    assert "Conv: the target does not list it (operators.Conv): 0" in ran.out


def test_mistakes(qhw_run: Run) -> None:
    for arguments, words in (
        (("none.toml", "--model", "net:model"), "none.toml: cannot be read"),
        (("tiny.toml", "--model", "nett:model"), "cannot import 'nett'"),
    ):
        ran = qhw_run("target", "check", *arguments)
        assert ran.status == 1 and words in ran.err and ran.err.count("\n") == 1
    assert qhw_run("target", "check", "tiny.toml").status == 2
