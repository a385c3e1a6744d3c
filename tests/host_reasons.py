# SPDX-License-Identifier: Apache-2.0
"""Whether a target's file really says what a plan gives as the reason for leaving an operator to the host."""

from qhw.graph import OperatorPlacement
from qhw.schema import Kernel, TargetSpec
from qhw.schema.kinds import row_kinds

__all__ = ["explains", "is_runnable", "obstacles"]


def obstacles(spec: TargetSpec, kernel: Kernel, gives_float: bool = False) -> list[str]:
    """Why no tensor can take a row: a reason per operand that has none but unplannable formats."""
    found = []
    for operand in ("input", "weight", "output"):
        listed = getattr(kernel, operand)
        if listed == "unknown":
            found.append(f"{operand} is unknown")
        elif isinstance(listed, tuple):
            reasons = [spec.formats[name].unplannable_reason for name in listed]
            if all(reasons):
                found.append(str(reasons[0]))
    if kernel.output is None and not gives_float:
        found.append("output is float")
    return found


def is_runnable(spec: TargetSpec, kind: str) -> bool:
    """Whether the file lists a kind, or one that stands for it, with a row that tensors can take; limits aside."""
    rows = [spec.operators[name] for name in row_kinds(kind, spec.operators)]
    return any(
        row.kernels is None
        or (
            isinstance(row.kernels, tuple)
            and any(not obstacles(spec, spec.kernels[name], row.output == "float") for name in row.kernels)
        )
        for row in rows
    )


def explains(spec: TargetSpec, operator: OperatorPlacement) -> bool:
    """Whether the file really says what is given as the reason for leaving an operator to the host."""
    section, *rest = operator.subject.split(".")
    if section == "operators" and len(rest) == 1:
        return rest[0] not in spec.operators
    if section == "operators" and rest[1] == "limits":
        return rest[2] in spec.operators[rest[0]].limits
    if section == "operators" and rest[1] == "same_scale":
        return spec.operators[rest[0]].same_scale in ("inputs", "all", "input_output")
    if section == "kernels" and rest[1] == "bias":
        rule = spec.biases.get(str(spec.kernels[rest[0]].bias))
        return spec.kernels[rest[0]].bias == "none" or (rule is not None and rule.max_channels is not None)
    if section in ("network", "boundary"):
        return getattr(getattr(spec, section), rest[0]) is not None
    if section == "kernels" and rest[1] == "weight" and "group_size" in operator.reason:
        return all(spec.formats[name].per == "group" for name in spec.kernels[rest[0]].weight or ())
    if section in ("operators", "kernels"):
        return not is_runnable(spec, operator.kind)
    return section == "graph" or (section == "fallback" and spec.fallback == "single_partition")
