# SPDX-License-Identifier: Apache-2.0
"""The reference of target files as Markdown, rendered from the models so that it cannot fall behind them."""

from typing import Any, get_args

from qhw.schema.arithmetic import Accumulator, Align, Bias, Pairwise, Ratio, Requantize, Shift, Stage
from qhw.schema.base import Table
from qhw.schema.formats import Format
from qhw.schema.kernels import ExponentBound, Kernel
from qhw.schema.marks import judged_mark, marks_of
from qhw.schema.messages import describe, field_type, members
from qhw.schema.operators import Approximation, FixedOutput, LimitRange, Operator, RealRange
from qhw.schema.scales import Palette, Scale
from qhw.schema.spec import TargetSpec
from qhw.schema.system import Artefact, Boundary, Clock, Conflict, Cost, Memory, Network, Reading

__all__ = ["MODELS", "render_reference"]

MODELS: tuple[tuple[str, type[Table]], ...] = (
    ("The file", TargetSpec),
    ("`formats.<id>`", Format),
    ("`formats.<id>.scale`", Scale),
    ("`formats.<id>.palette`", Palette),
    ("`biases.<id>`", Bias),
    ("`biases.<id>.shift`", Shift),
    ("`accumulators.<id>`", Accumulator),
    ("`accumulators.<id>.pairwise`", Pairwise),
    ("`requantize.<id>`", Requantize),
    ("`requantize.<id>.shift`", Shift),
    ("`requantize.<id>.align`", Align),
    ("`requantize.<id>.align.shift`", Shift),
    ("`requantize.<id>.ratio`", Ratio),
    ("`requantize.<id>.stages[]`", Stage),
    ("`kernels.<id>`", Kernel),
    ("`kernels.<id>.exponents[]`", ExponentBound),
    ("`operators.<Kind>`", Operator),
    ("`operators.<Kind>.limits.<attribute>`, as a table", LimitRange),
    ("`operators.<Kind>.fixed_output.<format>`", FixedOutput),
    ("`operators.<Kind>.range`", RealRange),
    ("`operators.<Kind>.approximation`", Approximation),
    ("`boundary`", Boundary),
    ("`artefact`", Artefact),
    ("`network`", Network),
    ("`memories.<id>`", Memory),
    ("`clocks.<id>`", Clock),
    ("`cost`", Cost),
    ("`conflicts[]`", Conflict),
    ("`conflicts[].readings[]`", Reading),
)

HEAD = """# Target files: reference

Written from the models by `python -m qhw.schema.reference > docs/target-reference.md`; a test keeps the two equal.

- A target is a TOML file. Only `schema_version` and `name` are required. What is absent, nobody looked for; `"unknown"`
  was looked for and is not published. Neither becomes a default; `qhw target lint` says what depends on it.
- State `used`: the planner or the integer executor reads the field. `recorded`: the field is checked and kept, and
  nothing is planned or computed by it; `qhw target lint` says so wherever a file sets it. `read by qhw check`:
  quantized files are held to it all the same.
- Ids name a role, never a value (`biases.narrow`, not `bias20`), because a file that extends this one may change the
  value.
- `extends`: tables merge field by field, lists replace, and a source follows the leaf it stands beside. To take
  something back: `kernels = []` (the hardware does not have the operator), `fused = []`, a limit of `"any"`,
  `bias = "none"`, `zero_point = "free"`. A tag that means another document in the child becomes `TAG@vendor/chip` in
  what was inherited.
- Every table takes `source`: a tag, a list of tags, or a table from `"*"` or a field to tags. It covers the tables
  inside, unless they have their own. The one at the top of the file covers `fallback` alone: each format, kernel,
  operator and so on names its own.
"""


def render_reference() -> str:
    """The whole page, ending in one newline."""
    return "\n".join([HEAD, *(_section(title, model) for title, model in MODELS)])


def _section(title: str, model: type[Table]) -> str:
    lines = [f"## {title}", "", (model.__doc__ or "").split("\n\n")[0], "", "| field | may hold | state | meaning |"]
    lines.append("| --- | --- | --- | --- |")
    for name, field in model.model_fields.items():
        if name == "source" and model not in (TargetSpec, Reading):
            continue
        is_recorded, values, keys = marks_of(field)
        by_check = "; read by qhw check" if judged_mark(field) else ""
        state = f"recorded{by_check}" if is_recorded else "see below" if _holds_table(field_type(field)) else "used"
        if values or keys:
            state += "; recorded: " + ", ".join(f"`{item}`" for item in (*values, *keys))
        cells = (f"`{name}`", describe(field_type(field)), state, field.description or "")
        lines.append("| " + " | ".join(_cell(text) for text in cells) + " |")
    return "\n".join([*lines, ""])


def _holds_table(annotation: Any) -> bool:
    parts = [part for member in members(annotation) for part in (member, *get_args(member))]
    return any(part in {model for _, model in MODELS} for part in parts if isinstance(part, type))


def _cell(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|")


if __name__ == "__main__":
    print(render_reference(), end="")
