# SPDX-License-Identifier: Apache-2.0
"""Clauses on sums of products: whether some input makes an accumulator overflow, proven from the stored codes."""

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from qhw.legality.artefact import Encoding
from qhw.legality.finding import Finding, unknown
from qhw.legality.site import Site
from qhw.numerics import accumulator_bits_needed, accumulator_bounds
from qhw.numerics.pairwise import pair_sums
from qhw.schema import SUMMING_KINDS, WEIGHTED_KINDS, Accumulator, Pairwise

__all__ = ["accumulator_findings", "largest_sums", "weight_sum_findings"]

_SAFE = 2**40
"""Codes and their number are bounded so that sums stay within int64."""


def accumulator_findings(site: Site, kernel: str) -> Iterator[Finding]:
    """Whether sums fit: of the stored weights and any input, in any order."""
    if site.kind not in SUMMING_KINDS:
        return
    name = site.kernel(kernel).accumulator
    if name is None or name == "unknown":
        why = "unknown" if name else "the target does not say how products are summed"
        yield unknown(f"kernels.{kernel}.accumulator", why)
        return
    path, spec = f"accumulators.{name}", site.target.accumulators[name]
    if spec.kind not in (None, "integer"):
        if spec.kind == "unknown":
            yield unknown(f"{path}.kind")
        return
    bounds = _bounds(site)
    if bounds is None:
        return
    if spec.bits is None or spec.bits == "unknown":
        yield unknown(f"{path}.bits", "unknown" if spec.bits else "the target does not say how wide sums are")
    elif isinstance(spec.bits, int):
        yield from _of_width(f"{path}.bits", spec.bits, bounds, site)
    if isinstance(spec.pairwise, Pairwise):
        yield from _of_pairs(f"{path}.pairwise", spec, spec.pairwise, site)
    elif spec.pairwise == "unknown":
        yield unknown(f"{path}.pairwise")


def weight_sum_findings(site: Site, kernel: str) -> Iterator[Finding]:
    """Largest sum of magnitudes of weights over one output channel."""
    most, clause = site.kernel(kernel).weight_abs_sum_max, f"kernels.{kernel}.weight_abs_sum_max"
    if most is None or site.kind not in WEIGHTED_KINDS:
        return
    if most == "unknown":
        yield unknown(clause)
        return
    rows = site.weight_rows()
    if rows is None:
        return
    if most == "from_accumulator":
        spec = site.target.accumulators.get(str(site.kernel(kernel).accumulator))
        x = site.inputs[0].encoding if site.inputs else None
        if spec is None or not isinstance(spec.bits, int) or x is None or x.is_dynamic:
            yield unknown(clause, "needs the accumulator's width and the input's grid")
            return
        most = ((1 << (spec.bits - 1)) - 1) // max(1, *(abs(end) for end in _range(x)))
    sums = np.abs(rows).sum(1)
    if bool((sums > most).any()):
        got = f"{int(sums.max())} ({int((sums > most).sum())} of {sums.size} channels)"
        fix = "Coarsen the scale of these channels' weights."
        yield Finding(clause, f"must be at most {most}", got, fix, site.weight.name if site.weight else None)


def largest_sums(site: Site) -> NDArray[Any] | None:
    """Largest magnitude of the sums of an operator with weights, per output channel; None where not known."""
    if site.kind not in WEIGHTED_KINDS:
        return None
    bounds = _bounds(site)
    return None if bounds is None else np.maximum(bounds[1], -bounds[0])


def _bounds(site: Site) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """Lowest and highest value of an accumulator: int64 [out_channels]; None where something is not known."""
    x = site.inputs[0].encoding if site.inputs else None
    if x is None or x.is_dynamic or x.scale.ndim or x.is_float:
        return None
    if site.kind == "MatMul" and site.weight is None:
        y = site.inputs[1].encoding if len(site.inputs) > 1 else None
        count = site.operator.attributes.get("reduced_elements")
        if y is None or y.is_dynamic or not isinstance(count, int):
            return None
        ends = [a * b * count for a, b in product(_range(x), _range(y))]
        return np.asarray([min(ends)]), np.asarray([max(ends)])
    rows = site.weight_rows()
    if rows is None or rows.shape[1] * int(np.abs(rows).max(initial=0)) * max(map(abs, _range(x))) >= _SAFE**1.5:
        return None
    bias = site.operator.bias
    codes = bias.codes if bias is not None and bias.encoding is not None and _is_in_unit(site) else None
    if codes is not None and codes.size != len(rows):
        codes = None
    lowest, highest = accumulator_bounds(
        torch.from_numpy(rows.copy()),
        input_quant_min=min(x.quant_min, int(x.zero_point)),
        input_quant_max=max(x.quant_max, int(x.zero_point)),
        input_zero_point=int(x.zero_point),
        bias_q=None if codes is None else torch.from_numpy(codes.reshape(-1).astype(np.int64)),
    )
    return lowest.numpy(), highest.numpy()


