# SPDX-License-Identifier: Apache-2.0
"""Reader `aimet`: encodings files of AIMET, versions 0.6.1, 1.0.0 and 2.0.0, with or without their ONNX model.

real = scale (code + offset), with codes from 0: an offset is a negative zero point, and no sign is stated.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from qhw.decisions import listed
from qhw.errors import ArtefactError
from qhw.extension import ArtefactReader, PluginInfo, hookimpl
from qhw.legality import Artefact, Encoding, encoding_of
from qhw_plugins.onnx_artefact import OnnxArtefact
from qhw_plugins.onnx_reader import parse_onnx
from qhw_plugins.onnx_stored import read_model_bytes

_MAX_BYTES = 2**28
_VERSIONS = ("0.6.1", "1.0.0", "2.0.0")
_SECTIONS = (b'"activation_encodings"', b'"param_encodings"', b'"encodings"')


class AimetReader(ArtefactReader):
    """Reads `.encodings` and `.json` files."""

    name = "aimet"
    summary = "AIMET encodings (.encodings, .json), with the model behind --model."

    def recognizes(self, path: Path, head: bytes) -> bool:
        """By its suffix, or by the sections that a JSON object starts with."""
        is_object = head.lstrip()[:1] == b"{"
        return (
            path.suffix.lower() == ".encodings"
            or (is_object and any(key in head for key in _SECTIONS))
            or (is_object and path.suffix.lower() == ".json")
        )

    def read(self, path: Path, model: Path | None) -> Artefact:
        """The encodings, and what the model makes of them.

        Raises:
            ArtefactError: the file holds no encodings of a version that is known, or the model cannot be read.
        """
        data = _parsed(path)
        activations, parameters, remarks = _encodings(data, str(path))
        if model is None:
            said = "no model was given, so that tensors are judged by themselves: --model net.onnx"
            return Artefact("AIMET encodings", activations=activations, parameters=parameters, remarks=(said, *remarks))
        everything = {**parameters, **activations}  # version 2.0.0 does not say which is which
        proto = parse_onnx(model)
        artefact = OnnxArtefact(proto, model.parent, str(model), everything).read("AIMET encodings")
        return replace(artefact, remarks=(*artefact.remarks, *remarks, *_strangers(proto, everything)))


def _strangers(model: Any, names: Iterable[str]) -> list[str]:
    """What is said of encodings of tensors that a model does not have: exporters rename tensors."""
    graph = model.graph
    known = {output for node in graph.node for output in node.output}
    known |= {value.name for values in (graph.input, graph.initializer) for value in values}
    strange = sorted(set(names) - known)
    return [f"encodings of tensors that the model does not have: {listed(strange, 1)}"] if strange else []


def _parsed(path: Path) -> dict[str, Any]:
    raw = read_model_bytes(path)
    if len(raw) > _MAX_BYTES:
        raise ArtefactError(f"{path}: must be at most {_MAX_BYTES} bytes; got {len(raw)}. Is this an encodings file?")
    try:
        data = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = "nests too deep" if isinstance(error, RecursionError) else " ".join(str(error).split())[:120]
        raise ArtefactError(f"{path}: is no JSON: {reason}. Export the encodings again.") from error
    if not isinstance(data, dict) or not {"activation_encodings", "param_encodings", "encodings"} & set(data):
        raise ArtefactError(f"{path}: must hold activation_encodings or param_encodings. Is this an encodings file?")
    return data


def _encodings(data: Mapping[str, Any], label: str) -> tuple[dict[str, Encoding], dict[str, Encoding], list[str]]:
    """Encodings of activations and of parameters by name, and what was passed over."""
    version = data.get("version", "0.6.1")
    if version not in _VERSIONS:
        known = ", ".join(_VERSIONS)
        raise ArtefactError(f"{label}: version must be one of {known}; got {str(version)[:40]!r}. Export them again.")
    found: dict[str, dict[str, Encoding]] = {"activation_encodings": {}, "param_encodings": {}}
    passed: list[str] = []
    if version == "2.0.0":
        for name, entry in _named(data.get("encodings"), label):
            if not isinstance(entry, dict):
                raise ArtefactError(f"{label}: {name}: must be an object; got {type(entry).__name__}. Export it again.")
            encoding = _of_version_2(entry, f"{label}: {name}")
            if encoding is None:
                passed.append(name)
            elif encoding.axis is None and not _looks_like_parameter(name):
                found["activation_encodings"][name] = encoding
            else:
                found["param_encodings"][name] = encoding
        return found["activation_encodings"], found["param_encodings"], _passed(passed)
    for section, encodings in found.items():
        for name, entry in _named(data.get(section, {}), label):
            read = _of_version_0 if isinstance(entry, list) else _of_version_1
            encoding = read(entry, f"{label}: {name}", section == "param_encodings")
            if encoding is None:
                passed.append(name)
            else:
                encodings[name] = encoding
    return found["activation_encodings"], found["param_encodings"], _passed(passed)


def _passed(names: list[str]) -> list[str]:
    return [f"{len(names)} encodings of floats or without a scale were passed over"] if names else []


def _looks_like_parameter(name: str) -> bool:
    return name.endswith((".weight", ".bias"))


def _named(section: Any, label: str) -> Iterator[tuple[str, Any]]:
    if isinstance(section, dict):
        yield from ((str(name)[:300], entry) for name, entry in section.items())
    elif isinstance(section, list):
        for entry in section:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise ArtefactError(f"{label}: each encoding must be an object with a name. Export them again.")
            yield entry["name"][:300], entry
    else:
        raise ArtefactError(f"{label}: encodings must be an object or a list; got {type(section).__name__}.")


def _number(entry: Mapping[str, Any], key: str, where: str, default: Any = None) -> Any:
    value = entry.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 2**62:
        raise ArtefactError(f"{where}: {key} must be a number; got {str(value)[:40]!r}. Export the encodings again.")
    return value


def _whole(value: float, key: str, where: str) -> int:
    """An integer that may be written as a float."""
    if value != round(value):
        raise ArtefactError(f"{where}: {key} must be an integer; got {value:g}. Export the encodings again.")
    return round(value)


def _width(entry: Mapping[str, Any], key: str, where: str, default: Any = None) -> int:
    """A width in bits, before anything is shifted by it."""
    bits = int(_number(entry, key, where, default))
    if not 1 <= bits <= 64:
        raise ArtefactError(f"{where}: {key} must be from 1 to 64; got {bits}. Export the encodings again.")
    return bits


def _numbers(entry: Mapping[str, Any], key: str, where: str) -> list[float]:
    value = entry.get(key)
    given: list[Any] = value if isinstance(value, list) else [value]
    flat: list[Any] = np.asarray(given, dtype=object).reshape(-1).tolist() if _is_even(given) else given
    for item in flat:
        if isinstance(item, bool) or not isinstance(item, int | float) or not abs(item) <= 2**62:
            raise ArtefactError(f"{where}: {key} must be numbers; got {str(item)[:40]!r}. Export the encodings again.")
    if not flat:
        raise ArtefactError(f"{where}: {key} must be numbers; got none. Export the encodings again.")
    return [float(item) for item in flat]


def _is_even(given: list[Any]) -> bool:
    return all(isinstance(item, list) for item in given) and len({len(item) for item in given}) == 1


def _of_version_0(entries: Any, where: str, is_parameter: bool) -> Encoding | None:
    """A list of objects, one for each channel."""
    if not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ArtefactError(f"{where}: must be a list of encodings. Export them again.")
    if any(entry.get("dtype", "int") != "int" for entry in entries):
        return None
    bits = {int(_number(entry, "bitwidth", where)) for entry in entries}
    if len(bits) > 1:
        raise ArtefactError(f"{where}: bitwidth must be one for all channels; got {sorted(bits)}. Export them again.")
    scales = [float(_number(entry, "scale", where)) for entry in entries]
    zeros = [-_whole(_number(entry, "offset", where), "offset", where) for entry in entries]
    axis = 0 if is_parameter and len(entries) > 1 else None
    encoding = _made(where, scales, zeros, bits.pop(), axis)
    first = entries[0]
    if "max" in first and "min" in first and scales[0] > 0:
        steps = round((_number(first, "max", where) - _number(first, "min", where)) / scales[0])
        return _with_steps(encoding, steps)
    return encoding


def _with_steps(encoding: Encoding, steps: int) -> Encoding:
    """The grid with that many steps; a strictly symmetric one has one code fewer than its bits allow."""
    return replace(encoding, quant_max=steps) if 0 < steps < encoding.quant_max else encoding


def _of_version_1(entry: Any, where: str, is_parameter: bool) -> Encoding | None:
    if not isinstance(entry, dict):
        raise ArtefactError(f"{where}: must be an object; got {type(entry).__name__}. Export the encodings again.")
    kind = entry.get("enc_type", "PER_TENSOR")
    if entry.get("dtype", "INT") != "INT" or "scale" not in entry:
        return None
    scales, bits = _numbers(entry, "scale", where), _width(entry, "bw", where)
    zeros = [1 << (bits - 1)]
    if "offset" in entry:
        zeros = [-_whole(offset, "offset", where) for offset in _numbers(entry, "offset", where)]
    if kind in ("PER_BLOCK", "LPBQ"):
        held = _width(entry, "compressed_bw", where, bits)
        size = int(_number(entry, "block_size", where))
        return _in_blocks(_made(where, [max(scales)], [1 << (held - 1)], held, None), size)
    axis = 0 if is_parameter and len(scales) > 1 else None
    return _made(where, scales, zeros if len(zeros) in (1, len(scales)) else zeros[:1], bits, axis)


def _in_blocks(encoding: Encoding, size: int) -> Encoding:
    """Blocks along the input channels; how scales are laid out is not stated, so that one stands for all."""
    return replace(encoding, axis=1, block_size=max(size, 1))


def _of_version_2(entry: Mapping[str, Any], where: str) -> Encoding | None:
    kind = str(entry.get("output_dtype", ""))
    if not kind.lstrip("u").startswith("int") or not kind.lstrip("u")[3:].isdigit():
        return None
    bits, signed = int(kind.lstrip("u")[3:][:3]), not kind.startswith("u")
    key = "y_scale" if "y_scale" in entry else "per_channel_float_scale"
    scales = _numbers(entry, key, where)
    zeros = (
        [_whole(zero, "y_zero_point", where) for zero in _numbers(entry, "y_zero_point", where)]
        if entry.get("y_zero_point") is not None
        else [0]
    )
    if "block_size" in entry:
        plain = encoding_of(where, [max(scales)], [0], bits=bits, signed=signed, type=kind)
        return _in_blocks(plain, int(_number(entry, "block_size", where)))
    axis = int(_number(entry, "axis", where)) if len(scales) > 1 else None
    return encoding_of(
        where, scales, zeros if len(zeros) == len(scales) else zeros[:1], bits=bits, signed=signed, axis=axis, type=kind
    )


def _made(where: str, scales: list[float], zeros: list[int], bits: int, axis: int | None) -> Encoding:
    return encoding_of(where, scales, zeros, bits=bits, signed=None, axis=axis, type=f"{bits}-bit integer")


@hookimpl
def qhw_plugin_info() -> PluginInfo:
    return PluginInfo(api=1, summary="Reads AIMET's encodings for qhw check.")


@hookimpl
def qhw_register_readers() -> list[type[ArtefactReader]]:
    return [AimetReader]
