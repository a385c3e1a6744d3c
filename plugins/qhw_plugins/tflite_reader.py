# SPDX-License-Identifier: Apache-2.0
"""Reader `tflite`: quantized TFLite (LiteRT) models."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from qhw.errors import ArtefactError
from qhw.extension import ArtefactReader, PluginInfo, hookimpl
from qhw.legality import Artefact, ArtefactOperator, Constant, Encoding, Use, encoding_of
from qhw_plugins.flat_tables import BrokenFile, FlatTable, root_table
from qhw_plugins.onnx_stored import read_model_bytes
from qhw_plugins.tflite_kinds import ACTIVATIONS, FLOATS, KINDS, TYPES, activation_of, facts_of

_TWO = ("Add", "Sub", "Mul", "Div", "Max", "Min", "MatMul")
_BLOCKWISE = 2


class TfliteReader(ArtefactReader):
    """Reads `.tflite` files; nothing of one is run."""

    name = "tflite"
    summary = "TFLite, with int8, int16 or int4 tensors (.tflite)."

    def recognizes(self, path: Path, head: bytes) -> bool:
        """By the mark that follows the first offset, or by its suffix."""
        return head[4:8] == b"TFL3" or path.suffix.lower() == ".tflite"

    def read(self, path: Path, model: Path | None) -> Artefact:
        """The model.

        Raises:
            ArtefactError: the file is no TFLite model, or does not hold together.
        """
        if model is not None:
            raise ArtefactError(f"{path}: is a model already, and --model goes with encodings. Leave it out.")
        raw = read_model_bytes(path)
        if raw[4:8] != b"TFL3":
            raise ArtefactError(f"{path}: is no TFLite model: the mark TFL3 is missing. Convert the model again.")
        try:
            return _File(raw, str(path)).artefact()
        except BrokenFile as error:
            raise ArtefactError(f"{path}: is cut off or damaged: {error}. Convert the model again.") from error


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A tensor of the file."""

    name: str
    shape: tuple[int, ...]
    type: int
    buffer: int
    encoding: Encoding | None

    @property
    def is_value(self) -> bool:
        """Whether it holds numbers that a network computes with: floats, or codes on a grid."""
        return self.encoding is not None or self.type in FLOATS


