# SPDX-License-Identifier: Apache-2.0
"""`qhw target list`: all accelerators that are described, a line each."""

import textwrap
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qhw.cli.console import print_json, print_table, warn, width
from qhw.cli.options import AsJson
from qhw.wording import counted

if TYPE_CHECKING:
    from qhw.schema import Accumulator, Format, TargetSpec

__all__ = ["list_targets", "target_facts"]

VendorOption = Annotated[
    list[str] | None, typer.Option("--vendor", metavar="VENDOR", help="Only those of this vendor. Repeatable.")
]
WithOption = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        metavar="NUMBERS",
        help="Only those that have weights or activations of these numbers, as int4 or uint8. Repeatable: all of them.",
    ),
]
NOTHING = "nothing here"
_MOST = 3
_WIDEST = 18
_SHARING = {"block": "/block", "group": "/group", "row": "/row", "out_channel": "/channel"}
LEGEND = (
    "weights, activations: numbers, preferred first; the finest sharing of scales, per tensor where none is named; "
    "2^k: all scales are powers of two; asym: zero points other than one fixed code."
)


def list_targets(vendor: VendorOption = None, numbers: WithOption = None, as_json: AsJson = False) -> None:
    """List all targets: what their toolchain takes, their formats and accumulators, and what can verify the artefact.

    Example: qhw target list --with int4
    """
    from qhw.cli.target.load import Shelf
    from qhw.errors import TargetError

    shelf = Shelf()
    names = shelf.registry.target_names()
    known = {name.partition("/")[0] for name in names}
    for one in vendor or ():
        _check_word(one, known, "--vendor", "vendor")
    facts: list[dict[str, Any]] = []
    broken: list[str] = []
    for name in names:
        if vendor and name.partition("/")[0] not in vendor:
            continue
        try:
            facts.append(target_facts(shelf.load(name).spec))
        except TargetError as error:
            broken.append(f"{name}: {error}")
    there = {number for fact in facts for number in fact["numbers"]}
    for one in numbers or ():
        _check_word(one, there, "--with", "numbers")
    facts = [fact for fact in facts if all(number in fact["numbers"] for number in numbers or ())]
    if as_json:
        print_json(facts)
    else:
        _show(facts)
    for line in broken:
        warn(f"warning: left out: {' '.join(line.split())}")


def _check_word(word: str, known: Iterable[str], option: str, what: str) -> None:
    from qhw.errors import TargetError
    from qhw.schema import closest

    names = sorted(known)
    if word not in names:
        near = closest(word, names)
        hint = f" Closest: {near}." if near else ""
        raise TargetError(f"{option}: no target is of {what} '{word}'.{hint} There are: {', '.join(names) or 'none'}.")


def _show(facts: list[dict[str, Any]]) -> None:
    columns = ("target", "artefact", "weights", "activations", "accumulator", "verified by")
    rows = [
        (fact["name"], _cut(fact["artefact"] or "-"), *fact["words"], fact["verified_by"] or NOTHING) for fact in facts
    ]
    print_table(columns, rows)
    print()
    print("\n".join(textwrap.wrap(LEGEND, width())))
    vendors = {fact["vendor"] for fact in facts}
    print(f"{counted(len(facts), 'target')} of {counted(len(vendors), 'vendor')}. One in full: qhw target show NAME")


def _cut(text: str) -> str:
    return text if len(text) <= _WIDEST else f"{text[: _WIDEST - 3].rstrip()}..."


def target_facts(spec: "TargetSpec") -> dict[str, Any]:
    """What the list says of one target, as data; `words` are the cells of the table."""
    from qhw.schema.words import accumulator_words, format_words

    weights, activations = list(_formats(spec, "weight")), list(_formats(spec, "activation"))
    accumulators = _accumulators(spec)
    artefact = spec.artefact
    numbers = dict.fromkeys(map(_number, (*weights, *activations)))
    return {
        "name": spec.name,
        "vendor": spec.name.partition("/")[0],
        "summary": spec.summary or "",
        "extends": spec.lineage[-1] if spec.lineage else None,
        "artefact": None if artefact is None else artefact.file_format,
        "exporter": None if artefact is None else artefact.exporter,
        "verified_by": None if artefact is None else artefact.executor,
        "weights": [format_words(form) for form in weights],
        "activations": [format_words(form) for form in activations],
        "accumulators": [accumulator_words(entry) for entry in accumulators],
        "numbers": list(numbers),
        "words": [_formats_words(weights), _formats_words(activations), _accumulators_words(accumulators)],
    }


def _formats(spec: "TargetSpec", role: str) -> "Iterator[Format]":
    """Formats of the weights of operators that have some, or of all activations, preferred first."""
    from qhw.schema import WEIGHTED_KINDS
    from qhw.schema.kinds import TWO_ACTIVATIONS

    found: dict[str, None] = {}
    for kind, operator in spec.operators.items():
        for kernel in operator.kernels if isinstance(operator.kernels, tuple) else ():
            row = spec.kernels[kernel]
            two = kind in TWO_ACTIVATIONS
            of_weights = [row.weight] if kind in WEIGHTED_KINDS else []
            of_activations = [row.input, *([row.weight] if two else []), row.output]
            for ids in of_weights if role == "weight" else of_activations:
                found.update(dict.fromkeys(ids if isinstance(ids, tuple) else ()))
    return (spec.formats[name] for name in found)


def _accumulators(spec: "TargetSpec") -> "list[Accumulator]":
    """Accumulators of operators with weights, preferred first."""
    from qhw.schema import WEIGHTED_KINDS

    used = [
        spec.kernels[kernel].accumulator
        for kind, operator in spec.operators.items()
        if kind in WEIGHTED_KINDS and isinstance(operator.kernels, tuple)
        for kernel in operator.kernels
    ]
    return [spec.accumulators[name] for name in dict.fromkeys(used) if name in spec.accumulators]


def _formats_words(forms: "list[Format]") -> str:
    """As `int8 int4 /channel 2^k asym`: numbers, finest sharing below a tensor, scales and zero points of all."""
    from qhw.schema import Scale

    if not forms:
        return "-"
    numbers = list(dict.fromkeys(map(_number, forms)))
    words = [*numbers[:_MOST], *([f"+{len(numbers) - _MOST}"] if len(numbers) > _MOST else [])]
    shared = {form.per for form in forms}
    finest = next((word for per, word in _SHARING.items() if per in shared), None)
    words += [] if finest is None else [finest]
    kinds = {form.scale.kind if isinstance(form.scale, Scale) else "float32" for form in forms}
    words += ["2^k"] if kinds == {"power_of_two"} else ["fixed scale"] if kinds <= {"fixed", "enumerated"} else []
    is_free = any(form.kind == "integer" and not isinstance(form.zero_point, int) for form in forms)
    return " ".join([*words, *(["asym"] if is_free else [])])


def _number(form: "Format") -> str:
    """Its numbers without the codes in use."""
    from qhw.schema.words import number_words

    return number_words(form).partition(" [")[0].partition(" up to")[0]


def _accumulators_words(entries: "list[Accumulator]") -> str:
    """As `32 wrap`, `32 40 saturate`, `unknown`."""
    if not entries:
        return "unknown"
    widths = dict.fromkeys(
        ("float" if entry.kind == "float" else "") + str(entry.bits or "?").replace("_", " ") for entry in entries
    )
    overflows = {entry.overflow for entry in entries if entry.overflow not in (None, "unknown", "exact")}
    return " ".join([*widths, *(sorted(map(str, overflows)) if len(overflows) == 1 else [])])
