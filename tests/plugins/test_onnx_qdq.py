# SPDX-License-Identifier: Apache-2.0
"""What the exporter writes: types, opsets, names, bytes; what `check` refuses; random layers against the simulation."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import ExportError
from qhw.graph import capture
from qhw.schema.system import Artefact
from qhw.testing import MODELS, calibration_for, example
from qhw_plugins.onnx_qdq import OnnxQdq, OnnxQdqOptions
from qhw_plugins.onnxruntime_executor import OnnxRuntime, optimized_operators
from tests.integer_support import Function
from tests.machine import has_vnni, onnxruntime_here
from tests.plugins import onnx_support as support

CPU = onnxruntime_here()
IMAGES = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
TOKENS = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(4))


def stored(path: Path) -> dict[str, np.ndarray]:
    """Initializers by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def types(path: Path) -> dict[str, int]:
    return {tensor.name: tensor.data_type for tensor in onnx.load(path).graph.initializer}


def opset(path: Path) -> int:
    return int(onnx.load(path).opset_import[0].version)


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def run(path: Path, result: QuantizedModel, values: Any) -> list[np.ndarray]:
    return OnnxRuntime().load(path)(support.as_inputs(result, values))


def small_conv() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU())


# What is written.


def test_weights_are_integers_and_biases_int32_at_input_scale_times_weight_scale(tmp_path: Path) -> None:
    model = small_conv()
    # No bias correction: what is written is what the model came with.
    result = support.quantized(model, IMAGES, CPU, pipeline="ranges-ptq")
    tensors = stored(support.exported(result, tmp_path))
    encodings = result.encodings()
    weight, source = encodings["0.weight"], encodings["input"]
    assert tensors["0.weight/codes"].dtype == np.int8 and tensors["0.weight/codes"].shape == (6, 4, 3, 3)
    assert not any(tensor.dtype == np.float32 and tensor.size > 6 for tensor in tensors.values())
    # An int8 code is round_half_even(w / scale) in [-127, 127], one scale per output channel.
    float_weight = model[0].weight.detach().numpy()  # type: ignore[index,union-attr,operator]
    scale = weight.scale.numpy().reshape(6, 1, 1, 1)
    np.testing.assert_array_equal(tensors["0.weight/codes"], np.clip(np.rint(float_weight / scale), -127, 127))
    bias = tensors["0.bias/codes"]
    assert bias.dtype == np.int32
    float_bias = model[0].bias.detach().numpy()  # type: ignore[index,union-attr,operator]
    step = source.scale.double().numpy() * weight.scale.double().numpy()
    # float32 product of the scales against float64: within a code of some thousands.
    np.testing.assert_allclose(bias, float_bias / step, atol=1)
    np.testing.assert_allclose(tensors["0.bias/scale"], step, rtol=1e-6)


def test_a_bias_that_the_target_leaves_open_is_int32_and_said_so(tmp_path: Path) -> None:
    result = support.quantized(small_conv(), IMAGES, support.target(tmp_path))
    path = support.exported(result, tmp_path)
    assert types(path)["0.bias/codes"] == TensorProto.INT32
    facts = {item.key: item.value for item in onnx.load(path).metadata_props}
    assert facts == {
        "qhw.target": "acme/onnx",
        "qhw.decided": "0: the bias is int32 at scale input*weight; the target does not say how it is held",
    }


def test_a_relu_that_saturation_does_is_left_out_and_the_layer_fuses(tmp_path: Path) -> None:
    path = support.exported(support.quantized(small_conv(), IMAGES, CPU), tmp_path)
    assert operators(path) == {"DequantizeLinear": 4, "QuantizeLinear": 2, "Conv": 1}
    assert optimized_operators(path, tmp_path)["QLinearConv"] == 1


@pytest.mark.parametrize(
    ("formats", "expected"),
    [
        ("u8 activations, weights per axis", 13),
        ("s8 activations", 13),
        ("7-bit activations", 13),
        ("4-bit activations", 13),  # in uint8, with a Clip
        ("int4 weights", 21),
        ("int16 activations", 21),
        ("uint16 activations", 21),
        ("power of two", 13),
    ],
)
def test_the_opset_is_the_lowest_that_holds_the_formats(formats: str, expected: int, tmp_path: Path) -> None:
    spec = support.target(tmp_path, *support.FORMATS[formats])
    result = support.quantized(small_conv(), IMAGES, spec)
    path = support.exported(result, tmp_path)
    assert opset(path) == expected
    # Without VNNI onnxruntime adds pairs of products of uint8 and int8 in 16 bits, which this target does not say.
    if has_vnni() or formats != "u8 activations, weights per axis":
        support.assert_within_one_code(result, run(path, result, IMAGES), support.simulated(result, IMAGES))


