# SPDX-License-Identifier: Apache-2.0
"""`qhw target diff`: what two targets say otherwise, by what it means."""

from dataclasses import asdict
from typing import Annotated

import typer

from qhw.cli.console import heading, paragraph, print_json
from qhw.cli.options import AsJson
from qhw.wording import counted

__all__ = ["diff_targets"]

One = Annotated[
    str, typer.Argument(metavar="ONE", help="A target's name (qhw target list), or a path to a .toml file.")
]
Other = Annotated[str, typer.Argument(metavar="OTHER", help="The one to compare with it, likewise.")]
ExitCode = Annotated[bool, typer.Option("--exit-code", help="Exit status 1 where they differ.")]
TITLES = {
    "operators": "Operators",
    "formats": "Formats",
    "arithmetic": "Arithmetic",
    "rules": "Rules of operators",
    "target": "The target",
}


def diff_targets(one: One, other: Other, exit_code: ExitCode = False, as_json: AsJson = False) -> None:
    """Say what the second target has otherwise than the first: by operator and content, never by ids.

    Example: qhw target diff onnxruntime/cpu-x86-vnni onnxruntime/cpu-x86-avx2
    """
    from qhw.cli.target.load import Shelf
    from qhw.schema import diff

    shelf = Shelf()
    first, second = (shelf.load(name).spec for name in (one, other))
    found = diff(first, second)
    if as_json:
        differences = [{**asdict(item), "text": item.sentence()} for item in found]
        print_json({"from": first.name, "to": second.name, "differences": differences})
    else:
        heading(f"{first.name} -> {second.name}")
        for section, title in TITLES.items():
            of_section = [item for item in found if item.section == section]
            if of_section:
                print()
                heading(title)
            for item in of_section:
                paragraph(
                    {"added": "+", "removed": "-", "changed": "~"}[item.change], item.sentence(), left=2, indent=2
                )
        print()
        print(f"{counted(len(found), 'difference')}." if found else "No difference: both mean the same.")
    raise typer.Exit(1 if exit_code and found else 0)
