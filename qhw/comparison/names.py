# SPDX-License-Identifier: Apache-2.0
"""Which targets a user means: names, paths, patterns, all."""

from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from qhw.errors import TargetError
from qhw.extension import Registry

__all__ = ["target_names"]

_ALL = "all"


def target_names(wanted: str | Iterable[str], registry: Registry) -> tuple[str, ...]:
    """Names and paths of targets, each once, in the order asked for; of a pattern in alphabetical order.

    Args:
        wanted: Names, paths that end in .toml or .json, patterns such as "espressif/*", or "all"; one text may hold
            several, with commas between.
        registry: The targets there are.

    Raises:
        TargetError: a name or pattern fits no target, or nothing is asked for.
    """
    texts = [wanted] if isinstance(wanted, str) else list(wanted)
    parts = [part.strip() for text in texts for part in text.split(",")]
    found: dict[str, None] = {}
    for part in filter(None, parts):
        found.update(dict.fromkeys(_matching(part, registry)))
    if not found:
        raise TargetError('targets: none is named. Give names with commas between, "vendor/*", or "all".')
    return tuple(found)


def _matching(part: str, registry: Registry) -> tuple[str, ...]:
    known = registry.target_names()
    if part == _ALL:
        return known
    if part.endswith((".toml", ".json")):
        if not Path(part).exists():
            raise TargetError(f"targets: {part}: no such file. Check the path.")
        return (part,)
    if any(mark in part for mark in "*?["):
        fitting = tuple(name for name in known if fnmatchcase(name, part))
        if not fitting:
            raise TargetError(f"targets: no target fits '{part}'. All: qhw target list")
        return fitting
    registry.target_path(part)
    return (part,)
