# SPDX-License-Identifier: Apache-2.0
"""What a loaded target still lacks: facts the planner needs, claims without a source, fields that nothing reads."""

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from qhw.schema.base import UNKNOWN, Path, leaves
from qhw.schema.closest import closest
from qhw.schema.formats import STATED_KINDS, Format
from qhw.schema.kernels import OPERANDS, Kernel
from qhw.schema.kinds import OPERATOR_KINDS, TWO_ACTIVATIONS
from qhw.schema.lint_claims import disagreements, unfounded
from qhw.schema.lint_numbers import contradictions
from qhw.schema.lint_reach import is_inherited, unreachable
from qhw.schema.load import Located
from qhw.schema.marks import recorded_fields
from qhw.schema.open_fields import has_integer_form
from qhw.schema.operators import Operator
from qhw.schema.read import dotted
from qhw.schema.remarks import Remark, Severity
from qhw.schema.scales import Scale
from qhw.schema.spec import TargetSpec

__all__ = ["Finding", "lint"]

ORDER: tuple[Severity, ...] = ("error", "warning", "info")
BLOCKING = re.compile(
    r"formats\.\w+\.(kind|bits|signed|codes|per|group_size|zero_point|scale|scale\.(kind|values))"
    r"|kernels\.\w+\.(input|weight|output)|operators\.\w+\.kernels"
)


@dataclass(frozen=True)
class Finding:
    """One remark about a target.

    Attributes:
        severity: `error`: it cannot be planned with as it stands, or contradicts itself. `warning`: something is
            probably wrong, missing, or reached by nothing. `info`: true and worth knowing.
        path: Dotted path of the field.
        message: What about it.
        place: `file:line`, or None where the target came from no file.
    """

    severity: Severity
    path: str
    message: str
    place: str | None = None

    def __str__(self) -> str:
        where = f"{self.place}  " if self.place else ""
        return f"{self.severity}: {where}{self.path}: {self.message}"


def lint(
    spec: TargetSpec, located: Located | None = None, *, known_kinds: Collection[str] | None = OPERATOR_KINDS
) -> tuple[Finding, ...]:
    """All remarks about a target, errors first, then in the order of the checks.

    Args:
        spec: The resolved target.
        located: Where its fields are written, as `read_target_file` returns it; gives each finding its place.
        known_kinds: The operator kinds there are; None: names of kinds are not checked.
    """
    found = [
        *_formats(spec),
        *_weights(spec),
        *contradictions(spec),
        *unreachable(spec),
        *_operators(spec),
        *_kinds(spec, known_kinds),
        *_unused(spec),
        *unfounded(spec),
        *_inexact(spec),
        *_unknown(spec),
        *disagreements(spec),
        *_recorded(spec),
    ]
    placed = [
        Finding(severity, dotted(path), message, located.place(path) if located is not None else None)
        for severity, path, message in found
    ]
    return tuple(sorted(placed, key=lambda finding: ORDER.index(finding.severity)))


def _formats(spec: TargetSpec) -> Iterator[Remark]:
    in_use = {name for kernel in spec.kernels.values() for name in kernel.formats()}
    for name, form in spec.formats.items():
        if form.kind not in (*STATED_KINDS, UNKNOWN):
            text = f'"{form.kind}" needs a plugin that brings it ("qhw plugin list"); lint does not look for one.'
            yield "info", ("formats", name, "kind"), text
        if name not in in_use or form.kind != "integer":
            continue
        path: Path = ("formats", name)
        open_codes = UNKNOWN in (form.codes, form.bits, form.signed)
        if form.quant_min is None and form.code_set is None and not open_codes:
            yield "error", path, "a kernel uses it, and its codes are open. State bits and signed, or codes."
        if form.per is None:
            yield "error", path, 'a kernel uses it, and per is absent. State per = "tensor", "out_channel" or "group".'
        if form.per == "group" and form.group_size is None:
            yield "error", path, 'per = "group" needs group_size. State it, or the sizes allowed.'
        scale = form.scale
        if isinstance(scale, Scale) and scale.values is None and scale.kind in ("fixed", "enumerated"):
            yield "error", (*path, "scale"), f'kind = "{scale.kind}" needs values. State them.'


def _inexact(spec: TargetSpec) -> Iterator[Remark]:
    """Kernels for which no field of arithmetic is asked for."""
    used = {name for one in spec.operators.values() for name in (one.kernels if isinstance(one.kernels, tuple) else ())}
    for name, kernel in spec.kernels.items():
        if name in used and not has_integer_form(spec, kernel):
            text = "reads no integers: qhw verify, qhw golden and qhw accumulators have no exact form of it."
            yield "info", ("kernels", name), text


def _weights(spec: TargetSpec) -> Iterator[Remark]:
    """Grids on which weights lose their sign or nearly everything else."""
    for name, kernel in spec.kernels.items():
        users = {k for k, o in spec.operators.items() if isinstance(o.kernels, tuple) and name in o.kernels}
        is_for_activations = bool(users) and users <= TWO_ACTIVATIONS  # which may be one-tailed
        if not isinstance(kernel.weight, tuple) or is_for_activations:
            continue
        path: Path = ("kernels", name, "weight")
        listed = {format_id: spec.formats[format_id] for format_id in kernel.weight}
        if all(_is_never_negative(form) for form in listed.values()):
            codes = "; ".join(f"{i} has codes [{f.quant_min}, {f.quant_max}]" for i, f in listed.items())
            zeros = "their zero points" if len(listed) > 1 else "its zero point"
            text = (
                f"no format holds a negative weight: {codes}, none below {zeros}. State signed codes, or free the zero "
                "point."
            )
            yield "warning", path, text
        for format_id, form in listed.items():
            count = _num_codes(form)
            if count is not None and count < 3:
                text = f"{format_id} has {count} codes, too few for a weight's sign and 0.0. State at least 3 codes."
                yield "warning", path, text


