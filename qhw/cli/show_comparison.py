# SPDX-License-Identifier: Apache-2.0
"""The matrix of a comparison: figures in one table, then what decided, said once for targets that agree."""

from collections import Counter
from collections.abc import Iterable, Mapping

from qhw.cli.console import heading, paragraph, print_table
from qhw.cli.figures import cycles_words, joules_words, seconds_words
from qhw.cli.words import bytes_words, count_words, format_words
from qhw.comparison import Comparison, Headroom, Row
from qhw.wording import counted, listed

__all__ = ["show_comparison"]

_FAILED = {"load": "cannot be loaded", "plan": "no plan", "quantize": "not quantized"}


def show_comparison(found: Comparison, model: str) -> None:
    """Print a comparison.

    Args:
        found: The comparison.
        model: What the command line calls the model.
    """
    data = "no data" if found.samples is None else f"calibrated on {counted(found.samples, 'sample')}"
    heading(f"{model} · {counted(len(found.rows), 'target')} · {data}")
    score = found.float_score
    scored = "" if score is None else f", {score.metric} {score.value:.2f} on {counted(score.samples, 'sample')}"
    print(f"In float: {bytes_words(found.float_bytes)}{scored}")
    print()
    done = [row for row in found.rows if row.plan is not None]
    if done:
        _show_figures(done, score is not None)
    _show_decisions(done)
    failed = [row for row in found.rows if row.ended is not None]
    if failed:
        print()
        heading("Not quantized")
        for row in failed:
            paragraph(row.target, f"{_FAILED[str(row.ended)]}: {row.reason}", left=30, indent=2)


def _show_figures(rows: list[Row], is_scored: bool) -> None:
    with_energy = any(row.cost is not None and (row.cost.joules.value or 0) for row in rows)
    columns = ["target"]
    columns += ["simulated", "agrees (95 %)"] if is_scored else []
    columns += ["size", "MACs on chip", "operators", "head-room", "cycles", "time"]
    columns += ["energy"] if with_energy else []
    print_table(columns, [_figures(row, is_scored, with_energy) for row in rows])


def _figures(row: Row, is_scored: bool, with_energy: bool) -> list[str]:
    assert row.plan is not None
    cells = [row.target]
    if is_scored:
        cells += _scores(row)
    total = row.plan.total_macs
    share = f"{100 * row.plan.accelerator_macs / total:.1f} % of {count_words(total)}" if total else "no MACs"
    on_chip = row.operators - len(row.host)
    cells += ["-" if row.bytes is None else bytes_words(row.bytes), share, f"{on_chip} of {row.operators}"]
    cells.append(_headroom(row.headroom))
    cost = row.cost
    words = [cycles_words(cost.cycles), seconds_words(cost.seconds), joules_words(cost.joules)] if cost else []
    words = words if cost is not None and cost.operators else ["-", "-", "-"]  # nothing runs there: no cost, not none
    cells += words[: 3 if with_energy else 2]
    return cells


def _scores(row: Row) -> list[str]:
    if row.simulated is None:
        return ["-", "-"]
    same = row.simulated.agreement
    agrees = "-" if same is None else f"{100 * same.share:.1f} % ({100 * same.low:.1f} to {100 * same.high:.1f})"
    return [f"{row.simulated.value:.2f}", agrees]


def _headroom(room: Headroom | None) -> str:
    if room is None:
        return "-"
    if room.overflowing:
        return f"{counted(len(room.overflowing), 'layer')} can overflow"
    if room.bits is None:
        return "unknown"
    return counted(room.bits, "bit") + (f", {len(room.unknown)} unknown" if room.unknown else "")


def _show_decisions(rows: list[Row]) -> None:
    """What decided: what holds for every target is said once, and targets that agree in all the rest share an entry."""
    if not rows:
        return
    decided = [_decisions(row) for row in rows]
    shared = [entry for entry in decided[0] if all(entry in entries for entries in decided)]
    print()
    heading("What decided")
    if len(rows) > 1:
        _show_entries("on every target", shared)
    grouped: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for row, entries in zip(rows, decided, strict=True):
        own = tuple(entry for entry in entries if entry not in shared or len(rows) == 1)
        grouped.setdefault(own, []).append(row.target)
    for own, names in grouped.items():
        print()
        _show_entries(", ".join(names), own)
    lacking = Counter(field for row in rows if row.cost is not None for field in row.cost.seconds.missing)
    if lacking:
        print()
        fields = [f"{field} ({counted(number, 'target')})" for field, number in lacking.most_common()]
        paragraph("Not known of cost", listed(fields, 6))


def _show_entries(title: str, entries: Iterable[tuple[str, str]]) -> None:
    labelled: dict[str, list[str]] = {}
    for label, text in entries:
        labelled.setdefault(label, []).append(text)
    heading(f"  {title}")
    if not labelled:
        print("    nothing but what holds for every target")
    for label, texts in labelled.items():
        paragraph(label, (", " if label == "algorithms" else "; ").join(texts), left=16, indent=4)


def _decisions(row: Row) -> list[tuple[str, str]]:
    """Label and text of everything that decided, without ids, so that targets which say the same agree."""
    found = [("weights", _formats(row, row.weights)), ("activations", _formats(row, row.activations))]
    found += [("algorithms", name) for name in row.algorithms]
    reasons: dict[str, list[str]] = {}
    for operator in row.host:
        reasons.setdefault(operator.reason, []).append(f"{operator.name} ({operator.kind})")
    found += [("on the host", f"{why}: {listed(names, 3)}") for why, names in reasons.items()]
    for name, why in row.refusals.items():
        said = list(dict.fromkeys(reason.statement() for reason in why))
        more = f" (and {len(said) - 1} more)" if len(said) > 1 else ""
        found.append(("refused", f"{name}: {said[0]}{more}"))
    return [(label, text) for label, text in found if text]


def _formats(row: Row, counts: Mapping[str, int]) -> str:
    """Formats in words, the most frequent first; ids are left out, so that targets with the same grids agree."""
    words: dict[str, int] = {}
    for name, number in counts.items():
        form = format_words(row.spec.formats[name]) if row.spec is not None else name
        words[form] = words.get(form, 0) + number
    if len(words) == 1:
        return next(iter(words))
    return "; ".join(f"{form} ({number})" for form, number in words.items())
