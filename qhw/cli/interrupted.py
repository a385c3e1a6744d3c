# SPDX-License-Identifier: Apache-2.0
"""Ctrl-C where there is more to say than that nothing was written."""

__all__ = ["Interrupted"]


class Interrupted(Exception):
    """The command was stopped; what it says is printed in one line, and the exit status is 130."""
