# SPDX-License-Identifier: Apache-2.0
"""Clips in front of a quantizer: they narrow the codes that can occur, and may change nothing else."""

from dataclasses import replace

import numpy as np

from qhw.legality.artefact import ArtefactOperator, Encoding

__all__ = ["CLIPS", "clip_codes", "narrowed"]

CLIPS = ("Relu", "Clip")


def narrowed(clip: ArtefactOperator, e: Encoding) -> Encoding:
    """The grid behind a clip, with the codes that it leaves."""
    codes = clip_codes(clip, e)
    if codes is None:
        return e
    low, high = max(e.quant_min, codes[0]), min(e.quant_max, codes[1])
    return replace(e, quant_min=low, quant_max=high) if low <= high else e


def clip_codes(clip: ArtefactOperator, e: Encoding) -> tuple[int, int] | None:
    """The codes of a clip's bounds, rounded as a quantizer does."""
    if e.is_dynamic or e.scale.ndim or e.is_float:
        return None
    ends = []
    for field, end in (("minimum", e.quant_min), ("maximum", e.quant_max)):
        bound = clip.attributes.get(field)
        if bound is None:
            ends.append(end)
            continue
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            steps = float(np.rint(np.float32(bound) / np.float32(e.scale)))
        if not np.isfinite(steps):
            ends.append(end)
        else:
            ends.append(int(min(max(steps, -(2.0**62)), 2.0**62)) + int(e.zero_point))
    return ends[0], ends[1]
