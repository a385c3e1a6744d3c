# SPDX-License-Identifier: Apache-2.0
"""One finished layer as a file: what was changed, its figures, and the facts it depends on. Plain data, no code."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, uint8

from qhw.decisions import Json
from qhw.errors import QhwError, ResultError
from qhw.numerics import QParams

__all__ = ["Facts", "KeptLayer", "content_digest", "from_bytes", "to_bytes"]

Facts = Mapping[str, Json]
"""Everything that decides a layer's result, by name."""

_ENTRY = "qhw_layer"


@dataclass(frozen=True)
class KeptLayer:
    """What a step made of one layer.

    Attributes:
        tensors: Name in the state dict -> new value, of the weight and the bias where they changed.
        qparams: The weight's scale and zero point, where they changed.
        figures: For the step's report.
    """

    tensors: Mapping[str, Tensor]
    qparams: QParams | None
    figures: dict[str, Json]


def to_bytes(layer: KeptLayer, facts: Facts) -> bytes:
    """The file: safetensors whose header holds the rest as JSON, and a digest of it all.

    Raises:
        TypeError: a figure is no JSON value.
    """
    tensors = {f"tensors/{name}": value.contiguous() for name, value in layer.tensors.items()}
    header = None
    if layer.qparams is not None:
        parts, header = layer.qparams.as_dict()
        tensors |= {f"qparams/{name}": value.contiguous() for name, value in parts.items()}
    text = json.dumps({"facts": dict(facts), "figures": layer.figures, "qparams": header})
    return bytes(save(tensors, metadata={_ENTRY: text, "sha256": content_digest(tensors, text)}))


def from_bytes(content: bytes) -> tuple[Facts, KeptLayer]:
    """The facts and the layer that `to_bytes` wrote.

    Raises:
        ResultError: the bytes are no such file, or are damaged.
    """
    try:
        end = 8 + int.from_bytes(content[:8], "little")  # safetensors: length of the header, header, tensors
        entries = json.loads(content[8:end])["__metadata__"]
        tensors = load(content)
        if entries["sha256"] != content_digest(tensors, entries[_ENTRY]):
            raise ValueError("SHA-256 differs")
        data = json.loads(entries[_ENTRY])
        own = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("tensors/")}
        parts = {name.partition("/")[2]: value for name, value in tensors.items() if name.startswith("qparams/")}
        qparams = None if data["qparams"] is None else QParams.from_dict(parts, data["qparams"])
        return dict(data["facts"]), KeptLayer(own, qparams, dict(data["figures"]))
    except (SafetensorError, QhwError, LookupError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ResultError("is damaged, or no file of qhw") from error


def content_digest(tensors: Mapping[str, Tensor], text: str) -> str:
    """SHA-256 of tensors by name, and of a text."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(uint8).numpy().data)
    return digest.hexdigest()
