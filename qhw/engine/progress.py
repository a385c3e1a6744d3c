# SPDX-License-Identifier: Apache-2.0
"""Progress of long work: a bar where a person looks on, silence elsewhere."""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

__all__ = ["Progress", "RichProgress", "SilentProgress", "default_progress"]

T = TypeVar("T")


class Progress(Protocol):
    """Wraps an iterable and shows how far it has come."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, one by one.

        Args:
            items: What is worked through.
            label: The step, and the layer where there is one.
            total: How many; None when nobody knows.
        """
        ...


class SilentProgress:
    """Shows nothing."""

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, one by one."""
        yield from items


class RichProgress:
    """Bars on standard error, gone when the work is done."""

    def __init__(self) -> None:
        self._bars: Bars | None = None

    @contextmanager
    def _shown(self) -> Iterator[Bars]:
        if self._bars is not None:  # nested work shares one display
            yield self._bars
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(stderr=True), transient=True) as bars:
            self._bars = bars
            try:
                yield bars
            finally:
                self._bars = None

    def stop(self) -> None:
        """Take all bars away. Work that ends with an error leaves its bar, which would draw over the message."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def track(self, items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
        """The items, one by one."""
        with self._shown() as bars:
            task = bars.add_task(label, total=total)
            for item in items:
                yield item
                bars.advance(task)
            bars.remove_task(task)


def default_progress() -> Progress:
    """Bars on a terminal, silence in pipes and logs."""
    return RichProgress() if sys.stderr.isatty() else SilentProgress()
