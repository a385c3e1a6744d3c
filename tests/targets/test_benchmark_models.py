# SPDX-License-Identifier: Apache-2.0
"""The networks of the benchmarks on every shipped target: planned, and what stays on the host is explained."""

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from qhw.decisions import Overrides, Resources
from qhw.engine import select
from qhw.extension import Registry
from qhw.graph import Graph, capture
from qhw.graph.kinds import VIEW_KINDS
from qhw.schema import TargetSpec
from tests.host_reasons import explains, is_runnable

ROOT = Path(__file__).parents[2] / "targets" / "qhw_targets"
FILES = sorted(ROOT.glob("*/*.toml"))
NETWORKS = ("resnet20", "mobilenetv2")

pytestmark = [pytest.mark.slow, pytest.mark.needs_data]


@cache
def captured(name: str) -> Graph:
    pytest.importorskip("PIL")
    from bench.data import load_models

    try:
        models: Any = load_models()
    except SystemExit as missing:
        pytest.skip(str(missing))
    model = models.resnet(20) if name == "resnet20" else models.mobilenet_v2()
    return capture(model.eval(), torch.zeros(2, 3, 32, 32))


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("file", FILES, ids=lambda path: path.relative_to(ROOT).with_suffix("").as_posix())
def test_it_is_planned_and_every_operator_on_the_host_has_a_reason_that_the_file_states(
    file: Path, spec: TargetSpec, network: str, registry: Registry
) -> None:
    lenient = spec.model_copy(update={"fallback": "host"}) if spec.fallback == "refuse" else spec
    made = select(captured(network), lenient, registry, Resources(calibration=True), Overrides())
    hosted = [op for op in made.operators if op.where == "host" and op.kind not in VIEW_KINDS]
    for operator in hosted:
        assert operator.reason and explains(spec, operator), f"{operator.name}: {operator.subject}: {operator.reason}"
    run = [op for op in made.operators if op.where == "accelerator" and op.members]
    assert all(is_runnable(spec, operator.kind) for operator in run)
    for point in made.points:
        assert point.format in point.legal and point.format in (spec.biases if point.role == "bias" else spec.formats)
