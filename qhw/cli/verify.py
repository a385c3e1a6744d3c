# SPDX-License-Identifier: Apache-2.0
"""`qhw verify`: the integer result, code by code, beside the simulation and the vendor's runtime."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qhw.cli.console import paragraph, print_json, print_table
from qhw.cli.options import AsJson, DataOption, ResultArgument
from qhw.wording import counted

if TYPE_CHECKING:
    from qhw.verification import Verification


def verify(result: ResultArgument, data: DataOption = None, as_json: AsJson = False) -> None:
    """Run a result in the target's exact integer arithmetic and compare code by code.

    Exit status 1 where a code differs from the artefact in the vendor's runtime; 0 where that was not run, which is
    said with its reason.

    Example: qhw verify out/p4 --data examples.digits:calibration
    """
    import qhw
    from qhw.cli.sources import load_calibration
    from qhw.engine.folder import artefacts_of

    loaded = qhw.load(result)
    samples = None if data is None else load_calibration(data, loaded.float_graph)
    artefacts = artefacts_of(result)
    found = qhw.verify(loaded, samples, artefact=artefacts[0] if artefacts else None)
    if as_json:
        print_json({**asdict(found), "proven": found.is_proven})
    else:
        _show(loaded.target.name, result, found)
    if found.first_difference is not None:
        raise typer.Exit(1)


def _show(target: str, folder: Path, found: "Verification") -> None:
    theirs = {one.tensor: one for one in found.artefact}
    runtime = next(iter(found.runtime), "runtime")
    rows = []
    for one in found.simulated:
        other = theirs.get(one.tensor)
        shown = "" if other is None else _count(other.differing, other.largest)
        rows.append((one.tensor, f"{one.codes:,}", _count(one.differing, one.largest), shown))
    columns = ("tensor", "codes", "simulation differs")
    if theirs:
        print_table((*columns, f"{runtime} differs"), rows)
    else:
        print_table(columns, [row[:3] for row in rows])
    print()
    paragraph("Target", target)
    paragraph("Samples", str(found.samples))
    if found.overflowing:
        names = ", ".join(found.overflowing[:5])
        paragraph(
            "Sums", f"{counted(len(found.overflowing), 'operator')} can overflow: {names} (qhw accumulators {folder})"
        )
    if found.host:
        paragraph(
            "Host", f"{counted(len(found.host), 'operator')} in float32, not compared: {', '.join(found.host[:5])}"
        )
    total = sum(one.codes for one in found.artefact)
    if found.not_run is not None:
        paragraph("Artefact", f"not run: {found.not_run}")
    elif found.first_difference is None:
        versions = ", ".join(f"{name} {version}" for name, version in found.runtime.items())
        paragraph("Artefact", f"0 of {total:,} codes differ ({versions})")
    else:
        first = found.first_difference
        differing = sum(one.differing for one in found.artefact)
        paragraph("Artefact", f"{differing:,} of {total:,} codes differ")
        paragraph("First difference", f"{first.tensor}: {first.differing:,} codes, by {first.largest} at most")
    if found.not_run is not None:
        print(f"Next: take {folder / 'artefacts'} to the target's toolchain and compare with these codes.")


def _count(differing: int, largest: int) -> str:
    return "0" if not differing else f"{differing:,} (by {largest})"
