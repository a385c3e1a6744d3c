# SPDX-License-Identifier: Apache-2.0
"""Formats, accumulators and sizes in a few words."""

from qhw.decisions import QuantPlan
from qhw.schema import Format, TargetSpec
from qhw.schema import Scale as ScaleSpec
from qhw.schema.words import number_words
from qhw.wording import counted

__all__ = ["accumulator_words", "bytes_words", "count_words", "format_words", "share_words"]


def format_words(spec: Format) -> str:
    """As `int8 [-127, 127] symmetric, per out_channel, power-of-two scale`."""
    words = [number_words(spec)]
    if spec.quant_min is not None and spec.quant_max is not None:
        words[0] += " symmetric" if isinstance(spec.zero_point, int) else " asymmetric"
    if spec.per is not None:
        words.append(f"per {spec.per.replace('_', ' ')}")
    if isinstance(spec.scale, ScaleSpec) and spec.scale.kind not in ("float32", "unknown"):
        words.append(f"{spec.scale.kind.replace('_', '-')} scale")
    return ", ".join(words)


def accumulator_words(target: TargetSpec, name: str | None) -> str:
    """As `32 bits, wrap`; `unknown` where nobody says."""
    if name is None or name == "unknown":
        return "not stated" if name is None else "unknown"
    spec = target.accumulators[name]
    bits = f"{spec.bits} bits" if isinstance(spec.bits, int) else str(spec.bits or "not stated")
    return f"{bits}, {spec.overflow}" if spec.overflow not in (None, "unknown") else bits


def count_words(number: int) -> str:
    """As `1.21 M`."""
    for factor, unit in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= factor:
            return f"{number / factor:.2f} {unit}"
    return str(number)


def bytes_words(number: int) -> str:
    """As `212 KB` (1 KB = 1,000 bytes)."""
    return f"{number / 1e6:.2f} MB" if number >= 1e6 else f"{number / 1e3:.1f} KB"


def share_words(plan: QuantPlan) -> str:
    """As `98.2 % of 1.21 M MACs`; says of how many operators nobody knows the multiply-accumulates."""
    total = plan.total_macs
    share = f"{100 * plan.accelerator_macs / total:.1f} % of {count_words(total)} MACs" if total else "no MACs"
    unknown = sum(op.kind == "Unknown" and not op.macs for op in plan.operators)
    return share + (f", those of {counted(unknown, 'unknown operator')} not counted" if unknown else "")
