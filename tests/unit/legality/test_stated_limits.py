# SPDX-License-Identifier: Apache-2.0
"""Clauses on how a bias meets the sum, on ranks, sizes and real ranges: kept, broken by one, and left unknown.

The convolution sums on the scale 2^-5 * 2^-7 = 2^-12, so that a bias on 2^(k - 12) is shifted left by k; its weights
take 4 * 3 * 3 * 3 = 108 bytes.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qhw.legality import Artefact, ArtefactOperator, Constant, Encoding, Use, judge
from tests.quantized_files import Grid, OnnxFile, conv_file, gemm_file, grid
from tests.unit.legality.conftest import changed

Broken = Callable[..., set[tuple[str, str]]]

OWN = {"biases.b.scale": "own", "biases.b.align": "shift", "biases.b.per": "tensor"}


def shifted(left: int, dtype: str = "int32", **more: Any) -> OnnxFile:
    return conv_file(bias_grid=grid(2.0 ** (left - 12), 0, dtype), **more)


def sized(shape: list[int | str]) -> OnnxFile:
    f = conv_file()
    f.inputs.clear()
    f.given("x", shape)
    return f


def unary(kind: str, y: Grid, shape: list[int | str] | None = None, **attributes: Any) -> OnnxFile:
    f = OnnxFile()
    x = f.pair(f.given("x", shape or [1, 4, 4, 4]), grid(2.0**-4))
    f.gives(f.pair(f.op(kind, [x], kind.lower(), **attributes), y), shape)
    return f


SIGMOID = {"operators.Sigmoid": {"kernels": ["free"], "range": {"min": 0.0, "max": 1.0}}}
TANH = {"operators.Tanh": {"kernels": ["free"], "range": {"min": -1.0, "max": 1.0}}}
FREE: dict[str, Any] = {
    "formats.s8": {"bits": 8, "signed": True, "per": "tensor"},
    "formats.u8": {"bits": 8, "signed": False, "per": "tensor"},
    "formats.p8": {"bits": 8, "signed": True, "zero_point": 0, "per": "tensor", "scale": {"kind": "power_of_two"}},
    "kernels.free": {"input": ["a8"], "output": ["s8", "u8"]},
}
POWERS = {"kernels.free": {"input": ["a8"], "output": ["p8"]}}

CASES: dict[str, tuple[OnnxFile, dict[str, Any], set[tuple[str, str]]]] = {
    "bias on the scale of the sum": (shifted(0), OWN, set()),
    "bias shifted as far as it may": (shifted(7), OWN | {"biases.b.shift": {"min": -7, "max": 0}}, set()),
    "bias shifted further": (
        shifted(8),
        OWN | {"biases.b.shift": {"min": -7, "max": 0}},
        {("conv", "biases.b.shift.min")},
    ),
    "bias that is shifted by 7 alone": (shifted(7), OWN | {"biases.b.shift": {"min": -7, "max": -7}}, set()),
    "bias shifted less": (
        shifted(6),
        OWN | {"biases.b.shift": {"min": -7, "max": -7}},
        {("conv", "biases.b.shift.max")},
    ),
    "bias finer than the sum": (shifted(-1), OWN, {("conv", "biases.b.align")}),
    "bias behind the multiplier": (shifted(-1), OWN | {"biases.b.applied": "after_multiplier"}, set()),
    "bias stored as wide as it may be": (conv_file(), {"biases.b.storage_bits": [32, 64]}, set()),
    "bias stored in another width": (
        conv_file(bias_grid=grid([2.0**-12] * 4, 0, "int16")),
        {"biases.b.storage_bits": [32, 64]},
        {("conv", "biases.b.storage_bits")},
    ),
    "bias below 0 where codes start there": (
        conv_file(),
        {"biases.b.signed": False},
        {("conv", "biases.b.bits")},
    ),
    "bias with the zero point that is stated": (
        conv_file(bias_grid=grid([2.0**-12] * 4, 3, "int16")),
        {"biases.b.zero_point": 3},
        set(),
    ),
    "bias without the zero point that is stated": (
        conv_file(),
        {"biases.b.zero_point": 3},
        {("conv", "biases.b.zero_point")},
    ),
    "zero point in its register": (
        conv_file(x=grid(2.0**-5, 7)),
        {"formats.a8.zero_point": "free", "formats.a8.zero_point_bits": 3},
        set(),
    ),
    "zero point past its register": (
        conv_file(x=grid(2.0**-5, 8)),
        {"formats.a8.zero_point": "free", "formats.a8.zero_point_bits": 3},
        {("conv", "formats.a8.zero_point_bits")},
    ),
    "as many dimensions as there may be": (conv_file(), {"network.max_rank": 4}, set()),
    "more dimensions": (conv_file(), {"network.max_rank": 3}, {("conv", "network.max_rank")}),
    "fixed sizes": (conv_file(), {"network.static_shapes": True}, set()),
    "a height that is not fixed": (
        sized([1, 3, "height", 8]),
        {"network.static_shapes": True},
        {("", "network.static_shapes")},
    ),
    "a height that need not be": (sized([1, 3, "height", 8]), {"network.static_shapes": False}, set()),
    "weights in their memory": (
        conv_file(),
        {"memories.w": {"holds": ["weights"], "capacity_bytes": 108, "past_capacity": "refuse"}},
        set(),
    ),
    "weights past their memory": (
        conv_file(),
        {"memories.w": {"holds": ["weights"], "capacity_bytes": 107, "past_capacity": "refuse"}},
        {("", "memories.w.capacity_bytes")},
    ),
    "weights that come from further away": (
        conv_file(),
        {"memories.w": {"holds": ["weights"], "capacity_bytes": 107, "past_capacity": "stream"}},
        set(),
    ),
    # 255 steps of 1/255 from 0 to 1; of 1/250 to 1.02, five thousandths past a step; from -1/255 on one step below 0.
    "codes for 0 to 1": (unary("Sigmoid", grid(1 / 255, 0, "uint8")), FREE | SIGMOID, set()),
    "codes for less": (unary("Sigmoid", grid(0.7 / 255, 0, "uint8")), FREE | SIGMOID, set()),
    "codes one step past the lowest": (unary("Sigmoid", grid(1 / 254, 1, "uint8")), FREE | SIGMOID, set()),
    "codes past the highest": (
        unary("Sigmoid", grid(1 / 250, 0, "uint8")),
        FREE | SIGMOID,
        {("sigmoid", "operators.Sigmoid.range.max")},
    ),
    "codes past the lowest": (
        unary("Sigmoid", grid(1 / 255, 5, "uint8")),
        FREE | SIGMOID,
        {("sigmoid", "operators.Sigmoid.range.min")},
    ),
    "symmetric codes for -1 to 1": (unary("Tanh", grid(1 / 127)), FREE | TANH, set()),
    "symmetric codes for 0 to 1": (unary("Sigmoid", grid(1 / 127)), FREE | SIGMOID, set()),
    "symmetric codes for more": (
        unary("Tanh", grid(1 / 120)),
        FREE | TANH,
        {("tanh", "operators.Tanh.range.max")},
    ),
    # 127 * 2^-7 = 0.992 does not reach 1, so that 2^-6 is the smallest power of two that covers it; 2^-5 is not.
    "the smallest power of two that covers 1": (unary("Sigmoid", grid(2.0**-6)), FREE | SIGMOID | POWERS, set()),
    "a larger power of two": (
        unary("Sigmoid", grid(2.0**-5)),
        FREE | SIGMOID | POWERS,
        {("sigmoid", "operators.Sigmoid.range.max")},
    ),
    "scales that must be computed at run time": (
        gemm_file(x=grid(2.0**-5, 3)),
        {"formats.a8": {"bits": 8, "signed": True, "per": "tensor", "scale": {"kind": "float32", "dynamic": True}}}
        | {"formats.s8": FREE["formats.s8"], "kernels.mac.output": ["s8"]},
        {("gemm", "formats.a8.scale.dynamic")},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_a_target_states_is_kept_or_named(case: str, broken_by: Broken) -> None:
    file, changes, expected = CASES[case]
    assert broken_by(file, changes) == expected


MESSAGES: dict[str, str] = {
    "bias shifted further": (
        "conv: b: biases.b.shift.min must be shifted left by at most 7 bits to meet the sum; got 8. "
        "Give it a finer scale."
    ),
    "bias shifted less": (
        "conv: b: biases.b.shift.max must be shifted left by at least 7 bits to meet the sum; got 6. "
        "Give it a coarser scale."
    ),
    "bias stored in another width": (
        "conv: b: biases.b.storage_bits must be 32 or 64; got int16. Store it in 32 or 64 bits."
    ),
    "more dimensions": (
        "conv: network.max_rank must be at most 3; got rank 4 of 'x'. "
        "Fold dimensions into one another, or run it on the host."
    ),
    "a height that is not fixed": (
        "network.static_shapes must be true: every size is fixed; got 'x' of shape [1, 3, ?, 8]. "
        "Export it with fixed sizes."
    ),
    "weights past their memory": (
        "memories.w.capacity_bytes must be at most 107; got 108 bytes of weights. Use fewer weights."
    ),
    "codes past the highest": (
        "sigmoid: operators.Sigmoid.range.max must be at most 1, but for one step; got codes for 1.02. "
        "Quantize it within these bounds."
    ),
    "scales that must be computed at run time": (
        "gemm: x: formats.a8.scale.dynamic must be computed at run time; got int8, scale 0.03125, zero point 3. "
        "Leave its scale to the run time."
    ),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_messages_say_what_must_hold_what_was_got_and_what_to_do(case: str, judged: Any) -> None:
    file, changes, _ = CASES[case]
    (violation,) = judged(file, changes).violations
    assert violation.message == MESSAGES[case]


UNKNOWN: dict[str, tuple[OnnxFile, dict[str, Any], str]] = {
    "shift of a bias": (shifted(7), OWN | {"biases.b.shift": "unknown"}, "biases.b.shift"),
    "longest shift of a bias": (
        shifted(7),
        OWN | {"biases.b.shift": {"min": "unknown", "max": 0}},
        "biases.b.shift.min",
    ),
    "alignment of a bias": (shifted(7), OWN | {"biases.b.align": "unknown"}, "biases.b.align"),
    "width in which a bias is stored": (conv_file(), {"biases.b.storage_bits": "unknown"}, "biases.b.storage_bits"),
    "sign of a bias": (conv_file(), {"biases.b.signed": "unknown"}, "biases.b.signed"),
    "zero point of a bias": (conv_file(), {"biases.b.zero_point": "unknown"}, "biases.b.zero_point"),
    "ranks": (conv_file(), {"network.max_rank": "unknown"}, "network.max_rank"),
    "static shapes": (conv_file(), {"network.static_shapes": "unknown"}, "network.static_shapes"),
    "a batch that is not fixed": (
        sized(["batch", 3, 8, 8]),
        {"network.static_shapes": True},
        "network.static_shapes",
    ),
    "a range": (
        unary("Sigmoid", grid(1 / 255, 0, "uint8")),
        FREE | {"operators.Sigmoid": {"kernels": ["free"], "range": "unknown"}},
        "operators.Sigmoid.range",
    ),
    "a memory": (
        conv_file(),
        {"memories.w": {"holds": ["weights"], "capacity_bytes": "unknown", "past_capacity": "refuse"}},
        "memories.w.capacity_bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_is_unknown_is_no_violation_and_is_listed(case: str, judged: Any) -> None:
    file, changes, clause = UNKNOWN[case]
    report = judged(file, changes)
    assert (report.violations, [one.clause for one in report.unjudged]) == ((), [clause])


def test_a_tensor_of_too_many_dimensions_goes_to_the_host(judged: Any) -> None:
    """A view to five dimensions, and a sum there; the sum of four dimensions before them stays."""
    f = OnnxFile()
    x = f.pair(f.given("x", [1, 4, 4, 4]), grid(2.0**-4))
    y = f.pair(f.op("Add", [x, x], "flat"), grid(2.0**-3))
    wide = f.op("Reshape", [y, f.stored("shape", [1, 2, 2, 4, 4], "int64")], "view")
    f.infos.append(_info("view", [1, 2, 2, 4, 4]))
    f.gives(f.pair(f.op("Add", [wide, wide], "deep"), grid(2.0**-2)), [1, 2, 2, 4, 4])
    report = judged(f, {"network.max_rank": 4, "fallback": "host"})
    assert {one.name: one.status for one in report.operators} == {"flat": "legal", "view": "host", "deep": "host"}
    assert report.operators[1].reason == "network.max_rank: rank 5 of 'view'"


def _info(name: str, shape: list[int]) -> Any:
    from onnx import TensorProto, helper

    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


def test_how_many_scales_a_grouped_operator_has() -> None:
    """Two groups of 4 outputs: 4 scales for weights [in, out / 2], 8 where each output has its own."""
    spec = changed({"operators.ConvTranspose": {"kernels": ["mac"], "weight_scales": "out_channels/groups"}})
    x = Encoding(np.asarray(2.0**-5), np.zeros((), np.int64), -128, 127, 8, True, type="int8")
    facts = {"groups": 2, "in_channels": 8, "out_channels": 8, "kernel": [1, 1], "stride": [1, 1], "rank": 4}

    def clauses(count: int) -> list[str]:
        scales = np.full(count, 2.0**-7)
        w = Encoding(scales, np.zeros(count, np.int64), -128, 127, 8, True, 1, type="int8")
        weight = Constant("w", (8, count, 1, 1), w)
        operator = ArtefactOperator(
            "up", "ConvTranspose", "ConvTranspose", (Use("x", x),), Use("y", replace(x, scale=np.asarray(2.0**-4))),
            weight, weight_axis=1, input_axis=0, attributes=facts,
        )  # fmt: skip
        artefact = Artefact("by hand", (operator,), inputs=frozenset({"x"}), outputs=frozenset({"y"}))
        return [one.clause for one in judge(artefact, spec, "by hand").violations]

    assert clauses(4) == []
    assert clauses(8) == ["operators.ConvTranspose.weight_scales"]
