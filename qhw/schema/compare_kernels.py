# SPDX-License-Identifier: Apache-2.0
"""What two targets compute for one operator kind: formats that may stand together, and the arithmetic of each."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product, zip_longest
from typing import Any

from qhw.schema.content import arithmetic_content, changed_leaves, format_parts, frozen
from qhw.schema.difference import Difference
from qhw.schema.kernels import OPERANDS
from qhw.schema.kinds import TWO_ACTIVATIONS
from qhw.schema.operators import Operator
from qhw.schema.spec import TargetSpec
from qhw.schema.words import joined

__all__ = ["kernel_differences"]

PARTS = ("number", "zero point", "sharing", "scale")


@dataclass(frozen=True)
class Grid:
    """A format by its content; or what stands where there is none: `unknown`, `none`.

    Attributes:
        key: Equal for formats of the same numbers, zero points, sharing and scales.
        parts: Content and words of each of these, and of the rest; empty where there is no format.
        word: What stands in its place.
    """

    key: Any
    parts: Mapping[str, tuple[Any, str]] = field(compare=False, default_factory=dict)
    word: str = field(compare=False, default="")

    def words(self) -> str:
        """All of it in words."""
        return ", ".join(w for p in PARTS if (w := self.parts[p][1]) != "any scale") if self.parts else self.word

    def number(self) -> str:
        """Its numbers in words."""
        return self.parts["number"][1] if self.parts else self.word

    def rest(self) -> Mapping[str, Any]:
        """What else it says."""
        return self.parts["rest"][0] if self.parts else {}


Row = tuple[Grid, Grid, Grid]
Rows = dict[Row, list[Any]]
NONE = Grid(("word", "none"), word="none")


def kernel_differences(
    one: TargetSpec, first: Operator, other: TargetSpec, second: Operator, kind: str
) -> Iterator[Difference]:
    """The differences between the kernels of one operator kind, ids and their order of writing left out of account.

    Args:
        one: The first target.
        first: Its row of the operator.
        other: The second target.
        second: Its row of the operator.
        kind: The operator's kind.
    """
    before, after = _rows(one, first, kind), _rows(other, second, kind)
    yield from _format_differences(before, after, kind)
    yield from _arithmetic_differences(before, after, kind)
    common = [[row for row in rows if row in before and row in after] for rows in (before, after)]
    if common[0] != common[1]:
        preferred = [_label(rows[0], rows) or rows[0][0].words() for rows in common]
        if preferred[0] == preferred[1]:
            preferred = [", then ".join(dict.fromkeys(_number_label(row) for row in rows)) for rows in common]
        if preferred[0] == preferred[1]:
            preferred = ["; ".join(grid.words() for grid in rows[0]) for rows in common]
        yield Difference("formats", "preferred", (kind,), "changed", preferred[0], preferred[1])


def _rows(spec: TargetSpec, operator: Operator, kind: str) -> Rows:
    """Each legal triple of formats with the arithmetic of the kernels that hold it, in order of preference."""
    found: Rows = {}
    for name in operator.kernels if isinstance(operator.kernels, tuple) else ():
        kernel = spec.kernels[name]
        inputs = _grids(spec, kernel.input)
        weights = _grids(spec, kernel.weight)
        if kind in TWO_ACTIVATIONS and kernel.weight is None:
            weights = inputs
        arithmetic = arithmetic_content(spec, kernel)
        for row in product(inputs, weights, _grids(spec, kernel.output)):
            known = found.setdefault(row, [])
            if arithmetic not in known:
                known.append(arithmetic)
    return found


def _grids(spec: TargetSpec, names: Any) -> list[Grid]:
    if not isinstance(names, tuple):
        return [NONE if names is None else Grid(("word", names), word=str(names))]
    found = []
    for name in names:
        parts = format_parts(spec.formats[name])
        found.append(Grid(frozen([parts[name][0] for name in PARTS]), parts))
    return found


def _format_differences(before: Rows, after: Rows, kind: str) -> Iterator[Difference]:
    """By operand where that explains which triples come and go; else the triples."""
    found: dict[str, list[Difference]] = {}
    came: list[set[Grid]] = []
    went: list[set[Grid]] = []
    for index, operand in enumerate(OPERANDS):
        old, new = ({row[index]: None for row in rows} for rows in (before, after))
        came.append(set(new) - set(old))
        went.append(set(old) - set(new))
        found[operand] = list(_of_operand(list(old), list(new), kind))
    yield from _named(found, kind)
    for label in _unexplained(before, after, went):
        yield Difference("formats", "combinations", (kind,), "removed", label, None)
    for label in _unexplained(after, before, came):
        yield Difference("formats", "combinations", (kind,), "added", None, label)


def _unexplained(rows: Rows, others: Rows, told: list[set[Grid]]) -> dict[str, None]:
    """Triples that one target alone has although the other has each of their formats."""
    left = [row for row in rows if row not in others and not any(g in s for g, s in zip(row, told, strict=True))]
    return dict.fromkeys(_combination(row, left) for row in left)


def _named(found: dict[str, list[Difference]], kind: str) -> Iterator[Difference]:
    """The operands by the names people give them; what inputs and results share is about activations."""
    second = "second operand" if kind in TWO_ACTIVATIONS else "weights"
    if found["input"] == found["output"]:
        if kind in TWO_ACTIVATIONS and found["weight"] == found["input"]:
            found = {"activations": found["input"]}
        else:
            found = {"activations": found["input"], second: found["weight"]}
    else:
        found = {"inputs": found["input"], second: found["weight"], "results": found["output"]}
    for name, differences in found.items():
        for one in differences:
            yield replace(one, subject=f"{name}{one.subject}")


def _of_operand(old: list[Grid], new: list[Grid], kind: str) -> Iterator[Difference]:
    for grid in old:
        other = next((one for one in new if one == grid), grid)
        for path, left, right in changed_leaves("", grid.rest(), other.rest()):
            where = grid.number() if len({one.number() for one in (*old, *new)}) > 1 else ""
            yield Difference("formats", f".{path}", (kind,), "changed", left, right, where)
    went, came = [grid for grid in old if grid not in new], [grid for grid in new if grid not in old]
    if not went and not came:
        return
    part = _deciding_part(old, new, went, came)
    say: Callable[[Grid], str] = Grid.words if part is None else lambda grid: grid.parts[part][1]
    gone, added = (list(dict.fromkeys(map(say, grids))) for grids in (went, came))
    if len(gone) == len(added) == 1 and (part is not None or len(old) == len(new) == 1):
        yield Difference("formats", "", (kind,), "changed", gone[0], added[0])
        return
    for words in gone:
        yield Difference("formats", "", (kind,), "removed", words, None)
    for words in added:
        yield Difference("formats", "", (kind,), "added", None, words)


def _deciding_part(old: list[Grid], new: list[Grid], went: list[Grid], came: list[Grid]) -> str | None:
    """The one part of a grid by whose values alone formats come and go; None where more than one is needed."""
    if not all(grid.parts for grid in (*old, *new)):
        return None
    for part in PARTS:
        values = [{frozen(grid.parts[part][0]) for grid in grids} for grids in (old, new)]
        told = all(frozen(grid.parts[part][0]) not in values[1] for grid in went) and all(
            frozen(grid.parts[part][0]) not in values[0] for grid in came
        )
        others = [
            {frozen([grid.parts[name][0] for name in PARTS if name != part]) for grid in grids} for grids in (old, new)
        ]
        if told and others[0] == others[1]:
            return part
    return None


def _number_label(row: Row) -> str:
    return " x ".join(grid.number() for grid in row[:2] if grid != NONE)


def _combination(row: Row, rows: Sequence[Row]) -> str:
    """Operands and result by their numbers; by everything where numbers do not tell them from the kept ones."""
    label = f"{_number_label(row)} -> {row[2].number()}"
    same = [other for other in rows if f"{_number_label(other)} -> {other[2].number()}" == label]
    return label if len(same) == 1 else " x ".join(grid.words() for grid in row if grid != NONE)


def _label(row: Row, rows: Sequence[Row]) -> str:
    """Operands by their numbers; empty where all rows have the same."""
    labels = {_number_label(other) for other in rows}
    return _number_label(row) if len(labels) > 1 else ""


def _arithmetic_differences(before: Rows, after: Rows, kind: str) -> Iterator[Difference]:
    pairs = list(_comparable(before, after))
    where: dict[Any, dict[str, None]] = {}
    said: dict[Any, tuple[str, Any, Any]] = {}
    reached: dict[Any, int] = {}
    for label, old_rows, new_rows in pairs:
        for old, new in zip_longest(old_rows, new_rows):
            for subject, left, right in _changed_fields(old, new):
                key = (subject, frozen(left), frozen(right))
                said[key] = (subject, left, right)
                where.setdefault(key, {})[label] = None
                reached[key] = reached.get(key, 0) + 1
    for key, (subject, left, right) in said.items():
        labels = list(where[key])
        everywhere = reached[key] >= len(pairs) and " against " not in labels[0]
        on = "" if everywhere else joined(labels[:3]) + (", ..." if len(labels) > 3 else "")
        yield Difference("arithmetic", subject, (kind,), "changed", left, right, on)


def _comparable(before: Rows, after: Rows) -> Iterator[tuple[str, list[Any], list[Any]]]:
    """Arithmetic side by side: of the same formats; else of the same numbers; else of what each target prefers."""
    common = [row for row in before if row in after]
    yield from ((_number_label(row), before[row], after[row]) for row in common)
    told = {_number_label(row) for row in common}
    first, second = ({_number_label(row): rows[row] for row in reversed(rows)} for rows in (before, after))
    for label in reversed(first):
        if label not in told and label in second:
            told.add(label)
            yield label, first[label][:1], second[label][:1]
    if not told and first and second:
        old, new = next(reversed(first)), next(reversed(second))
        yield f"{old} against {new}", first[old][:1], second[new][:1]


def _changed_fields(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Field, value before and after, of the arithmetic of two kernels of the same formats."""
    if old is None or new is None:
        yield "kernels", _kernel_words(old), _kernel_words(new)
    else:
        yield from changed_leaves("", old, new)


def _kernel_words(arithmetic: dict[str, Any] | None) -> str:
    if arithmetic is None:
        return "one"
    accumulator = arithmetic.get("accumulator")
    return (
        f"another one of {accumulator['bits']} bits"
        if isinstance(accumulator, dict) and "bits" in accumulator
        else "another one"
    )
