# SPDX-License-Identifier: Apache-2.0
"""One operator of a quantized model with all that decides its integer result."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from qhw.decisions import QuantPlan
from qhw.engine import QuantizedModel
from qhw.errors import IntegerError
from qhw.graph import Graph, Operator, OperatorPlacement, QuantPoint
from qhw.numerics import ROUNDING_RULES, QParams, Rounding
from qhw.schema import Accumulator, Format, Kernel, Requantize, TargetSpec
from qhw.schema import Operator as OperatorSpec

__all__ = ["Constant", "Site", "sites"]


@dataclass(frozen=True)
class Constant:
    """A weight or bias.

    Attributes:
        codes: In the smallest integer dtype.
        qparams: What they stand for.
    """

    codes: Tensor
    qparams: QParams


@dataclass(frozen=True)
class Site:
    """One operator that the accelerator runs, what is fused into it included.

    Attributes:
        operator: As the graph has it.
        node: Its node.
        members: It, and the operators that its kernel computes along.
        spec: The target's entry for its kind.
        path: Where that stands, as `operators.Conv`.
        kernel: Its kernel; None for an operator that only moves data.
        sources: QParams of the tensor behind each operand that is an activation.
        inputs: QParams of each of these operands as it is read: others where an edge gives it a format of its own.
        output: QParams of the result; None where it leaves the accelerator in float.
        output_format: The target's entry for the grid of the result.
        weight: The constant operand.
        bias: The bias.
        target: For what the kernel names.
    """

    operator: Operator
    node: fx.Node
    members: tuple[Operator, ...]
    spec: OperatorSpec
    path: str
    kernel: Kernel | None
    kernel_name: str
    sources: tuple[QParams, ...]
    inputs: tuple[QParams, ...]
    output: QParams | None
    output_format: Format | None
    weight: Constant | None
    bias: Constant | None
    target: TargetSpec

    @property
    def name(self) -> str:
        """The operator's name."""
        return self.operator.name

    @property
    def constant(self) -> Constant:
        """The weight of an operator that has one.

        Raises:
            IntegerError: it is not quantized.
        """
        if self.weight is None:
            raise IntegerError(f"{self.operator.kind} without a quantized weight cannot be executed exactly")
        return self.weight

    @property
    def result(self) -> QParams:
        """The grid of the result, for operators that have no float one.

        Raises:
            IntegerError: the result leaves the accelerator in float.
        """
        if self.output is None:
            raise IntegerError(f"{self.operator.kind} with a float result cannot be executed exactly yet")
        return self.output

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of the first operand that is no parameter, as captured."""
        return next(tuple(n.meta["shape"]) for n in self.node.all_input_nodes if n.op != "get_attr")

    def function(self) -> Callable[[Tensor], Tensor]:
        """The node's own function of its first operand, all other arguments as captured."""
        target: Any = self.node.target
        rest, kwargs = list(self.node.args[1:]), dict(self.node.kwargs)
        return lambda x: target(x, *rest, **kwargs)

    @property
    def accumulator(self) -> tuple[str, Accumulator]:
        """Path and entry of the kernel's accumulator.

        Raises:
            IntegerError: the target does not say.
        """
        name = self._named("accumulator")
        return f"accumulators.{name}", self.target.accumulators[name]

    @property
    def requantize(self) -> tuple[str, Requantize]:
        """Path and entry of the kernel's requantization.

        Raises:
            IntegerError: the target does not say.
        """
        name = self._named("requantize")
        return f"requantize.{name}", self.target.requantize[name]

    @property
    def code_rounding(self) -> Rounding:
        """How real values become codes of the result: bounds of clips, entries of tables.

        Raises:
            IntegerError: the target names no single rounding.
        """
        found = self.output_format.rounding if self.output_format is not None else None
        if found is None:
            return "half_even"
        if found not in ROUNDING_RULES:
            raise IntegerError(f'formats.*.rounding = "{found}" names no single rounding')
        return found  # type: ignore[return-value]

    @property
    def adds_zero_point_first(self) -> bool:
        """Whether the zero point is added before rounding. Asked for only where that changes a code.

        Raises:
            IntegerError: the target leaves it open.
        """
        found = self.spec.rounding_order
        if found is None or found == "unknown":
            raise unknown(f"{self.path}.rounding_order", found, ("zero_point_after", "zero_point_before"))
        return found == "zero_point_before"

    def _named(self, field: str) -> str:
        found = getattr(self.kernel, field) if self.kernel is not None else None
        if found is None or found == "unknown":
            raise unknown(f"kernels.{self.kernel_name}.{field}", found)
        return str(found)


