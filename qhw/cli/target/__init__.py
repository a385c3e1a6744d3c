# SPDX-License-Identifier: Apache-2.0
"""`qhw target ...`: list, show, compare, start, lint and check accelerator descriptions; print their JSON Schema."""

import typer

from qhw.cli.console import print_json
from qhw.cli.options import AsJson
from qhw.cli.target import check, compare, lint, listing, new, show

__all__ = ["app"]

app = typer.Typer(help="Accelerator descriptions: list, show, diff, new, lint, check, schema.", no_args_is_help=True)
app.command("list")(listing.list_targets)
app.command("show")(show.show)
app.command("diff")(compare.diff_targets)
app.command("new")(new.new_target)
app.command("lint")(lint.lint_files)
app.command("check")(check.check_target)


@app.command("schema")
def schema(as_json: AsJson = False) -> None:  # taken as everywhere: a JSON Schema is JSON anyway
    """Print the JSON Schema of a target file, for editors and other tools."""
    from qhw.schema import target_json_schema

    print_json(target_json_schema())
