# SPDX-License-Identifier: Apache-2.0
"""Commands that end early with more to say than an error has."""

from typing import Any

from qhw.errors import QhwError

__all__ = ["Interrupted", "Unanswered"]


class Interrupted(Exception):
    """Ctrl-C where there is more to say than that nothing was written; exit status 130."""


class Unanswered(QhwError):
    """An error beside which something was found out.

    Attributes:
        error: What is printed as ever.
        facts: What `--json` shows beside it.
    """

    def __init__(self, error: QhwError, facts: dict[str, Any]) -> None:
        super().__init__(str(error))
        self.error = error
        self.facts = facts
