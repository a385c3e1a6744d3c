# SPDX-License-Identifier: Apache-2.0
"""`qhw train`, and `qhw quantize` with --within and --train: what they write and show, and every mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qhw

Run = Callable[..., Any]
TRAINED = ("--data", "net:labelled", "--epochs", "2", "--lr", "0.01", "--out", "out/trained")


QUANTIZE = ("quantize", "net:model", "-t", "tiny.toml", "-c", "net:batches", "--pipeline", "ranges-ptq", "--out")


@pytest.fixture
def start(folder: Path, qhw_run: Run) -> Path:
    ran = qhw_run(*QUANTIZE, "out/start")
    assert ran.status == 0, ran.err
    return folder / "out/start"


def loss(result: Any) -> float:
    images = torch.cat(torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(1)).split(16))
    with torch.no_grad():
        outputs: Tensor = result(images)
    return float(nn.functional.cross_entropy(outputs, torch.zeros(64, dtype=torch.int64)))


def test_training_writes_a_result_that_has_learned(start: Path, folder: Path, qhw_run: Run) -> None:
    ran = qhw_run("train", str(start), *TRAINED)
    assert ran.status == 0, ran.err
    lines = [line.split() for line in ran.out.splitlines()]
    assert lines[0] == ["epoch", "loss"] and [line[0] for line in lines[1:3]] == ["1", "2"]
    assert "Result in out/trained" in ran.out
    before, after = qhw.load(start), qhw.load(folder / "out/trained")
    assert loss(after) < loss(before) - 0.1
    assert any(step.stage == "train" for step in after.plan.steps)
    assert not (folder / "out/trained.work").exists()


def test_scores_before_and_behind_are_shown_and_printed_as_json(start: Path, qhw_run: Run) -> None:
    ran = qhw_run("train", str(start), *TRAINED, "--evaluate", "net:labelled", "--json")
    facts = json.loads(ran.out)
    assert [epoch["number"] for epoch in facts["epochs"]] == [1, 2] and facts["best"] in (1, 2)
    assert [score["subject"] for score in facts["scores"]] == ["before", "trained"]
    assert {step["stage"] for step in facts["steps"]} <= {"train", "fit"}
    again = qhw_run("train", str(start), *TRAINED, "--evaluate", "net:labelled")
    assert "before," in again.out and "trained, 64 samples" in again.out


def test_wishes_reach_the_plan(start: Path, folder: Path, qhw_run: Run) -> None:
    more = ("--prefer", "reestimated_ranges", "--set", "reestimated_ranges.momentum=0.5")
    assert qhw_run("train", str(start), *TRAINED, *more).status == 0
    steps = [step for step in qhw.load(folder / "out/trained").plan.steps if step.stage == "train"]
    assert any(step.algorithm == "reestimated_ranges" and step.options == {"momentum": 0.5} for step in steps)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "net:batches", "--out", "o"), "net:batches: every batch must be (inputs, labels)"),
        (("--data", "net:missing", "--out", "o"), "has no 'missing'"),
        (("--data", "net:nothing", "--out", "o"), "net:nothing: holds no sample"),
        (("--data", "net:labelled", "--epochs", "0", "--out", "o"), "epochs must be a whole number, 1 or more; got 0"),
        (("--data", "net:labelled", "--lr", "-1", "--out", "o"), "lr must be above 0"),
        (("--data", "net:labelled", "--pipeline", "ranges-ptq", "--out", "o"), "trains nothing here"),
        (("--data", "net:labelled", "--prefer", "no_such", "--out", "o"), "no_such"),
    ],
)
def test_mistakes_are_one_line(start: Path, folder: Path, qhw_run: Run, arguments: Any, words: str) -> None:
    ran = qhw_run("train", str(start), *arguments)
    assert ran.status == 1 and words in ran.err and len(ran.err.strip().splitlines()) == 1, ran.err
    assert not (folder / "o").exists()


def test_a_folder_that_is_no_result_is_named(folder: Path, qhw_run: Run) -> None:
    ran = qhw_run("train", "out/nothing", *TRAINED)
    assert ran.status == 1 and "is no result folder" in ran.err


EVALUATE = ("--evaluate", "net:labelled", "--metric", "net:share_of_zero")


def test_a_loss_that_is_allowed_is_not_trained_away(folder: Path, qhw_run: Run) -> None:
    ran = qhw_run(*QUANTIZE, "out/q", *EVALUATE, "--train", "net:labelled", "--within", "100")
    assert ran.status == 0, ran.err
    assert not any(step.stage == "train" for step in qhw.load(folder / "out/q").plan.steps)


def test_more_than_is_allowed_is_trained_with_its_reason(folder: Path, qhw_run: Run) -> None:
    # Nothing is within -200 points of the float model: it is trained whatever it loses.
    ran = qhw_run(*QUANTIZE, "out/q", *EVALUATE, "--train", "net:labelled", "--within", "-200", "--epochs", "1")
    assert ran.status == 0, ran.err
    steps = [step for step in qhw.load(folder / "out/q").plan.steps if step.stage == "train"]
    assert steps and all(step.verdict.reasons[0].subject == "evaluation.lost" for step in steps)
    assert not list((folder / "out").glob("*.training"))


def test_more_than_is_allowed_is_said_where_there_is_nothing_to_train_on(folder: Path, qhw_run: Run) -> None:
    ran = qhw_run(*QUANTIZE, "out/q", *EVALUATE, "--within", "-200")
    assert ran.status == 0
    assert "more than -200 (--within)" in ran.err and "qhw train out/q --data DATA" in ran.err


def test_what_is_lost_needs_a_score(folder: Path, qhw_run: Run) -> None:
    ran = qhw_run(*QUANTIZE, "out/q", "--within", "1")
    assert ran.status == 1 and "Add --evaluate DATA" in ran.err
    assert not (folder / "out/q").exists()
