# SPDX-License-Identifier: Apache-2.0
"""What a check of `lint` yields: how bad, where, and what about it."""

from typing import Literal

from qhw.schema.base import Path

__all__ = ["Remark", "Severity"]

Severity = Literal["error", "warning", "info"]
Remark = tuple[Severity, Path, str]
