# SPDX-License-Identifier: Apache-2.0
"""ONNX models as artefacts: QDQ pairs, integer operators, moved weights, external data, files that are wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from qhw.errors import ArtefactError
from qhw.legality import Artefact
from qhw_plugins.onnx_reader import OnnxReader
from tests.quantized_files import CODES, OnnxFile, conv_file, gemm_file, grid

Read = Callable[[OnnxFile], Artefact]


@pytest.fixture
def read(tmp_path: Path) -> Read:
    return lambda file: OnnxReader().read(file.write(tmp_path), None)


def refusal(path: Path) -> str:
    with pytest.raises(ArtefactError) as caught:
        OnnxReader().read(path, None)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_a_convolution_between_pairs(read: Read) -> None:
    artefact = read(conv_file(behind=["Relu"], strides=[2, 2], pads=[1, 1, 1, 1]))
    conv, relu = artefact.operators
    assert (artefact.form, artefact.opset, artefact.inputs) == ("ONNX QDQ", 21, {"x"})
    assert (conv.name, conv.kind, conv.type) == ("conv", "Conv", "Conv")
    assert [use.tensor for use in conv.inputs] == ["x"]
    assert conv.inputs[0].encoding.words() == "int8, scale 0.03125, zero point 0"  # type: ignore[union-attr]
    assert conv.output.encoding is None
    assert relu.output.encoding is not None and relu.output.encoding.scale == 2.0**-4
    assert conv.weight is not None and np.array_equal(conv.weight.codes, CODES)  # type: ignore[arg-type]
    assert conv.bias is not None and conv.bias.codes.tolist() == [1, -2, 3, 0]  # type: ignore[union-attr]
    facts = {
        key: conv.attributes[key] for key in ("kernel", "stride", "padding", "groups", "in_channels", "out_channels")
    }
    assert facts == {
        "kernel": [3, 3], "stride": [2, 2], "padding": [1, 1], "groups": 1, "in_channels": 3, "out_channels": 4,
    }  # fmt: skip
    assert (conv.attributes["rank"], conv.attributes["height"], conv.weight_axis) == (4, 8, 0)


@pytest.mark.parametrize(
    ("group", "codes", "kind"),
    [(1, CODES, "Conv"), (3, np.ones((6, 1, 3, 3), int), "DepthwiseConv"), (2, np.ones((4, 2, 3, 3), int), "Conv")],
    ids=["plain", "depthwise", "grouped"],
)
def test_kinds_of_convolutions(group: int, codes: Any, kind: str, read: Read) -> None:
    file = conv_file(codes=codes, group=group, bias=None, w=grid(2.0**-7))
    assert [one.kind for one in read(file).operators] == [kind]


def test_a_product_with_a_stored_matrix_is_a_gemm(read: Read) -> None:
    f = OnnxFile()
    weight = f.weight("w", np.ones((8, 4), int), grid([0.5] * 4, axis=1))
    f.gives(f.pair(f.op("MatMul", [f.pair(f.given("x", [1, 5, 8]), grid(0.5)), weight], "product"), grid(1.0)))
    (product,) = read(f).operators
    assert (product.kind, product.weight_axis, product.input_axis) == ("Gemm", 1, 0)
    assert (product.attributes["in_channels"], product.attributes["out_channels"]) == (8, 4)
    assert product.weight is not None and product.weight.encoding is not None and product.weight.encoding.axis == 1


def test_a_product_of_a_stored_matrix_with_an_activation_is_no_gemm(read: Read) -> None:
    """[3, 4] x [4, 8] sums over 4 elements."""
    f = OnnxFile()
    weight = f.weight("w", np.ones((3, 4), int), grid(0.5))
    f.gives(f.pair(f.op("MatMul", [weight, f.pair(f.given("x", [1, 4, 8]), grid(0.5))], "product"), grid(1.0)))
    (product,) = read(f).operators
    assert (product.kind, product.weight_axis, product.attributes["weight_operand"]) == ("MatMul", None, 0)
    assert (product.attributes["reduced_elements"], "out_channels" in product.attributes) == (4, False)


def test_the_constant_of_an_integer_addition_is_the_second_operand(read: Read) -> None:
    f = OnnxFile()
    for name, value, dtype in (("s", 0.5, "float32"), ("z", 0, "int8"), ("c", [1, 2, 3, 4], "int8")):
        f.stored(name, value, dtype)
    a = f.op("QuantizeLinear", [f.given("a", [1, 4]), "s", "z"], "qa")
    f.gives(f.op("QLinearAdd", [a, "s", "z", "c", "s", "z", "s", "z"], "add", domain="com.microsoft"))
    (add,) = read(f).operators
    assert (add.kind, add.attributes["weight_operand"]) == ("Add", 1)


def test_a_transposed_weight_keeps_its_codes_and_its_axis(read: Read) -> None:
    f = OnnxFile()
    codes = np.arange(32).reshape(4, 8)
    turned = f.op("Transpose", [f.weight("w", codes, grid([0.5] * 4))], "turned", perm=[1, 0])
    f.gives(f.pair(f.op("MatMul", [f.pair(f.given("x", [1, 8]), grid(0.5)), turned], "product"), grid(1.0)))
    (product,) = read(f).operators
    assert product.weight is not None and product.weight.encoding is not None
    assert np.array_equal(product.weight.codes, codes.T)  # type: ignore[arg-type]
    assert product.weight.encoding.axis == 1 == product.weight_axis


def test_a_weight_that_is_quantized_in_the_graph(read: Read) -> None:
    """0.74 / 0.5 = 1.48, 0.75 / 0.5 = 1.5 and 1.25 / 0.5 = 2.5: half to even gives 1, 2, 2; 99 saturates."""
    f = OnnxFile()
    reals = f.stored("w", [[0.74, 0.75], [1.25, 99.0]])
    weight = f.pair(reals, grid(0.5))
    f.gives(f.pair(f.op("Gemm", [f.pair(f.given("x", [1, 2]), grid(0.5)), weight], "gemm", transB=1), grid(1.0)))
    (gemm,) = read(f).operators
    assert gemm.weight is not None
    assert gemm.weight.codes.tolist() == [[1, 2], [2, 127]]  # type: ignore[union-attr]


def test_four_bit_weights(read: Read) -> None:
    codes = np.asarray([[-8, 7, 0, 1], [2, -3, 4, -5]])
    (gemm,) = read(gemm_file(w=grid([0.5, 0.25], 0, "int4"), codes=codes)).operators
    assert gemm.weight is not None and gemm.weight.encoding is not None
    assert np.array_equal(gemm.weight.codes, codes)  # type: ignore[arg-type]
    assert (gemm.weight.encoding.bits, gemm.weight.encoding.signed) == (4, True)


def test_a_value_that_is_quantized_twice_is_one_tensor(read: Read) -> None:
    """The second grid is that on which the reader reads it."""
    f = OnnxFile()
    again = f.pair(f.pair(f.given("x", [1, 4, 8, 8]), grid(0.5)), grid(0.25, 3))
    f.gives(f.pair(f.op("MaxPool", [again], "pool", kernel_shape=[2, 2]), grid(0.25, 3)))
    (pool,) = read(f).operators
    assert pool.inputs[0].tensor == "x"
    assert pool.inputs[0].encoding.words() == "int8, scale 0.25, zero point 3"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda f, x: f.op("Clip", [x, f.stored("low", np.float32(0)), f.stored("high", np.float32(6))], "y"),
         ("Clip", {"minimum": 0.0, "maximum": 6.0})),
        (lambda f, x: f.op("Clip", [x, f.stored("low", np.float32(0))], "y"), ("Relu", {"minimum": 0.0})),
        (lambda f, x: f.op("LeakyRelu", [x], "y", alpha=0.25), ("LeakyRelu", {"slope": 0.25})),
        (lambda f, x: f.op("ReduceMean", [x, f.stored("axes", [2, 3], "int64")], "y"),
         ("GlobalAveragePool", {"kernel": [8, 8], "reduced_elements": 64})),
        (lambda f, x: f.op("ReduceMean", [x, f.stored("axes", [1], "int64")], "y"),
         ("ReduceMean", {"axes": [1], "reduced_elements": 4})),
        (lambda f, x: f.op("AveragePool", [x], "y", kernel_shape=[2, 3]),
         ("AveragePool", {"kernel": [2, 3], "stride": [1, 1], "reduced_elements": 6})),
        (lambda f, x: f.op("Softmax", [x], "y", axis=-1), ("Softmax", {"axis": 3})),
        (lambda f, x: f.op("NoSuchThing", [x], "y"), ("Unknown", {})),
        (lambda f, x: f.op("Add", [x, f.stored("c", np.ones(4))], "y"), ("Add", {"weight_operand": 1})),
    ],
    ids=["clip", "clip at 0", "leaky", "mean", "mean over channels", "pool", "softmax", "unknown", "add"],
)  # fmt: skip
def test_kinds_and_facts(build: Any, expected: tuple[str, dict[str, Any]], read: Read) -> None:
    f = OnnxFile()
    f.gives(build(f, f.pair(f.given("x", [1, 4, 8, 8]), grid(0.5))))
    (operator,) = read(f).operators
    assert operator.kind == expected[0]
    assert {key: operator.attributes.get(key) for key in expected[1]} == expected[1]


def test_real_numbers_in_another_type_are_the_same_value(read: Read) -> None:
    """As models of float16 have them around what computes in float32; a Cast to integers is an operator."""
    f = OnnxFile()
    half = f.op("Cast", [f.given("x", [1, 4], TensorProto.FLOAT16)], "wide", to=TensorProto.FLOAT)
    y = f.op("Relu", [f.pair(half, grid(0.5))], "relu")
    f.gives(f.pair(f.op("Cast", [y], "narrow", to=TensorProto.FLOAT16), grid(0.25)))
    (relu,) = read(f).operators
    assert (relu.inputs[0].tensor, relu.output.tensor) == ("x", "relu")
    assert relu.inputs[0].encoding is not None and relu.output.encoding is not None
    assert (float(relu.inputs[0].encoding.scale), float(relu.output.encoding.scale)) == (0.5, 0.25)
    counted = OnnxFile()
    counted.gives(counted.op("Cast", [counted.pair(counted.given("x", [1]), grid(0.5))], "count", to=TensorProto.INT64))
    assert [one.type for one in read(counted).operators] == ["Cast"]


def test_a_mean_of_a_scalar_has_no_axes(read: Read) -> None:
    f = OnnxFile()
    f.gives(f.op("ReduceMean", [f.pair(f.given("x", []), grid(0.5)), f.stored("axes", [0], "int64")], "y"))
    (mean,) = read(f).operators
    assert (mean.kind, "axes" in mean.attributes) == ("ReduceMean", False)


def test_shape_arithmetic_is_no_operator(read: Read) -> None:
    f = OnnxFile()
    x = f.pair(f.given("x", ["batch", 4, 8, 8]), grid(0.5))
    shape = f.op("Concat", [f.op("Slice", [f.op("Shape", [x], "shape"), f.stored("a", [0], "int64"),
                                           f.stored("b", [1], "int64")], "first"), f.stored("rest", [-1], "int64")],
                 "new", axis=0)  # fmt: skip
    f.gives(f.op("Reshape", [x, shape], "reshape"))
    assert [one.kind for one in read(f).operators] == ["Reshape"]


def integer_conv() -> OnnxFile:
    f = OnnxFile()
    names = {}
    for name, value, dtype in (
        ("xs", 0.5, "float32"), ("xz", 3, "uint8"), ("ws", [0.25] * 4, "float32"), ("wz", [0] * 4, "int8"),
        ("ys", 1.0, "float32"), ("yz", 128, "uint8"), ("b", [1, 2, 3, 4], "int32"), ("w", CODES, "int8"),
    ):  # fmt: skip
        names[name] = f.stored(name, value, dtype)
    x = f.op("QuantizeLinear", [f.given("x", [1, 3, 8, 8]), "xs", "xz"], "codes")
    y = f.op("QLinearConv", [x, "xs", "xz", "w", "ws", "wz", "ys", "yz", "b"], "conv")
    y = f.op("MaxPool", [y], "pool", kernel_shape=[2, 2])
    f.gives(f.op("DequantizeLinear", [y, "ys", "yz"], "out"))
    return f


def test_an_integer_convolution_is_what_it_computes(read: Read) -> None:
    artefact = read(integer_conv())
    conv, pool = artefact.operators
    assert artefact.form == "ONNX QOperator"
    assert (conv.kind, conv.type, conv.is_integer, pool.kind) == ("Conv", "QLinearConv", True, "MaxPool")
    assert conv.inputs[0].encoding.words() == "uint8, scale 0.5, zero point 3"  # type: ignore[union-attr]
    assert conv.output.encoding.words() == "uint8, scale 1, zero point 128"  # type: ignore[union-attr]
    assert pool.output.encoding is not None and pool.output.encoding.same_grid(conv.output.encoding)  # type: ignore[arg-type]
    assert conv.bias is not None and conv.bias.encoding is not None
    assert conv.bias.encoding.scale.tolist() == [0.125] * 4  # 0.5 * 0.25
    assert conv.bias.codes.tolist() == [1, 2, 3, 4]  # type: ignore[union-attr]


def test_other_integer_operators(read: Read) -> None:
    f = OnnxFile()
    for name, value, dtype in (("s", 0.5, "float32"), ("z", 0, "int8"), ("t", 0.25, "float32")):
        f.stored(name, value, dtype)
    a = f.op("QuantizeLinear", [f.given("a", [1, 4]), "s", "z"], "qa")
    b = f.op("QuantizeLinear", [f.given("b", [1, 4]), "t", "z"], "qb")
    total = f.op("QLinearAdd", [a, "s", "z", b, "t", "z", "s", "z"], "add", domain="com.microsoft")
    joined = f.op("QLinearConcat", ["s", "z", total, "s", "z", b, "t", "z"], "concat", domain="com.microsoft", axis=1)
    f.gives(f.op("DequantizeLinear", [joined, "s", "z"], "out"))
    add, concat = read(f).operators
    assert (add.kind, [float(use.encoding.scale) for use in add.inputs]) == ("Add", [0.5, 0.25])  # type: ignore[union-attr]
    assert (concat.kind, [use.tensor for use in concat.inputs]) == ("Concat", ["add", "b"])


def test_scales_computed_at_run_time_are_dynamic(read: Read) -> None:
    f = OnnxFile()
    f.nodes.append(onnx.helper.make_node("DynamicQuantizeLinear", [f.given("x", [1, 8])], ["q", "s", "z"]))
    f.stored("w", np.ones((8, 4)), "int8")
    f.gives(f.op("MatMulInteger", ["q", "w", "z"], "product"))
    (product,) = read(f).operators
    assert (product.kind, product.inputs[0].encoding.is_dynamic) == ("Gemm", True)  # type: ignore[union-attr]


def external(folder: Path, location: str, **more: str) -> Path:
    file = conv_file()
    tensor = next(t for t in file.tensors if t.name == "w")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=value)
    return file.write(folder)


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 16 + CODES.astype(np.int8).tobytes())
    path = external(tmp_path, "weights.bin", offset="16", length="108")
    (conv,) = OnnxReader().read(path, None).operators
    assert conv.weight is not None and np.array_equal(conv.weight.codes, CODES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("location", "more", "words"),
    [
        ("../weights.bin", {}, "lies outside the model's folder"),
        ("/etc/passwd", {}, "must be a path relative to the model's folder"),
        ("link.bin", {}, "lies outside the model's folder"),
        ("nowhere.bin", {}, "is missing"),
        ("weights.bin", {"offset": "-4"}, "ends before"),
        ("weights.bin", {"length": "99999999999"}, "ends before"),
        ("weights.bin", {"offset": "x"}, "cannot be read"),
        ("weights.bin", {"length": "7"}, "needs more data than is stored"),
        ("", {}, "must be a path relative"),
    ],
)
def test_external_data_that_is_not_there_or_not_for_us(
    location: str, more: dict[str, str], words: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    for place in (tmp_path, folder):
        (place / "weights.bin").write_bytes(CODES.astype(np.int8).tobytes())
    (folder / "link.bin").symlink_to(tmp_path / "weights.bin")
    assert words in refusal(external(folder, location, **more))


def test_wrong_scales_and_shapes_are_one_line(tmp_path: Path) -> None:
    assert "a scale must be a finite number; got nan" in refusal(conv_file(x=grid(np.nan)).write(tmp_path))
    assert "a scale must be a finite number; got inf" in refusal(conv_file(w=grid([1, np.inf, 1, 1])).write(tmp_path))
    wrong = conv_file(w=grid([0.5] * 3), bias=None).write(tmp_path)
    assert "needs 4 scales, one for each index of axis 0; got [3]" in refusal(wrong)
    huge = conv_file(w=grid(0.5), bias=None)
    next(t for t in huge.tensors if t.name == "w").dims[:] = [2**40, 2**20, 2, 2]
    assert "is none that a stored tensor can have" in refusal(huge.write(tmp_path))
    large = conv_file(w=grid(0.5), bias=None)
    next(t for t in large.tensors if t.name == "w").dims[:] = [2**20, 3, 3, 3]
    assert "needs more data than is stored" in refusal(large.write(tmp_path))
    text = conv_file()
    tensor = next(t for t in text.tensors if t.name == "x/q/scale")
    tensor.data_type = TensorProto.STRING
    assert "holds no weights or scales" in refusal(text.write(tmp_path))


def test_scales_and_codes_that_are_of_no_use(tmp_path: Path) -> None:
    def with_tensor(name: str, change: Callable[[TensorProto], None], **parts: Any) -> str:
        file = conv_file(**parts)
        change(next(t for t in file.tensors if t.name == name))
        return refusal(file.write(tmp_path))

    def retyped(value: Any, dtype: Any) -> Callable[[TensorProto], None]:
        return lambda tensor: tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(value, dtype), tensor.name))

    assert "x/q/zero: a zero point must be an integer; got float32" in with_tensor("x/q/zero", retyped(0, np.float32))
    assert "has 1 scales and 2 zero points" in with_tensor("x/q/zero", retyped([0, 0], np.int8))
    floats = with_tensor("w", retyped(CODES, np.float32), bias=None)
    assert "w: codes must be integers; got float. Export" in floats
    none = with_tensor("x/q/scale", retyped([], np.float32))
    assert "a scale must be a finite number; got none" in none
    outside = conv_file(w=grid([0.5] * 4, axis=7), bias=None)
    assert "axis must lie within 4 axes; got 7" in refusal(outside.write(tmp_path))


def test_a_scale_of_small_floats_that_is_no_number(tmp_path: Path) -> None:
    f = OnnxFile()
    x = f.given("x", [1, 8])
    f.stored("s", np.nan)
    f.tensors.append(onnx.helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    codes = f.op("QuantizeLinear", [x, "s", "z"], "codes")
    f.gives(f.op("Relu", [f.op("DequantizeLinear", [codes, "s", "z"], "back")], "relu"))
    assert "s: a scale must be a finite number; got nan. Quantize" in refusal(f.write(tmp_path))


def test_codes_that_a_node_computes(tmp_path: Path) -> None:
    """A sum of constants is folded by no reader: its codes are in no file."""
    f = OnnxFile()
    summed = f.op("Add", [f.stored("a", [[1]], "int8"), f.stored("b", [[2]], "int8")], "summed")
    weight = f.op("DequantizeLinear", [summed, f.stored("s", 0.5)], "weight")
    f.gives(f.op("MatMul", [f.pair(f.given("x", [1, 1]), grid(0.5)), weight], "product"))
    assert "summed: must be stored in the file; it is computed. Fold it first." in refusal(f.write(tmp_path))


def test_a_constant_that_a_batch_spreads_is_quantized_behind(read: Read) -> None:
    """A class token for each sample: its values are in the file, the number of samples is not."""
    f = OnnxFile()
    x = f.pair(f.given("x", ["batch", 4, 8]), grid(0.5))
    sizes = f.op("Concat", [f.op("Shape", ["x"], "size", end=1), f.stored("rest", [1, 8], "int64")], "sizes", axis=0)
    token = f.pair(f.op("Expand", [f.stored("cls", np.ones((1, 1, 8))), sizes], "token"), grid(0.5))
    f.gives(f.pair(f.op("Concat", [token, x], "joined", axis=1), grid(0.5)))
    (concat,) = read(f).operators
    assert [use.encoding.words() for use in concat.inputs] == ["int8, scale 0.5, zero point 0"] * 2  # type: ignore[union-attr]


def test_an_integer_operator_reads_codes_that_are_computed_of_a_constant(read: Read) -> None:
    """As onnxruntime's quantize_static writes numbers that a model multiplies with."""
    f = OnnxFile()
    x, out = f.op("QuantizeLinear", [f.given("x", [1, 4]), *f._parameters("x/q", grid(0.5))], "x/codes"), grid(0.25)
    names = f._parameters("half/q", grid(0.125))
    half = f.op("QuantizeLinear", [f.stored("half", 0.5), *names], "half/codes")
    operands = [x, "x/q/scale", "x/q/zero", half, *names, *f._parameters("y", out)]
    y = f.op("QLinearMul", operands, "y/codes", domain="com.microsoft")
    f.gives(f.op("DequantizeLinear", [y, "y/scale", "y/zero"], "y/dq"))
    (product,) = read(f).operators
    assert product.weight is not None and product.weight.codes is not None and product.weight.codes.tolist() == 4
    assert product.weight.encoding is not None and product.weight.encoding.words() == "int8, scale 0.125, zero point 0"


