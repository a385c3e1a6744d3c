# SPDX-License-Identifier: Apache-2.0
"""Resize: codes of the nearest elements, or sums of four codes whose weights are whole numbers."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qhw.errors import IntegerError
from qhw.graph.attributes import argument
from qhw.integer.approximation import approximation_of, stated_bits
from qhw.integer.arithmetic import clamped, code_bounds
from qhw.integer.codes import carrier, is_one_grid
from qhw.integer.pooling import divide
from qhw.integer.products import Fact, Lowered
from qhw.integer.site import Site, unknown
from qhw.integer.stages import order_decides
from qhw.integer.tables import rounding_of_codes
from qhw.schema import Approximation

__all__ = ["lower_resize"]

_MOST_FRACTION_BITS = 15


def lower_resize(site: Site) -> Lowered:
    """Resize between tensors on one grid: nearest, which copies codes, or bilinear in fixed point.

        y = round((sum of four codes, each times w_row w_column) / 2^(2 f)),  f = `fraction_bits`

    Raises:
        IntegerError: the target leaves open what decides, or the grids differ.
    """
    if not is_one_grid(site.inputs[0], site.result):
        raise IntegerError(f"{site.operator.kind} between two grids cannot be executed exactly yet")
    rule = approximation_of(site, "fixed_point")
    sizes = list(zip(site.input_shape[-2:], tuple(site.node.meta["shape"])[-2:], strict=True))
    _check_factors(site, sizes)
    if site.operator.attributes["mode"] == "nearest":
        return _nearest(site, rule, sizes)
    return _bilinear(site, rule, sizes)


def _check_factors(site: Site, sizes: list[tuple[int, int]]) -> None:
    """The model's positions follow from its sizes, as they do on hardware that is told sizes alone."""
    position = 2 if site.operator.attributes["mode"] == "nearest" else 3
    factors = argument(site.node, position, "scale_factors", None) or ()
    for (old, new), factor in zip(sizes, factors, strict=False):
        if torch.tensor(1 / factor, dtype=torch.float32) != torch.tensor(old / new, dtype=torch.float32):
            raise IntegerError(
                f"{site.operator.kind} by a factor of {factor:g}, {old} to {new} elements, cannot be executed exactly: "
                "its positions follow from the factor. Resize to a size instead"
            )


def _nearest(site: Site, rule: Approximation, sizes: list[tuple[int, int]]) -> Lowered:
    rows, columns = (_positions(site, rule, *size) for size in sizes)
    if len(site.members) > 1:
        raise IntegerError(f"{site.members[1].kind} behind {site.operator.kind} cannot be executed exactly yet")
    return Lowered(lambda values: values[0][..., rows[:, None], columns], facts={"rule": "move"})


def _positions(site: Site, rule: Approximation, old: int, new: int) -> Tensor:
    """int64 [new]: the element that each new one copies."""
    index = torch.arange(new)
    sizes = [torch.tensor(float(size), dtype=torch.float32) for size in (old, new)]
    if rule.position == "exact":
        found = index * old // new
    elif rule.position == "float32_ratio":
        found = (index.float() * (sizes[0] / sizes[1])).floor().long()
    elif rule.position == "float32_quotient":
        found = (index.float() / (sizes[1] / sizes[0])).floor().long()
    else:
        raise unknown(f"{site.path}.approximation.position", rule.position)
    return found.clamp(max=old - 1)


@dataclass(frozen=True)
class _Axis:
    """For each new element: the two it lies between, and its distance from the first; int64 [new]."""

    lower: Tensor
    upper: Tensor
    fraction: Tensor

    @classmethod
    def of(cls, old: int, new: int, bits: int, aligns_corners: bool) -> "_Axis":
        """Positions with `bits` fractional bits: between corners, or centres of elements half a step inside."""
        one = 1 << bits
        spans, steps = (old - 1, new - 1) if aligns_corners and new > 1 else (old, new)
        step = (one * spans + steps // 2) // steps
        position = torch.arange(new) * step + (0 if aligns_corners else step // 2 - one // 2)
        lower, upper = (position // one).clamp(min=0), ((position + one - 1) // one).clamp(max=old - 1)
        if bool((lower >= old).any()):
            raise IntegerError(f"{old} elements resized to {new} have positions behind the last: too few fraction_bits")
        return cls(lower, upper, position - one * lower)


def _bilinear(site: Site, rule: Approximation, sizes: list[tuple[int, int]]) -> Lowered:
    bits = stated_bits(site, rule, "fraction_bits", _MOST_FRACTION_BITS)
    aligns = bool(argument(site.node, 2, "align_corners", False))
    try:
        rows, columns = (_Axis.of(old, new, bits, aligns) for old, new in sizes)
    except IntegerError as error:
        raise IntegerError(f"{site.path}: {error}") from error
    x, limits, kept, rounding = site.inputs[0], code_bounds(site), carrier(site.result), rounding_of_codes(site)
    zero_point = int(x.zero_point)
    # Weights sum to 1, so that codes may be summed with their zero point or without.
    rest = zero_point if order_decides(rounding, zero_point) and not site.adds_zero_point_first else 0
    one = 1 << bits

    def run(values: Sequence[Tensor]) -> Tensor:
        codes = values[0].long() - rest
        down = rows.fraction[:, None]
        across = codes[..., rows.lower, :] * (one - down) + codes[..., rows.upper, :] * down
        total = across[..., columns.lower] * (one - columns.fraction) + across[..., columns.upper] * columns.fraction
        return clamped(divide(total, one * one, rounding) + rest, limits, kept)

    facts: dict[str, Fact] = {
        "rule": "interpolate", "fraction_bits": bits, "offset": zero_point - rest, "rounding": rounding,
        "zero_point": rest, "clamp": limits,
        **{f"{name}.{part}": getattr(axis, part)
           for name, axis in (("row", rows), ("column", columns)) for part in ("lower", "upper", "fraction")},
    }  # fmt: skip
    return Lowered(run, facts=facts)