def test_weights_per_group_need_opset_21(tmp_path: Path) -> None:
    spec = support.target(tmp_path, *support.FORMATS["weights per group"])
    result = support.quantized(nn.Linear(8, 6), TOKENS, spec)
    path = support.exported(result, tmp_path)
    assert opset(path) == 21 and types(path)["weight/codes"] == TensorProto.INT4
    blocks = [a.i for n in onnx.load(path).graph.node for a in n.attribute if a.name == "block_size"]
    assert blocks == [4]
    support.assert_within_one_code(result, run(path, result, TOKENS), support.simulated(result, TOKENS))


def test_int4_codes_go_into_int8_when_asked(tmp_path: Path) -> None:
    spec = support.target(tmp_path, *support.FORMATS["int4 weights"])
    result = support.quantized(small_conv(), IMAGES, spec)
    narrow = support.exported(result, tmp_path)
    assert types(narrow)["0.weight/codes"] == TensorProto.INT4
    codes = stored(narrow)["0.weight/codes"].astype(np.int64)
    wide = support.exported(result, tmp_path, int4=False)
    assert opset(wide) == 13 and types(wide)["0.weight/codes"] == TensorProto.INT8
    np.testing.assert_array_equal(stored(wide)["0.weight/codes"], codes)


@pytest.mark.parametrize("wanted", [13, 17, 18, 21, 23], ids=lambda opset: f"opset {opset}")
def test_an_opset_that_holds_the_model_is_written_when_asked(wanted: int, tmp_path: Path) -> None:
    result = support.quantized(nn.Sequential(nn.Conv2d(4, 6, 3), nn.AvgPool2d(2)), IMAGES, CPU)
    path = support.exported(result, tmp_path, opset=wanted)
    assert opset(path) == wanted
    support.assert_within_one_code(result, run(path, result, IMAGES), support.simulated(result, IMAGES))


def test_no_opset_below_the_target_s_is_written(tmp_path: Path) -> None:
    spec = support.target(tmp_path, *support.FORMATS["s8 activations"])
    assert opset(support.exported(support.quantized(small_conv(), IMAGES, spec), tmp_path)) == 13
    later = spec.model_copy(update={"artefact": Artefact(opset_min=17)})
    result = support.quantized(small_conv(), IMAGES, later)
    assert opset(support.exported(result, tmp_path)) == 17
    with pytest.raises(ExportError, match=r"'acme/onnx' takes opset 17 or later \(artefact.opset_min\); got 13\."):
        support.exported(result, tmp_path, opset=13)


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (
            "int4 weights",
            r"exporter 'onnx_qdq': int4 needs opset 21 or later; got 13\. "
            r"Raise opset= or store 4-bit codes in 8 bits with int4=False\.",
        ),
        ("int16 activations", r"exporter 'onnx_qdq': int16 needs opset 21 or later; got 13\. Raise opset=\."),
    ],
)
def test_an_opset_too_low_is_refused(formats: str, message: str, tmp_path: Path) -> None:
    result = support.quantized(small_conv(), IMAGES, support.target(tmp_path, *support.FORMATS[formats]))
    with pytest.raises(ExportError, match=f"^{message}$"):
        support.exported(result, tmp_path, opset=13)


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(4, 3, 1)
        self.right = nn.Conv2d(4, 3, 1)

    def forward(self, picture: Tensor, mask: Tensor) -> dict[str, Tensor]:
        return {"sum": self.left(picture) + self.right(mask), "mask": self.right(mask), "same": picture}


def test_inputs_and_outputs_keep_their_names(tmp_path: Path) -> None:
    result = support.quantized(_Named(), (IMAGES, IMAGES + 1), CPU)
    path = support.exported(result, tmp_path)
    graph = onnx.load(path).graph
    assert [value.name for value in graph.input] == ["picture", "mask"]
    assert [value.name for value in graph.output] == ["sum", "mask_2", "same"]
    support.assert_within_one_code(
        result, run(path, result, (IMAGES, IMAGES + 1)), support.simulated(result, (IMAGES, IMAGES + 1))
    )


def test_the_batch_is_an_axis_by_name_or_a_number(tmp_path: Path) -> None:
    result = support.quantized(small_conv(), IMAGES, CPU)

    def first_axes(path: Path) -> list[str | int]:
        graph = onnx.load(path).graph
        return [v.type.tensor_type.shape.dim[0].dim_param or v.type.tensor_type.shape.dim[0].dim_value
                for v in (*graph.input, *graph.output)]  # fmt: skip

    assert first_axes(support.exported(result, tmp_path)) == ["batch", "batch"]
    assert first_axes(support.exported(result, tmp_path, batch=3)) == [3, 3]


