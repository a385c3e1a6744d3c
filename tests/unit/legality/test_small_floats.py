# SPDX-License-Identifier: Apache-2.0
"""Small floats, groups and blocks in ONNX files: what is legal, and the clause that each broken thing breaks.

Values of e4m3 are multiples of 2^-9 with four significant bits, up to 448; 240 is the largest with exponent 7.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from qhw.errors import ArtefactError
from qhw.legality import encoding_of
from qhw.numerics import FloatElements
from tests.quantized_files import OnnxFile, gemm_file, grid

Broken = Callable[..., set[tuple[str, str]]]

E4M3, E5M2, FNUZ = "float8e4m3fn", "float8e5m2", "float8e4m3fnuz"
ROWS = (np.arange(32) % 15 - 7).reshape(4, 8) / 2
X, Y = grid(2.0**-5, 0, E4M3), grid(2.0**-4, 0, E4M3)
F8 = {"kind": "float", "bits": 8, "exponent_bits": 4, "mantissa_bits": 3, "finite_max": 448.0, "zero_point": 0}
FLOATS: dict[str, Any] = {
    "formats.a8": F8 | {"per": "tensor"},
    "formats.w8": F8 | {"per": "out_channel"},
    "accumulators.sum": {"kind": "float"},
    "kernels.mac.requantize": None,
    "requantize": {},
}
GROUPS = {"formats.w8.per": "group", "formats.w8.group_size": 4}
BLOCKS = {"formats.w8.per": "block", "formats.w8.block_shape": [2, 4]}


def of_weight(scale: Any = 2.0**-7, dtype: str = E4M3, rows: Any = ROWS, **more: Any) -> OnnxFile:
    return gemm_file(x=X, w=grid(scale, 0, dtype, **more), y=Y, codes=rows, opset=24)


def blocks(scale: Any, **more: Any) -> OnnxFile:
    return of_weight(scale, axis=1, block_size=4, **more)


CASES: dict[str, tuple[OnnxFile, dict[str, Any], set[str]]] = {
    "e4m3 as it is": (of_weight(), {}, set()),
    "a scale for each channel": (of_weight([2.0**-7] * 4), {}, set()),
    "a scale for each channel where one per tensor": (
        of_weight([2.0**-7] * 4),
        {"formats.w8.per": "tensor"},
        {"formats.w8.per"},
    ),
    "scales along the inputs": (of_weight([2.0**-7] * 8, axis=1), {}, {"formats.w8.per"}),
    "e5m2": (of_weight(dtype=E5M2), {}, {"kernels.mac.weight"}),
    "e4m3 of another bias": (of_weight(dtype=FNUZ), {}, {"kernels.mac.weight"}),
    "e4m3 of that bias": (
        of_weight(dtype=FNUZ),
        {"formats.w8.exponent_bias": 8, "formats.w8.finite_max": 240.0},
        set(),
    ),
    "integers": (of_weight(dtype="int8", rows=np.rint(ROWS)), {}, {"kernels.mac.weight"}),
    "floats where integers": (
        of_weight(),
        {"formats.w8": {"bits": 8, "signed": True, "zero_point": 0, "per": "out_channel"}},
        {"kernels.mac.weight"},
    ),
    "240 where that is the largest": (of_weight(rows=ROWS + 236.5), {"formats.w8.finite_max": 240.0}, set()),
    "256 where 240 is the largest": (
        of_weight(rows=np.where(ROWS == 3.5, 256, ROWS)),
        {"formats.w8.finite_max": 240.0},
        {"formats.w8.finite_max"},
    ),
    "no number": (of_weight(rows=np.where(ROWS == 3.5, np.nan, ROWS)), {}, {"formats.w8.finite_max"}),
    "activations up to 448 where 240 is the largest": (
        of_weight(),
        {"formats.a8.finite_max": 240.0},
        {"formats.a8.finite_max"},
    ),
    "groups": (blocks(np.full((4, 2), 2.0**-7)), GROUPS, set()),
    "groups where one scale per channel": (blocks(np.full((4, 2), 2.0**-7)), {}, {"formats.w8.per"}),
    "groups of another size": (
        blocks(np.full((4, 2), 2.0**-7)),
        GROUPS | {"formats.w8.group_size": [8, 16]},
        {"formats.w8.group_size"},
    ),
    "groups along the outputs": (
        of_weight(np.full((1, 8), 2.0**-7), axis=0, block_size=4),
        GROUPS,
        {"formats.w8.per"},
    ),
    "scales stored as e8m0": (
        blocks(np.full((4, 2), 2.0**-7), scale_dtype="float8e8m0"),
        GROUPS | {"formats.w8.scale": {"kind": "e8m0"}},
        set(),
    ),
    "a scale of a group that is no power of two": (
        blocks([[0.5, 0.5], [0.5, 0.5], [0.5, 0.75], [0.5, 0.5]]),
        GROUPS | {"formats.w8.scale": {"kind": "e8m0"}},
        {"formats.w8.scale.kind"},
    ),
    "blocks of two outputs": (blocks([[0.5, 1.0], [0.5, 1.0], [2.0, 0.5], [2.0, 0.5]]), BLOCKS, set()),
    "scales that differ within a block": (
        blocks([[0.5, 1.0], [0.5, 2.0], [2.0, 0.5], [2.0, 0.5]]),
        BLOCKS,
        {"formats.w8.block_shape"},
    ),
    "scales that differ within a block, where channels may have scales, too": (
        blocks([[0.5, 1.0], [0.5, 2.0], [2.0, 0.5], [2.0, 0.5]]),
        {"formats.b8": F8 | {"per": "block", "block_shape": [2, 4]}, "kernels.mac.weight": ["w8", "b8"]},
        {"formats.b8.block_shape"},
    ),
    "a scale for each channel where blocks": (of_weight([0.5, 0.5, 0.5, 1.0]), BLOCKS, {"formats.w8.block_shape"}),
    "4-bit floats": (
        blocks(np.full((4, 2), 2.0**-7), dtype="float4e2m1", rows=np.clip(ROWS, -3, 3).round()),
        GROUPS | {"formats.w8": {**F8, **{"bits": 4, "exponent_bits": 2, "mantissa_bits": 1, "finite_max": 6.0}}}
        | {"formats.w8.per": "group", "formats.w8.group_size": 4},
        set(),
    ),
    "4-bit floats where 8-bit ones": (
        blocks(np.full((4, 2), 2.0**-7), dtype="float4e2m1", rows=np.clip(ROWS, -3, 3).round()),
        GROUPS,
        {"kernels.mac.weight"},
    ),
    "4-bit integers in groups": (
        blocks(np.full((4, 2), 2.0**-7), dtype="int4", rows=np.rint(ROWS)),
        {"formats.w8": {"bits": 4, "signed": True, "zero_point": 0, "per": "group", "group_size": 4}},
        set(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_small_floats_groups_and_blocks(case: str, broken_by: Broken) -> None:
    file, changes, expected = CASES[case]
    assert {clause for _, clause in broken_by(file, FLOATS | changes)} == expected


def test_messages_say_which_float_and_how_far(judged: Any) -> None:
    def only(file: OnnxFile, changes: dict[str, Any]) -> str:
        (violation,) = judged(file, FLOATS | changes).violations
        return str(violation.message)

    assert only(of_weight(dtype=E5M2), {}) == (
        "gemm: w: kernels.mac.weight must be w8 (float8 e4m3); got float8e5m2, scale 0.0078125, zero point 0. "
        "Quantize it again to one of these."
    )
    largest = only(of_weight(rows=np.where(ROWS == 3.5, 256, ROWS)), {"formats.w8.finite_max": 240.0})
    assert largest == (
        "gemm: w: formats.w8.finite_max must be at most 240; got 256 (the largest of 32 elements). "
        "Quantize it with a coarser scale."
    )
    clip = only(of_weight(), {"formats.a8.finite_max": 240.0, "kernels.mac.output": ["w8"]})
    assert clip == (
        "gemm: x: formats.a8.finite_max must be at most 240; got 448. "
        "Clip it to 240 times its scale in front of its quantizer."
    )
    nothing = only(of_weight(rows=np.where(ROWS == 3.5, np.nan, ROWS)), {})
    assert "must be finite numbers; got 2 of 32 codes that stand for no finite number" in nothing
    outputs = only(blocks([[0.5, 1.0], [0.5, 2.0], [2.0, 0.5], [2.0, 0.5]]), BLOCKS)
    assert "must be 2 outputs by 4 inputs; got scales that differ within 2 outputs" in outputs


def clipped(bound: float) -> OnnxFile:
    """x clipped to +-bound in front of a quantizer of scale 2^-5."""
    f = OnnxFile(opset=24)
    ends = [f.stored("low", -bound), f.stored("high", bound)]
    x = f.pair(f.op("Clip", [f.given("x", [1, 8]), *ends], "clip"), X)
    product = f.op("Gemm", [x, f.weight("w", ROWS, grid(2.0**-7, 0, E4M3))], "gemm", transB=1)
    f.gives(f.pair(f.op("Clip", [product, *ends], "clip_y"), grid(2.0**-5, 0, E4M3)))
    return f


@pytest.mark.parametrize(("largest", "expected"), [(240.0, set()), (256.0, {"formats.a8.finite_max"})])
def test_a_clip_narrows_the_floats_that_can_occur(largest: float, expected: set[str], broken_by: Broken) -> None:
    """At scale 2^-5 a clip to 7.5 leaves elements up to 240, and one to 8 those up to 256."""
    found = broken_by(clipped(largest * 2.0**-5), FLOATS | {"formats.a8.finite_max": 240.0})
    assert {clause for _, clause in found} == expected


def test_a_clip_that_leaves_the_largest_float_needs_no_fusion(judged: Any) -> None:
    report = judged(clipped(7.5), FLOATS | {"formats.a8.finite_max": 240.0, "operators.Gemm.fused": []})
    assert report.is_legal
    assert {one.name: one.status for one in report.operators}["clip_y"] == "passed"


def test_a_largest_float_that_is_not_published_is_left_open(judged: Any) -> None:
    report = judged(of_weight(), FLOATS | {"formats.w8.finite_max": "unknown"})
    assert report.is_legal
    assert [one.clause for one in report.unjudged] == ["formats.w8.finite_max"]


def test_a_small_float_has_no_zero_point() -> None:
    e4m3 = FloatElements(4, 3, 448.0)
    with pytest.raises(ArtefactError, match=r"^m: the zero point of float8 must be 0\. Quantize the model again\.$"):
        encoding_of("m", 0.5, 3, bits=8, signed=True, type="float8", elements=e4m3)


def test_blocks_have_a_scale_each() -> None:
    message = (
        r"^m: needs scales of shape \[4, 2\], one for each 4 along axis 1; got \[4, 3\]\. Quantize the model again\.$"
    )
    with pytest.raises(ArtefactError, match=message):
        encoding_of("m", np.ones((4, 3)), 0, bits=8, signed=True, axis=1, block_size=4, shape=(4, 7))