def test_rows_of_a_stored_table_keep_their_codes(read: Read) -> None:
    """Positions 0 .. n-1, as torch writes them where constants are not folded."""
    f = OnnxFile()
    x = f.pair(f.given("x", ["batch", 2, 3]), grid(0.5))
    rows = f.op(
        "Gather", [f.stored("table", np.arange(12).reshape(4, 3), "int8"), f.stored("ids", [2, 0], "int64")], "rows"
    )
    positions = f.op("DequantizeLinear", [rows, *f._parameters("table/q", grid(0.25))], "positions")
    f.gives(f.pair(f.op("Add", [x, positions], "added"), grid(0.5)))
    (add,) = read(f).operators
    assert add.weight is not None and add.weight.codes is not None
    assert add.weight.codes.tolist() == [[6, 7, 8], [0, 1, 2]]


def test_rows_that_the_length_of_the_input_decides_keep_their_grid(read: Read) -> None:
    f = OnnxFile()
    x = f.pair(f.given("x", ["batch", "length", 3]), grid(0.5))
    length = f.op("Shape", ["x"], "length", start=1, end=2)
    ids = f.op("Slice", [f.stored("ids", [0, 1, 2], "int64"), f.stored("from", [0], "int64"), length], "some")
    rows = f.op("Gather", [f.stored("table", np.arange(12).reshape(4, 3), "int8"), ids], "rows")
    positions = f.op("DequantizeLinear", [rows, *f._parameters("table/q", grid(0.25))], "positions")
    f.gives(f.pair(f.op("Add", [x, positions], "added"), grid(0.5)))
    (add,) = read(f).operators
    assert add.weight is not None and (add.weight.codes, add.weight.shape) == (None, None)
    assert add.weight.encoding is not None and add.weight.encoding.words() == "int8, scale 0.25, zero point 0"


