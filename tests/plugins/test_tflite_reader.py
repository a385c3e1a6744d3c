# SPDX-License-Identifier: Apache-2.0
"""TFLite models as artefacts, written with the schema of ai-edge-litert, and files that are wrong."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qhw.errors import ArtefactError
from qhw.legality import CheckReport, judge
from qhw.schema import load_target_file
from qhw_plugins.flat_tables import BrokenFile, root_table
from qhw_plugins.tflite_reader import TfliteReader

pytest.importorskip("ai_edge_litert")
from tests.litert_writer import Encoding, Writer, schema

TARGET = load_target_file(Path(__file__).parents[2] / "targets/qhw_targets/google/litert-int8.toml")
WEIGHT_SCALES = np.asarray([0.25, 0.5, 0.125, 0.25], np.float32)


def options(name: str, **fields: Any) -> Any:
    found = getattr(schema, f"{name}T")()
    for key, value in fields.items():
        setattr(found, key, value)
    return found


def conv_options(**fields: Any) -> Any:
    plain = {"strideW": 2, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1, "padding": schema.Padding.VALID}
    return options("Conv2DOptions", **{**plain, **fields})


def conv(
    *,
    weight: Encoding | None = None,
    codes: Any = None,
    bias: Encoding | None = None,
    output: Encoding | None = None,
    activation: int = 0,
) -> bytes:
    """A CONV_2D of [1, 8, 8, 3] with four kernels of 3 x 3."""
    w = Writer()
    x = w.given((1, 8, 8, 3), Encoding(0.5, -3))
    held = np.ones((4, 3, 3, 3), np.int8) if codes is None else codes
    k = w.constant(held, weight or Encoding(WEIGHT_SCALES))
    b = w.constant(np.arange(4, dtype=np.int32), bias or Encoding(np.float32(0.5) * WEIGHT_SCALES))
    y = w.add("CONV_2D", conv_options(fusedActivationFunction=activation), [x, k, b], output or Encoding(1.0, 4))
    return w.finish([x], [y])


def written(folder: Path, content: bytes) -> Path:
    path = folder / "model.tflite"
    path.write_bytes(content)
    return path


def check(path: Path) -> CheckReport:
    return judge(TfliteReader().read(path, None), TARGET, str(path))


def refusal(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        TfliteReader().read(path, None)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_convolution_with_a_fused_activation(tmp_path: Path) -> None:
    artefact = TfliteReader().read(written(tmp_path, conv(activation=schema.ActivationFunctionType.RELU6)), None)
    first, follower = artefact.operators
    assert (first.kind, first.type, first.weight_axis, first.input_axis) == ("Conv", "CONV_2D", 0, 3)
    keys = ("kernel", "stride", "dilation", "groups", "in_channels", "out_channels", "padding", "height", "rank")
    assert [first.attributes[key] for key in keys] == [[3, 3], [1, 2], [1, 1], 1, 3, 4, "valid", 8, 4]
    assert first.inputs[0].encoding.words() == "int8, scale 0.5, zero point -3"  # type: ignore[union-attr]
    assert first.weight is not None and first.weight.encoding is not None
    assert first.weight.encoding.scale.tolist() == [0.25, 0.5, 0.125, 0.25]
    assert first.bias is not None and first.bias.codes.tolist() == [0, 1, 2, 3]  # type: ignore[union-attr]
    assert (follower.kind, follower.attributes["minimum"], follower.attributes["maximum"]) == ("Clip", 0.0, 6.0)
    assert first.output.encoding is None and follower.output.encoding is not None
    assert follower.inputs[0].tensor == first.output.tensor


def test_depthwise_weights_keep_a_scale_for_each_index_of_axis_3(tmp_path: Path) -> None:
    w = Writer()
    x = w.given((1, 8, 8, 4), Encoding(0.5))
    codes = np.stack([np.full((3, 3), n) for n in range(4)], -1)[None].astype(np.int8)
    k = w.constant(codes, Encoding(WEIGHT_SCALES, 0, 3))
    b = w.constant(np.zeros(4, np.int32), Encoding(np.float32(0.5) * WEIGHT_SCALES))
    fields = {"strideW": 1, "strideH": 1, "dilationWFactor": 1, "dilationHFactor": 1, "depthMultiplier": 1}
    y = w.add("DEPTHWISE_CONV_2D", options("DepthwiseConv2DOptions", **fields), [x, k, b], Encoding(1.0))
    path = written(tmp_path, w.finish([x], [y]))
    (operator,) = TfliteReader().read(path, None).operators
    assert (operator.kind, operator.weight_axis) == ("DepthwiseConv", 3)
    assert (operator.attributes["groups"], operator.attributes["out_channels"]) == (4, 4)
    assert check(path).is_legal


def test_what_only_quantizes_is_no_operator(tmp_path: Path) -> None:
    w = Writer()
    x = w.given((1, 8), Encoding(0.5))
    other = w.add("QUANTIZE", options("QuantizeOptions"), [x], Encoding(0.25, 1))
    y = w.add("LOGISTIC", None, [other], Encoding(1 / 256, -128))
    path = written(tmp_path, w.finish([x], [y]))
    (operator,) = TfliteReader().read(path, None).operators
    assert (operator.kind, operator.inputs[0].tensor) == ("Sigmoid", "tensor_0")
    assert operator.inputs[0].encoding.words() == "int8, scale 0.25, zero point 1"  # type: ignore[union-attr]
    assert check(path).is_legal


BROKEN = {
    "code -128": (conv(codes=np.full((4, 3, 3, 3), -128, np.int8)), "formats.w8.codes"),
    "asymmetric weights": (conv(weight=Encoding(WEIGHT_SCALES, 1)), "formats.w8.zero_point"),
    "scales along the input channels": (
        conv(weight=Encoding(WEIGHT_SCALES[:3], 0, 3), bias=Encoding(0.125)),
        "formats.w8.per",
    ),
    "bias on another scale": (conv(bias=Encoding(np.float32(0.25) * WEIGHT_SCALES)), "biases.wide.scale"),
    "multiplier out of range": (
        # 0.5 * 0.5 / 2^-33 = 2^31, beyond 2^30
        conv(output=Encoding(np.float32(2.0**-33))),
        "requantize.rescale.shift.min",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_one_broken_thing_is_named(case: str, tmp_path: Path) -> None:
    content, clause = BROKEN[case]
    report = check(written(tmp_path, content))
    assert {(one.node, one.clause) for one in report.violations} == {("tensor_3", clause)}


@pytest.mark.parametrize("activation", [0, 1, 2, 3], ids=["none", "RELU", "RELU_N1_TO_1", "RELU6"])
def test_the_runtimes_own_fusions_are_legal_on_it(activation: int, tmp_path: Path) -> None:
    assert check(written(tmp_path, conv(activation=activation))).is_legal


def test_a_result_with_prescribed_parameters(tmp_path: Path) -> None:
    for scale, expected in ((1 / 256, set()), (1 / 128, {"operators.Softmax.fixed_output.a8"})):
        w = Writer()
        x = w.given((1, 8), Encoding(0.5))
        y = w.add("SOFTMAX", options("SoftmaxOptions", beta=1.0), [x], Encoding(np.float32(scale), -128))
        report = check(written(tmp_path, w.finish([x], [y])))
        assert {one.clause for one in report.violations} == expected


def test_an_unshared_concatenation(tmp_path: Path) -> None:
    w = Writer()
    places = [w.given((1, 4), Encoding(0.5)), w.given((1, 4), Encoding(0.25))]
    y = w.add("CONCATENATION", options("ConcatenationOptions", axis=1), places, Encoding(0.5))
    report = check(written(tmp_path, w.finish(places, [y])))
    assert {(one.node, one.clause) for one in report.violations} == {("tensor_2", "operators.Concat.same_scale")}


def test_damaged_files_are_one_line(tmp_path: Path) -> None:
    whole = conv()
    assert "the mark TFL3 is missing" in refusal(written(tmp_path, b"x" * 100))
    assert "is cut off or damaged" in refusal(written(tmp_path, whole[: len(whole) // 2]))
    assert "is cut off or damaged" in refusal(written(tmp_path, struct.pack("<I", 2**31) + whole[4:]))
    assert "is cut off or damaged" in refusal(written(tmp_path, whole[:8]))


def test_an_index_of_no_tensor(tmp_path: Path) -> None:
    w = Writer()
    x = w.given((1, 8), Encoding(0.5))
    y = w.add("LOGISTIC", None, [x], Encoding(1 / 256, -128))
    w._graph.operators[0].inputs = [99]
    assert "names tensor 99 of 2" in refusal(written(tmp_path, w.finish([x], [y])))


def test_an_output_that_is_left_out(tmp_path: Path) -> None:
    w = Writer()
    x = w.given((1, 8), Encoding(0.5))
    y = w.add("LOGISTIC", None, [x], Encoding(1 / 256, -128))
    artefact = TfliteReader().read(written(tmp_path, w.finish([x, -1], [y, -1])), None)
    assert (artefact.inputs, artefact.outputs) == ({"tensor_0"}, {"tensor_1"})


def test_an_operator_of_no_code(tmp_path: Path) -> None:
    w = Writer()
    x = w.given((1, 8), Encoding(0.5))
    y = w.add("LOGISTIC", None, [x], Encoding(1 / 256, -128))
    w._graph.operators[0].opcodeIndex = 7
    assert "operator 0 has code 7 of 1" in refusal(written(tmp_path, w.finish([x], [y])))


def test_a_model_that_holds_no_graph(tmp_path: Path) -> None:
    # A vtable of 4 bytes, and a table without fields behind it.
    empty = struct.pack("<I4sHHi", 12, b"TFL3", 4, 4, 4)
    assert "must hold a graph; got none" in refusal(written(tmp_path, empty))


def test_no_model_belongs_to_a_model(tmp_path: Path) -> None:
    path = written(tmp_path, conv())
    with pytest.raises(ArtefactError, match="is a model already, and --model goes with encodings"):
        TfliteReader().read(path, path)


def test_a_mean_of_a_scalar_has_no_axes(tmp_path: Path) -> None:
    w = Writer()
    x, axes = w.given((), Encoding(0.5)), w.constant(np.zeros(1, np.int32), None)
    y = w.add("MEAN", options("ReducerOptions"), [x, axes], Encoding(0.5))
    (mean,) = TfliteReader().read(written(tmp_path, w.finish([x], [y])), None).operators
    assert (mean.kind, "axes" in mean.attributes) == ("ReduceMean", False)


def test_weights_shorter_than_their_shape(tmp_path: Path) -> None:
    w = Writer()
    x = w.given((1, 8, 8, 3), Encoding(0.5))
    k = w.constant(np.ones((4, 3, 3, 3), np.int8), Encoding(WEIGHT_SCALES))
    w._graph.tensors[k].shape = [4, 300, 300, 3]
    y = w.add("CONV_2D", conv_options(), [x, k], Encoding(1.0))
    assert "needs more data than is stored" in refusal(written(tmp_path, w.finish([x], [y])))


def test_a_scale_that_is_no_number(tmp_path: Path) -> None:
    assert "a scale must be a finite number; got nan" in refusal(written(tmp_path, conv(output=Encoding(np.nan))))


def test_a_table_never_reads_beyond_the_file() -> None:
    with pytest.raises(BrokenFile, match="an offset of"):
        root_table(b"\0\0\0")
    with pytest.raises(BrokenFile, match="an offset of"):
        root_table(struct.pack("<I", 100) + b"\0" * 10).integer(0)
    lists = struct.pack("<IHHHHiII", 12, 6, 8, 4, 0, 8, 4, 2**31)  # a vtable, a table, and a list without end
    with pytest.raises(BrokenFile, match="a list of 2147483648 entries ends behind the file"):
        root_table(lists).tables(0)
