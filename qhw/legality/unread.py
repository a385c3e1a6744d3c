# SPDX-License-Identifier: Apache-2.0
"""What a target states of files and this check does not look at, so that no report passes over it in silence."""

from collections.abc import Collection, Iterator
from typing import Any

from qhw.legality.artefact import Artefact
from qhw.legality.report import Unread
from qhw.schema import TargetSpec, recorded_fields

__all__ = ["unread_clauses"]

_NO_FORM = ("any", "none")
"""File formats that ask for nothing."""


def unread_clauses(
    target: TargetSpec, artefact: Artefact, kinds: Collection[str], kernels: Collection[str]
) -> Iterator[Unread]:
    """Fields that constrain files, that the target sets, and that were not judged.

    Args:
        target: The accelerator.
        artefact: The model.
        kinds: Operator kinds of the artefact.
        kernels: Kernels that its operators were held to.
    """
    formats = {name for kernel in kernels for name in target.kernels[kernel].formats()}
    for path in recorded_fields(target, judged=False):
        value = _at(target, path)
        section, entry = path[0], path[1]
        if value == "unknown" or (section == "operators" and entry not in kinds):
            continue
        if section == "formats" and entry not in formats:
            continue
        if path[-1] == "file_format" and (value in _NO_FORM or artefact.form in value):
            continue
        if path[-1] == "packing" and value == "low_first":  # as ONNX and TFLite have it
            continue
        words = str(value)
        if path[-1] == "artefact_io" and artefact.ends is not None:
            if value == artefact.ends:
                continue
            words += f"; this file takes and gives {'real numbers' if artefact.ends == 'float' else 'codes'}"
        yield Unread(".".join(map(str, path)), words)
    for name, memory in target.memories.items():
        if memory.past_capacity == "refuse" and isinstance(memory.holds, tuple) and "activations" in memory.holds:
            yield Unread(f"memories.{name}.capacity_bytes", f"{memory.capacity_bytes}, for activations")


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for part in path:
        value = value[part] if isinstance(value, dict) else getattr(value, str(part))
    return value
