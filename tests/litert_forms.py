# SPDX-License-Identifier: Apache-2.0
"""Each operator kind as LiteRT operators: from a captured operator and its integers to what the file holds.

What LiteRT has no operator for is made of several (a padded pool: PAD and a pool); none of these changes a code.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from qhw.integer import Site
from tests.litert_movement import MOVES
from tests.litert_place import Place, as_image, as_plain, sliced
from tests.litert_writer import Encoding, Value

_LOWEST = -128


def value(place: Place) -> Value:
    """Write an operator; its result."""
    return _FORMS[place.operator.kind](place)


def _two(values: Sequence[int]) -> tuple[int, int]:
    """Of height and width; a signal of one axis has height one."""
    height, width = ([1] * (2 - len(values))) + list(values)
    return height, width


def _around(values: Sequence[int]) -> list[tuple[int, int]]:
    """Rows of a PAD of an image."""
    edges = ([0] * (2 - len(values))) + list(values)
    return [(0, 0), *((edge, edge) for edge in edges), (0, 0)]


def _convolution(place: Place) -> Value:
    facts, site, writer = place.facts, place.integers, place.writer
    is_depthwise = place.operator.kind == "DepthwiseConv"
    options = schema.DepthwiseConv2DOptionsT() if is_depthwise else schema.Conv2DOptionsT()
    options.strideH, options.strideW = _two(facts["stride"])
    options.dilationHFactor, options.dilationWFactor = _two(facts["dilation"])
    options.padding = schema.Padding.VALID
    options.fusedActivationFunction = _fused(site)
    codes = site.constant.codes.numpy()
    codes = codes.reshape(*codes.shape[:2], *_two(codes.shape[2:]))
    if is_depthwise:
        options.depthMultiplier = len(codes) // place.sizes[1]
    weight = codes.transpose(1, 2, 3, 0) if is_depthwise else codes.transpose(0, 2, 3, 1)
    x = writer.pad(place.image(), _around(facts["padding"]), writer.values[place.names[0]].encoding)
    operands = [x, *_weights(place, weight, 3 if is_depthwise else 0)]
    name = "DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D"
    return as_image(place, _clipped(place, writer.add(name, options, operands, place.encoding)))


def _transposed_convolution(place: Place) -> Value:
    facts, writer = place.facts, place.writer
    options = schema.TransposeConvOptionsT()
    options.strideH, options.strideW = facts["stride"]
    options.padding = schema.Padding.VALID
    _, channels, *sides = place.shape
    padding = facts["padding"]
    whole = [n + 2 * p for n, p in zip(sides, padding, strict=True)]
    shape = writer.numbers(place.sizes[0], *whole, channels)
    weight = place.integers.constant.codes.numpy().transpose(1, 2, 3, 0)
    codes, bias = _weights(place, weight, 0)
    y = writer.add("TRANSPOSE_CONV", options, [shape, codes, place.image(), bias], place.encoding)
    if any(padding):  # torch crops what it pads an ordinary convolution with
        ranges = [(0, place.sizes[0]), *((p, n + p) for n, p in zip(sides, padding, strict=True)), (0, channels)]
        y = sliced(writer, y, ranges, place.encoding)
    return as_image(place, y)


def _linear(place: Place) -> Value:
    options = schema.FullyConnectedOptionsT()
    options.fusedActivationFunction, options.keepNumDims = _fused(place.integers), len(place.sizes) > 2
    operands = [place.plain(), *_weights(place, place.integers.constant.codes.numpy(), 0)]
    return as_plain(place, _clipped(place, place.writer.add("FULLY_CONNECTED", options, operands, place.encoding)))


def _weights(place: Place, weight: np.ndarray, axis: int) -> list[int]:
    """Codes and biases; LiteRT's layers have biases, of 0 where the model has none."""
    site, writer = place.integers, place.writer
    scale = site.constant.qparams.scale.numpy()
    codes = writer.constant(weight.astype(np.int8), Encoding(scale, 0, axis))
    if site.bias is not None:
        bias = writer.constant(site.bias.codes.numpy().astype(np.int32), Encoding(site.bias.qparams.scale.numpy()))
        return [codes, bias]
    unit = site.inputs[0].scale.numpy() * scale
    return [
        codes,
        writer.constant(np.zeros(place.shape[-1 if place.operator.kind == "Gemm" else 1], np.int32), Encoding(unit)),
    ]


def _binary(name: str, options: Callable[[], Any] | None, is_clipped: bool = True) -> Callable[[Place], Value]:
    def form(place: Place) -> Value:
        chosen = options() if options is not None else None
        if chosen is not None and is_clipped:
            chosen.fusedActivationFunction = _fused(place.integers)
        values = [place.writer.values[name] for name in place.names]
        if is_clipped and all(v.image is not None and len(v.shape) == 4 for v in values):
            tensors = [place.writer.image(name) for name in place.names]
            return as_image(place, _clipped(place, place.writer.add(name, chosen, tensors, place.encoding)))
        tensors = [place.plain(i) for i in range(2)]
        return as_plain(place, _clipped(place, place.writer.add(name, chosen, tensors, place.encoding)))

    return form


def _concatenation(place: Place) -> Value:
    options = schema.ConcatenationOptionsT()
    options.axis = place.facts["axis"]
    tensors = [place.plain(i) for i in range(len(place.names))]
    return as_plain(place, place.writer.add("CONCATENATION", options, tensors, place.encoding))