def _is_in_unit(site: Site) -> bool:
    """Whether bias codes are in units of input scale times weight scale, as they are added."""
    bias, x = site.operator.bias, site.inputs[0].encoding
    w = site.weight.encoding if site.weight is not None else None
    if bias is None or bias.encoding is None or x is None or w is None or w.scale.ndim > 1:
        return False
    unit, scale = site.per_channel(x.scale * w.scale), bias.encoding.scale
    if unit.size > 1 and scale.size > 1 and unit.size != scale.size:
        return False
    return bool(np.allclose(scale, unit, rtol=1e-6, atol=0.0))


def _of_width(clause: str, bits: int, bounds: tuple[NDArray[Any], NDArray[Any]], site: Site) -> Iterator[Finding]:
    needed = accumulator_bits_needed(torch.from_numpy(bounds[0]), torch.from_numpy(bounds[1])).numpy()
    if int(needed.max(initial=0)) <= bits:
        return
    if site.kind == "ConvTranspose":
        yield unknown(clause, f"sums may need {int(needed.max())} bits, by a bound that need not be attained")
        return
    over = int((needed > bits).sum())
    got = f"{int(needed.max())} bits for some input ({over} of {needed.size} channels)"
    fix = "Use fewer bits, coarsen the weights' scale, or split the layer."
    yield Finding(clause, f"must hold every sum in {bits} bits", got, fix, site.weight.name if site.weight else None)


def _of_pairs(path: str, spec: Accumulator, pairs: Pairwise, site: Site) -> Iterator[Finding]:
    """Sums of two products in a register of their own: of neighbours, or of any two where the order is not stated."""
    is_ordered = spec.order in ("channel_fastest", "kernel_fastest") and site.kind != "ConvTranspose"
    rows = _raw_rows(site, pairs, str(spec.order) if is_ordered else None)
    x = site.inputs[0].encoding if site.inputs else None
    if rows is None or x is None or x.is_dynamic or x.scale.ndim or x.is_float:
        return
    if pairs.bits is None or pairs.bits == "unknown" or pairs.operands in (None, "unknown"):
        field = "operands" if isinstance(pairs.bits, int) else "bits"
        yield unknown(f"{path}.{field}")
        return
    assert isinstance(pairs.bits, int)
    low, high = _multiplied(x, str(pairs.operands))
    if is_ordered:
        sums = pair_sums(torch.from_numpy(rows.copy()), low, high)
        least, most = sums[0].numpy().min(1), sums[1].numpy().max(1)
    else:
        lowest, highest = np.minimum(low * rows, high * rows), np.maximum(low * rows, high * rows)
        count = min(2, rows.shape[1])
        least = np.minimum(np.sort(lowest, axis=1)[:, :count], 0).sum(1)
        most = np.maximum(np.sort(highest, axis=1)[:, rows.shape[1] - count :], 0).sum(1)
    limit = 1 << (pairs.bits - 1)
    over = (least < -limit) | (most >= limit)
    if not bool(over.any()):
        return
    worst = int(max(most.max(), -least.min()))
    got = f"two products that sum to {worst} ({int(over.sum())} of {over.size} channels)"
    fix = "Use fewer codes of weights, as [-64, 64] for bytes."
    name = site.weight.name if site.weight else None
    yield Finding(f"{path}.bits", f"must hold two products in {pairs.bits} bits", got, fix, name)


def _raw_rows(site: Site, pairs: Pairwise, order: str | None) -> NDArray[np.int64] | None:
    """Weights as they are multiplied: without their zero point, or as stored."""
    rows = site.weight_rows(order)
    weight = site.weight
    if rows is None or pairs.operands == "centred" or weight is None or weight.encoding is None:
        return rows
    zeros = np.unique(weight.encoding.zero_point)
    return rows + int(zeros[0]) if len(zeros) == 1 else None


def _multiplied(x: Encoding, operands: str) -> tuple[int, int]:
    """Lowest and highest value of an input as it is multiplied."""
    if operands == "centred":
        return _range(x)
    lift = 1 << (x.bits - 1) if operands == "unsigned" and x.signed else 0
    return x.quant_min + lift, x.quant_max + lift


def _range(x: Encoding) -> tuple[int, int]:
    zero = int(x.zero_point.flat[0])
    return min(x.quant_min - zero, 0), max(x.quant_max - zero, 0)
