# SPDX-License-Identifier: Apache-2.0
"""Rules between operators: ties, prescribed parameters, what is computed along, who runs what, what stays open."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qhw.schema.marks import judged_mark, marks_of
from qhw.schema.reference import MODELS
from tests.quantized_files import Grid, OnnxFile, conv_file, gemm_file, grid

Broken = Callable[..., set[tuple[str, str]]]
A, B = grid(2.0**-4), grid(2.0**-3)


def concat_file(first: Grid, second: Grid, output: Grid) -> OnnxFile:
    f = OnnxFile()
    operands = [f.pair(f.given("a", [1, 2, 4, 4]), first), f.pair(f.given("b", [1, 2, 4, 4]), second)]
    f.gives(f.pair(f.op("Concat", operands, "concat", axis=1), output))
    return f


def unary_file(kind: str, x: Grid, y: Grid | None, **attributes: Any) -> OnnxFile:
    f = OnnxFile()
    value = f.op(kind, [f.pair(f.given("x", [1, 4, 4, 4]), x)], kind.lower(), **attributes)
    f.gives(value if y is None else f.pair(value, y))
    return f


@pytest.mark.parametrize(
    ("grids", "expected"),
    [
        ((A, A, A), set()),
        ((A, B, A), {("concat", "operators.Concat.same_scale")}),
        ((A, A, B), {("concat", "operators.Concat.same_scale")}),
    ],
    ids=["one scale", "an operand of another scale", "a result of another scale"],
)
def test_a_concat_wants_one_scale(grids: Sequence[Grid], expected: set[Any], broken_by: Broken) -> None:
    assert broken_by(concat_file(*grids)) == expected


@pytest.mark.parametrize("kernels", [["move"], None], ids=["computed", "moved"])
def test_a_concat_with_real_numbers_runs_on_the_host(kernels: list[str] | None, judged: Any) -> None:
    f = OnnxFile()
    stored = f.stored("token", np.ones((1, 1, 4, 4), np.float32))
    f.gives(f.pair(f.op("Concat", [stored, f.pair(f.given("a", [1, 2, 4, 4]), A)], "concat", axis=1), B))
    changes = {"operators.Concat.kernels": kernels, "fallback": "host"}
    report = judged(f, changes)
    assert [one.status for one in report.operators] == ["host"]
    assert report.operators[0].reason.endswith("real numbers in 'token'")


def test_a_stored_operand_of_a_concat_shares_the_scale(broken_by: Broken) -> None:
    def file(of_constant: Grid) -> OnnxFile:
        f = OnnxFile()
        stored = f.weight("token", np.ones((1, 1, 4, 4), int), of_constant)
        f.gives(f.pair(f.op("Concat", [stored, f.pair(f.given("a", [1, 2, 4, 4]), A)], "concat", axis=1), A))
        return f

    assert broken_by(file(A)) == set()
    assert broken_by(file(B)) == {("concat", "operators.Concat.same_scale")}


def test_a_row_of_its_own_is_not_passed_over_for_the_general_one(judged: Any) -> None:
    depthwise = conv_file(w=grid([2.0**-7] * 3), codes=np.ones((3, 1, 3, 3), int), bias=None, group=3)
    general = {"operators.Conv.limits": None}
    assert judged(depthwise, general).operators[0].status == "legal"
    own = {**general, "operators.DepthwiseConv": {"kernels": []}, "fallback": "refuse"}
    report = judged(depthwise, own)
    assert [one.clause for one in report.violations] == ["operators.DepthwiseConv.kernels"]


def test_the_zero_point_is_shared_too(broken_by: Broken) -> None:
    free = {"formats.a8.zero_point": "free"}
    file = concat_file(A, grid(2.0**-4, 1), A)
    assert broken_by(file, free) == {("concat", "operators.Concat.same_scale")}


def test_aligned_operands_may_have_scales_of_their_own_and_need_one_type(broken_by: Broken) -> None:
    aligned = {"operators.Concat.same_scale": "aligned", "kernels.move.input": ["a8", "a16"]}
    aligned["formats.a16"] = {"bits": 16, "signed": True, "zero_point": 0, "per": "tensor"}
    assert broken_by(concat_file(A, B, A), aligned) == set()
    mixed = concat_file(A, grid(2.0**-4, 0, "int16"), A)
    assert broken_by(mixed, aligned) == {("concat", "operators.Concat.same_scale")}


def test_a_maximum_keeps_its_inputs_scale(broken_by: Broken) -> None:
    pool = {"kernel_shape": [2, 2]}
    assert broken_by(unary_file("MaxPool", A, A, **pool)) == set()
    assert broken_by(unary_file("MaxPool", A, B, **pool)) == {("maxpool", "operators.MaxPool.same_scale")}


def test_what_only_moves_data_keeps_all_scales(broken_by: Broken) -> None:
    moves = {"operators.Transpose": {"same_scale": "none"}}
    assert broken_by(unary_file("Transpose", A, A, perm=[0, 2, 3, 1]), moves) == set()
    turned = broken_by(unary_file("Transpose", A, B, perm=[0, 2, 3, 1]), moves)
    assert turned == {("transpose", "operators.Transpose.same_scale")}


@pytest.mark.parametrize(
    ("kind", "facts", "limit", "expected"),
    [
        ("ReduceMean", {"axes": 0}, {"axis": ["channel"]}, {("reducemean", "operators.ReduceMean.limits.axis")}),
        ("ReduceMean", {"axes": 1}, {"axis": ["channel"]}, set()),
        ("Gather", {"axis": 2}, {"axis": ["channel"]}, {("gather", "operators.Gather.limits.axis")}),
        ("Gather", {"axis": 1}, {"axis": ["channel"]}, set()),
    ],
)
def test_a_limit_on_an_axis(
    kind: str, facts: dict[str, int], limit: dict[str, Any], expected: set[Any], broken_by: Broken
) -> None:
    f = OnnxFile()
    second = f.stored("second", [facts.pop("axes", 0)], "int64")
    f.gives(f.pair(f.op(kind, [f.pair(f.given("x", [2, 4, 4, 4]), A), second], kind.lower(), **facts), A))
    row = {"kernels": ["move"], "limits": limit}
    assert broken_by(f, {f"operators.{kind}": row}) == expected


def test_limits_on_what_a_convolution_sums_up_and_on_channels_from_one(broken_by: Broken) -> None:
    """3 * 3 * 3 = 27 products behind one result; six channels from three are two from each."""
    for most, expected in ((27, set()), (26, {("conv", "operators.Conv.limits.reduced_elements")})):
        assert broken_by(conv_file(), {"operators.Conv.limits": {"reduced_elements": {"max": float(most)}}}) == expected
    file = conv_file(codes=np.ones((6, 1, 3, 3), int), group=3, bias=None, w=grid(2.0**-7))
    for most, expected in ((2, set()), (1, {("conv", "operators.DepthwiseConv.limits.depth_multiplier")})):
        row = {"kernels": ["mac"], "limits": {"depth_multiplier": {"max": float(most)}}}
        assert broken_by(file, {"operators.DepthwiseConv": row, "operators.Conv": None}) == expected


def test_a_limit_on_sums_of_a_weight_computed_at_run_time(broken_by: Broken) -> None:
    f = OnnxFile()
    operands = [f.pair(f.given("x", [1, 3, 8, 8]), A), f.pair(f.given("w", [4, 3, 3, 3]), A)]
    f.gives(f.pair(f.op("Conv", operands, "conv"), A))
    assert broken_by(f, {"operators.Conv.limits": {"reduced_elements": {"max": 1.0}}}) == {("conv", "operators")}


@pytest.mark.parametrize("y", [grid(2.0**-8), grid(2.0**-7, 1)], ids=["another scale", "another zero point"])
def test_a_prescribed_result(y: Grid, broken_by: Broken) -> None:
    free = {"formats.a8.zero_point": "free"}
    assert broken_by(unary_file("Softmax", A, grid(2.0**-7)), free) == set()
    assert broken_by(unary_file("Softmax", A, y), free) == {("softmax", "operators.Softmax.fixed_output.a8")}


def test_a_tensor_quantized_between_two_operators_parts_them(judged: Any) -> None:
    """Relu is computed along behind a convolution; alone, the target does not have it."""
    f = OnnxFile()
    x, w = f.pair(f.given("x", [1, 8]), grid(2.0**-5)), f.weight("w", np.ones((4, 8), int), grid([2.0**-7] * 4))
    between = f.pair(f.op("Gemm", [x, w], "gemm", transB=1), A)
    f.gives(f.pair(f.op("Relu", [between], "relu"), A))
    report = judged(f)
    assert [(one.node, one.clause) for one in report.violations] == [("relu", "operators.Relu")]
    report = judged(f, {"operators.Relu": {"kernels": ["move"]}})
    assert [(one.name, one.status) for one in report.operators] == [("gemm", "legal"), ("relu", "legal")]


def test_a_clip_that_saturation_does_anyway_needs_no_fusion(judged: Any) -> None:
    """[-8, 7.9375] are the ends of int8 at 2^-4, and 0 is the lowest code of a uint8 with zero point 0."""
    f = conv_file(y=None)
    f.outputs.clear()
    bounds = [f.stored("low", np.float32(-8.0)), f.stored("high", np.float32(7.9375))]
    f.gives(f.pair(f.op("Clip", ["conv", *bounds], "clip"), A))
    report = judged(f)
    assert report.is_legal
    assert [(one.name, one.status) for one in report.operators] == [("conv", "legal"), ("clip", "passed")]


def test_a_clip_narrows_the_codes_that_can_occur(broken_by: Broken) -> None:
    """A format without -128 is kept by a clip to -127 / 16, and broken without one."""
    narrow = {"formats.a8.codes": [-127, 127]}
    f = conv_file(x=grid(2.0**-5), y=None)
    f.outputs.clear()
    f.gives(f.pair(f.op("Clip", ["conv", f.stored("low", np.float32(-127 / 16))], "clip"), A))
    x_only = {("conv", "formats.a8.codes")}
    assert broken_by(f, narrow) == x_only  # the input's quantizer has no clip
    wide_input = {**narrow, "formats.x8": {"bits": 8, "signed": True, "zero_point": 0, "per": "tensor"}}
    assert broken_by(f, {**wide_input, "kernels.mac.input": ["x8"]}) == set()
    assert broken_by(conv_file(), {**wide_input, "kernels.mac.input": ["x8"]}) == x_only


def test_a_clip_in_front_of_the_first_quantizer_narrows_what_is_read(judged: Any) -> None:
    """-127 / 16 = -7.9375 is the code -127: with the clip no input has the code -128, and the clip is no operator."""
    for bound, expected in ((-127 / 16, set()), (-8.0, {("pool", "formats.a8.codes")})):
        f = OnnxFile()
        x = f.op("Clip", [f.given("x", [1, 4, 4, 4]), f.stored("low", np.float32(bound))], "clip")
        value = f.op("MaxPool", [f.pair(x, A)], "pool", kernel_shape=[2, 2])
        y = f.op("Clip", [value, f.stored("bottom", np.float32(bound))], "end")
        f.gives(f.pair(y, A))
        report = judged(f, {"formats.a8.codes": [-127, 127], "operators.MaxPool.fused": ["Clip"]})
        assert {(one.node, one.clause) for one in report.violations} == expected
        assert report.operators[0].status == "passed"


def test_behind_a_view_a_value_has_the_codes_that_it_had(broken_by: Broken) -> None:
    f = OnnxFile()
    x = f.op("Clip", [f.given("x", [1, 8, 1, 1]), f.stored("low", np.float32(-127 / 16))], "clip")
    flat = f.pair(f.op("Flatten", [f.pair(x, A)], "flat", axis=1), A)
    weight = f.weight("w", np.ones((4, 8), int), grid([2.0**-7] * 4))
    f.gives(f.pair(f.op("Gemm", [flat, weight], "gemm", transB=1), A))
    wide = {"bits": 8, "signed": True, "zero_point": 0, "per": "tensor"}
    changes = {"formats.a8.codes": [-127, 127], "formats.y8": wide, "kernels.mac.output": ["y8"]}
    assert broken_by(f, changes) == set()


@pytest.mark.parametrize(
    ("fallback", "status"),
    [
        ("refuse", "illegal"),
        ("host", "host"),
        ("single_partition", "host"),
        ("unknown", "unjudged"),
        (None, "unjudged"),
    ],
)
def test_where_operators_go_that_the_target_lacks(fallback: str | None, status: str, judged: Any) -> None:
    report = judged(unary_file("Tanh", A, A), {"fallback": fallback})
    assert [one.status for one in report.operators] == [status]
    assert report.is_legal == (status != "illegal")
    assert [one.clause for one in report.unjudged] == (["fallback"] if status == "unjudged" else [])


def test_the_host_may_be_refused_whatever_the_fallback(judged: Any) -> None:
    file = unary_file("Tanh", A, A)
    assert judged(file, {"fallback": "host"}).is_legal
    assert not judged(file, {"fallback": "host"}, host_allowed=False).is_legal


def test_behind_the_first_on_the_host_a_single_partition_ends(judged: Any) -> None:
    f = OnnxFile()
    value = f.pair(f.given("x", [1, 4, 4, 4]), A)
    value = f.pair(f.op("Tanh", [value], "tanh"), A)
    f.gives(f.pair(f.op("MaxPool", [value], "pool", kernel_shape=[2, 2]), B))
    report = judged(f, {"fallback": "single_partition"})
    assert [one.status for one in report.operators] == ["host", "host"]
    assert [one.status for one in judged(f, {"fallback": "host"}).operators] == ["host", "illegal"]


def test_quantized_weights_say_that_an_operator_is_meant_for_the_accelerator(broken_by: Broken) -> None:
    big = conv_file(codes=np.ones((4, 3, 7, 7), int))
    assert broken_by(big, {"fallback": "host"}) == {("conv", "operators.Conv.limits.kernel")}


def test_an_operator_left_in_real_numbers_runs_on_the_host(judged: Any) -> None:
    report = judged(conv_file(w=None, bias=None), {"fallback": "host"})
    assert [(one.status, one.reason) for one in report.operators] == [
        ("host", "kernels.mac.weight: weights in real numbers")
    ]


OPEN: dict[str, tuple[dict[str, Any], str]] = {
    "formats of the input": ({"kernels.mac.input": "unknown"}, "kernels.mac.input"),
    "zero point": ({"formats.w8.zero_point": "unknown"}, "formats.w8.zero_point"),
    "scale": ({"formats.w8.scale": "unknown"}, "formats.w8.scale"),
    "exponent": ({"formats.w8.scale.exponent_min": "unknown"}, "formats.w8.scale.exponent_min"),
    "bias": ({"kernels.mac.bias": "unknown"}, "kernels.mac.bias"),
    "bias that nobody looked for": ({"kernels.mac.bias": None}, "kernels.mac.bias"),
    "width of the bias": ({"biases.b.bits": "unknown"}, "biases.b.bits"),
    "accumulator": ({"kernels.mac.accumulator": None}, "kernels.mac.accumulator"),
    "width of the accumulator": ({"accumulators.sum.bits": "unknown"}, "accumulators.sum.bits"),
    "requantization": ({"kernels.mac.requantize": "unknown"}, "kernels.mac.requantize"),
    "shift": ({"requantize.r.shift.max": "unknown"}, "requantize.r.shift.max"),
    "fusions": ({"operators.Conv.fused": "unknown"}, "operators.Conv.fused"),
    "limit": ({"operators.Conv.limits.kernel": "unknown"}, "operators.Conv.limits.kernel"),
    "sum of weights": ({"kernels.mac.weight_abs_sum_max": "unknown"}, "kernels.mac.weight_abs_sum_max"),
    "exponents": ({"kernels.mac.exponents": "unknown"}, "kernels.mac.exponents"),
}


@pytest.mark.parametrize("case", OPEN)
def test_what_the_target_leaves_open_is_no_violation_and_is_counted(case: str, judged: Any) -> None:
    changes, clause = OPEN[case]
    report = judged(conv_file(behind=["Relu"]), changes)
    assert report.is_legal
    assert [(one.clause, one.nodes) for one in report.unjudged] == [(clause, ("conv",))]
    assert report.summary.endswith("cannot judge: 1 clause")


STATED = {
    "artefact": {"file_format": "acme blob"},
    "boundary.artefact_io": "integer",
    "operators.Conv.weight_layout": "OHWI",
    "operators.Gemm.weight_layout": "OI",
    "formats.w8.packing": "high_first",
    "formats.other": {"bits": 4, "signed": True, "packing": "high_first"},
    "memories.data": {"holds": ["activations"], "capacity_bytes": 4096, "past_capacity": "refuse"},
}


def test_what_is_stated_of_files_and_not_looked_at_is_listed(judged: Any) -> None:
    """Of operators and formats only those that the file has."""
    report = judged(conv_file(), STATED)
    assert {one.clause: one.value for one in report.unread} == {
        "formats.w8.packing": "high_first",
        "operators.Conv.weight_layout": "OHWI",
        "boundary.artefact_io": "integer; this file takes and gives real numbers",
        "artefact.file_format": "acme blob",
        "memories.data.capacity_bytes": "4096, for activations",
    }
    assert report.is_legal
    assert judged(conv_file(), {"artefact": {"file_format": "TFLite or ONNX QDQ"}}).unread == ()
    assert judged(conv_file(), {"artefact": {"file_format": "any"}}).unread == ()
    assert judged(conv_file(), {"boundary.artefact_io": "float"}).unread == ()
    assert judged(conv_file(), {"formats.w8.packing": "low_first"}).unread == ()


def test_fields_marked_as_judged_are_those_that_the_judge_reads() -> None:
    """By name: a mark that is not true any more, or is forgotten, is found."""
    folder = Path(__file__).parents[3] / "qhw/legality"
    source = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py") if path.name != "unread.py")
    marked: dict[bool | None, set[str]] = {True: set(), False: set(), None: set()}
    for _, model in MODELS:
        for name, field in model.model_fields.items():
            if marks_of(field)[0]:
                marked[judged_mark(field)].add(name)
    assert {name for name in marked[True] if f".{name}" not in source} == set()
    assert marked[False] == {"file_format", "artefact_io", "weight_layout", "packing", "min_real_range"}
    assert marked[True] == {
        "static_shapes", "storage_bits", "shift_per", "zero_point_per", "zero_point_bits", "block_shape",
    }  # fmt: skip


def test_kernels_that_are_unknown_leave_the_operator_unjudged(judged: Any) -> None:
    report = judged(gemm_file(), {"operators.Gemm.kernels": "unknown"})
    assert [(one.status, one.reason) for one in report.operators] == [("unjudged", "operators.Gemm.kernels")]
    assert report.is_legal


@pytest.mark.parametrize("stated", ["float", None], ids=["float", "not said"])
def test_a_result_that_leaves_the_network_in_real_numbers(stated: str | None, judged: Any) -> None:
    report = judged(conv_file(y=None), {"boundary.outputs": stated})
    assert report.is_legal
    assert [one.clause for one in report.unjudged] == ([] if stated else ["boundary.outputs"])


def test_what_is_computed_along_may_leave_in_real_numbers(judged: Any) -> None:
    leaves = {"boundary.outputs": "float", "fallback": "host"}
    report = judged(conv_file(y=None, behind=["Relu", "Flatten"]), leaves)
    assert report.is_legal
    assert [one.status for one in report.operators] == ["legal", "passed", "passed"]
    # Sigmoid is not computed along: what it reads is no output of the network.
    report = judged(conv_file(y=None, behind=["Sigmoid"]), leaves)
    assert {(one.node, one.clause) for one in report.violations} == {("conv", "kernels.mac.output")}


def test_behind_a_kernel_that_gives_real_numbers_nothing_need_be_computed_along(judged: Any) -> None:
    """The longest start that is fused is; what follows reads real numbers, on the host."""
    half = {"kind": "float", "bits": 16, "exponent_bits": 5, "mantissa_bits": 10, "finite_max": 65504.0}
    changes = {"formats.f16": half, "kernels.mac.output": ["a8", "f16"], "fallback": "host"}
    report = judged(conv_file(behind=["Relu", "Elu"]), changes)
    assert report.is_legal
    assert [one.status for one in report.operators] == ["legal", "passed", "host"]
    report = judged(conv_file(behind=["Relu", "Elu"]), {"fallback": "host"})
    assert {one.clause for one in report.violations} == {"operators.Conv.fused"}


def test_formats_at_the_edge(broken_by: Broken) -> None:
    edge = {"formats.wide": {"bits": 16, "signed": True, "zero_point": 0, "per": "tensor"}}
    assert broken_by(conv_file(), {**edge, "boundary.output_formats": ["wide"]}) == {
        ("conv", "boundary.output_formats")
    }
    assert broken_by(conv_file(), {**edge, "boundary.input_formats": ["wide"]}) == {("conv", "boundary.input_formats")}
    assert broken_by(conv_file(), {"boundary.output_formats": ["a8"], "boundary.input_formats": ["a8"]}) == set()


def test_layers_are_counted(broken_by: Broken) -> None:
    f = OnnxFile()
    value = f.pair(f.given("x", [1, 4, 4, 4]), A)
    for name in ("one", "two"):
        value = f.pair(f.op("MaxPool", [value], name, kernel_shape=[2, 2]), A)
    f.gives(value)
    assert broken_by(f, {"network.max_layers": 2}) == set()
    assert broken_by(f, {"network.max_layers": 1}) == {("", "network.max_layers")}


def test_a_reshape_between_an_operator_and_its_quantizer_is_looked_through(judged: Any) -> None:
    f = conv_file(y=None)
    f.outputs.clear()
    f.gives(f.pair(f.op("Flatten", ["conv"], "flat", axis=1), A))
    report = judged(f)
    assert (report.is_legal, [one.status for one in report.operators]) == (True, ["legal", "passed"])


def test_a_report_says_the_same_as_json(judged: Any) -> None:
    import json

    report = judged(conv_file(x=grid(0.03)))
    data = json.loads(report.to_json())
    assert (data["is_legal"], data["counts"]) == (False, {"legal": 0, "illegal": 1, "host": 0, "unjudged": 0})
    (violation,) = data["violations"]
    assert violation == {
        "node": "conv",
        "kind": "Conv",
        "tensor": "x",
        "clause": "formats.a8.scale.kind",
        "must": "must be a power of two",
        "got": "scale 0.0299999993",
        "fix": "Round it up to the next power of two, and quantize again.",
    }