def _is_never_negative(form: Format) -> bool:
    """Whether every zero point that is allowed lies at or below the lowest code."""
    allowed = (form.zero_point,) if isinstance(form.zero_point, int) else form.zero_point
    low = form.quant_min
    return low is not None and isinstance(allowed, tuple) and bool(allowed) and all(low >= zero for zero in allowed)


def _num_codes(form: Format) -> int | None:
    """How many codes a tensor may have; None where the file does not determine it."""
    low, high = form.quant_min, form.quant_max
    return None if low is None or high is None else high - low + 1


def _operators(spec: TargetSpec) -> Iterator[Remark]:
    for kind, operator in spec.operators.items():
        path: Path = ("operators", kind)
        if operator.kernels == ():
            yield "info", (*path, "kernels"), "is empty: this hardware does not have the operator."
        elif operator.kernels is None and operator.same_scale in (None, "none") and operator.output != "float":
            text = (
                "names no kernels and no same_scale rule, so nothing says which formats it takes. State one of the two."
            )
            yield "warning", path, text
        elif isinstance(operator.kernels, tuple):
            reasons = {name: _kernel_reason(spec, spec.kernels[name], operator) for name in operator.kernels}
            if all(reasons.values()):
                listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
                yield "error", path, f"has no legal format, none of its kernels can be planned. {listed}."
    if spec.operators and spec.fallback is None:
        text = "is absent: where operators go that are not listed here is not said, and nothing is assumed."
        yield "info", ("fallback",), text


def _kernel_reason(spec: TargetSpec, kernel: Kernel, operator: Operator) -> str | None:
    for operand in OPERANDS:
        names = getattr(kernel, operand)
        if names == UNKNOWN:
            return f"{operand} is unknown"
        if names is None:
            if operand == "input" or (operand == "output" and operator.output != "float"):
                return f"{operand} is absent"
            continue
        reasons = [(name, spec.formats[name].unplannable_reason) for name in names]
        if all(reason for _, reason in reasons):
            return f"{operand} {reasons[0][0]}: {reasons[0][1]}"
    return None


def _kinds(spec: TargetSpec, known: Collection[str] | None) -> Iterator[Remark]:
    if known is None:
        return
    named: list[tuple[Path, str]] = [(("operators", kind), kind) for kind in spec.operators]
    lists: list[tuple[Path, object]] = []
    lists += [(("operators", kind, "fused"), operator.fused) for kind, operator in spec.operators.items()]
    lists += [(("kernels", name, "fused"), kernel.fused) for name, kernel in spec.kernels.items()]
    for path, fused in lists:
        for item in fused if isinstance(fused, tuple) else ():
            named.extend((path, kind) for kind in ((item,) if isinstance(item, str) else item))
    for path, kind in dict.fromkeys(named):
        if kind not in known:
            near = closest(kind, sorted(known))
            yield (
                "warning",
                path,
                f"'{kind}' is not an operator kind qhw knows." + (f" Closest: {near}." if near else ""),
            )


def _unused(spec: TargetSpec) -> Iterator[Remark]:
    """Entries of its own file that nothing refers to; those of a base cannot be taken out, and may serve others."""
    kernels = list(spec.kernels.values())
    edge = spec.boundary
    at_edge = [ids for ids in (edge.input_formats, edge.output_formats) if isinstance(ids, tuple)] if edge else []
    of_operators = [item.kernels for item in spec.operators.values() if isinstance(item.kernels, tuple)]
    referred: dict[str, set[str | None]] = {
        "formats": {name for ids in (*at_edge, *(kernel.formats() for kernel in kernels)) for name in ids},
        "biases": {kernel.bias for kernel in kernels},
        "accumulators": {kernel.accumulator for kernel in kernels},
        "requantize": {kernel.requantize for kernel in kernels},
        "kernels": {name for ids in of_operators for name in ids},
    }
    for section, names in referred.items():
        by = "operator" if section == "kernels" else "kernel"
        for name in getattr(spec, section):
            if name not in names and not is_inherited(spec, (section, name)):
                yield "warning", (section, name), f"no {by} refers to it. Refer to it, or remove it."


def _unknown(spec: TargetSpec) -> Iterator[Remark]:
    for path, value in leaves(spec):
        if value != UNKNOWN or path[0] in ("sources", "conflicts", "inherited"):
            continue
        if BLOCKING.fullmatch(dotted(path)):
            yield "warning", path, "unknown: what depends on it cannot be planned."
        else:
            yield "info", path, "unknown: not published, and nothing is assumed in its place."


def _recorded(spec: TargetSpec) -> Iterator[Remark]:
    judged = set(recorded_fields(spec, judged=True))
    for path in recorded_fields(spec):
        yield "info", path, "recorded: only `qhw check` reads it." if path in judged else "recorded, not used yet."
