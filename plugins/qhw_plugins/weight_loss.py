# SPDX-License-Identifier: Apache-2.0
"""What a step that repairs weights costs them, and the words that warn of it."""

import math
from collections.abc import Mapping

from torch import Tensor

from qhw.decisions import Json

# Weights of 3 bits, rounded to nearest, have some 15 dB: normal weights 14.6 dB on the best uniform grid (Max, 1960).
# ResNet-20 and MobileNetV2 lose several points of accuracy there; layers above it lost less than one.
WARN_BELOW_DB = 15.0


def sqnr_db(weight: Tensor, kept: Tensor) -> float | None:
    """Power of a weight over that of its error, in dB; None where one of them is 0.

    Args:
        weight: [*shape].
        kept: What is left of it; [*shape].
    """
    power, noise = float(weight.double().square().sum()), float((weight.double() - kept.double()).square().sum())
    return round(10 * math.log10(power / noise), 2) if power and noise else None


def lowest(figures: Mapping[str, Mapping[str, Json]]) -> str:
    """The lowest SQNR of sites that a step changed, in words, with a warning where it means that a layer is wrecked.

    Args:
        figures: Site -> figures, `sqnr_db` among them.
    """
    known = {name: float(str(site["sqnr_db"])) for name, site in figures.items() if site.get("sqnr_db") is not None}
    if not known:
        return ""
    worst = min(known, key=lambda name: known[name])
    words = f", lowest SQNR {known[worst]:.1f} dB ({worst})"
    wrecked = sorted((name for name in known if known[name] < WARN_BELOW_DB), key=lambda name: known[name])
    if not wrecked:
        return words
    listed = ", ".join(wrecked[:3]) + (f" and {len(wrecked) - 3} more" if len(wrecked) > 3 else "")
    return (
        f"{words}. Warning: below {WARN_BELOW_DB:g} dB, what 3-bit weights keep: {listed}; measure the accuracy, or "
        f"keep {'it' if len(wrecked) == 1 else 'them'} in float with --keep-float"
    )