@pytest.mark.parametrize("name", MODELS)
def test_tiny_models_pass_the_checker_and_give_the_same_bytes_twice(name: str, tmp_path: Path) -> None:
    model, given = example(name)
    result = support.quantized(model, given, CPU, calibration_for(given))
    path = support.exported(result, tmp_path)
    onnx.checker.check_model(path, full_check=True)
    before = path.read_bytes()
    assert support.exported(result, tmp_path).read_bytes() == before


def test_exporting_in_training_mode_leaves_the_statistics_alone(tmp_path: Path) -> None:
    class Kept(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.conv(x)
            return self.norm(y), y

    result = support.quantized(Kept(), IMAGES, CPU).train()
    before = {name: tensor.clone() for name, tensor in result.state_dict().items()}
    support.exported(result, tmp_path)
    after = result.state_dict()
    assert any("running_mean" in name for name in after) and result.training
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


# Between two grids.


def test_two_grids_in_a_row_round_twice(tmp_path: Path) -> None:
    """A ReLU alone has a grid of its own; onnxruntime would merge the pairs before and behind it into one."""
    result = support.quantized(nn.ReLU(), IMAGES, "google/litert-int8")
    path = support.exported(result, tmp_path)
    assert operators(path)["Clip"] == 1
    assert optimized_operators(path, tmp_path)["QuantizeLinear"] == 2
    np.testing.assert_array_equal(run(path, result, IMAGES)[0], support.simulated(result, IMAGES)[0])


class _Middle(nn.Module):
    def __init__(self, middle: nn.Module) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(4, 4, 1), middle, nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.middle(self.first(x)))
        return y


@pytest.mark.parametrize(
    ("kind", "middle"),
    [
        ("ConvTranspose", lambda: nn.ConvTranspose2d(4, 4, 3, padding=1)),
        ("Conv", lambda: nn.Conv2d(4, 4, 3, padding=1)),
    ],
    ids=["an operator the target lacks", "a layer kept in float"],
)
def test_float_weights_between_quantized_tensors_stay_float(kind: str, middle: Any, tmp_path: Path) -> None:
    """onnxruntime would quantize them to int8."""
    torch.manual_seed(0)
    result = support.quantized(_Middle(middle()), IMAGES, CPU, keep_float=["middle"])
    path = support.exported(result, tmp_path)
    operators_run = optimized_operators(path, tmp_path)
    assert operators_run[kind] == 1 and operators_run["DequantizeLinear"] == 2  # of activations, none of weights
    found, expected = run(path, result, IMAGES), support.simulated(result, IMAGES)
    # A code of the middle layer that differs moves the last one by its weight, below one code of that, too.
    support.assert_within_one_code(result, found, expected)


@pytest.mark.parametrize("values", [IMAGES, IMAGES[:, :, 0]], ids=["convolution", "linear layer"])
def test_a_bias_past_32_bits_is_added_in_float(values: Tensor, tmp_path: Path) -> None:
    """A dead channel has tiny weights, hence a tiny scale; onnxruntime would let its bias overflow."""
    layer = nn.Conv2d(4, 3, 1) if values.dim() == 4 else nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight[1] = 1e-9  # type: ignore[union-attr,index]
        layer.bias[1] = 3.0  # type: ignore[union-attr,index]
    result = support.quantized(layer, values, support.target(tmp_path))
    path = support.exported(result, tmp_path)
    decided = {item.key: item.value for item in onnx.load(path).metadata_props}["qhw.decided"]
    assert "the bias stays float32: it needs more than 32 bits at scale input*weight" in decided
    support.assert_within_one_code(result, run(path, result, values), support.simulated(result, values))


# Operators that only torch's exporter knows, and layers in float.


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.LSTM(8, 6, batch_first=True), id="LSTM"),
        pytest.param(lambda: nn.LSTM(8, 6, 2, batch_first=True, bidirectional=True), id="LSTM, two layers, both ways"),
        pytest.param(lambda: nn.GRU(8, 6, batch_first=True, bias=False), id="GRU without biases"),
        pytest.param(lambda: nn.GRU(8, 6, 3, batch_first=True, bidirectional=True), id="GRU, three layers, both ways"),
        pytest.param(lambda: nn.RNN(8, 6, batch_first=True), id="RNN"),
        pytest.param(
            lambda: nn.RNN(8, 6, nonlinearity="relu", batch_first=True, bidirectional=True), id="RNN with a ReLU"
        ),
    ],
)
@pytest.mark.slow
def test_recurrent_layers_run_in_float(make: Any, tmp_path: Path) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = make()
            self.head = nn.Linear(6 * (2 if self.recurrent.bidirectional else 1), 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Any]:
            steps, states = self.recurrent(x)
            return self.head(steps), states

    torch.manual_seed(0)
    result = support.quantized(Recurrent(), TOKENS, CPU)
    path = support.exported(result, tmp_path)
    onnx_kind = type(make()).__name__
    assert operators(path)[onnx_kind] == make().num_layers
    for values in (TOKENS, TOKENS[:1], torch.cat([TOKENS, -TOKENS, TOKENS / 2])):
        support.assert_within_one_code(result, run(path, result, values), support.simulated(result, values))


