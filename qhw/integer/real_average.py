# SPDX-License-Identifier: Apache-2.0
"""Averages over windows whose operand is dequantized first: float32 sums, in one order."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.integer.arithmetic import clamped, code_bounds, rounding_of
from qhw.integer.codes import carrier
from qhw.integer.pooling import divisor_of, lower_average, window_edges
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site
from qhw.numerics import round_real

__all__ = ["lower_average_pool"]


def lower_average_pool(site: Site) -> Lowered:
    """AveragePool: of codes; of reals where the kernel's accumulator is a float, as onnxruntime has it.

        y = round(sum(sx (X - zx)) / n / sy + zy)

    Every operation is rounded to float32; the sum runs through the window row by row, what lies outside left out.

    Raises:
        IntegerError: the target leaves open what decides.
    """
    if site.kernel is None or site.kernel.accumulator in (None, "unknown"):
        return lower_average(site)
    path, accumulator = site.accumulator
    if accumulator.kind != "float":
        return lower_average(site)
    if _is_whole(site) and site.spec.whole_image is not None:
        return lower_average(_as_other(site))
    if accumulator.bits != 32 or not site.adds_zero_point_first:
        raise IntegerError(f"{path}: sums of reals need bits = 32 and a zero point that is added before rounding")
    return _of_reals(site)


def _of_reals(site: Site) -> Lowered:
    facts = site.operator.attributes
    kernel, stride, edges = list(facts["kernel"]), list(facts["stride"]), window_edges(site)
    x, out, rounding = site.inputs[0], site.result, rounding_of(site)
    limits, kept = code_bounds(site), carrier(out)
    count = divisor_of(site, math.prod(kernel))
    is_overhanging = isinstance(count, Tensor) and facts.get("count_include_pad", True) and any(facts["padding"])
    if facts.get("divisor") or is_overhanging:
        raise IntegerError("a sum of reals over windows that reach past padding that counts cannot be executed exactly")
    divisor = count.float() if isinstance(count, Tensor) else float(count)

    def total(reals: Tensor) -> Tensor:
        reals = torch.nn.functional.pad(reals, edges)
        sizes = [(n - k) // s + 1 for n, k, s in zip(reals.shape[-len(kernel) :], kernel, stride, strict=True)]
        found = reals.new_zeros((*reals.shape[: -len(kernel)], *sizes))
        for tap in itertools.product(*map(range, kernel)):
            window: Any = tuple(slice(t, t + (n - 1) * s + 1, s) for t, n, s in zip(tap, sizes, stride, strict=True))
            found += reals[(..., *window)]
        return found

    def run(values: Sequence[Tensor]) -> Tensor:
        reals = (values[0].float() - x.zero_point.float()) * x.scale
        return clamped(round_real(total(reals) / divisor / out.scale + out.zero_point.float(), rounding), limits, kept)

    shown: dict[str, Fact] = {"rule": "real_average", "rounding": rounding, "clamp": limits, "divisor": count}
    return Lowered(run, facts=shown)


def _is_whole(site: Site) -> bool:
    facts = site.operator.attributes
    image = site.input_shape[-len(facts["kernel"]) :]
    return tuple(facts["kernel"]) == image and not any(facts["padding"])


def _as_other(site: Site) -> Site:
    """The site with the target's arithmetic for another kind, by that kind's kernel for the same input format.

    Raises:
        IntegerError: the target has none.
    """
    kind, own = site.spec.whole_image, site.kernel
    spec = site.target.operators.get(str(kind))
    names = spec.kernels if spec is not None and isinstance(spec.kernels, tuple) else ()
    for name in names:
        kernel = site.target.kernels[name]
        if spec is not None and own is not None and (kernel.input, kernel.output) == (own.input, own.output):
            return replace(site, spec=spec, path=f"operators.{kind}", kernel=kernel, kernel_name=name)
    raise IntegerError(f'{site.path}.whole_image = "{kind}": the target has no kernel of it for this input')
