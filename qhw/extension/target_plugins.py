# SPDX-License-Identifier: Apache-2.0
"""Which plugins may implement a hook, told from their source, so that `target list` imports no algorithm."""

import re
import sys
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

__all__ = ["may_register"]

_STAR = re.compile(r"import\s*\(?\s*\*")
_UNWRITTEN = ("globals", "locals", "vars()", "exec(", "sys.modules", "__dict__", "__dir__")
"""How a module gets a name that it does not write, beside taking all of another module's."""


def may_register(point: metadata.EntryPoint, hook: str) -> bool:
    """Whether a plugin may implement a hook, without importing it.

    False only where its module's source is at hand and holds neither the hook's name nor any of the ways by which a
    module can get a name that it does not write.

    Args:
        point: The plugin's entry point.
        hook: The hook's name.
    """
    if point.attr:
        return True
    if point.module in sys.modules:
        return hasattr(sys.modules[point.module], hook)
    try:
        spec = find_spec(point.module)
        origin = None if spec is None else spec.origin
        if origin is None or not origin.endswith(".py"):
            return True
        source = Path(origin).read_text(encoding="utf-8")
    except Exception:  # a parent package may raise anything; the import that follows says what
        return True
    return hook in source or any(word in source for word in _UNWRITTEN) or _STAR.search(source) is not None
