# SPDX-License-Identifier: Apache-2.0
"""The largest resident memory of this process during one piece of work (Linux: /proc)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["peak_gib"]


@contextmanager
def peak_gib() -> Iterator[list[float]]:
    """A list that holds the peak in GiB once the block is left, of all that the process holds."""
    found: list[float] = []
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far (man 5 proc)
    yield found
    kibibytes = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert kibibytes is not None
    found.append(int(kibibytes[1]) / 2**20)
