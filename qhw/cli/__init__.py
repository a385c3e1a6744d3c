# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls the public API, prints."""

import logging
import os
import sys
from contextlib import nullcontext
from typing import Any, NoReturn

from qhw.errors import QhwError

__all__ = ["main"]

_INTERRUPTED = 130  # what typer exits with after Ctrl-C


def main() -> None:
    """Run the command line; mistakes end in one line on standard error and exit status 1, never in a traceback.

    With `--json` standard output is always one JSON document: what was asked for, or
    `{"error": {"type": ..., "message": ...}}` beside the line on standard error. What the user's modules and plugins
    print goes to standard error then.
    """
    import typer

    from qhw.cli.app import app
    from qhw.cli.console import one_document
    from qhw.cli.stopped import Interrupted, Unanswered

    _quiet_libraries()
    as_json = "--json" in sys.argv[1:]
    usage_error: Any = typer.BadParameter.__bases__[0]  # typer gives the class no public name
    try:
        with one_document() if as_json else nullcontext():
            status = app(standalone_mode=not as_json)
    except Unanswered as stopped:
        _stop("error", stopped.error, 1, as_json, stopped.facts)
    except QhwError as error:
        _stop("error", error, 1, as_json)
    except Interrupted as interrupted:
        _stop("interrupted", interrupted, _INTERRUPTED, as_json)
    except usage_error as error:  # with --json alone: else typer has shown it and exits
        error.show()
        _stop(None, error, 2, as_json)
    except SystemExit as ended:
        status = ended.code
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    if status == _INTERRUPTED:
        _stop("interrupted", Interrupted("nothing was written. Run the same command again."), status, as_json)
    raise SystemExit(status)


def _stop(
    label: str | None, error: Exception, status: int, as_json: bool, facts: dict[str, Any] | None = None
) -> NoReturn:
    """End with a line on standard error, and with an object on standard output where JSON was asked for."""
    from qhw.cli.console import print_json

    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if label is not None:
        print(f"{label}: {message}", file=sys.stderr)
    if as_json:
        kind = type(error).__name__ if label is not None else "UsageError"
        print_json({"error": {"type": kind, "message": message}, **(facts or {})})
    raise SystemExit(status) from None


def _quiet_libraries() -> None:
    """torch's exporter warns about things that no user of qhw can act upon."""
    logging.getLogger("torch").setLevel(logging.ERROR)
