# SPDX-License-Identifier: Apache-2.0
"""Limits of a network as a whole: ranks, and the bytes that its weights may take."""

import math

from qhw.graph.cell import Cell
from qhw.graph.graph import Graph
from qhw.graph.operator import Operator
from qhw.graph.slots import Choice, weight
from qhw.schema import TargetSpec

__all__ = ["past_weight_memory", "violated_network_limit"]


def violated_network_limit(graph: Graph, target: TargetSpec, operator: Operator) -> tuple[str, str] | None:
    """The limit on tensors of the network that an operator breaks, and what was found; None where it keeps them."""
    most = target.network.max_rank if target.network is not None else None
    if not isinstance(most, int):
        return None
    given = [graph.inputs[name] if name in graph.inputs else graph.operator(name).shape for name in operator.inputs]
    rank = max(map(len, (operator.shape, *given)))
    return ("network.max_rank", f"a tensor of rank {rank}; the most is {most}") if rank > most else None


def past_weight_memory(
    graph: Graph, target: TargetSpec, cells: tuple[Cell, ...], choice: Choice
) -> dict[str, tuple[str, str]]:
    """Operators whose weights do not fit the memory for weights beside those of the ones before, with the reason.

    Each parameter counts once, with all its elements packed in the width of its format.
    """
    most = target.network.max_weight_bytes if target.network is not None else None
    if not isinstance(most, int):
        return {}
    held: dict[str, int] = {}
    late: dict[str, tuple[str, str]] = {}
    for cell in cells:
        name = cell.weight
        if name is None or name in held:
            continue
        form = choice.formats[weight(name)][0]
        size = -(-math.prod(graph.tensor(name).shape) * (target.formats[form].element_bits or 0) // 8)
        used = sum(held.values())
        if used + size > most:
            rule = f"its {size:,} bytes in {form} beside {used:,} before them; the most is {most:,}"
            late[cell.operator.name] = ("network.max_weight_bytes", rule)
        else:
            held[name] = size
    return late
