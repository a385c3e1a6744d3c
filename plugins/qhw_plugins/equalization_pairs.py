# SPDX-License-Identifier: Apache-2.0
"""Pairs of operators with weights between which a channel can be rescaled or shifted: who they are, or why not."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from qhw.decisions import Reason
from qhw.errors import PlanError
from qhw.graph import VIEW_KINDS, WEIGHTED_KINDS, Graph, Operator, Placement

__all__ = [
    "Pair",
    "PairFinder",
    "along_features",
    "along_outputs",
    "folded_norms",
    "largest_weights",
    "planned_pairs",
]

_ELEMENTWISE = ("Relu", "PRelu", "LeakyRelu", "Identity", "Dropout")
_POOLS = ("MaxPool", "AveragePool")
_REDUCTIONS = ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
_JOINS = ("Add", "Sub", "Mul", "Div", "Max", "Min", "Concat", "MatMul", "Attention")


@dataclass(frozen=True)
class Pair:
    """Two operators with weights, the second of which alone reads the first.

    Scaling channel i of the first by s[i] > 0 scales `block` input features of the second, from i * block on.

    Attributes:
        first: Writes the channels.
        second: Reads them.
        between: Operators in between, in order, without batch norms that are folded into the first.
        block: Input features of the second for each channel; more than 1 where an image was flattened.
    """

    first: Operator
    second: Operator
    between: tuple[Operator, ...] = ()
    block: int = 1

    @property
    def channels(self) -> int:
        """Output channels of the first."""
        return int(self.first.attributes["out_channels"])


class PairFinder:
    """Finds pairs in one graph.

    Args:
        graph: The model.
        folded: Batch norms that are part of the operator before them by the time the pairs are used.
        unbounded: Clips that count as if they had no upper bound.
    """

    def __init__(self, graph: Graph, folded: Collection[str] = (), unbounded: Collection[str] = ()) -> None:
        self._graph = graph
        self._folded = folded
        self._unbounded = unbounded
        self._reads: Counter[int] = Counter()
        for node in graph.module.graph.nodes:
            if node.op == "get_attr":
                self._reads[id(graph.tensor(str(node.target)))] += len(node.users)

    def firsts(self) -> tuple[Operator, ...]:
        """Operators with weights, in execution order."""
        return tuple(operator for operator in self._graph.operators if operator.kind in WEIGHTED_KINDS)

    def batch_norm_of(self, first: Operator) -> Operator | None:
        """The batch norm that is folded into an operator."""
        readers = self._graph.consumers(first.name)
        return next((reader for reader in readers if reader.name in self._folded), None)

    def after(self, first: Operator) -> Pair | Reason:
        """The pair that an operator with weights begins, or the fact that stands against it."""
        obstacle = self._parameters(first) or _bias_shape(self._graph, first)
        if obstacle is not None:
            return obstacle
        between: list[Operator] = []
        value, layout = first, _Layout.of_output(first)
        while True:
            reader = self._only_reader(value)
            if isinstance(reader, Reason):
                return reader
            if reader.kind in WEIGHTED_KINDS:
                obstacle = self._parameters(reader) or layout.mismatch(reader, value)
                block = layout.block(value)
                return obstacle or Pair(first, reader, tuple(between), block)
            if reader.name not in self._folded:
                obstacle = None if reader.name in self._unbounded else _not_homogeneous(reader)
                moved = layout.through(value, reader)
                if obstacle is not None or moved is None:
                    return obstacle or _fact(reader, "kind", reader.kind, "{value} does not keep channels apart")
                layout = moved
                between.append(reader)
            value = reader

    def _only_reader(self, value: Operator) -> Operator | Reason:
        readers = self._graph.consumers(value.name)
        if value.name in self._graph.output_values:
            return _fact(value, "is_output", True, "the model returns it, so that its scale must stay")
        if len(readers) != 1:
            return _fact(value, "readers", len(readers), "{value} operators read it, which need one scale")
        return readers[0]

    def _parameters(self, operator: Operator) -> Reason | None:
        facts = operator.attributes
        if operator.weight is None or facts.get("computed"):
            return _fact(operator, "weight", "computed", "the weight or bias is {value}, not stored")
        if operator.kind == "DepthwiseConv" and facts["out_channels"] != facts["in_channels"]:
            multiplier = facts["out_channels"] // facts["in_channels"]
            return _fact(operator, "multiplier", multiplier, "{value} outputs of a depthwise channel share its scale")
        if operator.kind != "DepthwiseConv" and facts.get("groups", 1) > 1:
            return _fact(operator, "groups", facts["groups"], "{value} groups: only depthwise ones can be equalized")
        for role, parameter in (("weight", operator.weight), ("bias", operator.bias)):
            if parameter is not None and self._reads[id(self._graph.tensor(parameter))] > 1:
                return _fact(operator, role, parameter, "{value} is shared with another operator")
        return None


def folded_norms(points: Placement) -> frozenset[str]:
    """Operators that the plan folds into the one before."""
    return frozenset(operator.name for operator in points.operators if operator.where == "folded")


def planned_pairs(graph: Graph, sites: Collection[str], algorithm: str) -> list[Pair]:
    """The pairs of a step's sites, batch norms being folded.

    Raises:
        PlanError: a site is none; says why.
    """
    finder = PairFinder(graph)
    pairs = []
    for operator in finder.firsts():
        if operator.name in sites:
            found = finder.after(operator)
            if isinstance(found, Reason):
                raise PlanError(
                    f"plan: step '{algorithm}': {operator.name}: {found.sentence()}. Take it out of the sites, or plan "
                    "again."
                )
            pairs.append(found)
    strange = sorted(set(sites) - {pair.first.name for pair in pairs})
    if strange:
        raise PlanError(
            f"plan: step '{algorithm}': {strange[0]}: is no operator with weights. Take it out of the sites."
        )
    return pairs


def largest_weights(graph: Graph, operator: Operator) -> Tensor:
    """Largest magnitude over the kernel's taps: float64 [out, in], depthwise [channels]."""
    weight = graph.tensor(str(operator.weight)).detach().double().abs()
    if operator.kind == "DepthwiseConv":
        return weight.flatten(1).amax(1)
    weight = weight if operator.weight_axis == 0 else weight.transpose(0, 1)
    return weight.flatten(2).amax(2) if weight.dim() > 2 else weight


