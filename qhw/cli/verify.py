# SPDX-License-Identifier: Apache-2.0
"""`qhw verify`: the integer result, code by code, beside the simulation and the vendor's runtime."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from qhw.cli.accumulators import open_biases
from qhw.cli.console import heading, paragraph, print_json, print_table
from qhw.cli.options import AsJson, DataOption, ResultArgument
from qhw.wording import argument, counted, listed

if TYPE_CHECKING:
    from qhw.engine import QuantizedModel
    from qhw.verification import Remainder, Verification


def verify(result: ResultArgument, data: DataOption = None, as_json: AsJson = False) -> None:
    """Run a result in the target's exact integer arithmetic and compare code by code.

    Exit status 1 where a code differs from the artefact in the vendor's runtime, and where the target leaves open what
    decides: then the fields are named, and the rest is checked. 0 where the artefact was not run, which is said with
    its reason.

    Example: qhw verify out/p4 --data examples.digits:calibration
    """
    import qhw
    from qhw.cli.sources import load_calibration
    from qhw.cli.stopped import Unanswered
    from qhw.engine.folder import artefacts_of, changed_artefacts
    from qhw.errors import IntegerError
    from qhw.integer import lower
    from qhw.verification import check_rest

    loaded = qhw.load(result)
    samples = None if data is None else load_calibration(data, loaded.float_graph)
    artefact, changed = next(iter(artefacts_of(result)), None), changed_artefacts(result)
    try:
        found = qhw.verify(loaded, samples, artefact=artefact)
    except IntegerError as error:
        _, obstacles = lower(loaded)
        if not obstacles:
            raise
        rest = check_rest(loaded, samples, artefact=artefact)
        if not as_json:
            _show_rest(loaded, result, rest)
        facts = {"obstacles": [asdict(one) for one in obstacles], "still_checked": asdict(rest)}
        raise Unanswered(error, facts) from error
    if as_json:
        print_json({**asdict(found), "proven": found.is_proven, "changed": changed})
    else:
        _show(loaded.target.name, result, found, changed)
    if found.first_difference is not None:
        raise typer.Exit(1)


def _show(target: str, folder: Path, found: "Verification", changed: list[str]) -> None:
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
        paragraph("Sums", _overflowing_words(found.overflowing, folder))
    if found.host:
        paragraph("Host", f"{counted(len(found.host), 'operator')} in float32, not compared: {listed(found.host)}")
    if changed:
        paragraph("Changed", f"{listed(changed)}: not as exported (SHA-256 differs)")
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
        compare = f"compare what the toolchain computes of {folder / 'artefacts'}"
        print(f"Next: 'qhw golden {argument(folder)} --out vectors' writes these codes; {compare}.")


def _show_rest(result: "QuantizedModel", folder: Path, rest: "Remainder") -> None:
    """What was checked all the same, where the integer result cannot be computed."""
    from qhw.schema import open_fields

    heading("The integer result cannot be computed. Checked all the same:")
    if rest.proven:
        text = f"{counted(len(rest.proven), 'operator')} cannot overflow"
        biases = open_biases(result)
        text += f", their biases left out ({', '.join(dict.fromkeys(biases.values()))})" if biases else ""
        paragraph("Sums", f"{text} (qhw accumulators {argument(folder)})")
    if rest.overflowing:
        paragraph("Sums", _overflowing_words(rest.overflowing, folder))
    if rest.unbounded:
        paragraph("Sums", f"the accumulator's width of {counted(len(rest.unbounded), 'operator')} is not known")
    if rest.not_run is not None:
        paragraph("Artefact", f"not run: {rest.not_run}")
    else:
        paragraph("Simulation", _simulation_words(rest))
    if any("qhw verify" in field.commands for field in open_fields(result.target)):
        print(f"Next: 'qhw target lint {argument(folder / 'target.json')}' lists all that the target leaves open.")


def _overflowing_words(names: "tuple[str, ...]", folder: Path) -> str:
    return f"{counted(len(names), 'operator')} can overflow: {listed(names)} (qhw accumulators {argument(folder)})"


def _simulation_words(rest: "Remainder") -> str:
    differing, total = (sum(getattr(one, field) for one in rest.simulated) for field in ("differing", "codes"))
    largest = max((one.largest for one in rest.simulated), default=0)
    by = f", by {largest} at most" if differing else ""
    versions = ", ".join(f"{name} {version}" for name, version in rest.runtime.items())
    return f"{differing:,} of {total:,} codes differ from the artefact's{by} ({versions})"


def _count(differing: int, largest: int) -> str:
    return "0" if not differing else f"{differing:,} (by {largest})"
