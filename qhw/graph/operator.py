# SPDX-License-Identifier: Apache-2.0
"""Reading one graph node as an operator: kind, operands, attributes, multiply-accumulates per sample."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from qhw.graph.attributes import argument, conv_attributes, macs_of, narrowed, shape_of, target_name
from qhw.graph.kinds import ATEN_KINDS, MODULE_KINDS, VIEW_KINDS, KindRule
from qhw.graph.structure import structure_of

__all__ = ["Operator", "data_nodes", "describe", "is_constant", "target_name", "value_name"]

_BINARY = frozenset({"Add", "Sub", "Mul", "Div", "Max", "Min"})
_LIKE = frozenset(f"aten.{name}.default" for name in ("zeros_like", "ones_like", "new_zeros", "new_ones"))


@dataclass(frozen=True)
class Operator:
    """One operator of a captured model.

    Attributes:
        name: Unique, made of the module path: `layer1.0.conv1`, `layer1.0.add`.
        kind: As in `qhw.graph.kinds`; `Unknown` for an operator that the table lacks.
        node: Name of its node in the fx graph.
        inputs: The values it reads that are not parameters: names of operators or of graph inputs. A value that it
            reads twice stands twice. None where it only spreads parameters over the batch, as of a class token.
        weight: Name of its constant operand in the state dict.
        bias: Name of its bias in the state dict.
        weight_axis: Axis of the output channels in the weight; None where there is none, or no weight.
        attributes: Plain facts (kernel, stride, groups, minimum, maximum, ...), as limits and exporters read them.
            `weight_operand`: which operand of two is the constant. `scalar`: an operand is a plain number.
            `computed`: an operand is computed from parameters alone. `of_tuple`: one of several results.
        shape: Output shape with the batch axis of the example; of the first output where there are several.
        is_float: Whether the output is a float tensor; only such values are quantized.
        macs: Multiply-accumulates per sample.
    """

    name: str
    kind: str
    node: str
    inputs: tuple[str, ...]
    weight: str | None = None
    bias: str | None = None
    weight_axis: int | None = None
    attributes: Mapping[str, Any] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    is_float: bool = True
    macs: int = 0

    @property
    def is_view(self) -> bool:
        """Whether its output is its input seen otherwise, so that both are one quantized tensor."""
        return self.kind in VIEW_KINDS and bool(self.inputs) and not self.attributes.get("of_tuple")


def is_constant(argument: object) -> bool:
    """Whether an argument is a parameter or buffer of the model."""
    return isinstance(argument, fx.Node) and argument.op == "get_attr"


def value_name(node: fx.Node) -> str:
    """The value that a node holds; a node without a name (an inserted quantizer) stands for what it reads."""
    while "name" not in node.meta:
        node = node.all_input_nodes[0]
    return str(node.meta["name"])


def data_nodes(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that hold values of the model's run: its inputs, what is computed from them, and what a batch spreads.

    Shape arithmetic is none, nor is what follows from it as integers (positions 0 .. n-1) or from parameters alone.
    Real numbers that depend on the size of the batch are: a class token for each sample, a table read at zeros.
    """
    found: set[fx.Node] = set()
    sized: set[fx.Node] = set()  # values that depend on the sizes of the inputs, not on what they hold
    for node in nodes:
        if node.op in ("get_attr", "output"):
            continue
        if "shape" not in node.meta:
            sized.update({node} if node.op != "placeholder" else ())
        elif node.op == "placeholder":
            found.add(node)
        elif target_name(node) in _LIKE and not node.meta["dtype"].startswith("float"):
            sized.add(node)
        elif any(source in found for source in node.all_input_nodes):
            found.add(node)
        elif any(source in sized for source in node.all_input_nodes):
            (found if node.meta["dtype"].startswith("float") else sized).add(node)
    return found


def describe(
    node: fx.Node, modules: Mapping[str, torch.nn.Module], batch: int, data: Collection[fx.Node]
) -> Operator | None:
    """Read a node as an operator; None for inputs, parameters, outputs, shape arithmetic and constants.

    Args:
        node: A node with `meta["name"]`, `meta["shape"]` and `meta["dtype"]` as capture leaves them.
        modules: Submodules by path, to tell batch norm from dropout.
        batch: Batch size of the example whose shapes the nodes carry.
        data: The nodes that `data_nodes` finds.
    """
    if node.op == "placeholder" or node not in data or "name" not in node.meta:
        return None
    rule = _rule(node, modules)
    shape = shape_of(node)
    operands = _operands(node, rule)
    kind, weight, weight_axis, attributes = _read(node, rule, operands, shape)
    bias = _constant(node, rule.bias) if kind != "Unknown" else None
    values = [a for a in operands if isinstance(a, fx.Node) and a in data]
    others = [a for a in node.all_input_nodes if "shape" in a.meta and a not in values]
    values += [a for a in others if a in data]
    parameters = (weight, bias)
    if (
        kind != "Unknown"
        and values
        and any(a not in data and not (is_constant(a) and str(a.target) in parameters) for a in others)
    ):
        attributes["computed"] = True
    attributes["rank"] = len(shape)
    attributes["inputs"] = len(values)
    attributes = structure_of(node, kind, shape, values, batch) | attributes
    return Operator(
        name=node.meta["name"],
        kind=kind,
        node=node.name,
        inputs=tuple(value_name(a) for a in values),
        weight=weight,
        bias=bias,
        weight_axis=weight_axis,
        attributes=attributes,
        shape=shape,
        is_float=node.meta["dtype"].startswith(("float", "bfloat")),
        macs=macs_of(node, kind, shape, attributes) // max(batch, 1),
    )


