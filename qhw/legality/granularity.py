# SPDX-License-Identifier: Apache-2.0
"""Clauses on how many scales a tensor has: one, one per channel, group or block. Equal scales count as one."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qhw.legality.artefact import Encoding
from qhw.legality.finding import Finding, unknown
from qhw.schema import Format

__all__ = ["sharing_findings"]


def sharing_findings(
    path: str, spec: Format, e: Encoding, out_axis: int | None, in_axis: int | None
) -> Iterator[Finding]:
    """What separates a tensor's scales from those a format has. One scale for a whole weight is legal in each.

    Args:
        path: Of the format, as `formats.w8`.
        spec: The format.
        e: The tensor's grid.
        out_axis: Axis of the output channels, of weights.
        in_axis: Axis of the input channels, of weights.
    """
    rule, clause = spec.per, f"{path}.per"
    if rule in (None, "unknown"):
        if e.axis is not None:
            yield unknown(clause, "the target does not say how scales are shared" if rule is None else "unknown")
        return
    if e.axis is None:
        return
    got = f"a scale for each index of axis {e.axis}" if e.block_size is None else f"blocks of {e.block_size}"
    if rule == "tensor":
        fix = "Quantize it with one scale per tensor."
        yield Finding(clause, 'must be "tensor": one scale', f"{e.scale.size} scales, {got}", fix, distance=5)
    elif rule == "out_channel":
        if e.block_size is not None or (out_axis is not None and e.axis != out_axis):
            where = "" if out_axis is None else f", axis {out_axis}"
            fix = "Quantize it again with one scale per output channel."
            yield Finding(clause, f'must be "out_channel"{where}', got, fix, distance=5)
    elif rule == "group":
        yield from _of_groups(path, spec.group_size, e, in_axis, got)
    elif rule == "block":
        yield from _of_blocks(path, spec.block_shape, e, out_axis, in_axis, got)
    else:
        yield unknown(clause, f"this form holds no scales per {rule}")


def _of_groups(path: str, stated: object, e: Encoding, in_axis: int | None, got: str) -> Iterator[Finding]:
    sizes = (stated,) if isinstance(stated, int) else stated
    if e.block_size is None:
        fix = "Quantize it again in groups of input channels."
        yield Finding(f"{path}.per", 'must be "group"', got, fix, distance=5)
    elif isinstance(sizes, tuple) and e.block_size not in sizes:
        must = f"must be {' or '.join(map(str, sizes))}"
        yield Finding(f"{path}.group_size", must, str(e.block_size), "Quantize it again in such groups.", distance=5)
    elif in_axis is not None and e.axis != in_axis:
        must = f"must lie along the input channels, axis {in_axis}"
        yield Finding(f"{path}.per", must, f"groups along axis {e.axis}", "Quantize it again along them.", distance=5)
    elif sizes in (None, "unknown"):
        yield unknown(f"{path}.group_size")


def _of_blocks(
    path: str, shape: object, e: Encoding, out_axis: int | None, in_axis: int | None, got: str
) -> Iterator[Finding]:
    """Blocks of outputs by inputs: groups along the inputs, whose scales neighbouring outputs repeat."""
    if not isinstance(shape, tuple) or len(shape) != 2 or out_axis is None or in_axis is None:
        yield unknown(f"{path}.block_shape")
        return
    rows, columns = shape
    clause, must = f"{path}.block_shape", f"must be {rows} outputs by {columns} inputs"
    fix = "Quantize it again in such blocks."
    if e.block_size != columns or e.axis != in_axis:
        yield Finding(clause, must, got, fix, distance=5)
    elif not _repeats(e.scale, out_axis, rows):
        yield Finding(clause, must, f"scales that differ within {rows} outputs", fix, distance=3)


def _repeats(scale: NDArray[Any], axis: int, count: int) -> bool:
    """Whether each block of `count` indices of an axis, the last one shorter, has one scale."""
    if scale.ndim <= axis:  # one for all, as where a file states only the largest
        return True
    lines = np.moveaxis(scale, axis, 0)
    first = np.repeat(lines[::count], count, axis=0)[: len(lines)]
    return bool((lines == first).all())
