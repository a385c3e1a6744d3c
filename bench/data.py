# SPDX-License-Identifier: Apache-2.0
"""The real models and images beside the checkout: `../shared/data`, or the folder that QHW_DATA names."""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

__all__ = ["load_models"]


def load_models() -> ModuleType:
    """The module with `resnet`, `mobilenet_v2` and `cifar10`.

    Exits with one line where the folder is absent.
    """
    folder = Path(os.environ.get("QHW_DATA", Path(__file__).parents[2] / "shared" / "data"))
    file = folder / "models.py"
    if not file.is_file():
        sys.exit(f"error: {file} is not there. Set QHW_DATA to the folder with the benchmark models.")
    spec = importlib.util.spec_from_file_location("benchmark_models", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
