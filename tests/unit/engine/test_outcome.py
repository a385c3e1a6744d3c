# SPDX-License-Identifier: Apache-2.0
"""What an algorithm leaves undone or breaks is told of it by name, not of the next one that stumbles over it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qhw.decisions import Step, StepReport, Verdict
from qhw.engine.outcome import check_outcome
from qhw.errors import PluginError
from qhw.extension.plugin import PluginRecord
from qhw.graph import Graph, capture

RECORD = PluginRecord("zeta", "zeta-qhw", "0.3")
BLAME = r"^plugin 'zeta' \(zeta-qhw 0\.3\): plugin author: algorithm 'halfway': apply "


@pytest.fixture
def graph() -> Graph:
    return capture(torch.nn.Linear(4, 2), (torch.zeros(2, 4),))


def step_at(stage: str, *sites: str) -> Step:
    return Step(stage=stage, algorithm="halfway", sites=sites, verdict=Verdict(taken=True))


def report_of(stage: str, algorithm: str = "halfway") -> StepReport:
    return StepReport(stage=stage, algorithm=algorithm, summary="done")


def held(graph: Graph, *groups: str) -> Any:
    return SimpleNamespace(graph=graph, qparams=dict.fromkeys(groups))


def test_what_keeps_its_promise_passes(graph: Graph) -> None:
    check_outcome(held(graph, "a", "b"), step_at("weight_range", "a", "b"), report_of("weight_range"), RECORD)
    check_outcome(held(graph), step_at("round", "a"), report_of("round"), RECORD)  # sets no scale, and need not


@pytest.mark.parametrize("stage", ["weight_range", "activation_range"])
def test_a_site_without_a_scale(graph: Graph, stage: str) -> None:
    message = "set no scale of b and 1 more, which are its sites. Call work.set_qparams for each, or leave them out of"
    with pytest.raises(PluginError, match=BLAME + message):
        check_outcome(held(graph, "a"), step_at(stage, "a", "b", "c"), report_of(stage), RECORD)


@pytest.mark.parametrize(("stage", "name"), [("round", "other"), ("correct", "halfway")])
def test_a_report_of_something_else(graph: Graph, stage: str, name: str) -> None:
    message = f"returned a report of '{name}' at stage '{stage}'. Give its own stage and name."
    with pytest.raises(PluginError, match=BLAME + message):
        check_outcome(held(graph), step_at("round"), report_of(stage, name), RECORD)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_any_more(graph: Graph, value: float) -> None:
    weight = str(graph.operators[0].weight)
    graph.set_tensor(weight, graph.tensor(weight).detach() * value)
    with pytest.raises(PluginError, match=BLAME + f"left NaN or infinite values in {weight}. Give finite ones."):
        check_outcome(held(graph), step_at("prepare"), report_of("prepare"), RECORD)