def test_a_name_that_is_no_text(tmp_path: Path) -> None:
    path = conv_file().write(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"x/q/scale", b"x/q/sc\xff\xfee"))
    assert "is damaged: a name in it is no Unicode text" in refusal(path)


def test_a_tensor_that_numpy_cannot_make(tmp_path: Path) -> None:
    file = conv_file(w=grid(0.5), bias=None)
    tensor = next(t for t in file.tensors if t.name == "w")
    tensor.raw_data += b"\0"
    assert "w: cannot be read as a tensor" in refusal(file.write(tmp_path))


def test_a_file_beyond_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = conv_file().write(tmp_path)
    monkeypatch.setattr("qhw_plugins.onnx_stored.MAX_BYTES", 100)
    assert "must be at most 100 bytes. Store its weights in files of their own." in refusal(path)


def test_no_model_belongs_to_a_model(tmp_path: Path) -> None:
    path = conv_file().write(tmp_path)
    with pytest.raises(ArtefactError, match="is a model already, and --model goes with encodings"):
        OnnxReader().read(path, path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\xff" * 100)
    assert refusal(path).endswith("is no ONNX model: its bytes do not parse. Export it again.")
    path.write_bytes(b"")
    assert "must hold an ONNX graph" in refusal(path)
    assert "cannot be read: No such file" in refusal(tmp_path / "none.onnx")
    assert "got a folder or a device" in refusal(tmp_path)
    whole = conv_file().write(tmp_path)
    whole.write_bytes(whole.read_bytes()[:-40])
    assert "do not parse" in refusal(whole)


@pytest.mark.parametrize(
    ("name", "head", "expected"),
    [("a.onnx", b"", True), ("a.bin", b"\x08\x0a\x12\x03qhw", True), ("a.bin", b"{}", False), ("a.tflite", b"", False)],
)
def test_it_recognizes_its_own(name: str, head: bytes, expected: bool) -> None:
    assert OnnxReader().recognizes(Path(name), head) is expected
