# SPDX-License-Identifier: Apache-2.0
"""Numbers in reports, as people write them."""

__all__ = ["counted"]


def counted(number: int, noun: str) -> str:
    """A number and its noun, as `1 layer`, `2 layers`.

    Args:
        number: How many.
        noun: In the singular; its plural takes an s.
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
