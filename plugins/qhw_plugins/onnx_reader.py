# SPDX-License-Identifier: Apache-2.0
"""Reader `onnx`: quantized ONNX models, as QuantizeLinear / DequantizeLinear pairs or integer operators."""

from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from qhw.errors import ArtefactError
from qhw.extension import ArtefactReader, PluginInfo, hookimpl
from qhw.legality import Artefact
from qhw_plugins.onnx_artefact import OnnxArtefact
from qhw_plugins.onnx_stored import read_model_bytes

__all__ = ["parse_onnx"]

_NEWEST_IR = 99


class OnnxReader(ArtefactReader):
    """Reads `.onnx` files; nothing of one is run, and external data is read from its own folder alone."""

    name = "onnx"
    summary = "ONNX, QDQ or QOperator (.onnx)."

    def recognizes(self, path: Path, head: bytes) -> bool:
        """By its suffix, or by the IR version that a model starts with."""
        starts = len(head) > 2 and head[0] == 0x08 and 1 <= head[1] <= _NEWEST_IR and head[2] & 7 == 2
        return path.suffix.lower() == ".onnx" or starts

    def read(self, path: Path, model: Path | None) -> Artefact:
        """The model.

        Raises:
            ArtefactError: the file is no ONNX model, or does not hold together.
        """
        if model is not None:
            raise ArtefactError(f"{path}: is a model already, and --model goes with encodings. Leave it out.")
        return OnnxArtefact(parse_onnx(path), path.parent, str(path)).read()


def parse_onnx(path: Path) -> onnx.ModelProto:
    """The model in a file, its external data not read yet.

    Raises:
        ArtefactError: the file is none.
    """
    raw = read_model_bytes(path)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(raw)
    except (DecodeError, ValueError, RecursionError, MemoryError) as error:
        raise ArtefactError(f"{path}: is no ONNX model: its bytes do not parse. Export it again.") from error
    if any(isinstance(text, bytes) for text in _texts(model.graph)):
        raise ArtefactError(f"{path}: is damaged: a name in it is no Unicode text. Export the model again.")
    if not model.graph.node:
        raise ArtefactError(f"{path}: must hold an ONNX graph; got one without operators. Export the model again.")
    return model


def _texts(graph: onnx.GraphProto) -> Iterator[str | bytes]:
    """Every name in a graph; protobuf gives bytes for what is no Unicode text."""
    for node in graph.node:
        yield from (node.op_type, node.name, node.domain, *node.input, *node.output)
        for item in node.attribute:
            yield from (item.name, item.t.name)
    for tensor in graph.initializer:
        yield tensor.name
        for entry in tensor.external_data:
            yield from (entry.key, entry.value)
    for info in (*graph.input, *graph.output, *graph.value_info):
        yield info.name


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Reads quantized ONNX models for qhw check.")


@hookimpl
def qhw_register_readers() -> list[type[ArtefactReader]]:
    return [OnnxReader]
