# SPDX-License-Identifier: Apache-2.0
"""Which ratios of scales a requantization can hold."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qhw.numerics.requantize import fixed_point_multiplier
from qhw.schema import Requantize

SMALLEST_NORMAL, LARGEST_FLOAT = 2.0**-126, float(torch.finfo(torch.float32).max)
_MOST_BITS = 31  # of a multiplier that can be computed exactly
_ANY_SHIFT = 512


@dataclass(frozen=True)
class LegalRatios:
    """Ratios from `low` to `high`, and what is legal to the last bit.

    Attributes:
        low: A legal ratio below which hardly any is legal: rounding of the multiplier may carry one over.
        high: Likewise above.
        low_field: Path of the field that states the lower end.
        high_field: Path of the field that states the upper end.
        is_legal: float64 [*P] -> bool [*P].
        zero_is_defined: Whether a ratio that is too small gives 0 rather than an error.
    """

    low: float
    high: float
    low_field: str
    high_field: str
    is_legal: Callable[[Tensor], Tensor]
    zero_is_defined: bool = False


def legal_ratios(path: str, rule: Requantize) -> LegalRatios | None:
    """What a requantization can hold; None where the target states nothing that could be held to.

    float32, float64: positive and finite. fixed_point: multiplier_bits and shift; a ratio just below a power of two may
    round up to it. shift: from 2^-max to 2^-min. `ratio` narrows all of them.

    Args:
        path: Where it stands, as `requantize.r`.
        rule: The target's entry.
    """
    found = _of_kind(path, rule)
    bounds = rule.ratio if rule.ratio != "unknown" else None
    if bounds is None:
        return found
    low = bounds.min if isinstance(bounds.min, float) else 0.0
    high = bounds.max if isinstance(bounds.max, float) else LARGEST_FLOAT
    if low == 0.0 and high == LARGEST_FLOAT:
        return found
    wide = found or LegalRatios(0.0, LARGEST_FLOAT, path, path, _is_positive)
    return replace(
        wide,
        low=max(wide.low, low),
        high=min(wide.high, high),
        low_field=f"{path}.ratio.min" if low > wide.low else wide.low_field,
        high_field=f"{path}.ratio.max" if high < wide.high else wide.high_field,
        is_legal=lambda ratio: wide.is_legal(ratio) & (ratio >= low) & (ratio <= high),
        zero_is_defined=wide.zero_is_defined and low <= wide.low,
    )


def _is_positive(ratio: Tensor) -> Tensor:
    return torch.isfinite(ratio) & (ratio > 0)


def _of_kind(path: str, rule: Requantize) -> LegalRatios | None:
    if rule.kind in ("float32", "float64"):
        return LegalRatios(SMALLEST_NORMAL, LARGEST_FLOAT, f"{path}.kind", f"{path}.kind", _is_positive)
    if rule.kind not in ("fixed_point", "shift") or rule.shift is None or rule.shift == "unknown":
        return None
    least, most = (bound if isinstance(bound, int) else None for bound in (rule.shift.min, rule.shift.max))
    if least is None and most is None:
        return None
    fields = f"{path}.shift.max", f"{path}.shift.min"
    if rule.kind == "shift":
        low, high = 0.0 if most is None else 2.0**-most, math.inf if least is None else 2.0**-least
        return LegalRatios(low, high, *fields, lambda ratio: (ratio >= low) & (ratio <= high))
    return _of_multiplier(rule, least, most, fields)


def _of_multiplier(
    rule: Requantize, least: int | None, most: int | None, fields: tuple[str, str]
) -> LegalRatios | None:
    bits = rule.multiplier_bits
    if not isinstance(bits, int) or bits > _MOST_BITS:
        return None
    # An end that is not stated is left open: ratios of float32 scales stay within these.
    shift_min, shift_max = -_ANY_SHIFT if least is None else least, _ANY_SHIFT if most is None else most

    def is_legal(ratio: Tensor) -> Tensor:
        known = torch.where(_is_positive(ratio), ratio, 0.0)
        multiplier, _ = fixed_point_multiplier(
            known, bits=bits, shift_min=shift_min, shift_max=shift_max, out_of_range="zero_scale"
        )
        return multiplier > 0

    low = 0.0 if most is None else 2.0 ** (-most - 1)
    high = math.inf if least is None else 2.0**-least * (1 - 2.0**-bits)  # rounded up it would need a shift less
    return LegalRatios(low, high, *fields, is_legal, rule.out_of_range in ("saturate", "zero_scale"))
