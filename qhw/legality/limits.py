# SPDX-License-Identifier: Apache-2.0
"""Structural limits: of an operator, of the network as a whole, of the artefact."""

from collections.abc import Iterator
from typing import Any

from qhw.graph import Operator as GraphOperator
from qhw.graph.limits import violated_limit
from qhw.legality.artefact import Artefact, ArtefactOperator
from qhw.legality.finding import Finding, unknown
from qhw.schema import LimitRange, TargetSpec
from qhw.schema import Operator as OperatorSpec

__all__ = ["limit_findings", "network_findings", "rank_findings"]

_STATED_BY_ALL = ("rank",)
"""What every operator has; any other attribute is absent where a kind has no such thing."""


def limit_findings(operator: GraphOperator, path: str, spec: OperatorSpec) -> Iterator[Finding]:
    """Limits that an operator breaks, and those that cannot be judged.

    Args:
        operator: As the planner reads it.
        path: Of its row, as `operators.Conv`.
        spec: That row.
    """
    for attribute, limit in spec.limits.items():
        clause = f"{path}.limits.{attribute}"
        if limit == "unknown":
            yield unknown(clause)
            continue
        if limit != "any" and attribute in _STATED_BY_ALL and operator.attributes.get(attribute) is None:
            yield unknown(clause, "the artefact does not state it")
            continue
        broken = violated_limit(operator, {attribute: limit})
        if broken is not None:
            fix = "Change the model there, or keep the operator in float."
            yield Finding(clause, f"must be {_words(limit)}", f"{broken[0]} {broken[1]}", fix)


def network_findings(target: TargetSpec, artefact: Artefact, run: int) -> Iterator[Finding]:
    """What the target says of the network and of the file.

    Args:
        target: The accelerator.
        artefact: The model.
        run: Operators on the accelerator.
    """
    network = target.network
    if network is not None:
        yield from _counted(
            "network.max_layers", network.max_layers, run, f"{run} operators on the accelerator", "Use fewer layers."
        )
        yield from _of_shapes(network.static_shapes, artefact)
    yield from _of_weights(target, artefact)
    least = target.artefact.opset_min if target.artefact is not None else None
    if isinstance(least, int) and artefact.opset is not None and artefact.opset < least:
        fix = f"Export again with opset {least} or later."
        yield Finding("artefact.opset_min", f"must be at least {least}", f"opset {artefact.opset}", fix)


def _of_weights(target: TargetSpec, artefact: Artefact) -> Iterator[Finding]:
    """Weights against what the network may have, else against the memory that refuses more."""
    size = weight_bytes(artefact)
    got, fix = f"{size} bytes of weights", "Use fewer weights."
    stated = target.network.max_weight_bytes if target.network is not None else None
    if stated is not None:
        yield from _counted("network.max_weight_bytes", stated, size, got, fix)
        return
    for name, memory in target.memories.items():
        if isinstance(memory.holds, tuple) and "weights" in memory.holds:
            if memory.past_capacity == "refuse":
                yield from _counted(f"memories.{name}.capacity_bytes", memory.capacity_bytes, size, got, fix)
            return


def rank_findings(target: TargetSpec, operator: ArtefactOperator) -> Iterator[Finding]:
    """A tensor with more dimensions than the network may have; open where those of the result are not known."""
    clause, most = "network.max_rank", target.network.max_rank if target.network is not None else None
    if most is None:
        return
    if most == "unknown":
        yield unknown(clause)
        return
    ranks = {use.tensor: len(use.shape) for use in (*operator.inputs, operator.output) if use.shape is not None}
    if isinstance(operator.attributes.get("rank"), int):
        ranks.setdefault(operator.output.tensor, operator.attributes["rank"])
    for tensor, rank in ranks.items():
        if rank > most:
            fix = "Fold dimensions into one another, or run it on the host."
            yield Finding(clause, f"must be at most {most}", f"rank {rank} of '{tensor}'", fix)
            return
    if operator.output.tensor not in ranks:
        yield unknown(clause, "the artefact does not state it")


def _of_shapes(stated: bool | str | None, artefact: Artefact) -> Iterator[Finding]:
    """Sizes of graph inputs that are not fixed; the batch alone may be given to the toolchain."""
    clause = "network.static_shapes"
    if stated == "unknown":
        yield unknown(clause)
    if stated is not True:
        return
    uses = [use for operator in artefact.operators for use in operator.inputs if use.tensor in artefact.inputs]
    shapes = {use.tensor: use.shape for use in uses if use.shape is not None}
    for tensor, shape in shapes.items():
        words = ", ".join("?" if size is None else str(size) for size in shape)
        if None in shape[1:]:
            must, got = "must be true: every size is fixed", f"'{tensor}' of shape [{words}]"
            yield Finding(clause, must, got, "Export it with fixed sizes.")
        elif None in shape:
            yield unknown(clause, f"the batch of '{tensor}' is left to the toolchain")


def weight_bytes(artefact: Artefact) -> int:
    """Bytes of all quantized weights, each once."""
    bits: dict[str, int] = {}
    for operator in artefact.operators:
        weight = operator.weight
        if weight is not None and weight.codes is not None and weight.encoding is not None:
            bits[weight.name] = int(weight.codes.size) * weight.encoding.bits
    return (sum(bits.values()) + 7) // 8


def _counted(clause: str, most: Any, count: int, got: str, fix: str) -> Iterator[Finding]:
    if most == "unknown":
        yield unknown(clause)
    elif isinstance(most, int) and count > most:
        yield Finding(clause, f"must be at most {most}", got, fix)


def _words(limit: Any) -> str:
    """A limit as a person reads it: `1 or channels`, `at least 1 and at most 7`."""
    if isinstance(limit, tuple):
        return " or ".join(_value(value) for value in limit[:8]) + (" ..." if len(limit) > 8 else "")
    if not isinstance(limit, LimitRange):
        return str(limit)
    parts = [
        f"at least {limit.min:g}" if isinstance(limit.min, float) else "",
        f"at most {limit.max:g}" if isinstance(limit.max, float) else "",
        f"a multiple of {limit.multiple_of}" if isinstance(limit.multiple_of, int) else "",
        f"one of {_words(limit.values)}" if isinstance(limit.values, tuple) else "",
    ]
    return " and ".join(part for part in parts if part)


def _value(value: Any) -> str:
    return " x ".join(map(str, value)) if isinstance(value, tuple) else str(value)
