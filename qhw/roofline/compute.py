# SPDX-License-Identifier: Apache-2.0
"""Cycles of arithmetic: multiply-accumulates of padded channels, or elementwise results, over what one cycle does."""

import math

from qhw.graph import Graph, Operator, OperatorPlacement
from qhw.roofline.figure import Figure
from qhw.schema import TargetSpec

__all__ = ["compute_cycles", "padded_macs"]

_WINDOWS = ("MaxPool", "AveragePool", "GlobalMaxPool", "GlobalAveragePool")
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceProd", "ArgMax")


def padded_macs(operator: Operator, macs: int, multiple: int) -> float:
    """Multiply-accumulates where the channels of an operator are rounded up to a multiple.

    Input and output channels of each group are rounded. A depthwise convolution has one input channel to each output:
    there only the channels themselves are. Of a product of two activations the rows that are summed, and the columns.
    """
    facts = operator.attributes
    if operator.kind == "DepthwiseConv":
        sizes = [facts["out_channels"]]
    elif "in_channels" in facts:
        groups = facts.get("groups", 1)
        sizes = [facts["in_channels"] // groups, facts["out_channels"] // groups]
    elif operator.kind == "MatMul" and operator.shape:
        sizes = [facts["reduced_elements"], operator.shape[-1]]
    else:
        sizes = []
    factor: float = math.prod(math.ceil(size / multiple) * multiple / size for size in sizes if size > 0)
    return macs * factor


def compute_cycles(
    graph: Graph, target: TargetSpec, placement: OperatorPlacement, operator: Operator, clock_hz: float | None
) -> Figure:
    """Cycles that the arithmetic of one kernel takes for one sample.

    Args:
        graph: The captured model.
        target: The accelerator.
        placement: Where the operator runs.
        operator: The same operator.
        clock_hz: For the lower bound that a published peak gives.
    """
    if placement.kernel is None:
        return Figure(0.0)  # it moves data: memories alone decide
    if placement.macs:
        return _products(target, placement, operator, clock_hz)
    per_cycle = target.cost.elementwise_per_cycle if target.cost is not None else None
    if not isinstance(per_cycle, float):
        return Figure(0.0, ("cost.elementwise_per_cycle",))
    return Figure(_results(graph, operator) / per_cycle)


def _products(target: TargetSpec, placement: OperatorPlacement, operator: Operator, clock_hz: float | None) -> Figure:
    missing = []
    multiple = target.cost.channel_multiple if target.cost is not None else None
    if not isinstance(multiple, int):
        missing.append("cost.channel_multiple")
        multiple = 1
    macs = padded_macs(operator, placement.macs, multiple)
    per_cycle = target.kernels[str(placement.kernel)].macs_per_cycle
    if isinstance(per_cycle, float):
        return Figure(macs / per_cycle, tuple(missing))
    # No kernel is faster than the published peak; one multiply-accumulate is two operations.
    peak = target.cost.peak_ops_per_s if target.cost is not None else None
    low = 2 * placement.macs / peak * clock_hz if isinstance(peak, float) and clock_hz is not None else 0.0
    return Figure(low, (f"kernels.{placement.kernel}.macs_per_cycle", *missing))


def _results(graph: Graph, operator: Operator) -> float:
    """Elementwise steps per sample: one per result, of a window one per element of it, of a reduction one per input."""
    batch = max(graph.batch, 1)
    if operator.kind in _REDUCTIONS:
        sizes = [shape for name in operator.inputs if (shape := _shape(graph, name))]
        return max((math.prod(shape) / batch for shape in sizes), default=0.0)
    window = operator.attributes.get("kernel", []) if operator.kind in _WINDOWS else []
    return math.prod(operator.shape) / batch * math.prod(window if isinstance(window, list) else [window])


def _shape(graph: Graph, value: str) -> tuple[int, ...]:
    return graph.inputs[value] if value in graph.inputs else graph.operator(value).shape
