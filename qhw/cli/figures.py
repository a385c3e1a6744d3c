# SPDX-License-Identifier: Apache-2.0
"""Estimated figures in a few characters; one that lacks something says `>=`, one of which nothing is known says so."""

from qhw.roofline import Figure

__all__ = ["cycles_words", "joules_words", "seconds_words"]

_SMALL = ((1.0, ""), (1e-3, "m"), (1e-6, "u"), (1e-9, "n"))


def cycles_words(figure: Figure) -> str:
    """As `12.3 k`, `>= 67.1 k`, `unknown`."""
    return _bounded(figure, _large(figure.at_least))


def seconds_words(figure: Figure) -> str:
    """As `168 us`."""
    return _bounded(figure, _small(figure.at_least, "s"))


def joules_words(figure: Figure) -> str:
    """As `2.1 mJ`."""
    return _bounded(figure, _small(figure.at_least, "J"))


def _bounded(figure: Figure, words: str) -> str:
    if not figure.missing:
        return words
    return f">= {words}" if figure.at_least else "unknown"


def _large(number: float) -> str:
    for factor, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= factor:
            return f"{number / factor:.3g}{unit}"
    return f"{number:.3g}"


def _small(number: float, unit: str) -> str:
    factor, prefix = next(((f, p) for f, p in _SMALL if number >= f), _SMALL[-1])
    return f"{number / factor:.3g} {prefix}{unit}" if number else f"0 {unit}"
