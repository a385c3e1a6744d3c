# SPDX-License-Identifier: Apache-2.0
"""All commands, put together. Each lives in its own file and imports what is heavy only when it runs."""

from typing import Annotated

import typer

from qhw import __version__
from qhw.cli import accumulators, check, compare, cost, golden, plan, plugin, quantize, target, train, verify

__all__ = ["app"]

app = typer.Typer(
    name="qhw",
    help="Quantize a model for a described accelerator, explain why, and prove the result.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(target.app, name="target")
app.add_typer(plugin.app, name="plugin")
app.command("plan")(plan.plan)
app.command("check")(check.check)
app.command("compare")(compare.compare)
app.command("cost")(cost.cost)
app.command("quantize")(quantize.quantize)
app.command("train")(train.train)
app.command("verify")(verify.verify)
app.command("accumulators")(accumulators.accumulators)
app.command("golden")(golden.golden)


def _version(asked: bool) -> None:
    if asked:
        print(f"qhw {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Quantize a model for a described accelerator, explain why, and prove the result."""