def test_states_that_are_inputs_are_used(tmp_path: Path) -> None:
    class Continued(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.recurrent = nn.LSTM(8, 6, num_layers=2)

        def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
            steps: Tensor = self.recurrent(x, (h, c))[0]
            return steps

    torch.manual_seed(0)
    values = (torch.randn(5, 2, 8), torch.randn(2, 2, 6), torch.randn(2, 2, 6))
    graph = capture(Continued().eval(), values, dynamic_batch=False)  # axis 0 counts steps
    result = qhw.quantize(graph, CPU, calibration=[values])
    path = support.exported(result, tmp_path)
    support.assert_within_one_code(result, run(path, result, values), support.simulated(result, values))


def test_a_batch_norm_without_statistics_takes_those_of_the_batch(tmp_path: Path) -> None:
    class Unseen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(self.conv(x), None, None, training=True)

    result = support.quantized(Unseen(), IMAGES, CPU)
    path = support.exported(result, tmp_path)
    assert OnnxQdq().check(result) == () and operators(path)["ReduceMean"] == 2
    support.assert_within_one_code(result, run(path, result, IMAGES), support.simulated(result, IMAGES))


def test_an_operator_of_no_table_is_translated_by_torch(tmp_path: Path) -> None:
    class Island(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.conv(x), 1)

    result = support.quantized(Island(), IMAGES, CPU)
    path = support.exported(result, tmp_path)
    assert opset(path) == 18 and operators(path)["CumSum"] == 1
    support.assert_within_one_code(result, run(path, result, IMAGES[:1]), support.simulated(result, IMAGES[:1]))


def test_an_operator_that_torch_cannot_translate_is_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(4, 3, 1), nn.AdaptiveMaxPool2d(3))
    result = support.quantized(model, IMAGES, CPU)
    message = (
        r"^exporter 'onnx_qdq': 1: operator 'aten\.adaptive_max_pool2d\.default' has no ONNX form: [^\n]+\. "
        r"Replace it in the model, or choose another exporter\.$"
    )
    with pytest.raises(ExportError, match=message):
        support.exported(result, tmp_path)


# What check refuses.


def test_check_refuses_a_bfloat16_tensor(tmp_path: Path) -> None:
    model = nn.Sequential(small_conv(), Function(lambda x: x.bfloat16().cumsum(1).float()))
    result = support.quantized(model.eval(), IMAGES, CPU)
    message = r"bfloat16 has no ONNX form here; compute in float32 there, then quantize again"
    (problem,) = OnnxQdq().check(result)
    assert problem.endswith(message)
    with pytest.raises(ExportError, match=rf"^exporter 'onnx_qdq': [^\n]+{message}"):
        qhw.export(result, tmp_path / "out")


def test_check_refuses_quantizers_that_are_off() -> None:
    result = support.quantized(small_conv(), IMAGES, CPU)
    result.set_enabled(False, ["input"])
    assert OnnxQdq().check(result) == ("input: its quantizer is switched off; call set_enabled(True) first",)


def test_check_refuses_another_rounding() -> None:
    result = support.quantized(small_conv(), IMAGES, CPU)
    result.quantizer("input").rounding = "half_away_from_zero"
    assert OnnxQdq().check(result) == ("input: rounds half_away_from_zero; QuantizeLinear rounds half_even",)


def test_check_refuses_codes_that_no_type_holds(tmp_path: Path) -> None:
    wide = '{ bits = 20, signed = true, zero_point = 0, per = "tensor" }'
    result = support.quantized(small_conv(), IMAGES, support.target(tmp_path, activation=wide))
    problems = OnnxQdq().check(result)
    assert "input: 20 bits have no ONNX type; use 16 bits or fewer" in problems
    with pytest.raises(ExportError, match=r"^exporter 'onnx_qdq': input: no ONNX type holds codes \[-524288, 524287\]"):
        support.exported(result, tmp_path)


