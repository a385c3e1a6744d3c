# SPDX-License-Identifier: Apache-2.0
"""`qhw golden`: per-layer vectors of the exact integer result, for firmware and RTL."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qhw.cli.console import paragraph, print_json
from qhw.cli.options import AsJson, DataOption, ResultArgument
from qhw.wording import argument, counted, listed

if TYPE_CHECKING:
    from qhw.vectors import GoldenVectors

OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the vectors; earlier vectors are replaced.")
]
SamplesOption = Annotated[
    int, typer.Option("--samples", "-n", metavar="NUMBER", help="How many samples, from the first on.")
]
LimitOption = Annotated[
    int,
    typer.Option(
        "--header-limit",
        metavar="BYTES",
        help="Array elements in vectors.h; the arrays of layers past it are in vectors.npz only.",
    ),
]


def golden(
    result: ResultArgument,
    out: OutOption,
    samples: SamplesOption = 1,
    data: DataOption = None,
    header_limit: LimitOption = 4 << 20,
    as_json: AsJson = False,
) -> None:
    """Write what every layer reads, sums and writes, as .npz and C header, with a script that recomputes it.

    Example: qhw golden out/p4 --samples 1 --out out/vectors
    """
    import qhw
    from qhw.cli.sources import load_calibration

    loaded = qhw.load(result)
    given = None if data is None else load_calibration(data, loaded.float_graph)
    found = qhw.golden(loaded, out, given, samples=samples, header_limit=header_limit)
    if as_json:
        print_json({**asdict(found), "folder": str(found.folder)})
    else:
        _show(loaded.target.name, found)


def _show(target: str, found: "GoldenVectors") -> None:
    from qhw.cli.words import bytes_words

    paragraph("Target", target)
    paragraph("Samples", str(found.samples))
    paragraph("Layers", str(len(found.operators)))
    if found.host:
        paragraph("Host", f"{counted(len(found.host), 'operator')} in float32, without vectors: {listed(found.host)}")
    paragraph("Files", ", ".join(f"{name} {bytes_words(size)}" for name, size in found.num_bytes.items()))
    if left := found.header_left_out:
        paragraph("Not in vectors.h", f"the arrays of {listed(left, 3)}: past --header-limit")
    script = argument(found.folder / "check.py")
    print(f"Next: python {script}; with --output NPZ it compares the arrays of your own device.")
