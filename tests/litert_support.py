# SPDX-License-Identifier: Apache-2.0
"""LiteRT's own int8 kernels, one operator at a time: builds a model of one operator and runs it.

    from tests.litert_support import Codes, Encoding, conv_2d

    y_q = conv_2d(Codes(x_q, 0.02, -3), Codes(w_q, w_scales), bias_q, Encoding(0.05, 4), stride=2, padding="SAME")

Tensors are LiteRT's: images [batch, height, width, channels], weights [out, height, width, in], depthwise weights
[1, height, width, channels]. Everything is int8 but biases, which are int32 in units of input scale * weight scale.

The kernels are the portable reference ones (OpResolverType.BUILTIN_REF), without delegates; `optimized=True` takes the
optimized ones instead. Import this module only where ai-edge-litert is installed: tests start with
`pytest.importorskip("ai_edge_litert")`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import ArrayLike, NDArray

from tests.litert_writer import Encoding, Writer

Padding = Literal["SAME", "VALID"]
Activation = Literal["NONE", "RELU", "RELU6", "RELU_N1_TO_1"]
Int8 = NDArray[np.int8]


@dataclass(frozen=True)
class Codes:
    """A quantized tensor: int8 codes (or int32, of a bias) and where they lie, as in Encoding."""

    codes: ArrayLike
    scale: ArrayLike
    zero_point: int = 0
    axis: int = 0

    @property
    def array(self) -> NDArray[Any]:
        """The codes; integers that are not int32 become int8."""
        array = np.asarray(self.codes)
        return np.ascontiguousarray(array if array.dtype == np.int32 else _narrowed(array))

    @property
    def encoding(self) -> Encoding:
        """Where they lie."""
        return Encoding(self.scale, self.zero_point, self.axis)


def _narrowed(array: NDArray[Any]) -> Int8:
    if array.size and (array.min() < -128 or array.max() > 127):
        raise ValueError(f"codes must fit int8; got {array.min()} to {array.max()}")
    return array.astype(np.int8)


def conv_2d(
    x: Codes,
    weight: Codes,
    bias: ArrayLike,
    output: Encoding,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "VALID",
    activation: Activation = "NONE",
    optimized: bool = False,
) -> Int8:
    """CONV_2D: x [n, h, w, in], weight [out, kh, kw, in / groups], bias [out]; codes [n, h', w', out]."""
    options = schema.Conv2DOptionsT()
    options.strideH = options.strideW = stride
    options.dilationHFactor = options.dilationWFactor = dilation
    options.padding = _padding(padding)
    options.fusedActivationFunction = _activation(activation)
    return run_operator("CONV_2D", options, [x], output, [weight, _bias(bias, x, weight)], optimized=optimized)


def depthwise_conv_2d(
    x: Codes,
    weight: Codes,
    bias: ArrayLike,
    output: Encoding,
    *,
    stride: int = 1,
    dilation: int = 1,
    padding: Padding = "VALID",
    activation: Activation = "NONE",
    optimized: bool = False,
) -> Int8:
    """DEPTHWISE_CONV_2D: x [n, h, w, in], weight [1, kh, kw, in * multiplier] with axis 3, bias [in * multiplier]."""
    options = schema.DepthwiseConv2DOptionsT()
    options.strideH = options.strideW = stride
    options.dilationHFactor = options.dilationWFactor = dilation
    options.depthMultiplier = weight.array.shape[3] // x.array.shape[3]
    options.padding = _padding(padding)
    options.fusedActivationFunction = _activation(activation)
    constants = [weight, _bias(bias, x, weight)]
    return run_operator("DEPTHWISE_CONV_2D", options, [x], output, constants, optimized=optimized)


def fully_connected(
    x: Codes,
    weight: Codes,
    bias: ArrayLike,
    output: Encoding,
    *,
    activation: Activation = "NONE",
    optimized: bool = False,
) -> Int8:
    """FULLY_CONNECTED: x [..., in], weight [out, in], bias [out]; codes [..., out]."""
    options = schema.FullyConnectedOptionsT()
    options.keepNumDims = True
    options.fusedActivationFunction = _activation(activation)
    return run_operator("FULLY_CONNECTED", options, [x], output, [weight, _bias(bias, x, weight)], optimized=optimized)


def add(a: Codes, b: Codes, output: Encoding, *, activation: Activation = "NONE", optimized: bool = False) -> Int8:
    """ADD of two tensors that broadcast.

    The output scale must exceed max(input scales) / 2**19: LiteRT ends the process otherwise.
    """
    options = schema.AddOptionsT()
    options.fusedActivationFunction = _activation(activation)
    return run_operator("ADD", options, [a, b], output, optimized=optimized)


def mul(a: Codes, b: Codes, output: Encoding, *, activation: Activation = "NONE", optimized: bool = False) -> Int8:
    """MUL of two tensors that broadcast."""
    options = schema.MulOptionsT()
    options.fusedActivationFunction = _activation(activation)
    return run_operator("MUL", options, [a, b], output, optimized=optimized)


def average_pool_2d(
    x: Codes,
    *,
    size: int,
    stride: int = 1,
    padding: Padding = "VALID",
    activation: Activation = "NONE",
    optimized: bool = False,
) -> Int8:
    """AVERAGE_POOL_2D; the result lies where x does."""
    options = _pool(size, stride, padding, activation)
    return run_operator("AVERAGE_POOL_2D", options, [x], x.encoding, optimized=optimized)


def max_pool_2d(
    x: Codes,
    *,
    size: int,
    stride: int = 1,
    padding: Padding = "VALID",
    activation: Activation = "NONE",
    optimized: bool = False,
) -> Int8:
    """MAX_POOL_2D; the result lies where x does."""
    return run_operator("MAX_POOL_2D", _pool(size, stride, padding, activation), [x], x.encoding, optimized=optimized)


def mean(
    x: Codes, output: Encoding, *, axes: Sequence[int] = (1, 2), keep_dims: bool = True, optimized: bool = False
) -> Int8:
    """MEAN over axes."""
    options = schema.ReducerOptionsT()
    options.keepDims = keep_dims
    return run_operator("MEAN", options, [x], output, [np.asarray(axes, np.int32)], optimized=optimized)


def concatenation(parts: Sequence[Codes], output: Encoding, *, axis: int = 3, optimized: bool = False) -> Int8:
    """CONCATENATION along an axis; the int8 kernel wants all encodings equal."""
    options = schema.ConcatenationOptionsT()
    options.axis = axis
    return run_operator("CONCATENATION", options, list(parts), output, optimized=optimized)


def logistic(x: Codes, output: Encoding | None = None, *, optimized: bool = False) -> Int8:
    """LOGISTIC; its int8 result has scale 1/256 and zero point -128."""
    return run_operator("LOGISTIC", None, [x], output or Encoding(1 / 256, -128), optimized=optimized)


def tanh(x: Codes, output: Encoding | None = None, *, optimized: bool = False) -> Int8:
    """TANH; its int8 result has scale 1/128 and zero point 0."""
    return run_operator("TANH", None, [x], output or Encoding(1 / 128, 0), optimized=optimized)


def run_operator(
    name: str,
    options: Any,
    inputs: Sequence[Codes],
    output: Encoding,
    constants: Sequence["Codes | NDArray[np.int32]"] = (),
    *,
    order: Sequence[int] | None = None,
    optimized: bool = False,
) -> Int8:
    """Run one builtin operator.

    Args:
        name: As in the schema's BuiltinOperator.
        options: Its options object, or None.
        inputs: The tensors that change from run to run; int8.
        output: Where the result lies.
        constants: Operands after the inputs, stored in the model: weights, biases, and int32 arrays such as axes.
        order: Of the operands as the operator wants them, inputs and constants counted together; None: as given.
        optimized: Optimized kernels, not the reference ones.

    Returns:
        array: int8 codes of the result.
    """
    model = build_operator(name, options, inputs, output, constants, order)
    kernels = OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES if optimized else OpResolverType.BUILTIN_REF
    interpreter = Interpreter(model_content=model, experimental_op_resolver_type=kernels, num_threads=1)
    interpreter.allocate_tensors()
    for place, x in zip(interpreter.get_input_details(), inputs, strict=True):
        interpreter.set_tensor(place["index"], x.array)
    interpreter.invoke()
    result: Int8 = interpreter.get_tensor(interpreter.get_output_details()[0]["index"])
    return result


def build_operator(
    name: str,
    options: Any,
    inputs: Sequence[Codes],
    output: Encoding,
    constants: Sequence[Any] = (),
    order: Sequence[int] | None = None,
) -> bytes:
    """The TFLite file of `run_operator`: a graph of one operator."""
    writer = Writer()
    given = [writer.given(x.array.shape, x.encoding) for x in inputs]
    stored = [
        writer.constant(one.array, one.encoding) if isinstance(one, Codes) else writer.constant(one)
        for one in constants
    ]
    operands = [*given, *stored]
    result = writer.add(name, options, [operands[i] for i in order or range(len(operands))], output)
    return writer.finish(given, [result])


def _bias(bias: ArrayLike, x: Codes, weight: Codes) -> Codes:
    scale = np.asarray(x.scale, np.float32) * np.asarray(weight.scale, np.float32)
    return Codes(np.asarray(bias, np.int32), scale)


def _pool(size: int, stride: int, padding: Padding, activation: Activation) -> Any:
    options = schema.Pool2DOptionsT()
    options.filterHeight = options.filterWidth = size
    options.strideH = options.strideW = stride
    options.padding = _padding(padding)
    options.fusedActivationFunction = _activation(activation)
    return options


def _padding(name: Padding) -> int:
    return int(getattr(schema.Padding, name))


def _activation(name: Activation) -> int:
    return int(getattr(schema.ActivationFunctionType, name))
