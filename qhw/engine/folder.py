# SPDX-License-Identifier: Apache-2.0
"""The result folder: written once, whole or not at all; read back without running code."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensors_as_bytes
from torch import Tensor

from qhw import __version__
from qhw.decisions import QuantPlan, StepReport
from qhw.engine.number_formats import elements_of
from qhw.engine.result import QuantizedModel
from qhw.engine.select import target_fingerprint
from qhw.engine.unfinished import set_aside, unfinished_folder
from qhw.errors import PlanError, QhwError, ResultError, TargetError
from qhw.extension import Registry
from qhw.graph import graph_from_json, graph_to_json
from qhw.graph.verify import verify_finite
from qhw.numerics import FoldedBatchNorm, QParams
from qhw.schema import TargetSpec, load_target_file, to_json

__all__ = [
    "artefacts_of",
    "changed_artefacts",
    "is_result_folder",
    "load_result",
    "save_result",
    "why_not_written",
    "written_files",
    "written_whole",
]

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
_RESTORE = "Restore the file, or quantize again."
_SAMPLES = "samples.safetensors"
_FILES = ("target.json", "plan.json", "graph.json", "tensors.safetensors", "steps.json")


def save_result(
    result: QuantizedModel,
    folder: Path,
    write_more: Callable[[Path], Any] | None = None,
    *,
    keep_samples: bool = True,
) -> Path:
    """Write a result folder.

    Args:
        result: The quantized model.
        folder: Where. A result folder that stands there is replaced; any other content is left alone and refused.
        write_more: Called with the unfinished folder, to add `artefacts/` and the like.
        keep_samples: Whether the few calibration samples that the result holds are written, too.

    Raises:
        ResultError: the place is taken or cannot be written.
    """
    with written_whole(folder, _check_place) as inside:
        graph = result.float_graph
        tensors, headers, norms = _tensors(result)
        _write(inside / "target.json", to_json(result.target).encode())
        _write(inside / "plan.json", result.plan.to_json().encode())
        _write(inside / "graph.json", graph_to_json(graph).encode())
        _write(inside / "tensors.safetensors", tensors_as_bytes(tensors))
        reports = [report.model_dump(mode="json") for report in result.steps]
        _write(inside / "steps.json", _json({"steps": reports, "encodings": headers, "batch_norms": norms}))
        if keep_samples and result.samples:
            _write(inside / _SAMPLES, tensors_as_bytes({n: t.contiguous() for n, t in result.samples.items()}))
        if write_more is not None:
            write_more(inside)
        _write(inside / MANIFEST, _json(_manifest(result, inside)))
    return folder


def load_result(folder: Path, registry: Registry | None = None) -> QuantizedModel:
    """Read a result folder.

    Args:
        folder: What `save_result` wrote.
        registry: Plugins that know kinds of numbers; absent: all that are installed, asked only where one is needed.

    Raises:
        ResultError: it is no result folder, a file is missing or was changed, or does not fit the others.
    """
    manifest = _read_manifest(folder)
    for name in (*_FILES, *((_SAMPLES,) if _SAMPLES in manifest["files"] else ())):
        _check_hash(folder / name, manifest["files"].get(name))
    try:
        return _read_result(folder, manifest.get("provenance", {}), _SAMPLES in manifest["files"], registry)
    except ResultError:
        raise
    except QhwError as error:  # of the target, the plan, the graph or the scales; says which file
        raise ResultError(f"{folder}: cannot be read: {error}") from error
    # What json, pydantic and torch raise on data that no writer of ours made.
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        what = (str(error).strip() or "damaged").splitlines()[0][:200]
        raise ResultError(f"{folder}: cannot be read: {type(error).__name__}: {what}. Quantize again.") from error


def artefacts_of(folder: Path) -> list[Path]:
    """The artefact's files in a result folder, as its manifest lists them; empty for a result that was not exported.

    Raises:
        ResultError: it is no result folder, or a file is missing.
    """
    listed = [folder / name for name in sorted(_read_manifest(folder)["files"]) if name.startswith("artefacts/")]
    for path in listed:
        if not path.is_file():
            raise ResultError(f"{path}: is missing. Quantize again, or restore the file.")
    return listed


def changed_artefacts(folder: Path) -> list[str]:
    """Names of the artefact's files that are not what was exported.

    Raises:
        ResultError: it is no result folder.
    """
    files = _read_manifest(folder)["files"]
    return [
        name
        for name, digest in sorted(files.items())
        if name.startswith("artefacts/") and (folder / name).is_file() and _sha256(folder / name) != digest
    ]


def _read_result(folder: Path, provenance: Any, has_samples: bool, registry: Registry | None) -> QuantizedModel:
    target, plan = _read_target(folder / "target.json"), _read_plan(folder / "plan.json")
    if (target.name, target_fingerprint(target)) != (plan.target, plan.target_fingerprint):
        raise ResultError(f"{folder}: target.json and plan.json do not belong together. Quantize again.")
    steps = json.loads(_text(folder / "steps.json"))
    tensors = _load_tensors(folder / "tensors.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(("qparams/", "batch_norms/"))}
    graph = graph_from_json(_text(folder / "graph.json"), own, where=str(folder / "graph.json"))
    verify_finite(graph, str(folder / "tensors.safetensors"))
    formats = {point.group: point.format for point in plan.points if point.role != "bias"}
    qparams = {}
    for group, header in steps["encodings"].items():
        elements = elements_of(target, formats[group], registry) if group in formats else None
        qparams[group] = QParams.from_dict(_part(tensors, f"qparams/{group}/"), header, elements)
    norms = {
        name: FoldedBatchNorm.from_dict(_part(tensors, f"batch_norms/{name}/"), header)
        for name, header in steps.get("batch_norms", {}).items()
    }
    reports = tuple(StepReport.model_validate_json(json.dumps(report)) for report in steps["steps"])
    samples = _load_tensors(folder / _SAMPLES) if has_samples else {}
    return QuantizedModel(graph, plan, target, qparams, reports, provenance, samples, norms)


def _read_target(path: Path) -> TargetSpec:
    try:
        return load_target_file(path)
    except TargetError as error:  # it says how to write a target, which is nobody's wish here
        raise ResultError(f"{path}: is damaged, and no target any more. {_RESTORE}") from error


def _read_plan(path: Path) -> QuantPlan:
    try:
        return QuantPlan.from_json(_text(path), where=str(path))
    except PlanError as error:
        raise ResultError(f"{path}: is damaged, and no plan any more. {_RESTORE}") from error


@contextmanager
def written_whole(folder: Path, check: Callable[[Path], None]) -> Iterator[Path]:
    """A temporary folder beside the wanted one, moved into place when the block ends well, removed when it does not.

    Args:
        folder: The wanted one; what stands there is replaced.
        check: Called with it first, to refuse a place where something would be lost.

    Raises:
        ResultError: the place cannot be written.
    """
    with ExitStack() as stack:
        try:
            check(folder)
            folder.parent.mkdir(parents=True, exist_ok=True)
            inside = stack.enter_context(unfinished_folder(folder.parent, folder.name))
        except OSError as error:
            raise ResultError(
                f"{folder}: cannot be written: {why_not_written(folder, error)}. Choose another --out."
            ) from error
        try:
            yield inside
            _move(inside, folder)
        except OSError as error:
            raise ResultError(
                f"{folder}: cannot be written: {why_not_written(folder, error)}. Nothing was kept."
            ) from error


@contextmanager
def written_files(folder: Path) -> Iterator[Path]:
    """A temporary folder inside the wanted one; when the block ends well, its files replace those of the same name."""
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            inside = stack.enter_context(unfinished_folder(folder, "files"))
        except OSError as error:
            raise ResultError(
                f"{folder}: cannot be written: {why_not_written(folder, error)}. Choose another folder."
            ) from error
        try:
            yield inside
            for file in sorted(path for path in inside.rglob("*") if path.is_file()):
                place = folder / file.relative_to(inside)
                place.parent.mkdir(parents=True, exist_ok=True)
                file.replace(place)
        except OSError as error:
            raise ResultError(
                f"{folder}: cannot be written: {why_not_written(folder, error)}. Nothing was kept."
            ) from error


def _check_place(folder: Path) -> None:
    """Refuse a place where something of the user's would be overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ResultError(f"{folder}: is a file or a link, not a folder. Choose another --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not is_result_folder(folder):
        raise ResultError(f"{folder}: holds other files, and they are not overwritten. Choose another --out.")
    try:
        ours = _read_manifest(folder)["files"]
    except ResultError as error:
        raise ResultError(
            f"{folder}: holds a result that is damaged or of another version, and it is not overwritten. "
            "Remove it, or choose another --out."
        ) from error
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if not path.is_dir() and name not in (*ours, MANIFEST) and not name.startswith("artefacts/"):
            raise ResultError(
                f"{folder}: holds '{name}', which is no part of the result, and it is not overwritten. "
                "Move it, or choose another --out."
            )