def unknown(path: str, value: object, choices: Iterable[str] = ()) -> IntegerError:
    """A fact that the target leaves open.

    Args:
        path: Its field.
        value: What stands there: None or "unknown".
        choices: What may stand there, where that is a short list.
    """
    what = "not stated" if value is None else f"'{value}'"
    listed = " or ".join(choices)
    return IntegerError(f"{path} is {what}{f', and must be {listed}' if listed else ''}")


def sites(result: QuantizedModel) -> Iterator[Site]:
    """The operators that the accelerator runs, in execution order, without those that only look at data otherwise and
    those that only spread parameters over the batch."""
    reader = _Reader(result)
    for placement in result.plan.operators:
        operator = reader.operators.get(placement.name)
        runs = placement.where == "accelerator" and placement.fused_into is None
        if operator is not None and runs and operator.inputs and not operator.is_view:
            yield reader.site(placement, operator)


class _Reader:
    def __init__(self, result: QuantizedModel) -> None:
        self._result = result
        self._graph: Graph = result.float_graph
        self._plan: QuantPlan = result.plan
        self._qparams: Mapping[str, QParams] = result.encodings()
        self.operators = {operator.name: operator for operator in self._graph.operators}
        self._points = PointIndex(result.plan)

    def site(self, placement: OperatorPlacement, operator: Operator) -> Site:
        members = tuple(self.operators[name] for name in placement.members if name in self.operators)
        path = placement.subject.removesuffix(".kernels")
        kernel = None if placement.kernel is None else self._result.target.kernels[placement.kernel]
        produced = self._points.written.get(members[-1].name)
        behind = [self._points.source(self._graph, name) for name in operator.inputs]
        read = [self._points.read(self._graph, operator, index) for index in range(len(operator.inputs))]
        return Site(
            operator=operator,
            node=self._graph.node(operator.name),
            members=members,
            spec=self._result.target.operators[placement.listed_as],
            path=path,
            kernel=kernel,
            kernel_name=str(placement.kernel),
            sources=tuple(self._qparams[(b or r).group] for b, r in zip(behind, read, strict=True) if r is not None),
            inputs=tuple(self._qparams[point.group] for point in read if point is not None),
            output=None if produced is None else self._qparams[produced.group],
            output_format=None if produced is None else self._result.target.formats.get(produced.format),
            weight=self._constant(self._points.weights, operator),
            bias=self._constant(self._points.biases, operator),
            target=self._result.target,
        )

    def _constant(self, points: Mapping[str, QuantPoint], operator: Operator) -> Constant | None:
        point = points.get(operator.name)
        if point is None:
            return None
        return Constant(self._result.codes(point), self._qparams[point.group])


class PointIndex:
    """A plan's points by what they do.

    Attributes:
        written: Activation points by the value they quantize.
        given: Model inputs and host tensors that the accelerator reads, by value.
        weights: Weight points by operator.
        biases: Bias points by operator.
    """

    def __init__(self, plan: QuantPlan) -> None:
        self.written = {point.tensor: point for point in plan.points if point.role == "activation"}
        self.given = {point.tensor: point for point in plan.points if point.role == "input"}
        self.weights = {name: p for p in plan.points if p.role == "weight" for name in (p.operator, *p.consumers)}
        self.biases = {name: p for p in plan.points if p.role == "bias" for name in (p.operator, *p.consumers)}
        self._edges = {point.name: point for point in plan.points if point.role == "edge"}

    def edge(self, operator: str, index: int) -> QuantPoint | None:
        """The point at which one operand gets another format than its tensor has."""
        return self._edges.get(f"{operator}.input.{index}")

    def read(self, graph: Graph, operator: Operator, index: int) -> QuantPoint | None:
        """The point whose grid an operator's operand is on; None for an operand that is not quantized."""
        edge = self.edge(operator.name, index)
        return edge or self.source(graph, operator.inputs[index])

    def source(self, graph: Graph, value: str) -> QuantPoint | None:
        """The point whose grid a value is on, views looked through."""
        while value not in self.written and value not in self.given:
            if graph.node(value).op == "placeholder" or not graph.operator(value).is_view:
                return None
            value = graph.operator(value).inputs[0]
        return self.written.get(value) or self.given[value]
