# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands share."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from qhw.errors import PlanError

__all__ = [
    "AsJson",
    "CalibrationOption",
    "DataOption",
    "EvaluateOption",
    "Formats",
    "KeepFloat",
    "MetricOption",
    "ModelArgument",
    "OutOption",
    "Pipeline",
    "Prefer",
    "ResultArgument",
    "Settings",
    "TargetArgument",
    "TargetOption",
    "Without",
    "wishes",
]

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="module:callable that returns (nn.Module, example inputs), or a result folder.",
    ),
]
ResultArgument = Annotated[
    Path, typer.Argument(metavar="RESULT", help="Result folder that 'qhw quantize' wrote.", show_default=False)
]
TargetArgument = Annotated[
    str, typer.Argument(metavar="TARGET", help="A target's name (qhw target list), or a path to a .toml file.")
]
TargetOption = Annotated[
    str,
    typer.Option(
        "--target", "-t", metavar="TARGET", help="A target's name (qhw target list), or a path to a .toml file."
    ),
]
DataOption = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        metavar="DATA",
        help="Samples: an .npz file with one array per input, an .npy file for a single input, or module:callable that "
        "yields batches. Absent: those the result keeps.",
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        "-c",
        metavar="DATA",
        help="Samples: an .npz file with one array per input, an .npy file for a single input, or module:callable that "
        "yields batches.",
    ),
]
OutOption = Annotated[
    Path, typer.Option("--out", "-o", metavar="FOLDER", help="Folder for the result; an earlier result is replaced.")
]
EvaluateOption = Annotated[
    str | None,
    typer.Option(
        "--evaluate",
        "-e",
        metavar="DATA",
        help="Labelled samples: an .npz file that also has 'labels', or module:callable that yields (inputs, labels).",
    ),
]
MetricOption = Annotated[
    str | None,
    typer.Option("--metric", metavar="CALLABLE", help="module:callable of (outputs, labels) -> number. Absent: top-1."),
]
Pipeline = Annotated[
    str | None, typer.Option("--pipeline", metavar="NAME", help="Another pipeline than the default one.")
]
Prefer = Annotated[
    list[str] | None,
    typer.Option("--prefer", metavar="ALGORITHM", help="Algorithm to put first at its stage. Repeatable."),
]
Without = Annotated[
    list[str] | None, typer.Option("--without", metavar="ALGORITHM", help="Algorithm to leave out. Repeatable.")
]
KeepFloat = Annotated[
    list[str] | None,
    typer.Option("--keep-float", metavar="OPERATOR", help="Operator or pattern that stays in float. Repeatable."),
]
Formats = Annotated[
    list[str] | None,
    typer.Option("--format", metavar="POINT=FORMAT", help="Format of a point, or of a pattern's. Repeatable."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="ALGORITHM.OPTION=VALUE", help="Option of an algorithm. Repeatable."),
]
AsJson = Annotated[
    bool, typer.Option("--json", help='Print the same facts as JSON on standard output; an error as {"error": ...}.')
]


def wishes(
    pipeline: str | None,
    prefer: list[str] | None,
    without: list[str] | None,
    keep_float: list[str] | None,
    formats: list[str] | None,
    settings: list[str] | None,
) -> dict[str, Any]:
    """The overrides, as `qhw.plan` takes them."""
    pairs = {}
    for text in formats or []:
        point, separator, name = text.rpartition("=")
        if not separator or not point or not name:
            raise PlanError(f"--format: must be POINT=FORMAT, as 'fc1.weight=w4'; got '{text}'.")
        pairs[point] = name
    return {
        "pipeline": pipeline,
        "prefer": tuple(prefer or ()),
        "without": tuple(without or ()),
        "keep_float": tuple(keep_float or ()),
        "formats": pairs,
        "options": _options(settings or []),
    }


def _options(settings: list[str]) -> dict[str, dict[str, Any]]:
    """Algorithm -> option -> value; a value that is no JSON is a word."""
    found: dict[str, dict[str, Any]] = {}
    for text in settings:
        name, separator, value = text.partition("=")
        algorithm, dot, option = name.partition(".")
        if not (separator and dot and algorithm and option):
            raise PlanError(f"--set: must be ALGORITHM.OPTION=VALUE, as 'mse_weights.clipping_weight=3'; got '{text}'.")
        try:
            found.setdefault(algorithm, {})[option] = json.loads(value)
        except ValueError:
            found.setdefault(algorithm, {})[option] = value
    return found
