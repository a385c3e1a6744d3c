# SPDX-License-Identifier: Apache-2.0
"""`qhw.check`: anybody's quantized model held against a target, clause by clause."""

import os
from pathlib import Path

from qhw.api import load_target
from qhw.engine import blaming, must_be
from qhw.errors import ArtefactError, PluginError, QhwError
from qhw.extension import ArtefactReader, Entry, Registry, default_registry
from qhw.legality import Artefact, CheckReport, judge
from qhw.schema import TargetSpec

__all__ = ["check"]

_HEAD_BYTES = 4096


def check(
    path: str | os.PathLike[str],
    target: TargetSpec | str | os.PathLike[str],
    *,
    model: str | os.PathLike[str] | None = None,
    host_allowed: bool = True,
    registry: Registry | None = None,
) -> CheckReport:
    """Judge whether a quantized model keeps to what a target states. The model need not be made with qhw.

    Args:
        path: A file that an installed reader recognizes: ONNX (QDQ or QOperator), TFLite, AIMET encodings.
        target: A target, its name, or a path to its file.
        model: The ONNX model that encodings belong to; absent: tensors are judged by themselves.
        host_allowed: False: an operator that the accelerator does not run is a violation, also where the target's
            fallback is the host.
        registry: Plugins to use; absent: all that are installed.

    Returns:
        CheckReport: every violation with its clause, and apart from them what the target leaves open.

    Raises:
        ArtefactError: the file cannot be read, or does not hold together.
        TargetError: no such target.
    """
    registry = registry or default_registry()
    spec = target if isinstance(target, TargetSpec) else load_target(target, registry=registry)
    place = Path(path)
    entry = _reader_of(place, registry)
    try:
        artefact = entry.value().read(place, None if model is None else Path(model))
    except QhwError:
        raise
    except Exception as error:  # a stranger's reader, or a file that nobody foresaw: never a traceback for the user
        text = " ".join(str(error).split())[:160].rstrip(".")
        raise ArtefactError(
            f"{place}: reader '{entry.name}' cannot make sense of it: {type(error).__name__}: {text}. "
            "Export the file again, or report it."
        ) from error
    artefact = must_be(artefact, Artefact, entry.record, f"reader '{entry.name}': read")
    return judge(artefact, spec, str(place), host_allowed=host_allowed)


def _reader_of(path: Path, registry: Registry) -> Entry[type[ArtefactReader]]:
    """The first reader, by name, that recognizes a file."""
    if not registry.readers:
        raise PluginError(
            "no loaded plugin reads quantized models. See 'qhw plugin list' for what QHW_BLOCK leaves out."
        )
    try:
        if path.exists() and not path.is_file():
            artefacts = sorted(path.glob("artefacts/*"))  # of a result folder
            fix = f"Its artefact: {artefacts[0]}" if artefacts else "Check the path."
            raise ArtefactError(f"{path}: must be a file; got a folder or a device. {fix}")
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except (OSError, ValueError) as error:
        raise ArtefactError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}. Check the path.") from error
    for entry in registry.readers.values():
        with blaming(entry.record, f"reader '{entry.name}': recognizes"):
            if entry.value().recognizes(path, head):
                return entry
    known = " ".join(entry.value.summary for entry in registry.readers.values())
    raise ArtefactError(f"{path}: is of no form that can be read. Readers: {known}")