@pytest.mark.parametrize(
    "weight",
    [
        pytest.param('{ bits = 20, signed = true, zero_point = "free", per = "tensor" }', id="20 bits, asymmetric"),
        pytest.param('{ bits = 40, signed = true, zero_point = 0, per = "tensor" }', id="40 bits"),
    ],
)
def test_check_refuses_weights_that_no_type_holds(weight: str, tmp_path: Path) -> None:
    result = support.quantized(small_conv(), IMAGES, support.target(tmp_path, weight=weight))
    (problem,) = OnnxQdq().check(result)
    bits = weight.split()[3].rstrip(",")
    assert problem == f"0.weight: {bits} bits have no ONNX type; use 16 bits, or 32 with zero point 0, or fewer"


def test_weights_of_20_symmetric_bits_go_into_int32(tmp_path: Path) -> None:
    weight = '{ bits = 20, signed = true, zero_point = 0, per = "tensor" }'
    result = support.quantized(small_conv(), IMAGES, support.target(tmp_path, weight=weight))
    path = support.exported(result, tmp_path)
    assert types(path)["0.weight/codes"] == TensorProto.INT32
    support.assert_within_one_code(result, run(path, result, IMAGES), support.simulated(result, IMAGES))


def test_check_refuses_an_activation_with_several_scales(tmp_path: Path) -> None:
    result = support.quantized(small_conv(), IMAGES, CPU)
    quantizer = result.quantizer("input")
    weight = result.quantizer("0.weight")
    assert weight.qparams.granularity != quantizer.qparams.granularity
    quantizer.granularity = weight.qparams.granularity
    quantizer.scale = torch.full((4,), float(quantizer.scale))
    quantizer.zero_point = torch.zeros(4, dtype=torch.int32)
    (problem,) = OnnxQdq().check(result)
    assert problem == "input: PerAxis(axis=0); an activation needs one scale per tensor"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 12}, r"^exporter 'onnx_qdq': option opset: [^\n]*13[^\n]*Known: opset, batch, int4\.$"),
        ({"opset": 24}, r"^exporter 'onnx_qdq': option opset: [^\n]*23[^\n]*Known: opset, batch, int4\.$"),
        ({"level": 1}, r"^exporter 'onnx_qdq': option level: [^\n]*Known: opset, batch, int4\.$"),
    ],
    ids=["opset too low", "opset too high", "unknown option"],
)
def test_options_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    result = support.quantized(small_conv(), IMAGES, CPU)
    with pytest.raises(ExportError, match=message):
        qhw.export(result, tmp_path / "out", **options)


def test_the_shipped_exporter_has_no_options_by_default() -> None:
    assert OnnxQdq().options == OnnxQdqOptions(opset=None, batch="dynamic", int4=True)


# Random layers: the artefact and the simulation differ by at most one code.


def agrees(model: nn.Module, x: Tensor, folder: Path) -> None:
    result = support.quantized(model, x, CPU)
    path = support.exported(result, folder)
    support.assert_within_one_code(result, run(path, result, x[:1]), support.simulated(result, x[:1]))


sizes = st.integers(1, 3)


@settings(max_examples=10, deadline=None)
@given(
    kernel=st.tuples(sizes, sizes),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    groups=st.sampled_from([1, 2, 4]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_convolution_agrees(
    tmp_path_factory: pytest.TempPathFactory,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    bias: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    conv = nn.Conv2d(4, 8, kernel, stride, padding, dilation, groups, bias)
    agrees(conv, torch.randn(2, 4, 9, 8), tmp_path_factory.mktemp("conv"))


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(["average", "maximum"]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(sizes, sizes),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    dilation=st.integers(1, 3),
    ceil_mode=st.booleans(),
    count_include_pad=st.booleans(),
    divisor=st.one_of(st.none(), st.integers(1, 9)),
    seed=st.integers(0, 99),
)
def test_any_pooling_agrees(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: int,
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
    seed: int,
) -> None:
    assume(all(2 * pad <= k for pad, k in zip(padding, kernel, strict=True)))  # torch allows no more
    pool: nn.Module = (
        nn.AvgPool2d(kernel, stride, padding, ceil_mode, count_include_pad, divisor)
        if kind == "average"
        else nn.MaxPool2d(kernel, stride, padding, dilation, ceil_mode=ceil_mode)
    )
    torch.manual_seed(seed)
    x = torch.randn(2, 4, 11, 10)
    assume(bool(torch.isfinite(pool(x)).all()))  # a dilated window of ceil mode may hold nothing but padding
    agrees(pool, x, tmp_path_factory.mktemp("pool"))
