# SPDX-License-Identifier: Apache-2.0
"""check.py as golden vectors hold it: one file that needs no other."""

import ast
from pathlib import Path

__all__ = ["check_script"]

_ARITHMETIC = "check_arithmetic"


def check_script() -> str:
    """The source of `qhw.vectors.check` with its arithmetic in place of the import of it."""
    folder = Path(__file__).parent
    script, arithmetic = ((folder / f"{name}.py").read_text(encoding="utf-8") for name in ("check", _ARITHMETIC))
    lines, tree = script.splitlines(), ast.parse(script)
    own = next(n for n in tree.body if isinstance(n, ast.ImportFrom) and n.module == f"qhw.vectors.{_ARITHMETIC}")
    last = max(n.end_lineno or 0 for n in ast.parse(arithmetic).body if isinstance(n, ast.Import | ast.ImportFrom))
    body = "\n".join(arithmetic.splitlines()[last:]).strip("\n")
    return "\n".join([*lines[: own.lineno - 1], body, *lines[own.end_lineno :]]) + "\n"
