# SPDX-License-Identifier: Apache-2.0
"""`qhw plugin list`: what is installed, and what each plugin brings."""

from typing import TYPE_CHECKING, Annotated

import typer

from qhw.cli.console import print_json, print_table, warn
from qhw.cli.options import AsJson

if TYPE_CHECKING:
    from qhw.extension import Algorithm, Exporter
    from qhw.extension.registry import Entry

app = typer.Typer(help="Plugins: what is installed, what each brings, and options of algorithms.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Plugins: what is installed, what each brings, and options of algorithms."""


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


@app.command("show")
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="An algorithm or exporter, as 'qhw plugin list' names it.")
    ],
    as_json: AsJson = False,
) -> None:
    """Show an algorithm or exporter: what it does, and the options that --set takes.

    Example: qhw plugin show mse_weights
    """
    from qhw.errors import PluginError
    from qhw.extension import default_registry
    from qhw.schema import closest

    registry = default_registry()
    known: dict[str, Entry[type[Algorithm]] | Entry[type[Exporter]]] = {**registry.exporters, **registry.algorithms}
    if name not in known:
        hint = closest(name, known)
        raise PluginError(
            f"no algorithm or exporter is called '{name}'.{f' Closest: {hint}.' if hint else ''} All: qhw plugin list"
        )
    entry = known[name]
    options = {
        option: {"default": field.get_default(call_default_factory=True), "description": field.description}
        for option, field in entry.value.Options.model_fields.items()
    }
    facts = {
        "name": name,
        "plugin": entry.record.name,
        "stage": getattr(entry.value, "stage", None),
        "summary": entry.value.summary,
        "options": options,
    }
    if as_json:
        print_json(facts)
        return
    print(f"{name}: {entry.value.summary}")
    stage = f"stage {facts['stage']}, " if facts["stage"] else ""
    print(f"{stage}from {entry.record.name} ({entry.record.distribution} {entry.record.version})")
    print()
    if not options:
        print("It has no options.")
        return
    print_table(
        ("option", "default", "meaning"), [(n, str(o["default"]), str(o["description"])) for n, o in options.items()]
    )
