# SPDX-License-Identifier: Apache-2.0
"""How wide sums of products get by formats and shapes alone, and a kernel with the bits for it where it costs nothing.

A kernel costs nothing when it takes the formats that were chosen, and is not stated to be slower or less preferred.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

from qhw.graph.cell import Cell
from qhw.graph.operator import Operator
from qhw.graph.slots import Choice, Slot, edge, tensor, weight
from qhw.schema import SUMMING_KINDS, Format, TargetSpec

__all__ = ["SUMMING_KINDS", "accumulator_width", "num_products", "sum_bits", "with_room"]

_UNBOUNDED = 128


def num_products(operator: Operator) -> int:
    """Products that one output of an operator sums at most; the operator is one of SUMMING_KINDS."""
    facts = operator.attributes
    if operator.kind == "MatMul":
        return int(facts["reduced_elements"])
    taps = int(math.prod(facts.get("kernel", ())))
    return int(facts["in_channels"]) // int(facts.get("groups", 1)) * taps


def sum_bits(operator: Operator, first: Format, second: Format) -> int:
    """Width that holds every sum of products of two formats, zero points taken off, whatever the values.

        bits = 1 + bit_length(max |a - za| max |b - zb| products)

    Args:
        operator: One of SUMMING_KINDS.
        first: Format of the activation; its codes are known.
        second: Format of the weight, or of the other activation.
    """
    return (_reach(first) * _reach(second) * num_products(operator)).bit_length() + 1


def _reach(spec: Format) -> int:
    """Largest magnitude of a code, its zero point taken off."""
    low, high, zero = int(spec.quant_min or 0), int(spec.quant_max or 0), spec.zero_point
    return max(high - zero, zero - low) if isinstance(zero, int) else high - low


def accumulator_width(target: TargetSpec, kernel: str | None) -> int | None:
    """Bits of a kernel's integer accumulator; 128 where hardware is made as wide as needed; None where not known."""
    name = target.kernels[kernel].accumulator if kernel is not None else None
    spec = target.accumulators.get(str(name))
    if spec is None or spec.kind not in (None, "integer"):
        return None
    if spec.bits == "per_layer":
        return _UNBOUNDED
    return spec.bits if isinstance(spec.bits, int) else None


def with_room(target: TargetSpec, cells: Sequence[Cell], choice: Choice) -> tuple[Choice, dict[str, str]]:
    """The choice with wider accumulators where sums could overflow and more bits cost nothing.

    Of the kernels that take the chosen formats, the first that holds every sum is taken, else the widest. The order of
    the target counts where the preferred kernel has the bits already, or where its width is not known.

    Args:
        target: The accelerator.
        cells: In execution order.
        choice: Kernels and formats, the chosen one first.

    Returns:
        tuple: the choice; and operator -> why it has another kernel than the preferred one, or why not, in words.
    """
    kernels, reasons = dict(choice.kernels), {}
    for cell in cells:
        legal = kernels.get(cell.operator.name, ())
        if cell.operator.kind in SUMMING_KINDS and len(legal) > 1:
            chosen, reason = _roomiest(target, cell, choice, legal)
            kernels[cell.operator.name] = (chosen, *(name for name in legal if name != chosen))
            if reason:
                reasons[cell.operator.name] = reason
    return replace(choice, kernels=kernels), reasons


def _roomiest(target: TargetSpec, cell: Cell, choice: Choice, legal: Sequence[str]) -> tuple[str, str]:
    """The kernel to take, and why in words; no words where nothing is to be decided."""
    preferred = legal[0]
    formats = _formats(cell, choice, preferred)
    width = accumulator_width(target, preferred)
    if width is None or len(formats) < 2:
        return preferred, ""
    needed = sum_bits(cell.operator, target.formats[formats[0]], target.formats[formats[1]])
    wider = {
        name: bits
        for name in legal[1:]
        if (bits := accumulator_width(target, name) or 0) > width and _states_as_much(target, preferred, name)
    }
    if needed <= width or not wider:
        return preferred, ""
    sums = f"sums of {num_products(cell.operator)} products can need {needed} bits; kernels.{preferred} has {width}"
    costs = {name: _cost(target, cell, choice, preferred, name) for name in wider}
    free = [name for name in wider if not costs[name]]
    if not free:
        refused = ", ".join(f"kernels.{name} with {_bits(wider[name])} {costs[name]}" for name in wider)
        return preferred, f"{sums}; {refused}"
    chosen = next((name for name in free if wider[name] >= needed), max(free, key=lambda name: wider[name]))
    return chosen, f"{sums}, so kernels.{chosen} with {_bits(wider[chosen])} is taken for the same formats"


def _bits(width: int) -> str:
    return "as many bits as needed" if width == _UNBOUNDED else f"{width} bits"


def _slots(cell: Cell, choice: Choice) -> list[Slot]:
    places = [edge(cell.operator.name, index) for index in range(len(cell.inputs))]
    return [p if p in choice.edges else tensor(name) for p, name in zip(places, cell.inputs, strict=True)]


def _formats(cell: Cell, choice: Choice, kernel: str) -> list[str]:
    """Formats of both factors of a product, the activation's first; fewer where one is not quantized."""
    slots = _slots(cell, choice)
    if cell.weight is not None:
        slots = [*slots[:1], weight(cell.weight)]
    return [choice.formats[slot][0] for slot in slots if slot in choice.formats]


def _states_as_much(target: TargetSpec, preferred: str, other: str) -> bool:
    """Whether a kernel's bias and requantization are stated where the preferred one's are."""
    first, second = target.kernels[preferred], target.kernels[other]

    def has_bias(name: str | None) -> bool:
        return name in target.biases and isinstance(target.biases[str(name)].bits, int)

    def has_requantize(name: str | None) -> bool:
        return name in target.requantize

    return has_bias(second.bias) >= has_bias(first.bias) and has_requantize(second.requantize) >= has_requantize(
        first.requantize
    )


def _cost(target: TargetSpec, cell: Cell, choice: Choice, preferred: str, other: str) -> str:
    """What stands against a kernel, in words; empty where nothing does."""
    first, second = target.kernels[preferred], target.kernels[other]
    fits = all(
        choice.formats[slot][0] in cell.operand_formats(other, index)
        for index, slot in enumerate(_slots(cell, choice))
        if slot in choice.formats
    )
    if cell.weight is not None:
        fits = fits and choice.formats[weight(cell.weight)][0] in cell.weight_formats(other)
    output = None if cell.gives_float else choice.formats.get(tensor(cell.output))
    if not fits or (output is not None and output[0] not in cell.output_formats(other)):
        return "takes other formats (--format)"
    now, then = first.macs_per_cycle, second.macs_per_cycle
    if isinstance(now, float) and isinstance(then, float) and then < now:
        return f"takes {now / then:.3g} x the cycles"
    costs = [kernel.preference_cost for kernel in (first, second)]
    if isinstance(costs[1], float | int) and costs[1] > (costs[0] if isinstance(costs[0], float | int) else 0):
        return f"has preference_cost {costs[1]:g}"
    return ""
