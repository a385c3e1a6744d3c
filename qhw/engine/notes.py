# SPDX-License-Identifier: Apache-2.0
"""Facts that a target leaves open, and what in this plan depends on them. An open fact is said, never defaulted."""

from collections.abc import Collection, Iterator, Mapping

from qhw.decisions import Reason
from qhw.graph import Placement
from qhw.schema import TargetSpec

__all__ = ["open_facts"]

_BIAS_FACTS: Mapping[str, str] = {
    "signed": "its codes are simulated with a sign",
    "zero_point": "its zero point is simulated as 0",
    "max_channels": "the number of channels with a bias is not checked",
    "required": "operators without a bias get none",
}
_NETWORK_FACTS: Mapping[str, tuple[str, ...]] = {
    "network": ("max_layers", "max_rank", "max_weight_bytes"),
    "boundary": ("inputs", "outputs", "input_formats", "output_formats"),
}


def open_facts(target: TargetSpec, placement: Placement) -> tuple[Reason, ...]:
    """What the target does not say, for the kernels that this plan uses; each once."""
    used = dict.fromkeys(op.kernel for op in placement.operators if op.kernel is not None)
    weighted = {op.kernel for op in placement.operators if op.macs and op.kernel is not None}
    with_bias = {point.format for point in placement.points if point.role == "bias"}
    found: dict[str, Reason] = {}
    for kernel in used:
        sums = _sum_facts(target, kernel, with_bias) if kernel in weighted else ()
        for reason in (*sums, *_requantize_facts(target, kernel)):
            found.setdefault(reason.subject, reason)
    for name in dict.fromkeys(point.format for point in placement.points if point.role != "bias"):
        for reason in _scale_facts(target, name):
            found.setdefault(reason.subject, reason)
    for reason in _network_facts(target):
        found.setdefault(reason.subject, reason)
    if target.fallback in (None, "unknown") and any(op.where == "host" for op in placement.operators):
        found["fallback"] = _open("fallback", target.fallback, "who runs the operators left to the host is not stated")
    return tuple(found.values())


def _sum_facts(target: TargetSpec, name: str, with_bias: Collection[str]) -> Iterator[Reason]:
    """Bias and accumulator of a kernel that sums products."""
    row = target.kernels[name]
    if row.bias in (None, "unknown"):
        yield _open(f"kernels.{name}.bias", row.bias, "biases are simulated in float")
    elif row.bias != "none":
        rule = target.biases[row.bias]
        if rule.bits in (None, "unknown"):
            yield _open(f"biases.{row.bias}.bits", rule.bits, "biases are simulated in float")
        elif row.bias in with_bias and rule.scale in (None, "unknown"):
            yield _open(f"biases.{row.bias}.scale", rule.scale, "biases are simulated at input*weight")
        for field, said in _BIAS_FACTS.items():
            if row.bias in with_bias and getattr(rule, field) == "unknown":
                yield _open(f"biases.{row.bias}.{field}", "unknown", said)
    if row.accumulator in (None, "unknown"):
        yield _open(f"kernels.{name}.accumulator", row.accumulator, "overflow is not checked")
    elif target.accumulators[row.accumulator].bits in (None, "unknown"):
        width = target.accumulators[row.accumulator].bits
        yield _open(f"accumulators.{row.accumulator}.bits", width, "overflow is not checked")
    if row.weight_abs_sum_max == "unknown":
        yield _open(f"kernels.{name}.weight_abs_sum_max", "unknown", "sums of weights are not held to it")


def _network_facts(target: TargetSpec) -> Iterator[Reason]:
    """Limits of the network as a whole that somebody looked for in vain."""
    for section, fields in _NETWORK_FACTS.items():
        table = getattr(target, section)
        for field in fields:
            if getattr(table, field, None) == "unknown":
                yield _open(f"{section}.{field}", "unknown", "the model is not held to it")


def _requantize_facts(target: TargetSpec, name: str) -> Iterator[Reason]:
    """How a kernel comes to its output code."""
    row = target.kernels[name]
    if row.requantize in (None, "unknown"):
        yield _open(f"kernels.{name}.requantize", row.requantize, "ties may round differently on the chip")
        return
    rule = target.requantize[row.requantize]
    for field in ("rounding", "shift", "multiplier_bits"):
        if getattr(rule, field) == "unknown":
            yield _open(f"requantize.{row.requantize}.{field}", "unknown", f"{field} is not checked")


def _scale_facts(target: TargetSpec, name: str) -> Iterator[Reason]:
    """Bounds of a format's scale that somebody looked for in vain."""
    scale = target.formats[name].scale
    for field in ("min", "max", "exponent_min", "exponent_max"):
        if getattr(scale, field, None) == "unknown":
            yield _open(f"formats.{name}.scale.{field}", "unknown", "scales are not held to it")


def _open(subject: str, value: object, consequence: str) -> Reason:
    said = "unknown" if value == "unknown" else "absent"
    return Reason(subject=subject, value=said, rule=f"{{value}} in this target: {consequence}")
