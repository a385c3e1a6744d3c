# SPDX-License-Identifier: Apache-2.0
"""The working copy: ranges that a format cannot hold at any of its scales are told, and no others."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qhw.engine import Work
from qhw.graph import QuantPoint
from qhw.schema import parse_target
from tests.target_texts import TINY

A8 = "bits = 8, signed = true, per"
SCALE = 'scale = { kind = "fixed", values = [0.0078125] }'
FIXED = f"zero_point = 0, {SCALE}"  # (-128, 127) / 128
LISTED = 'zero_point = 0, scale = { kind = "enumerated", values = [0.5, 4.0] }'
ENDING = 'zero_point = 0, scale = { kind = "power_of_two", exponent_max = -7 }'
SAID = "its values reach from %s, and formats.a8 holds [%s]: the rest is clipped. "


def bounded(form: str, low: float, high: float, **facts: Any) -> tuple[float, float]:
    target = parse_target(TINY.replace(A8, f"bits = 8, signed = true, {form}, per" if form else A8))
    names = {"name": "conv", "operator": "conv", "tensor": "conv", "group": "conv"}
    point = QuantPoint(role="activation", legal=("a8",), format="a8", **names, **facts)
    plan: Any = SimpleNamespace(points=(point,))
    graph: Any = None
    ends = Work(graph, target, plan).bounded("conv", torch.tensor(low), torch.tensor(high))
    return float(ends[0]), float(ends[1])


@pytest.mark.parametrize(
    ("form", "low", "high", "facts", "said"),
    [
        pytest.param(FIXED, -0.5, 1.5, {}, ("-0.5 to 1.5", "-1, 0.992188"), id="above"),
        pytest.param(FIXED, -3.0, 0.5, {}, ("-3 to 0.5", "-1, 0.992188"), id="below"),
        pytest.param(FIXED, -1.0, 1.0, {}, None, id="rounded to the last code"),
        pytest.param(FIXED, 0.0, 8.0, {"maximum": 0.5}, None, id="bounded by the graph"),
        pytest.param(SCALE, 0.0, 1.5, {}, None, id="zero point of one tail"),
        pytest.param(SCALE, -1.0, 1.5, {}, ("-1 to 1.5", "-1, 0.992188"), id="zero point from the lower end"),
        pytest.param(
            "codes = [0, 127], zero_point = 0", -3.0, 254.0, {}, ("-3 to 254", "0, 254"), id="no codes below zero"
        ),
        pytest.param(LISTED, -9.0, 600.0, {}, ("-9 to 600", "-512, 508"), id="listed scales"),
        pytest.param(LISTED, -9.0, 500.0, {}, None, id="the largest of listed scales"),
        pytest.param(ENDING, -1.0, 1.5, {}, ("-1 to 1.5", "-1, 0.992188"), id="exponents that end"),
        pytest.param(ENDING.replace(", exponent_max = -7", ""), -1e6, 1e6, {}, None, id="powers of two"),
        pytest.param("", -1e6, 1e6, {}, None, id="any scale"),
    ],
)
def test_a_range_that_no_scale_holds_is_told(
    form: str, low: float, high: float, facts: dict[str, Any], said: Any, caplog: pytest.LogCaptureFixture
) -> None:
    assert bounded(form, low, high, **facts) == (low, min(high, facts.get("maximum", high)))
    assert [record.message.partition("Scale the")[0] for record in caplog.records] == (
        [f"conv: {SAID % said}"] if said else []
    )