def _mean(place: Place) -> Value:
    facts, writer = place.facts, place.writer
    source, rank = writer.values[place.names[0]], len(place.sizes)
    axes = facts.get("axes") or list(range(rank - len(facts["kernel"]), rank))
    options = schema.ReducerOptionsT()
    options.keepDims = facts["keepdim"]
    if rank == 4 and list(axes) == [2, 3] and source.image is not None:
        y = writer.add("MEAN", options, [source.image, writer.numbers(1, 2)], place.encoding)
        return as_image(place, y) if facts["keepdim"] else as_plain(place, y)
    return as_plain(place, writer.add("MEAN", options, [place.plain(), writer.numbers(*axes)], place.encoding))


def _pool(place: Place) -> Value:
    facts, writer = place.facts, place.writer
    options = schema.Pool2DOptionsT()
    options.filterHeight, options.filterWidth = _two(facts["kernel"])
    options.strideH, options.strideW = _two(facts["stride"])
    x, is_average = place.image(), place.operator.kind == "AveragePool"
    edges = _around(facts["padding"])
    options.padding = schema.Padding.VALID
    if is_average and not facts.get("count_include_pad", True):  # windows of three, a code around
        options.padding = schema.Padding.SAME
    else:
        x = writer.pad(x, edges, place.encoding, None if is_average else _LOWEST)
    name = "AVERAGE_POOL_2D" if is_average else "MAX_POOL_2D"
    return as_image(place, writer.add(name, options, [x], place.encoding))


def _function(name: str, options: Callable[[], Any] | None = None) -> Callable[[Place], Value]:
    def form(place: Place) -> Value:
        chosen = options() if options is not None else None
        return as_plain(place, place.writer.add(name, chosen, [place.plain()], place.encoding))

    return form


def _softmax(place: Place) -> Value:
    assert place.facts["axis"] == len(place.sizes) - 1, "LiteRT's softmax is one of the last axis"
    options = schema.SoftmaxOptionsT()
    options.beta = 1.0
    return as_plain(place, place.writer.add("SOFTMAX", options, [place.plain()], place.encoding))


def _resize(place: Place) -> Value:
    is_nearest = place.facts["mode"] == "nearest"
    options = schema.ResizeNearestNeighborOptionsT() if is_nearest else schema.ResizeBilinearOptionsT()
    options.halfPixelCenters = not is_nearest  # torch's nearest takes the floor of whole steps
    name = "RESIZE_NEAREST_NEIGHBOR" if is_nearest else "RESIZE_BILINEAR"
    operands = [place.image(), place.writer.numbers(*place.shape[2:])]
    return as_image(place, place.writer.add(name, options, operands, place.encoding))


def _leaky_relu(place: Place) -> Value:
    options = schema.LeakyReluOptionsT()
    options.alpha = place.facts["slope"]
    return as_plain(place, place.writer.add("LEAKY_RELU", options, [place.plain()], place.encoding))


def _clip(place: Place) -> Value:
    ends = place.facts.get("minimum"), place.facts.get("maximum")
    return as_plain(place, place.writer.add(_CLIPS[ends], None, [place.plain()], place.encoding))


_CLIPS: Mapping[tuple[float | None, float | None], str] = {
    (0.0, None): "RELU",
    (0.0, 6.0): "RELU6",
    (-1.0, 1.0): "RELU_N1_TO_1",
}


def _fused(site: Site) -> int:
    """The first clip that is computed along, which the operator takes in."""
    kinds = schema.ActivationFunctionType
    if len(site.members) == 1:
        return int(kinds.NONE)
    facts = site.members[1].attributes
    return int(getattr(kinds, _CLIPS[facts.get("minimum"), facts.get("maximum")]))


def _clipped(place: Place, tensor: int) -> int:
    """Behind the further clips, which LiteRT knows as operators of their own, here on one grid."""
    for member in place.site.members[2:] if place.site is not None else ():
        name = _CLIPS[member.attributes.get("minimum"), member.attributes.get("maximum")]
        tensor = place.writer.add(name, None, [tensor], place.encoding)
    return tensor


_FORMS: Mapping[str, Callable[[Place], Value]] = {
    **dict.fromkeys(("Conv", "DepthwiseConv"), _convolution),
    "ConvTranspose": _transposed_convolution,
    "Gemm": _linear,
    "MatMul": _binary("BATCH_MATMUL", schema.BatchMatMulOptionsT, is_clipped=False),
    "Add": _binary("ADD", schema.AddOptionsT),
    "Sub": _binary("SUB", schema.SubOptionsT),
    "Mul": _binary("MUL", schema.MulOptionsT),
    "Max": _binary("MAXIMUM", None),
    "Min": _binary("MINIMUM", None),
    "Concat": _concatenation,
    **dict.fromkeys(("ReduceMean", "GlobalAveragePool"), _mean),
    **dict.fromkeys(("AveragePool", "MaxPool"), _pool),
    **dict.fromkeys(("Relu", "Clip"), _clip),
    "LeakyRelu": _leaky_relu,
    "Abs": _function("ABS"),
    "Sigmoid": _function("LOGISTIC"),
    "Tanh": _function("TANH"),
    "HardSwish": _function("HARD_SWISH"),
    "Gelu": _function("GELU", schema.GeluOptionsT),
    "Exp": _function("EXP", schema.ExpOptionsT),
    "Softmax": _softmax,
    "LogSoftmax": _function("LOG_SOFTMAX", schema.LogSoftmaxOptionsT),
    "Resize": _resize,
    **MOVES,
}
