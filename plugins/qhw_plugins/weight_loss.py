# SPDX-License-Identifier: Apache-2.0
"""What a step that repairs weights costs them, and the words that warn of it."""

import math
from collections.abc import Mapping

from torch import Tensor

from qhw.decisions import Json, listed

# What weights of 3 bits keep: normal ones 14.3 dB on their best uniform grid of 8 steps (Max, 1960). Accumulators that
# are too narrow cost ResNet-20 1.0 points of accuracy where its worst layer keeps 16.9 dB, 4.5 at 10.9 dB, 43 at 5.2.
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
    return (
        f"{words}. Warning: below {WARN_BELOW_DB:g} dB, what 3-bit weights keep: {listed(wrecked, 3)}; measure the "
        f"accuracy, or keep {'it' if len(wrecked) == 1 else 'them'} in float with --keep-float"
    )