def _rule(node: fx.Node, modules: Mapping[str, torch.nn.Module]) -> KindRule:
    if node.op == "call_module":
        return KindRule(MODULE_KINDS.get(type(modules[str(node.target)]).__name__, "Unknown"))
    return ATEN_KINDS.get(target_name(node), KindRule("Unknown"))


def _operands(node: fx.Node, rule: KindRule) -> list[Any]:
    if rule.kind == "Unknown":
        return list(node.all_input_nodes)
    if rule.sequence and isinstance(node.args[0], Sequence):
        return list(node.args[0])
    return [node.args[position] for position in rule.inputs if position < len(node.args)]


def _constant(node: fx.Node, position: int | None) -> str | None:
    if position is None or position >= len(node.args) or not is_constant(node.args[position]):
        return None
    return _name(node.args[position])


def _name(node: Any) -> str:
    return str(node.target)


def _read(
    node: fx.Node, rule: KindRule, operands: list[Any], shape: tuple[int, ...]
) -> tuple[str, str | None, int | None, dict[str, Any]]:
    """Kind, weight, axis of the weight's output channels, attributes."""
    kind, weight = rule.kind, _constant(node, rule.weight)
    if kind in ("Conv", "ConvTranspose"):
        attributes = conv_attributes(node, kind)
        if kind == "Conv" and attributes["groups"] > 1 and attributes["groups"] == attributes["in_channels"]:
            kind = "DepthwiseConv"
        return kind, weight, (1 if kind == "ConvTranspose" else 0) if weight else None, attributes
    if kind == "Gemm":
        return _gemm(node, weight)
    if kind == "MatMul":
        return _matmul(operands)
    if kind in _BINARY:
        if argument(node, 2, "alpha", 1) != 1:
            return "Unknown", None, None, {}
        return kind, *_constant_operand(operands)
    if kind == "BatchNormalization":
        return kind, None, None, {"module": str(node.target)}
    if node.target is not None and target_name(node) == "operator.getitem":
        source = node.args[0]
        listed = (
            isinstance(source, fx.Node) and ATEN_KINDS.get(target_name(source), KindRule("Unknown")).kind == "Split"
        )
        return kind, None, None, {} if listed else {"of_tuple": True}
    kind, attributes = narrowed(node, kind, shape)
    return kind, weight, None, attributes


def _constant_operand(operands: list[Any]) -> tuple[str | None, int | None, dict[str, Any]]:
    if any(isinstance(a, int | float) for a in operands):
        return None, None, {"scalar": True}
    for index, operand in enumerate(operands):
        if is_constant(operand):
            return _name(operand), None, {"weight_operand": index}
    return None, None, {}


def _gemm(node: fx.Node, weight: str | None) -> tuple[str, str | None, int | None, dict[str, Any]]:
    out_first = target_name(node) == "aten.linear.default"
    if not out_first and (node.kwargs.get("alpha", 1) != 1 or node.kwargs.get("beta", 1) != 1):
        return "Unknown", None, None, {}
    dims = shape_of(node.args[1] if out_first else node.args[2])
    axis, inner = (0, 1) if out_first else (1, 0)
    return "Gemm", weight, axis if weight else None, _products(dims[inner], dims[axis])


def _matmul(operands: list[Any]) -> tuple[str, str | None, int | None, dict[str, Any]]:
    """A matrix of constants on the right makes it a Gemm; any other constant operand is a tensor with one scale."""
    weight, _, attributes = _constant_operand(operands)
    dims = shape_of(operands[1])
    if weight is not None and attributes["weight_operand"] == 1 and len(dims) == 2:
        return "Gemm", weight, 1, _products(dims[0], dims[1])
    return "MatMul", weight, None, attributes | {"reduced_elements": shape_of(operands[0])[-1]}


def _products(inner: int, outer: int) -> dict[str, Any]:
    return {"in_channels": inner, "out_channels": outer, "reduced_elements": inner}
