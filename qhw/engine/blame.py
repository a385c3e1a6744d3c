# SPDX-License-Identifier: Apache-2.0
"""Calling into plugins: whatever one raises, or returns by mistake, names it, its distribution and version."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from qhw.errors import QhwError
from qhw.extension.plugin import PluginRecord

__all__ = ["blaming", "must_be"]

T = TypeVar("T")


@contextmanager
def blaming(record: PluginRecord, doing: str) -> Iterator[None]:
    """Turn what a plugin raises into an error that names it. Its own QhwErrors speak of the input and pass.

    Raises:
        PluginError: the plugin raised something else.
    """
    try:
        yield
    except QhwError:
        raise
    except Exception as error:  # a stranger's code, which may raise anything
        text = " ".join(str(error).split()).rstrip(".")
        raise record.author_error(
            f"{doing} raised {type(error).__name__}: {text}. Repair it; where the input is at fault, raise a QhwError."
        ) from error


def must_be(value: object, kind: type[T], record: PluginRecord, doing: str) -> T:
    """The value that a plugin returned.

    Raises:
        PluginError: it is of another type.
    """
    if not isinstance(value, kind):
        raise record.author_error(f"{doing} must return {kind.__name__}; got {type(value).__name__}.")
    return value
