# SPDX-License-Identifier: Apache-2.0
"""Facts that a target leaves open are said, with what depends on them; unknown and absent are told apart."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import qhw
from qhw.decisions import Resources
from qhw.engine import select
from qhw.extension import Registry
from qhw.graph import Graph
from qhw.schema import TargetSpec

Notes = Callable[..., dict[str, str]]


@pytest.fixture
def notes(graph: Graph, registry: Registry, target_with: Callable[..., TargetSpec]) -> Notes:
    """Subject -> sentence for the small target with changes."""

    def make(*changes: tuple[str, str]) -> dict[str, str]:
        plan = select(graph, target_with(*changes), registry, Resources(calibration=True))
        return {reason.subject: reason.sentence() for reason in plan.notes}

    return make


def full(old: str = "", new: str = "") -> tuple[str, str]:
    """The small target's kernel with an accumulator and a requantization, of which one word is replaced."""
    row = 'output = ["a8"], accumulator = "acc", requantize = "f32" }'
    return 'output = ["a8"] }', row.replace(old, new) if old else row


def test_a_kernel_that_says_all_leaves_nothing_open(notes: Notes) -> None:
    assert notes(full()) == {}


@pytest.mark.parametrize(
    ("changes", "subject", "sentence"),
    [
        ((), "kernels.mac.accumulator", "absent in this target: overflow is not checked"),
        ((full('"acc"', '"unknown"'),), "kernels.mac.accumulator", "unknown in this target: overflow is not checked"),
        ((full(), ("bits = 32, overflow", 'bits = "unknown", overflow')), "accumulators.acc.bits", "unknown in this"),
        (
            (full(), ("bits = 32, overflow", "overflow")),
            "accumulators.acc.bits",
            "absent in this target",
        ),
        ((full('"f32"', '"unknown"'),), "kernels.mac.requantize", "unknown in this target: ties may round differently"),
        (
            (full(), ('"half_even"', '"unknown"')),
            "requantize.f32.rounding",
            "unknown in this target: rounding",
        ),
        ((full(), ('bias = "b", ', "")), "kernels.mac.bias", "absent in this target: biases are simulated in float"),
        (
            (full(), ('bias = "b"', 'bias = "unknown"')),
            "kernels.mac.bias",
            "unknown in this target: biases",
        ),
        (
            (full(), ("b = { bits = 32, scale", 'b = { bits = "unknown", scale')),
            "biases.b.bits",
            "unknown in this targe",
        ),
        (
            (full(), ('fallback = "host"', "")),
            "fallback",
            "absent in this target: who runs the",
        ),
        (
            (full(), ('"host"', '"unknown"')),
            "fallback",
            "unknown in this target: who runs the",
        ),
        (
            (
                full(),
                ('true, per = "tensor" }', 'true, per = "tensor", scale = { kind = "float32", min = "unknown" } }'),
            ),
            "formats.a8.scale.min",
            "unknown in this target: scales are not held to it",
        ),
        (
            (full('acc"', 'acc", weight_abs_sum_max = "unknown"'),),
            "kernels.mac.weight_abs_sum_max",
            "unknown in this target: sums of weights are not held to it",
        ),
        (
            (full(), ("b = { bits = 32, scale", 'b = { zero_point = "unknown", bits = 32, scale')),
            "biases.b.zero_point",
            "unknown in this target: its zero point is simulated as 0",
        ),
        (
            (full(), ("fallback", 'network.max_weight_bytes = "unknown"\nfallback')),
            "network.max_weight_bytes",
            "unknown in this target: the model is not held to it",
        ),
        (
            (full(), ("fallback", 'boundary.input_formats = "unknown"\nfallback')),
            "boundary.input_formats",
            "unknown in this target: the model is not held to it",
        ),
    ],
)
def test_an_open_fact_is_said_once(
    notes: Notes, changes: tuple[tuple[str, str], ...], subject: str, sentence: str
) -> None:
    found = notes(*changes)
    assert found[subject].startswith(sentence)
    assert found[subject].endswith(f"({subject})")


def test_a_kernel_that_the_plan_does_not_use_is_not_mentioned(notes: Notes) -> None:
    assert not [subject for subject in notes() if "mac16" in subject]


def test_a_kernel_without_products_has_a_requantization_alone(
    registry: Registry, target_with: Callable[..., TargetSpec]
) -> None:
    row = 'kernels.act = { input = ["a8"], output = ["a8"] }\noperators.Sigmoid = { kernels = ["act"] }\nfallback'
    graph = qhw.capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid()).eval(), torch.randn(2, 3, 8, 8))
    plan = select(graph, target_with(full(), ("fallback", row)), registry, Resources(calibration=True))
    assert [reason.subject for reason in plan.notes] == ["kernels.act.requantize"]