def _move(inside: Path, folder: Path) -> None:
    """Swap the finished folder in; what stood there is removed only once the new one is in place."""
    inside.chmod(0o755)
    if folder.is_dir():
        old = set_aside(inside)
        folder.replace(old)
        try:
            inside.replace(folder)
        except BaseException:
            old.replace(folder)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        inside.replace(folder)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _json(data: Any) -> bytes:
    return (json.dumps(data, indent=1, sort_keys=True) + "\n").encode()


def _tensors(result: QuantizedModel) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """All tensors by name, shared ones once; plain fields of encodings by group, of folded batch norms by operator."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    module = result.float_graph.module
    everything = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        if id(tensor) not in seen:
            seen.add(id(tensor))
            # A clone: tensors that are views of one storage are refused by safetensors.
            tensors[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    headers: dict[str, Any] = {}
    for group, qparams in result.encodings().items():
        parts, headers[group] = qparams.as_dict()
        tensors.update({f"qparams/{group}/{field}": t.contiguous() for field, t in parts.items()})
    norms: dict[str, Any] = {}
    for name, norm in result.folded_norms.items():
        parts, norms[name] = norm.as_dict()
        tensors.update({f"batch_norms/{name}/{field}": t.contiguous() for field, t in parts.items()})
    return dict(sorted(tensors.items())), headers, norms


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin so, by the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _manifest(result: QuantizedModel, inside: Path) -> dict[str, Any]:
    files = [path for path in sorted(inside.rglob("*")) if path.is_file()]
    return {
        "format_version": FORMAT_VERSION,
        "qhw": __version__,
        "target": result.target.name,
        "model_fingerprint": result.plan.model_fingerprint,
        "provenance": result.provenance,
        "files": {path.relative_to(inside).as_posix(): _sha256(path) for path in files},
    }


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not (folder / MANIFEST).is_file():
        raise ResultError(f"{folder}: is no result folder (no {MANIFEST}). Give the folder that 'qhw quantize' wrote.")
    try:
        manifest = json.loads(_text(folder / MANIFEST))
        version = manifest["format_version"]
        files = manifest["files"]
    except (ValueError, LookupError, TypeError, RecursionError) as error:
        raise ResultError(f"{folder / MANIFEST}: is damaged. Quantize again, or restore the file.") from error
    if version != FORMAT_VERSION or not isinstance(files, dict):
        raise ResultError(f"{folder / MANIFEST}: format_version must be {FORMAT_VERSION}; got {version!r}.")
    return dict(manifest)


def _check_hash(path: Path, wanted: str | None) -> None:
    if not path.is_file():
        raise ResultError(f"{path}: is missing. Quantize again, or restore the file.")
    if _sha256(path) != wanted:
        raise ResultError(f"{path}: was changed since it was written (SHA-256 differs). Quantize again, or restore it.")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ResultError(f"{path}: cannot be read: {error}. Quantize again, or restore the file.") from error


def _load_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return dict(load_tensors(path.read_bytes()))
    except (SafetensorError, OSError, ValueError) as error:
        raise ResultError(f"{path}: holds no tensors: {error}. Quantize again, or restore the file.") from error


def why_not_written(path: Path, error: OSError) -> str:
    """The reason in the user's terms: the system's is no help where a file stands in place of a folder."""
    parts = (path, *path.parents) if isinstance(error, FileExistsError) else path.parents
    blocking = next((part for part in parts if part.is_file()), None)
    return f"'{blocking}' is a file, not a folder" if blocking is not None else str(error.strerror or error)


def is_result_folder(path: Path) -> bool:
    """Whether a folder holds a result."""
    return (path / MANIFEST).is_file()
