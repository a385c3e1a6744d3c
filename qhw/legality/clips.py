# SPDX-License-Identifier: Apache-2.0
"""Clips in front of a quantizer: they narrow the codes that can occur, and may change nothing else."""

from dataclasses import replace

import numpy as np
import torch

from qhw.legality.artefact import ArtefactOperator, Encoding

__all__ = ["CLIPS", "clip_codes", "narrowed"]

CLIPS = ("Relu", "Clip")


def narrowed(clip: ArtefactOperator, e: Encoding) -> Encoding:
    """The grid behind a clip, with the codes that it leaves; of small floats, with the largest of both signs."""
    codes = clip_codes(clip, e)
    if codes is None:
        return e
    if e.elements is not None:
        most = max(map(abs, codes))
        return replace(e, elements=replace(e.elements, finite_max=most)) if most > 0 else e
    low, high = max(e.quant_min, codes[0]), min(e.quant_max, codes[1])
    return replace(e, quant_min=int(low), quant_max=int(high)) if low <= high else e


def clip_codes(clip: ArtefactOperator, e: Encoding) -> tuple[float, float] | None:
    """The codes of a clip's bounds, rounded as a quantizer does; of small floats the elements, saturated."""
    if e.is_dynamic or e.scale.ndim:
        return None
    lowest, highest = (e.quant_min, e.quant_max) if e.elements is None else (e.elements.lowest, e.elements.highest)
    ends: list[float] = []
    for field, end in (("minimum", lowest), ("maximum", highest)):
        bound = clip.attributes.get(field)
        if bound is None:
            ends.append(end)
            continue
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            real = np.float32(bound) / np.float32(e.scale)
        if not np.isfinite(real):
            ends.append(end)
        elif e.elements is not None:
            ends.append(float(e.elements.round_to(torch.tensor(float(real)))))
        else:
            ends.append(int(min(max(float(np.rint(real)), -(2.0**62)), 2.0**62)) + int(e.zero_point))
    return ends[0], ends[1]
