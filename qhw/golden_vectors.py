# SPDX-License-Identifier: Apache-2.0
"""`qhw.golden`: per-layer vectors of the exact integer result, for those who build the chip or its firmware."""

import os
from pathlib import Path

from torch import Tensor

from qhw.engine import CalibrationData, Progress, QuantizedModel, default_progress
from qhw.errors import CalibrationError, ResultError
from qhw.vectors import GoldenVectors, write_golden
from qhw.verification import batches_of

__all__ = ["HEADER_LIMIT", "golden"]

HEADER_LIMIT = 4 << 20


def golden(
    result: QuantizedModel,
    folder: str | os.PathLike[str],
    data: CalibrationData | None = None,
    *,
    samples: int = 1,
    header_limit: int = HEADER_LIMIT,
    progress: Progress | None = None,
) -> GoldenVectors:
    """Write what every operator reads, sums and writes in the target's exact integer arithmetic.

    The folder gets `vectors.npz` (integer arrays), `manifest.json` (operators, grids, multipliers, shifts, hashes),
    `vectors.h` (the same for C), and `check.py`, which recomputes all of it with numpy alone.

    Args:
        result: The quantized model.
        folder: Where; earlier golden vectors are replaced, anything else is refused.
        data: Samples, as `qhw.quantize` takes them; absent: those that the result keeps.
        samples: How many of them, from the first on. They are run one by one: memory holds one.
        header_limit: Bytes of array elements in the C header; the arrays of operators past it are left out of it.
        progress: Where progress is shown; absent: a bar on a terminal.

    Raises:
        IntegerError: the target leaves open what decides the integer result; names the fields.
        CalibrationError: there are not that many samples.
        ResultError: the folder holds other files or cannot be written.
    """
    if header_limit < 0:
        raise ResultError(f"golden: header_limit must be 0 or more bytes; got {header_limit}. Use 0 for no arrays.")
    chosen = _first(result, data, samples)
    return write_golden(
        result, chosen, Path(folder), header_limit=header_limit, progress=progress or default_progress()
    )


def _first(result: QuantizedModel, data: CalibrationData | None, count: int) -> list[tuple[Tensor, ...]]:
    """The first samples, each with a batch axis of 1."""
    if count < 1:
        raise CalibrationError(f"golden: samples must be 1 or more; got {count}. Pass --samples 1.")
    found: list[tuple[Tensor, ...]] = []
    for batch in batches_of(result, data, "golden"):
        wanted = min(len(batch[0]), count - len(found))
        found += [tuple(x[i : i + 1] for x in batch) for i in range(wanted)]
        if len(found) == count:
            return found
    raise CalibrationError(f"golden: there are {len(found)} samples; got {count}. Ask for fewer, or pass --data DATA.")
