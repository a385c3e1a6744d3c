# SPDX-License-Identifier: Apache-2.0
"""Which of a target's kernels can hold an operator, in the order of preference, and what keeps the others from it."""

from collections.abc import Mapping, Sequence

from qhw.graph.cell import TWO_OPERANDS, reads_input_row
from qhw.graph.operator import Operator
from qhw.schema import Format, Kernel, TargetSpec
from qhw.schema import Operator as OperatorSpec

__all__ = ["activations_of", "format_reason", "group_size", "held_formats", "missing_field", "preferred"]


def preferred(rows: Mapping[str, Kernel] | Mapping[str, Format], names: Sequence[str]) -> list[str]:
    """Ids of kernels or formats, the cheapest first (`preference_cost`, 0 where none is stated), else in order."""
    costs = {name: rows[name].preference_cost for name in names}
    return sorted(names, key=lambda name: cost if isinstance(cost := costs[name], float | int) else 0.0)


def format_reason(target: TargetSpec, name: str) -> str | None:
    """Why no activation can have a format; None where one can."""
    spec = target.formats[name]
    if spec.unplannable_reason is not None:
        return spec.unplannable_reason
    if spec.per == "tensor" or (spec.is_dynamic and spec.per in ("group", "row")):
        return None
    return f'per: "{spec.per}"; an activation has one scale, which is per = "tensor"'


def activations_of(target: TargetSpec) -> frozenset[str]:
    """Formats that an activation can have."""
    return frozenset(name for name in target.formats if format_reason(target, name) is None)


def held_formats(
    target: TargetSpec, operator: Operator, spec: OperatorSpec, row: Kernel, has_bias: bool
) -> tuple[str, ...]:
    """Formats that a kernel takes for an operator's constant operand."""
    names = row.input if reads_input_row(operator, row) else row.weight
    if operator.weight is None or not isinstance(names, tuple):
        return ()
    return tuple(name for name in names if _weight_reason(target, name, operator, spec, row, has_bias) is None)


def group_size(spec: Format, operator: Operator) -> int | None:
    """The largest allowed size of a group that divides an operator's inputs; None where none does.

    The last block of a format with shared exponents (e8m0) may be shorter: it is filled up with zeros.
    """
    sizes = spec.group_size if isinstance(spec.group_size, tuple) else (spec.group_size,)
    inner = _grouped_inputs(operator)
    is_filled = getattr(spec.scale, "kind", None) == "e8m0"
    fitting = [size for size in sizes if isinstance(size, int) and (is_filled or inner % size == 0)]
    return max(fitting, default=None)


def _grouped_inputs(operator: Operator) -> int:
    """Inputs along the axis that groups of weights cut: those of one output, for each position of the kernel."""
    facts = operator.attributes
    return int(facts["in_channels"]) // int(facts.get("groups", 1))


def missing_field(
    target: TargetSpec, operator: Operator, spec: OperatorSpec, row: Kernel, has_bias: bool, reads: bool
) -> tuple[str, str] | None:
    """The field of a kernel that keeps an operator from it, and why; None where nothing does.

    Args:
        target: The accelerator.
        operator: The operator.
        spec: The target's row for its kind.
        row: One of its kernels.
        has_bias: Whether it has a bias, or gets one.
        reads: Whether it reads a tensor that may be quantized.
    """
    two = operator.kind in TWO_OPERANDS
    has_weight = operator.weight is not None and spec.parameters != "float"
    needed: list[tuple[str, bool]] = [("input", False)] if reads else []
    needed += [] if spec.output == "float" else [("output", False)]
    if has_weight and not two:
        needed.append(("weight", True))
    elif two and isinstance(row.weight, tuple):
        needed.append(("weight", has_weight))
    for field, is_constant in needed:
        listed = getattr(row, field)
        if not isinstance(listed, tuple):
            return field, "unknown" if listed == "unknown" else "the target does not say which formats it takes"
        reasons = {
            name: _weight_reason(target, name, operator, spec, row, has_bias)
            if is_constant
            else format_reason(target, name)
            for name in listed
        }
        if None not in reasons.values():
            return field, f"formats.{listed[0]}.{reasons[listed[0]]}"
    return _bias_reason(target, operator, row, has_bias)


def _bias_reason(target: TargetSpec, operator: Operator, row: Kernel, has_bias: bool) -> tuple[str, str] | None:
    if has_bias and row.bias == "none":
        return "bias", "it adds no bias, and the operator has one"
    rule = target.biases.get(str(row.bias))
    channels = operator.attributes.get("out_channels")
    if rule is None or channels is None:
        return None
    gets_one = has_bias or rule.required is True
    if gets_one and isinstance(rule.max_channels, int) and channels > rule.max_channels:
        return "bias", f"biases.{row.bias}.max_channels = {rule.max_channels}, and it has {channels} and a bias"
    if not has_bias and rule.required is True and operator.kind == "Gemm" and not _takes_bias(operator):
        return "bias", f"biases.{row.bias}.required: it has none, and a product of this rank takes none"
    return None


def _takes_bias(operator: Operator) -> bool:
    """Whether a bias can be added to a Gemm that has none: to a linear layer, or to a product of two matrices."""
    return operator.weight_axis == 0 or len(operator.shape) == 2


def _weight_reason(
    target: TargetSpec, name: str, operator: Operator, spec: OperatorSpec, row: Kernel, has_bias: bool
) -> str | None:
    """Why a kernel cannot take an operator's constant operand in a format; None where it can."""
    form = target.formats[name]
    if form.unplannable_reason is not None or form.per == "tensor":
        return form.unplannable_reason
    if form.per == "row":
        return 'per: "row"; a constant operand has "tensor", "out_channel" or "group"'
    if operator.weight_axis is None:
        return f'per: "{form.per}"; the constant of {operator.kind} has no output channels'
    requantize = target.requantize.get(str(row.requantize))
    if requantize is not None and requantize.per == "tensor":
        return f'per: "{form.per}"; requantize.{row.requantize}.per = "tensor" has one multiplier for all channels'
    if form.per == "group":
        return _group_reason(target, form, operator, row, has_bias)
    groups = int(operator.attributes.get("groups", 1))
    if groups > 1:
        # Weights of a transposed convolution are [in, out / groups, ...]: one scale per index is out / groups.
        has = "out_channels/groups" if operator.kind == "ConvTranspose" else "out_channels"
        if spec.weight_scales not in (None, "unknown", has):
            return f'per: "{form.per}"; {groups} groups would get {has} scales, and weight_scales asks for others'
    return None


def _group_reason(target: TargetSpec, form: Format, operator: Operator, row: Kernel, has_bias: bool) -> str | None:
    if group_size(form, operator) is None:
        sizes = form.group_size if isinstance(form.group_size, tuple) else (form.group_size,)
        said = " and ".join(map(str, sizes)) + (" does" if len(sizes) == 1 else " do")
        return f"group_size: {said} not divide {_grouped_inputs(operator)} inputs"
    rule = target.biases.get(str(row.bias))
    is_integer = rule is not None and isinstance(rule.bits, int) and (has_bias or rule.required is True)
    if is_integer and rule is not None and rule.meets_sum:
        return f'per: "group"; sums have no one scale, and its bias is in units of it (biases.{row.bias})'
    return None
