# SPDX-License-Identifier: Apache-2.0
"""`qhw plugin list`: what is installed, and what each plugin brings."""

import typer

from qhw.cli.console import print_json, print_table, warn
from qhw.cli.options import AsJson

app = typer.Typer(help="Plugins: targets, algorithms, pipelines, exporters, executors.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Plugins: targets, algorithms, pipelines, exporters, executors."""


@app.command("list")
def list_plugins(as_json: AsJson = False) -> None:
    """List the installed plugins and what each one brings."""
    from qhw.extension import default_registry

    registry = default_registry()
    facts = [
        {
            "name": record.name,
            "state": record.state,
            "distribution": record.distribution,
            "version": record.version,
            "summary": record.summary,
            "brings": {kind: list(names) for kind, names in registry.provided_by(record.name).items()},
        }
        for record in registry.plugins
    ]
    if as_json:
        print_json(facts)
        return
    rows = []
    for record in registry.plugins:
        brings = "; ".join(f"{kind}: {', '.join(n)}" for kind, n in registry.provided_by(record.name).items())
        what = "blocked by QHW_BLOCK" if record.state == "blocked" else brings or record.summary
        rows.append((record.name, f"{record.distribution} {record.version}", what))
    print_table(("plugin", "distribution", "brings"), rows)
    for name in registry.unmatched_blocks:
        warn(f"QHW_BLOCK names '{name}', and no plugin has that name.")