class _File:
    """The first subgraph of one file."""

    def __init__(self, raw: bytes, label: str) -> None:
        self._raw = raw
        self._label = label
        root = root_table(raw)
        self._buffers = root.tables(4)
        graphs = root.tables(2)
        if not graphs:
            raise ArtefactError(f"{label}: must hold a graph; got none. Convert the model again.")
        self._graph = graphs[0]
        self._remarks = [f"{len(graphs) - 1} more subgraphs were not read"] if len(graphs) > 1 else []
        self._codes = [_operator_code(code) for code in root.tables(1)]
        self._tensors: list[_Tensor] = []
        names: set[str] = set()
        for index, table in enumerate(self._graph.tables(0)):
            self._tensors.append(self._tensor(table, index, names))
        self._root = {index: tensor.name for index, tensor in enumerate(self._tensors)}

    def artefact(self) -> Artefact:
        """The model."""
        operators: list[ArtefactOperator] = []
        for index, table in enumerate(self._graph.tables(3)):
            operators.extend(self._operator(table, index))
        return Artefact(
            form="TFLite",
            operators=tuple(operators),
            inputs=frozenset(self._root[i] for i in self._indices(self._graph, 1) if i >= 0),
            outputs=frozenset(self._root[i] for i in self._indices(self._graph, 2) if i >= 0),
            remarks=tuple(self._remarks),
            ends=self._ends(),
        )

    def _ends(self) -> Literal["float", "integer"] | None:
        """What all inputs and outputs are; None where they differ."""
        tensors = [self._tensors[i] for slot in (1, 2) for i in self._indices(self._graph, slot) if i >= 0]
        found: set[Literal["float", "integer"]] = {
            "float" if tensor.type in FLOATS else "integer" for tensor in tensors if tensor.is_value
        }
        return next(iter(found)) if len(found) == 1 else None

    def _indices(self, table: FlatTable, slot: int) -> list[int]:
        """Indices of tensors; -1 stands for one that is left out.

        Raises:
            ArtefactError: there is no such tensor.
        """
        found = [int(index) for index in table.numbers(slot, "i4")]
        wrong = next((index for index in found if not -1 <= index < len(self._tensors)), None)
        if wrong is not None:
            raise ArtefactError(
                f"{self._label}: names tensor {wrong} of {len(self._tensors)}. Convert the model again."
            )
        return found

    def _tensor(self, table: FlatTable, index: int, names: set[str]) -> _Tensor:
        name = table.text(3) or f"tensor_{index}"
        name = f"{name}#{index}" if name in names else name
        names.add(name)
        signature = table.numbers(7, "i4")
        sizes = signature if len(signature) else table.numbers(0, "i4")
        shape = tuple(int(size) for size in sizes[:64])
        kind = table.integer(1, "b")
        quantization = table.table(4)
        encoding = None if quantization is None else self._encoding(quantization, name, kind, shape)
        return _Tensor(name, shape, kind, table.integer(2, "I"), encoding)

    def _encoding(self, table: FlatTable, name: str, kind: int, shape: tuple[int, ...]) -> Encoding | None:
        stored, details = TYPES.get(kind), table.integer(4, "B")
        scales = table.numbers(2, "f4").astype(np.float64)
        if stored is None or (not len(scales) and details != _BLOCKWISE):
            return None
        if details:
            self._remarks.append(f"{name}: scales per block are not read")
            return None
        zeros = table.numbers(3, "i8").astype(np.int64)
        type_name, bits, signed = stored
        return encoding_of(
            f"{self._label}: {name}",
            scales,
            zeros if len(zeros) else np.zeros(1, np.int64),
            bits=bits,
            signed=signed,
            axis=table.integer(6),
            shape=shape if len(scales) > 1 else None,
            type=type_name,
        )

    def _data(self, tensor: _Tensor) -> NDArray[Any]:
        """Bytes of a stored tensor, not copied; empty for one that is computed."""
        whole = np.frombuffer(self._raw, np.uint8)
        if not 0 < tensor.buffer < len(self._buffers):
            return whole[:0]
        table = self._buffers[tensor.buffer]
        held = table.numbers(0, "u1")
        if len(held):
            return held
        start, size = table.integer(1, "Q"), table.integer(2, "Q")
        return whole[start : start + size] if start > 1 else whole[:0]

    def _is_constant(self, index: int) -> bool:
        return index >= 0 and len(self._data(self._tensors[index])) > 0

    def _constant(self, index: int) -> Constant:
        tensor = self._tensors[index]
        shape = tuple(max(size, 0) for size in tensor.shape)
        stored = TYPES.get(tensor.type)
        if stored is None or tensor.encoding is None:
            return Constant(tensor.name, shape, tensor.encoding)
        codes = self._codes_of(tensor, stored[1], stored[2], math.prod(shape))
        return Constant(tensor.name, shape, tensor.encoding, codes.reshape(shape))

    def _codes_of(self, tensor: _Tensor, bits: int, signed: bool, count: int) -> NDArray[Any]:
        raw, where = self._data(tensor), f"{self._label}: {tensor.name}"
        if count * bits > len(raw) * 8:
            raise ArtefactError(
                f"{where}: shape {list(tensor.shape)} needs more data than is stored. Convert the model again."
            )
        if bits >= 8:
            return raw[: count * bits // 8].view(f"<{'i' if signed else 'u'}{bits // 8}")
        per, mask = 8 // bits, (1 << bits) - 1  # the first code lies in the lowest bits
        packed = raw[: -(-count // per)]
        codes = np.stack([(packed >> (bits * place)) & mask for place in range(per)], 1).reshape(-1)[:count]
        codes = codes.astype(np.int16)
        return np.where(codes >= 1 << (bits - 1), codes - (1 << bits), codes) if signed else codes

    def _small(self, index: int) -> list[int] | None:
        """Values of a stored int32 tensor of few elements."""
        if not self._is_constant(index) or self._tensors[index].type != 2:
            return None
        raw = self._data(self._tensors[index])
        return [int(value) for value in raw[: len(raw) // 4 * 4].view("<i4")[:64]]

    def _operator(self, table: FlatTable, index: int) -> list[ArtefactOperator]:
        code = table.integer(0, "I")
        if code >= len(self._codes):
            raise ArtefactError(
                f"{self._label}: operator {index} has code {code} of {len(self._codes)}. Convert the model again."
            )
        name, kind = self._codes[code]
        inputs, outputs = self._indices(table, 1), self._indices(table, 2)
        if not outputs or outputs[0] < 0:
            return []
        if name in ("QUANTIZE", "DEQUANTIZE"):
            if inputs and inputs[0] >= 0:
                self._root[outputs[0]] = self._root[inputs[0]]
            return []
        numbers = [i for i in inputs if i >= 0 and self._tensors[i].is_value]
        constants = [i for i in numbers if self._is_constant(i)]
        values = [i for i in numbers if i not in constants]
        if not values:
            return []
        node = self._tensors[outputs[0]].name
        return self._computed(node, name, kind, table.table(4), inputs, outputs, values, constants)

    def _computed(
        self,
        node: str,
        name: str,
        kind: str,
        options: FlatTable | None,
        inputs: Sequence[int],
        outputs: Sequence[int],
        values: Sequence[int],
        constants: Sequence[int],
    ) -> list[ArtefactOperator]:
        weight, bias = self._parameters(name, inputs, constants)
        source = self._tensors[values[0]].shape
        axes = self._small(inputs[1]) if kind.startswith("Reduce") and len(inputs) > 1 else None
        shape = self._tensors[weight].shape if weight is not None else None
        kind, facts = facts_of(name, kind, options, source, shape, axes)
        facts |= {"rank": max(len(self._tensors[outputs[0]].shape), len(source)), "inputs": len(values)}
        if len(source) == 4:
            facts |= {"height": source[1], "width": source[2]} | (
                {"spatial": list(source[1:3])} if "kernel" in facts else {}
            )
        if weight is not None and kind in _TWO:
            facts["weight_operand"] = 0 if inputs[0] == weight else 1
        out_axis, in_axis = {"CONV_2D": (0, 3), "TRANSPOSE_CONV": (0, 3), "DEPTHWISE_CONV_2D": (3, None),
                             "FULLY_CONNECTED": (0, 1)}.get(name, (None, None))  # fmt: skip
        activation = activation_of(name, options)
        output = self._use(outputs[0])
        fused = ACTIVATIONS.get(activation)
        inner = Use(f"{output.tensor}/before", None, output.shape) if fused is not None else output
        uses = tuple(self._use(i) for i in values)
        first = ArtefactOperator(
            name=node, kind=kind, type=name, inputs=uses, output=inner,
            weight=self._constant(weight) if weight is not None else None,
            bias=self._constant(bias) if bias is not None else None,
            weight_axis=out_axis, input_axis=in_axis, attributes=facts, is_integer=uses[0].encoding is not None,
            more_outputs=tuple(self._use(i) for i in outputs[1:] if i >= 0),
        )  # fmt: skip
        if fused is None:
            return [first]
        kind, bounds = fused
        follower = ArtefactOperator(
            name=f"{node}/{kind.lower()}", kind=kind, type=f"{name} with a fused activation", inputs=(inner,),
            output=output, attributes=bounds | {"rank": facts["rank"], "inputs": 1}, is_integer=first.is_integer,
        )  # fmt: skip
        return [first, follower]

    def _parameters(self, name: str, inputs: Sequence[int], constants: Sequence[int]) -> tuple[int | None, int | None]:
        """Indices of the constant operand and of the bias."""

        def at(position: int) -> int | None:
            index = inputs[position] if position < len(inputs) else -1
            return index if index in constants else None

        if name in ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED"):
            return at(1), at(2)
        if name == "TRANSPOSE_CONV":
            return at(1), at(3)
        if name in ("ADD", "SUB", "MUL", "DIV", "MAXIMUM", "MINIMUM", "BATCH_MATMUL"):
            return at(1) if at(1) is not None else at(0), None
        return (at(1), None) if name == "PRELU" else (None, None)

    def _use(self, index: int) -> Use:
        tensor = self._tensors[index]
        shape = tuple(size if size >= 0 else None for size in tensor.shape)
        return Use(self._root[index], tensor.encoding, shape)


def _operator_code(table: FlatTable) -> tuple[str, str]:
    """TFLite's name and the kind; `Unknown` for what has none."""
    code = max(table.integer(3), table.integer(0, "b"))
    found = KINDS.get(code)
    if found is not None:
        return found
    return table.text(1) or f"builtin operator {code}", "Unknown"


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Reads quantized TFLite models for qhw check.")


@hookimpl
def qhw_register_readers() -> list[type[ArtefactReader]]:
    return [TfliteReader]
