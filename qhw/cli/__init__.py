# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls the public API, prints."""

import logging
import os
import sys
from typing import Any, NoReturn

from qhw.errors import QhwError

__all__ = ["main"]

_INTERRUPTED = 130  # what typer exits with after Ctrl-C


def main() -> None:
    """Run the command line; mistakes end in one line on standard error and exit status 1, never in a traceback.

    With `--json` standard output is always one JSON document: what was asked for, or
    `{"error": {"type": ..., "message": ...}}` beside the line on standard error.
    """
    import typer

    from qhw.cli.app import app
    from qhw.cli.interrupted import Interrupted

    _quiet_libraries()
    as_json = "--json" in sys.argv[1:]
    usage_error: Any = typer.BadParameter.__bases__[0]  # typer gives the class no public name
    try:
        status = app(standalone_mode=not as_json)
    except QhwError as error:
        _stop("error", type(error).__name__, str(error), 1, as_json)
    except Interrupted as stopped:
        _stop("interrupted", "Interrupted", str(stopped), _INTERRUPTED, as_json)
    except usage_error as error:  # with --json alone: else typer has shown it and exits
        error.show()
        _stop(None, "UsageError", error.format_message(), 2, as_json)
    except SystemExit as ended:
        status = ended.code
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None
    if status == _INTERRUPTED:
        text = "nothing was written. Run the same command again."
        _stop("interrupted", "Interrupted", text, _INTERRUPTED, as_json)
    raise SystemExit(status)


def _stop(label: str | None, kind: str, message: str, status: int, as_json: bool) -> NoReturn:
    """End with a line on standard error, and with an object on standard output where JSON was asked for."""
    from qhw.cli.console import print_json

    if label is not None:
        print(f"{label}: {message}", file=sys.stderr)
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
    raise SystemExit(status) from None


def _quiet_libraries() -> None:
    """torch's exporter warns about things that no user of qhw can act upon."""
    logging.getLogger("torch").setLevel(logging.ERROR)
