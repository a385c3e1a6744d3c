# SPDX-License-Identifier: Apache-2.0
"""What the command line's MODEL and DATA stand for: a callable of the user's, a saved file, a result folder."""

import functools
import importlib
import sys
import traceback
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from qhw.engine import Calibration
from qhw.engine.folder import is_result_folder, load_result
from qhw.errors import CalibrationError, CaptureError, QhwError
from qhw.graph import Graph, capture

__all__ = ["load_calibration", "load_callable", "load_data", "load_model"]


def load_model(text: str) -> Graph:
    """The captured model that MODEL names.

    Raises:
        CaptureError: there is no such callable or folder, or it gives no model.
    """
    path = Path(text)
    if path.is_dir():
        if is_result_folder(path):
            return load_result(path).float_graph
        raise CaptureError(f"{text}: is a folder, but no result of qhw (no manifest.json). Give module:callable.")
    if path.suffix in (".pt", ".pth", ".pt2", ".pkl", ".onnx"):
        raise CaptureError(
            f"{text}: model files are not read (pickled ones run code when loaded). Write a function that returns "
            "(model, example_inputs) and give module:function."
        )
    made = load_callable(text, CaptureError, "MODEL")()
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return capture(made[0], made[1])
    raise CaptureError(
        f"{text}: must return (nn.Module, example inputs); got {type(made).__name__}. "
        "Return both, as: return model, torch.randn(1, 3, 224, 224)"
    )


def load_calibration(text: str | None, graph: Graph) -> Calibration | None:
    """The samples that DATA names, for one model; messages call them as the command line did.

    Raises:
        CalibrationError: see `load_data`.
    """
    return None if text is None else Calibration(load_data(text), graph, name=text)


def load_data(text: str) -> Any:
    """The samples that DATA names: a dict of arrays from an .npz file, one from an .npy, or what a callable yields.

    Raises:
        CalibrationError: no such file or callable, or the file holds no plain arrays.
    """
    if text.endswith((".npz", ".npy")) or Path(text).is_file():
        return _arrays(Path(text))
    return _Reiterable(load_callable(text, CalibrationError, "DATA"))


def load_callable(text: str, error: type[QhwError], what: str) -> Callable[..., Any]:
    """`package.module:function`, imported with the current folder in reach."""
    module_name, separator, name = text.partition(":")
    if not separator or not module_name or not name:
        raise error(f"{what}: must be module:callable or an existing file or folder; got '{text}'.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as problem:
        raise error(
            f"{text}: cannot import '{module_name}' ({problem}). Run from its folder, or install it."
        ) from problem
    except AttributeError as problem:
        raise error(f"{text}: module '{module_name}' has no '{name}'. Check the spelling.") from problem
    except Exception as problem:
        raise error(f"{text}: importing '{module_name}' fails: {_place(problem)}.") from problem
    if not callable(found):
        raise error(f"{text}: must be callable; '{name}' is {type(found).__name__}.")

    @functools.wraps(found)
    def call(*arguments: Any) -> Any:
        try:
            return found(*arguments)
        except QhwError:
            raise
        except Exception as problem:
            raise error(f"{text}: fails: {_place(problem)}.") from problem

    return call


_NPY = b"\x93NUMPY"  # what an .npy file starts with


class _Reiterable:
    """Calls the user's function anew for every pass, so that a generator can be read more than once."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __iter__(self) -> Any:
        made = self._call()
        return iter(made.split(32) if hasattr(made, "split") and hasattr(made, "dtype") else made)


def _place(problem: BaseException) -> str:
    last = traceback.extract_tb(problem.__traceback__)[-1]
    return f"{type(problem).__name__}: {problem} (at {last.filename}:{last.lineno})"


def _arrays(path: Path) -> Any:
    """A dict of arrays from an archive, or the one array of an .npy file, whatever the file is called."""
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file. Give an .npz file, or module:callable.")
    try:
        with path.open("rb") as file:
            start = file.read(len(_NPY))
        if start == _NPY:
            return np.load(path, allow_pickle=False)
        if not zipfile.is_zipfile(path):
            raise _unreadable(path, "it is another kind of file, or cut short")
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        is_object = isinstance(error, ValueError) and "Object arrays" in str(error)
        raise _unreadable(
            path, "an array holds Python objects, which could run code" if is_object else "it is damaged"
        ) from error
    if not arrays:
        raise CalibrationError(f"{path}: holds no array. Write one array per input name.")
    return arrays


def _unreadable(path: Path, why: str) -> CalibrationError:
    return CalibrationError(
        f"{path}: is no .npz file of plain arrays: {why}. Write it with numpy.savez(path, **inputs)."
    )
