# SPDX-License-Identifier: Apache-2.0
"""The captured model: a plain fx.GraphModule of ATen operators, read as operators with names and kinds."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhw.errors import CaptureError, PlanError, RangeError
from qhw.graph.copying import copied
from qhw.graph.operator import Operator, data_nodes, describe, target_name, value_name
from qhw.graph.tensors import assign, fetch, holds

__all__ = ["Graph"]

_aten = torch.ops.aten
_FUNCTIONS = {"Relu": _aten.relu.default}  # kinds that need nothing but their input
_MATRIX_PRODUCTS = ("aten.mm.default", "aten.matmul.default")


class Graph:
    """One captured model.

    The planner only reads it. An algorithm changes the runner's working copy, through `set_tensor`, `add_bias`,
    `become` and `remove`, so that operators, names and parameters stay in step.

    Attributes:
        module: The fx.GraphModule; runs, trains, deep-copies.
        batch: Batch size of the example that gave the shapes.
    """

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        self.module = module
        self.batch = batch
        self._operators: dict[str, Operator] | None = None
        self._consumers: dict[str, tuple[Operator, ...]] = {}
        self._nodes: dict[str, fx.Node] = {}
        self._deferred = False

    @property
    def operators(self) -> tuple[Operator, ...]:
        """All operators, in execution order."""
        return tuple(self._read().values())

    def _read(self) -> dict[str, Operator]:
        if self._operators is None:
            modules = dict(self.module.named_modules())
            data = data_nodes(self.module.graph.nodes)
            described = (describe(node, modules, self.batch, data) for node in self.module.graph.nodes)
            self._operators = {operator.name: operator for operator in described if operator is not None}
            self._nodes = {
                n.meta["name"]: n for n in self.module.graph.nodes if "name" in n.meta and n.op != "get_attr"
            }
            readers: dict[str, list[Operator]] = {}
            for operator in self._operators.values():
                for value in dict.fromkeys(operator.inputs):
                    readers.setdefault(value, []).append(operator)
            self._consumers = {value: tuple(found) for value, found in readers.items()}
        return self._operators

    @property
    def inputs(self) -> dict[str, tuple[int, ...]]:
        """Input names and example shapes."""
        return {n.meta["name"]: n.meta.get("shape", ()) for n in self.module.graph.nodes if n.op == "placeholder"}

    @property
    def input_dtypes(self) -> dict[str, str]:
        """Input names and dtypes, as `float32`."""
        return {n.meta["name"]: n.meta.get("dtype", "") for n in self.module.graph.nodes if n.op == "placeholder"}

    @property
    def output_values(self) -> tuple[str, ...]:
        """Names of the operators or inputs that the model returns."""
        output = next(n for n in self.module.graph.nodes if n.op == "output")
        return tuple(dict.fromkeys(value_name(a) for a in output.all_input_nodes if a.op != "get_attr"))

    def operator(self, name: str) -> Operator:
        """The operator of that name.

        Raises:
            CaptureError: there is none.
        """
        found = self._read().get(name)
        if found is None:
            raise CaptureError(f"graph: no operator '{name}'. Operators: {', '.join(self._read())}")
        return found

    def consumers(self, value: str) -> tuple[Operator, ...]:
        """Operators that read a value, each once, in execution order."""
        self._read()
        return self._consumers.get(value, ())

    def weight_users(self, name: str) -> tuple[Operator, ...]:
        """Operators whose constant operand is a parameter, in execution order; more than one where it is shared."""
        return tuple(operator for operator in self.operators if operator.weight == name)

    def node(self, value: str) -> fx.Node:
        """The fx node of an operator or input.

        Raises:
            CaptureError: there is none.
        """
        self._read()
        if value not in self._nodes:
            raise CaptureError(f"graph: no value '{value}'.")
        return self._nodes[value]

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by its name in the state dict.

        Raises:
            CaptureError: there is none.
        """
        try:
            return fetch(self.module, name)
        except AttributeError as error:
            raise CaptureError(f"graph: no tensor '{name}'.") from error

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Overwrite a parameter or buffer in place, keeping its identity (shared parameters stay shared).

        Raises:
            RangeError: the shapes differ.
        """
        tensor = self.tensor(name)
        if tensor.shape != value.shape:
            raise RangeError(f"{name}: must have shape {tuple(tensor.shape)}; got {tuple(value.shape)}. Reshape it.")
        with torch.no_grad():
            tensor.copy_(value)

    def bias_name(self, operator: Operator) -> str:
        """Name of an operator's bias in the state dict: the one it has, or the one `add_bias` would give it."""
        if operator.bias is not None:
            return operator.bias
        name = f"{(operator.weight or operator.node).rpartition('.')[0]}.bias".lstrip(".")
        shared = operator.weight is not None and self.weight_users(operator.weight)[0].name != operator.name
        return f"{operator.node}_bias" if shared or holds(self.module, name) else name

    def add_bias(self, operator: Operator, value: Tensor) -> str:
        """Give a convolution or linear operator a bias; returns its name in the state dict.

        Args:
            operator: One without a bias.
            value: float32 [out_channels].

        Raises:
            PlanError: the operator has a bias, or cannot take one.
        """
        node = self.node(operator.name)
        is_product = target_name(node) in _MATRIX_PRODUCTS
        if operator.bias is not None or operator.weight is None or (is_product and len(operator.shape) != 2):
            what = (
                "has a bias already" if operator.bias else f"{operator.kind} of rank {len(operator.shape)} takes none"
            )
            raise PlanError(f"{operator.name}: cannot be given a bias: {what}. Leave this operator out.")
        name = self.bias_name(operator)
        assign(self.module, name, nn.Parameter(value.clone()))
        with self.module.graph.inserting_before(node):
            parameter = self.module.graph.get_attr(name)
        parameter.meta["shape"] = tuple(value.shape)
        parameter.meta["dtype"] = str(value.dtype).removeprefix("torch.")
        if is_product:
            node.target, node.args = _aten.addmm.default, (parameter, *node.args)
        else:
            arguments = list(node.args) + [None] * (3 - len(node.args))
            arguments[2] = parameter
            node.args = tuple(arguments)
        self.refresh()
        return name

    def remove(self, operator: Operator) -> None:
        """Take an operator with one input out of the graph; its readers read its input instead."""
        node = self.node(operator.name)
        node.replace_all_uses_with(self.node(operator.inputs[0]))
        self.module.graph.erase_node(node)
        if node.op == "call_module" and all(n.target != node.target for n in self.module.graph.nodes):
            self.module.delete_submodule(str(node.target))
        self.refresh()

    def become(self, changes: Mapping[str, str]) -> None:
        """Let operators with one input and no parameters compute another function of it.

        Args:
            changes: Operator -> kind; `Relu` is the only one so far.

        Raises:
            CaptureError: there is no such operator.
            PlanError: the operator or the kind is none of those.
        """
        with self.changes():
            for name, kind in changes.items():
                operator, node = self.operator(name), self.node(name)
                if kind not in _FUNCTIONS or len(node.all_input_nodes) != 1 or node.op != "call_function":
                    raise PlanError(
                        f"{name}: {operator.kind} cannot become {kind}. An element-wise operator with one input can "
                        f"become {' or '.join(_FUNCTIONS)}."
                    )
                node.target, node.args, node.kwargs = _FUNCTIONS[kind], (node.all_input_nodes[0],), {}

    @contextmanager
    def changes(self) -> Iterator[None]:
        """Several changes at the price of one: inside, operators are read as they were before the first."""
        self._read()
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
            self.refresh()

    def refresh(self) -> None:
        """Re-read the operators after a change of the fx graph; inside `changes`, at its end."""
        if self._deferred:
            return
        self._operators = None
        self.module.graph.lint()
        self.module.recompile()

    def copy(self, *, share_tensors: bool = False) -> "Graph":
        """An independent copy: changing it leaves this one alone.

        Args:
            share_tensors: The copy holds this graph's own parameters and buffers, which are then kept once. Its graph
                and modules are its own all the same.
        """
        return Graph(copied(self.module, share_tensors=share_tensors), self.batch)

    def fingerprint(self) -> str:
        """SHA-256 of operators, edges and tensor contents; equal for equal models, whatever the object."""
        from qhw.graph.saving import graph_as_data

        digest = hashlib.sha256(json.dumps(graph_as_data(self), sort_keys=True).encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __call__(self, *inputs: Any) -> Any:
        return self.module(*inputs)
