# SPDX-License-Identifier: Apache-2.0
"""Names of registered things: their pattern, and what is said about one that nobody knows."""

import re
from collections.abc import Iterable

from qhw.schema import closest

NAME = re.compile(r"[a-z][a-z0-9_]*")
TARGET_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]*/[a-z0-9][a-z0-9_.-]*")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like this one, else the first that holds it, as `vendor/chip` holds a chip; else None."""
    known = sorted(known)
    return closest(name, known) or next((other for other in known if name and name.lower() in other), None)


def unknown_name(kind: str, name: str, known: Iterable[str], listing: str | None = None) -> str:
    """The line for a name that nobody registered.

    Args:
        kind: What was looked for: `target`, `algorithm`, ...
        name: What was asked for.
        known: All registered names of that kind.
        listing: The command that lists them, when there may be too many for one line.
    """
    known = sorted(known)
    if not known:
        return f"no {kind} '{name}': no loaded plugin brings any. See 'qhw plugin list' for what QHW_BLOCK leaves out."
    near = nearest(name, known)
    parts = [f"no {kind} '{name}'."]
    if near is not None:
        parts.append(f"Closest: {near}.")
    parts.append(f"All: {listing}" if listing else f"Known: {', '.join(known)}.")
    return " ".join(parts)
