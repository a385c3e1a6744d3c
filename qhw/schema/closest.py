# SPDX-License-Identifier: Apache-2.0
"""The known name a mistyped one was probably meant to be."""

import difflib
from collections.abc import Iterable

__all__ = ["closest"]


def closest(name: str, known: Iterable[str]) -> str | None:
    """The most similar known name, case ignored; None where none is similar."""
    names = list(known)
    folded = {other.lower(): other for other in reversed(names)}
    near = difflib.get_close_matches(name[:200].lower(), folded, n=1, cutoff=0.6)
    return folded[near[0]] if near else None
