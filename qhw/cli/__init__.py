# SPDX-License-Identifier: Apache-2.0
"""The command line: parses, calls the public API, prints."""

import logging
import os
import sys

from qhw.errors import QhwError

__all__ = ["main"]

_INTERRUPTED = 130  # what typer exits with after Ctrl-C


def main() -> None:
    """Run the command line; mistakes end in one line on standard error and exit status 1, never in a traceback."""
    from qhw.cli.app import app
    from qhw.cli.interrupted import Interrupted

    _quiet_libraries()
    try:
        app(standalone_mode=True)
    except QhwError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
    except Interrupted as stopped:
        print(f"interrupted: {stopped}", file=sys.stderr)
        raise SystemExit(_INTERRUPTED) from None
    except SystemExit as ended:
        if ended.code == _INTERRUPTED:
            print("interrupted: nothing was written. Run the same command again.", file=sys.stderr)
        raise
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def _quiet_libraries() -> None:
    """torch's exporter warns about things that no user of qhw can act upon."""
    logging.getLogger("torch").setLevel(logging.ERROR)
