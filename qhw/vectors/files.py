# SPDX-License-Identifier: Apache-2.0
"""The folder of golden vectors: manifest.json, vectors.npz, vectors.h and check.py, whole or not at all."""

import hashlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qhw import __version__
from qhw.engine import Progress, QuantizedModel, written_whole
from qhw.errors import IntegerError, ResultError
from qhw.integer.codes import Codes
from qhw.integer.float_result import in_float, is_float_result
from qhw.integer.model import Executed, IntegerModel
from qhw.vectors.arrays import ArrayStore
from qhw.vectors.collect import VectorReader, codes_array, grid
from qhw.vectors.header import write_header
from qhw.vectors.script import check_script

__all__ = ["FILES", "GoldenVectors", "write_golden"]

FILES = ("check.py", "manifest.json", "vectors.h", "vectors.npz")
_FORMAT = "qhw-golden"
_VERSION = 1


@dataclass(frozen=True)
class GoldenVectors:
    """What was written.

    Attributes:
        folder: Where.
        samples: How many.
        operators: Names, in execution order.
        host: Operators in float32 on the host, which have no vectors.
        header_left_out: Operators whose arrays the C header leaves out.
        num_bytes: Of each file, by name.
    """

    folder: Path
    samples: int
    operators: tuple[str, ...]
    host: tuple[str, ...]
    header_left_out: tuple[str, ...]
    num_bytes: dict[str, int]


def write_golden(
    result: QuantizedModel,
    samples: Sequence[tuple[Tensor, ...]],
    folder: Path,
    *,
    header_limit: int,
    progress: Progress,
) -> GoldenVectors:
    """Run samples in the target's integer arithmetic and write every operator's vectors.

    Samples are run one by one, and what an operator read and wrote goes to the disk at once: memory holds one sample.

    Args:
        result: The quantized model.
        samples: Inputs of one sample each, with a batch axis of 1, in the order of the model's inputs.
        folder: Where; earlier golden vectors are replaced, anything else is refused.
        header_limit: Bytes of array elements in the C header.
        progress: Where progress is shown.

    Raises:
        IntegerError: an operator has no exact form.
        ResultError: the folder holds other files or cannot be written.
    """
    model = IntegerModel(result)
    with written_whole(folder, _check_place) as inside:
        with tempfile.TemporaryDirectory(dir=inside) as scratch:
            store = ArrayStore(Path(scratch))
            manifest = _run(result, model, samples, store, progress)
            keys = [one["array"] for one in manifest["inputs"]]
            keys += [one["key"] for entry in manifest["operators"] for one in entry["arrays"]]
            arrays = store.write_npz(inside / "vectors.npz", progress.track(keys, "golden: write", len(keys)))
            with (inside / "vectors.h").open("w", encoding="ascii", newline="\n") as file:
                left_out = write_header(file, manifest, store, header_limit)
        (inside / "check.py").write_text(check_script(), encoding="utf-8")
        hashes = {name: _sha256(inside / name) for name in FILES if name != "manifest.json"}
        manifest |= {"header": {"limit_bytes": header_limit, "left_out": left_out}, "files": hashes, "arrays": arrays}
        (inside / "manifest.json").write_text("".join(_json(manifest)) + "\n", encoding="utf-8", newline="\n")
        sizes = {name: (inside / name).stat().st_size for name in FILES}
    return GoldenVectors(
        folder=folder,
        samples=len(samples),
        operators=tuple(entry["name"] for entry in manifest["operators"]),
        host=tuple(operator["name"] for operator in manifest["host"]),
        header_left_out=tuple(left_out),
        num_bytes=sizes,
    )


def _run(
    result: QuantizedModel,
    model: IntegerModel,
    samples: Sequence[tuple[Tensor, ...]],
    store: ArrayStore,
    progress: Progress,
) -> dict[str, Any]:
    """Run the samples, fill the store, and say what is in it."""
    read = VectorReader(result)
    entries: dict[str, dict[str, Any]] = {}
    inputs: dict[str, dict[str, Any]] = {}

    def watch(name: str, codes: Codes) -> None:
        if name in model.input_names and name not in seen:
            seen.add(name)
            inputs[name] = {"tensor": name, "array": f"inputs/{name}", **grid(codes.qparams)}
            inputs[name]["shape"] = list(codes.values.shape)
            store.append({inputs[name]["array"]: codes_array(codes)})

    def trace(run: Executed) -> None:
        if is_float_result(run.site):
            return
        vectors = read(run)
        if run.site.name not in entries:
            entries[run.site.name] = vectors.entry
            store.append(vectors.constants)
        store.append(vectors.values)

    for sample in progress.track(samples, "golden: run", len(samples)):
        seen: set[str] = set()
        model(*sample, watch=watch, trace=trace)
    if not entries:
        raise IntegerError(f"'{result.target.name}': no operator runs on the accelerator, so there are no vectors.")
    kinds = {operator.name: operator for operator in result.float_graph.operators}
    return {
        "format": _FORMAT,
        "schema_version": _VERSION,
        "qhw": __version__,
        "target": {"name": result.target.name, "fingerprint": result.plan.target_fingerprint},
        "model_fingerprint": result.plan.model_fingerprint,
        "samples": len(samples),
        "inputs": list(inputs.values()),
        "operators": list(entries.values()),
        "host": [
            {"name": name, "kind": kinds[name].kind, "inputs": list(kinds[name].inputs)}
            for name in in_float(result)
            if name in kinds
        ],
    }


def _check_place(folder: Path) -> None:
    """Refuse a place where something of the user's would be overwritten."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ResultError(f"{folder}: is a file or a link, not a folder. Choose another --out.")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    other = sorted(path.name for path in folder.iterdir() if path.name not in FILES)
    if other or not _is_golden(folder / "manifest.json"):
        what = f"'{other[0]}', which is" if other else "files that are"
        raise ResultError(
            f"{folder}: holds {what} no part of golden vectors, and is not overwritten. Choose another --out."
        )


def _is_golden(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.get("format") == _FORMAT


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json(data: Any, indent: str = "") -> Iterator[str]:
    """JSON with a line for each entry, and lists of numbers on one."""
    inner = indent + " "
    if isinstance(data, dict) and data:
        for index, (key, value) in enumerate(data.items()):
            yield f"{',' if index else '{'}\n{inner}{json.dumps(key)}: "
            yield from _json(value, inner)
        yield f"\n{indent}}}"
    elif isinstance(data, list) and any(isinstance(item, dict) for item in data):
        for index, value in enumerate(data):
            yield f"{',' if index else '['}\n{inner}"
            yield from _json(value, inner)
        yield f"\n{indent}]"
    else:
        yield json.dumps(data)
