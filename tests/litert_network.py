# SPDX-License-Identifier: Apache-2.0
"""A whole quantized model as a TFLite file, made from its integer operators: every result is an output.

    network = build_network(result)
    codes = run_network(network, x_q)      # int8 codes of the input [n, c, h, w] -> codes of every quantized tensor

For image classifiers: convolutions, depthwise convolutions, linear operators, sums, means over the image, padding,
slices. Images are [batch, height, width, channels] inside. Needs ai-edge-litert; see `litert_support`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter, OpResolverType
from numpy.typing import NDArray

from qhw.engine import QuantizedModel
from qhw.integer import Site, sites
from qhw.numerics import QParams
from tests.litert_support import _KINDS, _VERSIONS, Encoding, _tensor

Array = NDArray[Any]


@dataclass(frozen=True)
class Network:
    """A TFLite file.

    Attributes:
        content: Its bytes.
        tensors: Name of the tensor in the plan, of each output in order.
    """

    content: bytes
    tensors: tuple[str, ...]


def build_network(result: QuantizedModel, batch: int) -> Network:
    """The file for inputs of `batch` images; one input."""
    return _Builder(result, batch).network()


def run_network(network: Network, codes: Array) -> dict[str, Array]:
    """Codes of every result, images as [n, c, h, w], by the portable reference kernels.

    Args:
        network: The file.
        codes: int8 [n, c, h, w].
    """
    interpreter = Interpreter(
        model_content=network.content, experimental_op_resolver_type=OpResolverType.BUILTIN_REF, num_threads=1
    )
    interpreter.allocate_tensors()
    interpreter.set_tensor(interpreter.get_input_details()[0]["index"], np.ascontiguousarray(_last(codes)))
    interpreter.invoke()
    outputs = interpreter.get_output_details()
    found = [interpreter.get_tensor(place["index"]) for place in outputs]
    return {name: np.moveaxis(y, -1, 1) for name, y in zip(network.tensors, found, strict=True)}


class _Builder:
    def __init__(self, result: QuantizedModel, batch: int) -> None:
        self._result, self._batch = result, batch
        self._graph, self._buffers = schema.SubGraphT(), [schema.BufferT()]
        self._graph.tensors, self._graph.operators = [], []
        self._codes: list[tuple[str, int]] = []
        self._places: dict[str, int] = {}

    def network(self) -> Network:
        sites_ = list(sites(self._result))
        (name,) = self._result.input_names
        shape = self._result.float_graph.inputs[name]
        self._places[name] = self._new(_image((self._batch, *shape[1:])), _encoding(sites_[0].inputs[0]))
        written: dict[str, int] = {}
        for site in sites_:
            place = _FORMS[site.operator.kind](self, site)
            self._places.update((member.name, place) for member in site.members)
            if site.output is not None:
                written[site.members[-1].name] = place
        self._graph.inputs, self._graph.outputs = [self._places[name]], list(written.values())
        return Network(self._pack(), tuple(written))

    def convolution(self, site: Site) -> int:
        facts = site.operator.attributes
        is_depthwise = site.operator.kind == "DepthwiseConv"
        options = schema.DepthwiseConv2DOptionsT() if is_depthwise else schema.Conv2DOptionsT()
        (options.strideH, options.strideW) = facts["stride"]
        (options.dilationHFactor, options.dilationWFactor) = facts["dilation"]
        options.padding = schema.Padding.VALID
        options.fusedActivationFunction = _activation(site)
        codes = site.weight.codes.numpy()
        weight = codes.transpose(1, 2, 3, 0) if is_depthwise else codes.transpose(0, 2, 3, 1)
        if is_depthwise:
            options.depthMultiplier = (
                len(codes) // self._result.float_graph.node(site.name).all_input_nodes[0].meta["shape"][1]
            )
        x = self._padded(self._operand(site, 0), site.inputs[0], [(0, 0), *((p, p) for p in facts["padding"]), (0, 0)])
        return self._add("DEPTHWISE_CONV_2D" if is_depthwise else "CONV_2D", options,
                         [x, *self._weights(site, weight, 3 if is_depthwise else 0)], site.output)  # fmt: skip

    def linear(self, site: Site) -> int:
        options = schema.FullyConnectedOptionsT()
        options.fusedActivationFunction = _activation(site)
        operands = [self._operand(site, 0), *self._weights(site, site.weight.codes.numpy(), 0)]
        return self._add("FULLY_CONNECTED", options, operands, site.output)

    def total(self, site: Site) -> int:
        options = schema.AddOptionsT()
        options.fusedActivationFunction = _activation(site)
        return self._add("ADD", options, [self._operand(site, 0), self._operand(site, 1)], site.output)

    def mean(self, site: Site) -> int:
        axes = self._constant(np.asarray([1, 2], np.int32), None)
        return self._add("MEAN", schema.ReducerOptionsT(), [self._operand(site, 0), axes], site.output)

    def pad(self, site: Site) -> int:
        flat = [*site.operator.attributes["padding"], 0, 0, 0, 0, 0, 0, 0, 0][:8]
        rows = [(flat[2 * i], flat[2 * i + 1]) for i in range(4)]  # of width, height, channels, batch
        return self._padded(self._operand(site, 0), site.inputs[0], [rows[3], rows[1], rows[0], rows[2]])

    def slice(self, site: Site) -> int:
        _, axis, start, end, step = [*site.node.args, 1][:5]
        place = {0: 0, 1: 3, 2: 1, 3: 2}[int(axis)]
        begins, ends, steps = np.zeros(4, np.int32), np.full(4, 2**31 - 1, np.int32), np.ones(4, np.int32)
        begins[place], ends[place], steps[place] = start or 0, min(end, 2**31 - 1), step
        operands = [self._constant(values, None) for values in (begins, ends, steps)]
        return self._add(
            "STRIDED_SLICE", schema.StridedSliceOptionsT(), [self._operand(site, 0), *operands], site.inputs[0]
        )

    def _operand(self, site: Site, index: int) -> int:
        operators = {operator.name: operator for operator in self._result.float_graph.operators}
        name = site.operator.inputs[index]
        while name not in self._places:
            assert operators[name].is_view, name
            name = operators[name].inputs[0]
        return self._places[name]

    def _padded(self, place: int, q: QParams, rows: list[tuple[int, int]]) -> int:
        if not any(edge for row in rows for edge in row):
            return place
        return self._add("PAD", schema.PadOptionsT(), [place, self._constant(np.asarray(rows, np.int32), None)], q)

    def _weights(self, site: Site, weight: Array, axis: int) -> list[int]:
        scale = site.weight.qparams.scale.numpy()
        unit = site.bias.qparams.scale.numpy()
        bias = site.bias.codes.numpy().astype(np.int32)
        codes = np.ascontiguousarray(weight.astype(np.int8))
        return [self._constant(codes, Encoding(scale, 0, axis)), self._constant(bias, Encoding(unit))]

    def _constant(self, array: Array, encoding: Encoding | None) -> int:
        buffer = schema.BufferT()
        buffer.data = np.frombuffer(array.tobytes(), np.uint8)
        self._buffers.append(buffer)
        self._graph.tensors.append(_tensor(array.shape, _KINDS[array.dtype], encoding, len(self._buffers) - 1))
        return len(self._graph.tensors) - 1

    def _new(self, shape: tuple[int, ...], encoding: Encoding) -> int:
        self._graph.tensors.append(_tensor(shape, "INT8", encoding, 0))
        return len(self._graph.tensors) - 1

    def _add(self, name: str, options: Any, operands: list[int], q: QParams) -> int:
        code = name, _VERSIONS.get(name, 2)
        if code not in self._codes:
            self._codes.append(code)
        operator = schema.OperatorT()
        operator.opcodeIndex = self._codes.index(code)
        place = self._new((), _encoding(q))
        operator.inputs, operator.outputs, operator.builtinOptions = operands, [place], options
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__[:-1])
        self._graph.operators.append(operator)
        return place

    def _pack(self) -> bytes:
        model = schema.ModelT()
        model.version, model.subgraphs, model.buffers, model.operatorCodes = 3, [self._graph], self._buffers, []
        for name, version in self._codes:
            code = schema.OperatorCodeT()
            code.builtinCode = getattr(schema.BuiltinOperator, name)
            code.deprecatedBuiltinCode = min(code.builtinCode, 127)
            code.version = version
            model.operatorCodes.append(code)
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


_FORMS: Mapping[str, Callable[[_Builder, Site], int]] = {
    "Conv": _Builder.convolution,
    "DepthwiseConv": _Builder.convolution,
    "Gemm": _Builder.linear,
    "Add": _Builder.total,
    "GlobalAveragePool": _Builder.mean,
    "Pad": _Builder.pad,
    "Slice": _Builder.slice,
}


def _activation(site: Site) -> int:
    kinds = schema.ActivationFunctionType
    ends = [(m.attributes.get("minimum"), m.attributes.get("maximum")) for m in site.members[1:]]
    return {(): kinds.NONE, ((0.0, None),): kinds.RELU, ((0.0, 6.0),): kinds.RELU6}[tuple(ends)]  # type: ignore[no-any-return]


def _encoding(q: QParams) -> Encoding:
    return Encoding(q.scale.numpy(), int(q.zero_point))


def _image(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], *shape[2:], shape[1]


def _last(codes: Array) -> Array:
    return np.moveaxis(codes, 1, -1)