def along_outputs(factor: Tensor, operator: Operator, weight: Tensor) -> Tensor:
    """A value per output channel in a shape that broadcasts over the weight of an ungrouped or depthwise operator."""
    return _along(factor, 0 if operator.weight_axis == 0 else 1, weight)


def along_features(factor: Tensor, operator: Operator, weight: Tensor) -> Tensor:
    """A value per input feature in a shape that broadcasts over the weight; depthwise: the channel of the filter."""
    if operator.kind == "DepthwiseConv":
        return _along(factor, 0, weight)
    return _along(factor, 1 if operator.weight_axis == 0 else 0, weight)


def _along(factor: Tensor, axis: int, weight: Tensor) -> Tensor:
    return factor.reshape([-1 if index == axis else 1 for index in range(weight.dim())])


@dataclass(frozen=True)
class _Layout:
    """Where the channels of the first operator lie: channel i at [i * block, (i + 1) * block) of one axis."""

    axis: int
    channels: int

    @classmethod
    def of_output(cls, first: Operator) -> "_Layout":
        spatial = 0 if first.kind == "Gemm" else len(first.attributes["kernel"])
        return cls(len(first.shape) - 1 - spatial, int(first.attributes["out_channels"]))

    def block(self, value: Operator) -> int:
        return value.shape[self.axis] // self.channels

    def mismatch(self, second: Operator, value: Operator) -> Reason | None:
        """Why an operator does not read the channels as its own."""
        spatial = 0 if second.kind == "Gemm" else len(second.attributes["kernel"])
        axis, block = len(value.shape) - 1 - spatial, self.block(value)
        if axis != self.axis:
            return _fact(second, "axis", axis, f"it sums over axis {{value}}; the channels lie along axis {self.axis}")
        if second.kind == "DepthwiseConv" and block > 1:
            return _fact(second, "in_channels", second.attributes["in_channels"], f"{block} of its {{value}} channels "
                         "would share a scale")  # fmt: skip
        return None

    def through(self, value: Operator, operator: Operator) -> "_Layout | None":
        """Where they lie behind an operator; None where that mixes them."""
        facts: Any = operator.attributes
        rank = len(value.shape)
        if operator.kind in _ELEMENTWISE or operator.kind == "Clip":
            return None if facts.get("of_tuple") else self
        if operator.kind in _POOLS:
            return self if self.axis < rank - len(facts["kernel"]) else None
        if operator.kind == "Pad":
            return self if self.axis < rank - len(facts["padding"]) // 2 else None
        if operator.kind in _REDUCTIONS:
            axes = facts.get("axes", list(range(rank - len(facts.get("kernel", ())), rank)))
            if self.axis in axes:
                return None
            gone = 0 if facts["keepdim"] else sum(axis < self.axis for axis in axes)
            return _Layout(self.axis - gone, self.channels)
        return self._reshaped(value.shape, operator.shape)

    def _reshaped(self, old: tuple[int, ...], new: tuple[int, ...]) -> "_Layout | None":
        """A row-major reshape keeps channels apart where one axis begins where theirs begins, and holds them whole."""
        for axis, size in enumerate(new):
            if prod(new[:axis]) == prod(old[: self.axis]) and size and size % self.channels == 0:
                return _Layout(axis, self.channels)
        return None


def _not_homogeneous(operator: Operator) -> Reason | None:
    """Why f(s x) = s f(x) fails for s > 0, channel by channel."""
    kind, facts = operator.kind, operator.attributes
    if kind == "Clip":
        bounds = (("minimum", facts["minimum"]), ("maximum", facts["maximum"]))
        fact, bound = next((pair for pair in bounds if pair[1]), ("", None))
        rule = "the bound {value} is not scale-equivariant: it would have to differ from channel to channel"
        return None if bound is None else _fact(operator, fact, bound, rule)
    if kind == "Pad" and (facts["mode"] != "constant" or facts["value"] != 0):
        value = facts["value"] if facts["mode"] == "constant" else facts["mode"]
        return _fact(operator, "value", value, "padding with {value} does not scale with its input")
    if kind == "BatchNormalization":
        return _fact(operator, "kind", kind, "{value} that is not folded keeps no scale")
    if kind in _JOINS:
        return _fact(operator, "kind", kind, "{value} joins it with other values; equalization stays inside the branch")
    known = (*_ELEMENTWISE, *_POOLS, *_REDUCTIONS, "Pad")
    if kind not in known and (kind not in VIEW_KINDS or kind == "Split"):
        return _fact(operator, "kind", kind, "{value} comes before the next operator with weights")
    return None


def _bias_shape(graph: Graph, operator: Operator) -> Reason | None:
    if operator.bias is None:
        return None
    shape = list(graph.tensor(operator.bias).shape)
    if shape == [operator.attributes["out_channels"]]:
        return None
    return _fact(operator, "bias", shape, "a bias of shape [{value}] is not one value per channel")


def _fact(operator: Operator, fact: str, value: Any, rule: str) -> Reason:
    return Reason(subject=f"graph.{operator.name}.{fact}", value=value, rule=rule)
