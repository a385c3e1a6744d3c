# SPDX-License-Identifier: Apache-2.0
"""An ONNX graph as an artefact: QDQ pairs become grids of values, integer operators what they compute."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from qhw.errors import ArtefactError
from qhw.legality import Artefact, ArtefactOperator, Constant, Encoding, Use, encoding_of
from qhw_plugins.onnx_folding import MOVES, moved
from qhw_plugins.onnx_integer import INTEGER_OPERATORS, IntegerForm
from qhw_plugins.onnx_kinds import attributes_of, kind_of
from qhw_plugins.onnx_parameters import Parameters
from qhw_plugins.onnx_stored import CODE_TYPES, REALS, CodeType

__all__ = ["OnnxArtefact"]

_SHAPES_ONLY = frozenset({"Shape", "Size", "NonZero", "RandomNormalLike", "RandomUniformLike"})
_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")
_TWO = ("Add", "Sub", "Mul", "Div", "Max", "Min", "MatMul")
_SECOND_WEIGHT = ("PRelu", "LayerNormalization", "InstanceNormalization", "GroupNormalization")
_KEEPS_RANK = frozenset({
    "Abs", "AveragePool", "BatchNormalization", "Clip", "Concat", "DepthToSpace", "Dropout", "Elu", "Exp", "Gelu",
    "GlobalAveragePool", "GlobalMaxPool", "HardSigmoid", "HardSwish", "Identity", "InstanceNormalization",
    "LayerNormalization", "LeakyRelu", "Log", "LogSoftmax", "MaxPool", "Mish", "Neg", "PRelu", "Pad", "Pow", "Relu",
    "Resize", "Sigmoid", "Slice", "Softmax", "Softplus", "SpaceToDepth", "Split", "Sqrt", "Tanh", "Tile", "Transpose",
})  # fmt: skip
UINT8 = CodeType("uint8", 8, False)


@dataclass
class _Draft:
    """An operator before the quantizers behind it are known."""

    node: onnx.NodeProto
    kind: str
    inputs: list[Use]
    outputs: list[str]
    attributes: dict[str, Any]
    weight: Constant | None = None
    bias: Constant | None = None
    weight_axis: int | None = None
    input_axis: int | None = None
    encoding: Encoding | None = None
    is_integer: bool = False


@dataclass
class OnnxArtefact:
    """Reads one graph, node by node.

    Args:
        model: The parsed file.
        folder: Where external data lies.
        label: What messages call the file.
        encodings: Grids of values and constants by name, from a file of their own.
    """

    model: onnx.ModelProto
    folder: Path
    label: str
    encodings: Mapping[str, Encoding] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self._constants = Parameters(graph, self.folder, self.label)
        self._types = {info.name: info.type.tensor_type.elem_type for info in (*graph.input, *graph.value_info)}
        self._shapes = {
            info.name: _shape_of(info)
            for info in (*graph.input, *graph.value_info, *graph.output)
            if info.type.tensor_type.HasField("shape")
        }
        self._grid: dict[str, Encoding] = {}
        self._root: dict[str, str] = {}
        self._codes: set[str] = set()
        self._quantized: dict[str, Encoding] = {}
        self._rank: dict[str, int] = {name: len(shape) for name, shape in self._shapes.items() if shape is not None}
        self._drafts: list[_Draft] = []
        self._data: set[str] = {info.name for info in graph.input if info.name not in self._constants}

    def read(self, form: str | None = None) -> Artefact:
        """The artefact.

        Raises:
            ArtefactError: scales, codes or shapes do not hold together.
        """
        inputs = frozenset(self._data)
        for name in inputs:
            self._root[name] = name
            if name in self.encodings:
                self._quantized[name] = self.encodings[name]
        for node in self.model.graph.node:
            self._visit(node)
        names: set[str] = set()
        operators = tuple(self._operator(draft, names) for draft in self._drafts)
        outputs = frozenset(self._root.get(info.name, info.name) for info in self.model.graph.output)
        opset = next((item.version for item in self.model.opset_import if item.domain in ("", "ai.onnx")), None)
        is_integer = any(draft.is_integer for draft in self._drafts)
        return Artefact(
            form=form or ("ONNX QOperator" if is_integer else "ONNX QDQ"),
            operators=operators,
            inputs=inputs,
            outputs=outputs,
            biases="derived" if form is not None else "stored",
            opset=opset,
            ends=self._ends(),
        )

    def _ends(self) -> Literal["float", "integer"] | None:
        """What all inputs and outputs are, counts and indices left out; None where they differ."""
        graph = self.model.graph
        types = {info.type.tensor_type.elem_type for info in graph.output}
        types |= {info.type.tensor_type.elem_type for info in graph.input if info.name not in self._constants}
        found: set[Literal["float", "integer"]] = {
            "float" if kind in REALS else "integer" for kind in types if kind in REALS or kind in CODE_TYPES
        }
        return next(iter(found)) if len(found) == 1 else None

    def _visit(self, node: onnx.NodeProto) -> None:
        kind = node.op_type
        if not node.output:
            return
        if kind == "Constant":
            self._stored_constant(node)
        elif kind == "QuantizeLinear" and len(node.input) >= 2:
            self._quantize(node)
        elif kind == "DequantizeLinear" and len(node.input) >= 2:
            self._dequantize(node)
        elif kind == "DynamicQuantizeLinear" and node.input:
            self._values(
                node.output[0], node.input[0], self._constants.encoding("", None, UINT8, axis=None), codes=True
            )
        elif kind in _SHAPES_ONLY or not any(name in self._data for name in node.input):
            self._folded(node)
        elif kind == "Cast" and node.input[0] not in self._codes and attributes_of(node).get("to") in REALS:
            self._renamed(node)
        elif kind in INTEGER_OPERATORS:
            self._integer(node, INTEGER_OPERATORS[kind])
        else:
            self._plain(node)

    def _stored_constant(self, node: onnx.NodeProto) -> None:
        for item in node.attribute:
            if item.name == "value" and item.type == onnx.AttributeProto.TENSOR:
                self._constants.add_stored(node.output[0], item.t)
                return
            plain: dict[str, Any] = {
                "value_float": item.f, "value_floats": list(item.floats),
                "value_int": item.i, "value_ints": list(item.ints),
            }  # fmt: skip
            if item.name in plain:
                array = np.asarray(plain[item.name], np.float32 if "float" in item.name else np.int64)
                self._constants.add_stored(node.output[0], onnx.numpy_helper.from_array(array))
                return
        self._constants.add(node.output[0], Constant(node.output[0]))

    def _grid_of(self, node: onnx.NodeProto, codes: str) -> Encoding:
        """What the scale and zero point of a QuantizeLinear or DequantizeLinear say."""
        given = attributes_of(node)
        zero = node.input[2] if len(node.input) > 2 else ""
        typed = self._constants.data_type(zero) or self._constants.data_type(codes) or given.get("output_dtype")
        kind = CODE_TYPES.get(int(typed or self._types.get(codes, 0)))
        known = self._grid.get(codes)
        if kind is None:
            kind = UINT8 if known is None else CodeType(known.type, known.bits, bool(known.signed), known.elements)
        return self._constants.encoding(
            node.input[1],
            zero,
            kind,
            axis=int(given.get("axis", 1)),
            block_size=int(given.get("block_size", 0)),
            shape=self._constants.shape(node.input[0]),
        )

    def _quantize(self, node: onnx.NodeProto) -> None:
        source, out = node.input[0], node.output[0]
        encoding = self._grid_of(node, out)
        if source in self._constants:
            self._constants.add(out, self._constants.quantized(source, encoding))
            return
        if source not in self._data:
            self._constants.add(out, Constant(source, encoding=encoding))
            return
        self._values(out, source, encoding, codes=True)
        if source not in self._grid:
            self._quantized.setdefault(self._root.get(source, source), encoding)

    def _dequantize(self, node: onnx.NodeProto) -> None:
        source, out = node.input[0], node.output[0]
        encoding = self._grid_of(node, source)
        if source in self._data:
            if source not in self._grid:  # a graph input of codes
                self._quantized.setdefault(self._root.get(source, source), encoding)
            self._values(out, source, encoding, codes=False)
            return
        if source not in self._constants:
            self._constants.add(out, Constant(out, encoding=encoding))
            return
        self._constants.add(out, self._constants.dequantized(source, encoding, source))

    def _values(self, out: str, source: str, encoding: Encoding, *, codes: bool) -> None:
        """A value on a grid: the same one as it was before the quantizer."""
        self._data.add(out)
        self._grid[out] = encoding
        self._root[out] = self._root.get(source, source)
        self._shapes.setdefault(out, self._shapes.get(source))
        if source in self._rank:
            self._rank[out] = self._rank[source]
        if codes:
            self._codes.add(out)

    def _renamed(self, node: onnx.NodeProto) -> None:
        """Real numbers in another type of real numbers are the same value."""
        source, out = node.input[0], node.output[0]
        self._data.add(out)
        self._root[out] = self._root.get(source, source)
        self._shapes.setdefault(out, self._shapes.get(source))
        if source in self._rank:
            self._rank[out] = self._rank[source]
        if source in self._grid:
            self._grid[out] = self._grid[source]

    def _folded(self, node: onnx.NodeProto) -> None:
        """A node that no input decides: moved weights keep their codes, anything else is a constant nobody knows."""
        found = moved(node, self._constants.plain(node.input))
        if found is not None:
            self._constants.add_stored(node.output[0], onnx.numpy_helper.from_array(found))
            return
        if node.op_type in MOVES:
            self._constants.add_part(node.output[0], node.input[0])
        for name in node.output:
            self._constants.add(name, Constant(name))
        if node.op_type not in ("Transpose", "Identity") or not node.input or node.input[0] not in self._constants:
            return
        held = self._constants.constant(node.input[0])
        if node.op_type == "Identity":
            self._constants.add(node.output[0], held)
            return
        rank = len(held.shape or ())
        order = attributes_of(node).get("perm", list(range(rank))[::-1])
        if sorted(order) != list(range(rank)) or held.encoding is None:
            return
        axis = None if held.encoding.axis is None else order.index(held.encoding.axis)
        turned = replace(held.encoding, axis=axis)
        shape = tuple((held.shape or ())[i] for i in order)
        codes = None if held.codes is None else held.codes.transpose(order)
        self._constants.add(node.output[0], Constant(held.name, shape, turned, codes))

    def _use(self, name: str) -> Use:
        root = self._root.get(name, name)
        encoding = self._grid.get(name) or self.encodings.get(name)
        return Use(root, encoding, self._shapes.get(name))

    def _operand(self, name: str) -> Use:
        """A value or a constant, on the grid that it has."""
        if name in self._data:
            return self._use(name)
        held = self._parameter(name) or Constant(name)
        return Use(name, held.encoding, held.shape)

    def _plain(self, node: onnx.NodeProto) -> None:
        given = attributes_of(node)
        read = [name for name in node.input if name in self._data]
        constants = [name if name in self._constants and name not in self._data else "" for name in node.input]
        weight_name, bias_name = _parameter_names(node, constants)
        weight = self._parameter(weight_name, _out_axis(node.op_type, given))
        shape = None if weight is None else weight.shape
        small = [self._constants.small(name) if name else None for name in constants]
        kind, facts = kind_of(node.op_type, given, self._shapes.get(read[0]), shape, small)
        if kind in ("Max", "Min", "Add", "Mul", "Sub", "Div") and len(node.input) != 2:
            kind = "Unknown"
        # A constant that is put together with others is read as they are.
        operands = [name for name in node.input if name] if kind == "Concat" else read
        draft = _Draft(node, kind, [self._operand(name) for name in operands], list(node.output), facts, weight)
        draft.bias = self._parameter(bias_name, 0)
        self._place_axes(draft, node.op_type, given, weight_name)
        if all(name in self._codes for name in read):
            draft.is_integer, draft.encoding = True, draft.inputs[0].encoding
        self._finish(draft)

    def _place_axes(self, draft: _Draft, name: str, given: Mapping[str, Any], weight: str | None) -> None:
        if draft.weight is None:
            return
        is_first = weight == draft.node.input[0]
        if name == "MatMul" and draft.kind == "Gemm" and is_first:  # its sums go along the rows of the constant
            draft.kind = "MatMul"
            draft.attributes = {"reduced_elements": (draft.weight.shape or (1,))[-1]}
        if name in ("Conv", "ConvTranspose") or draft.kind == "Gemm":
            draft.weight_axis = _out_axis(name, given)
            draft.input_axis = 1 - draft.weight_axis
        elif name in _TWO:
            draft.attributes["weight_operand"] = 0 if is_first else 1

    def _parameter(self, name: str | None, axis: int | None = None) -> Constant | None:
        """A constant operand, on the grid that a file of encodings gives it where the graph has none.

        Args:
            name: Its name.
            axis: Of its output channels, which such a file need not state.
        """
        if name is None:
            return None
        held = self._constants.constant(name)
        encoding = self.encodings.get(name)
        if encoding is None or held.encoding is not None or held.shape is None:
            return held
        if encoding.signed is None and encoding.axis is not None and encoding.block_size is None:
            encoding = replace(encoding, axis=axis)
        if encoding.axis is not None and encoding.block_size is None:
            sizes = held.shape[encoding.axis : encoding.axis + 1]
            if sizes != encoding.scale.shape:
                raise ArtefactError(
                    f"{self._constants.where(name)}: has {encoding.scale.size} encodings where axis {encoding.axis} of "
                    f"{list(held.shape)} needs as many as it has indices. Export the encodings with this model."
                )
        return self._constants.quantized(name, encoding)

    def _integer(self, node: onnx.NodeProto, form: IntegerForm) -> None:
        """A QOperator: what it computes, with the grids that it is given."""
        names = list(node.input)

        def at(position: int | None) -> str:
            return names[position] if position is not None and position < len(names) else ""

        given = attributes_of(node)
        inputs: list[Use] = []
        weight: Constant | None = None
        weight_name: str | None = None
        for value, scale, zero in form.operands(len(names)):
            name = at(value)
            if not name:
                continue
            stored = self._constants.code_type(at(zero)) or self._constants.code_type(name) or UINT8
            shape = self._constants.shape(name) if name in self._constants else None
            axis = form.weight_axis(shape, given)
            encoding = self._constants.encoding(at(scale), at(zero), stored, axis=axis, shape=shape)
            if name in self._data:
                inputs.append(Use(self._root.get(name, name), encoding, self._shapes.get(name)))
                if name not in self._grid:
                    self._quantized.setdefault(self._root.get(name, name), encoding)
            elif name in self._constants:
                weight, weight_name = self._constants.dequantized(name, encoding, name), name
        read = next((name for name in names if name in self._data), "")
        kind, facts = kind_of(form.computes, given, self._shapes.get(read), weight.shape if weight else None, [])
        draft = _Draft(node, kind, inputs, list(node.output), facts, weight, is_integer=True)
        if at(form.bias) and weight is not None:
            draft.bias = self._integer_bias(at(form.bias), inputs, weight)
        self._place_axes(draft, form.computes, given, weight_name)
        result = form.result(len(names))
        if result is not None:
            kind_out = self._constants.code_type(at(result[1])) or UINT8
            draft.encoding = self._constants.encoding(at(result[0]), at(result[1]), kind_out, axis=None)
        self._finish(draft)

    def _integer_bias(self, name: str, inputs: Sequence[Use], weight: Constant) -> Constant:
        """int32 codes, by definition at input scale times weight scale."""
        x, w = inputs[0].encoding if inputs else None, weight.encoding
        if name not in self._constants or x is None or w is None or x.is_dynamic or w.is_dynamic:
            return Constant(name)
        scale = np.asarray(x.scale, np.float32) * np.asarray(w.scale, np.float32)
        where = self._constants.where(name)
        encoding = encoding_of(where, scale, 0, bits=32, signed=True, axis=0, type="int32")
        return self._constants.dequantized(name, encoding, name)

    def _finish(self, draft: _Draft) -> None:
        rank = self._rank_of(draft)
        draft.attributes |= {"inputs": len(draft.inputs)}
        if rank is not None:
            draft.attributes.setdefault("rank", rank)
        _add_sizes(draft.attributes, draft.inputs)
        self._drafts.append(draft)
        for name in draft.outputs:
            if not name:
                continue
            self._data.add(name)
            self._root[name] = name
            if rank is not None:
                self._rank.setdefault(name, rank)
            if draft.is_integer and draft.encoding is not None:
                self._codes.add(name)
                self._grid[name] = draft.encoding
                self._quantized[name] = draft.encoding
            elif name in self.encodings:
                self._quantized[name] = self.encodings[name]

    def _rank_of(self, draft: _Draft) -> int | None:
        known = self._rank.get(draft.outputs[0])
        if known is not None:
            return known
        if "rank" in draft.attributes:
            return int(draft.attributes["rank"])
        ranks = [self._rank[name] for name in draft.node.input if name in self._rank]
        if draft.node.op_type in (*_KEEPS_RANK, *_TWO) and ranks:
            return max(ranks)
        return None

    def _operator(self, draft: _Draft, names: set[str]) -> ArtefactOperator:
        """The operator, under a name that no other one has."""
        outputs = [name for name in draft.outputs if name]
        uses = [Use(name, self._quantized.get(name), self._shapes.get(name)) for name in outputs]
        wanted = draft.node.name or (outputs[0] if outputs else draft.node.op_type)
        name, number = wanted, 1
        while name in names:
            number += 1
            name = f"{wanted}_{number}"
        names.add(name)
        return ArtefactOperator(
            name=name,
            kind=draft.kind,
            type=draft.node.op_type,
            inputs=tuple(draft.inputs),
            output=uses[0] if uses else Use(draft.node.name),
            weight=draft.weight,
            bias=draft.bias,
            weight_axis=draft.weight_axis,
            input_axis=draft.input_axis,
            attributes=draft.attributes,
            is_integer=draft.is_integer,
            more_outputs=tuple(uses[1:]),
        )


def _out_axis(name: str, given: Mapping[str, Any]) -> int:
    """Axis of the output channels in a weight."""
    if name == "Gemm":
        return 0 if given.get("transB", 0) else 1
    return 1 if name in ("ConvTranspose", "MatMul") else 0


def _parameter_names(node: onnx.NodeProto, constants: Sequence[str]) -> tuple[str | None, str | None]:
    """Names of the constant operand and of the bias."""

    def at(position: int) -> str | None:
        return (constants[position] or None) if position < len(constants) else None

    if node.op_type in _WEIGHTED:
        return at(1), at(2)
    if node.op_type in _SECOND_WEIGHT:
        return at(1), None
    if node.op_type in _TWO and len(node.input) == 2:
        return at(0) or at(1), None
    return None, None


def _shape_of(info: onnx.ValueInfoProto) -> tuple[int | None, ...] | None:
    dims = info.type.tensor_type.shape.dim
    if len(dims) > 64:
        return None
    return tuple(int(d.dim_value) if d.HasField("dim_value") and d.dim_value >= 0 else None for d in dims)


def _add_sizes(facts: dict[str, Any], inputs: Sequence[Use]) -> None:
    """Height, width and spatial sizes of the first operand, where they are known."""
    shape = inputs[0].shape if inputs else None
    if shape is None or len(shape) < 3 or any(size is None for size in shape[2:]):
        return
    if "kernel" in facts:
        facts["spatial"] = list(shape[2:])
    facts["width"] = shape[-1]
    if len(shape) > 3:
        facts["height"] = shape[-2]
