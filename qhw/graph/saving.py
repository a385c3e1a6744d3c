# SPDX-License-Identifier: Apache-2.0
"""The safe saved form of a graph: JSON of allow-listed operators. Loading it runs no code.

fx writes a Python function from names and arguments, so every name that a file brings is held to a plain pattern.
"""

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhw.errors import CaptureError
from qhw.graph.forms import BUILTINS, DTYPES, FORMATS, LAYOUTS, MODULES, GraphForm, NodeForm, is_allowed, is_plain_path
from qhw.graph.graph import Graph
from qhw.graph.operator import target_name
from qhw.graph.switching import BatchNorm, Dropout
from qhw.graph.tensors import assign
from qhw.graph.verify import verify_shapes

__all__ = ["check_savable", "graph_as_data", "graph_from_json", "graph_to_json"]

GRAPH_VERSION = 1
MAX_DEPTH = 16  # of an argument; deeper ones do not occur, and fx would recurse through them


def graph_as_data(graph: Graph) -> dict[str, Any]:
    """Everything about a graph but the contents of its tensors, as plain data.

    Raises:
        CaptureError: an argument that has no plain form.
    """
    module = graph.module
    switches = {}
    for path, submodule in module.named_modules():
        fields = MODULES.get(type(submodule).__name__)
        if fields is not None:
            switches[path] = {"type": type(submodule).__name__, **{f: getattr(submodule, f) for f in fields}}
    return {
        "graph_version": GRAPH_VERSION,
        "batch": graph.batch,
        "modules": switches,
        "parameters": [name for name, _ in module.named_parameters()],
        "buffers": [name for name, _ in module.named_buffers()],
        "shared": _shared_names(module),
        "nodes": [_node_as_data(node) for node in module.graph.nodes],
    }


def check_savable(graph: Graph) -> None:
    """Refuse a graph that could not be loaded again, at no cost.

    Raises:
        CaptureError: an operator is not on the allow-list, or a name not plain.
    """
    for node in graph.module.graph.nodes:
        if node.op == "call_function" and not is_allowed(target_name(node)):
            raise CaptureError(
                f"{node.name}: operator '{target_name(node)}' is not on the list of operators that a saved graph may "
                "call. Ask for it to be added, or replace it in the model."
            )
    for name in graph.module.state_dict():
        if not is_plain_path(name):
            raise CaptureError(
                f"{name!r}: cannot be saved: names hold letters, digits, _ and - only. Rename the module."
            )


def graph_to_json(graph: Graph) -> str:
    """The graph without its tensors as JSON text, stable byte for byte.

    Raises:
        CaptureError: it could not be loaded again; see `check_savable`.
    """
    check_savable(graph)
    # Keys in the order they were made in, not sorted: that of a dict of outputs is the model's.
    return json.dumps(graph_as_data(graph), indent=1) + "\n"


def graph_from_json(text: str, tensors: Mapping[str, Tensor], where: str = "graph.json") -> Graph:
    """Read a graph that `graph_to_json` wrote.

    Args:
        text: The JSON text.
        tensors: Parameters and buffers by name, shared ones under one of their names or all; others are passed over.
        where: File name for messages.

    Raises:
        CaptureError: the text is no graph, calls an operator that is not allowed, misses a tensor, or does not fit
            the shapes it states.
    """
    try:
        data = json.loads(text)
        version = data.get("graph_version") if isinstance(data, dict) else None
        if version != GRAPH_VERSION or isinstance(version, bool):
            raise CaptureError(
                f"{where}: graph_version must be {GRAPH_VERSION}; got {_printable(repr(version))}. Quantize again."
            )
        graph = _Reader(GraphForm.model_validate(data), tensors, where).graph()
        verify_shapes(graph, where)
        _ = graph.operators  # read here, where a fault still names the file
        return graph
    except CaptureError:
        raise
    # What fx and json raise on data that no writer of ours made; it carries no code, so any of them means "no graph".
    except (LookupError, TypeError, ValueError, AttributeError, RuntimeError, AssertionError, ArithmeticError) as error:
        raise CaptureError(
            f"{where}: is not a saved graph: {_first_fault(error)}. Quantize again, or restore the file."
        ) from error


def _first_fault(error: Exception) -> str:
    faults = getattr(error, "errors", None)
    if callable(faults):  # pydantic: the first field that is wrong
        first = faults()[0]
        field, fault = ".".join(str(part) for part in first["loc"]), first["msg"].removeprefix("Value error, ")
        return _printable(f"{field}: {fault}" if field else fault)
    text = str(error).strip()
    return _printable(f"{type(error).__name__} {text.splitlines()[0] if text else ''}".strip())


def _printable(text: str) -> str:
    """One short line without control characters, whatever a file brings."""
    return "".join(c if c.isprintable() else "?" for c in text[:300])


def _shared_names(module: nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    everything = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    for name, tensor in everything:
        names.setdefault(id(tensor), []).append(name)
    return [group for group in names.values() if len(group) > 1]


def _node_as_data(node: fx.Node) -> dict[str, Any]:
    kept = {key: node.meta[key] for key in ("name", "shape", "dtype") if key in node.meta}
    return {
        "op": node.op,
        "name": node.name,
        "target": target_name(node) if node.op == "call_function" else str(node.target),
        "args": [_encode(a) for a in node.args],
        "kwargs": {k: _encode(v) for k, v in sorted(node.kwargs.items())},
        "meta": {**kept, "shape": list(kept["shape"])} if "shape" in kept else kept,
    }


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, tuple | list):
        return {"tuple": [_encode(v) for v in value]} if isinstance(value, tuple) else [_encode(v) for v in value]
    if isinstance(value, dict):
        return {"dict": {str(k): _encode(v) for k, v in value.items()}}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    for word, table in (("dtype", DTYPES), ("memory_format", FORMATS), ("layout", LAYOUTS)):
        for name, known in table.items():
            if value is known:
                return {word: name}
    if isinstance(value, torch.device):
        return {"device": "cpu"}
    raise CaptureError(f"graph: an argument of type {type(value).__name__} cannot be saved. Pass numbers and tensors.")


class _Reader:
    """Rebuilds an fx graph from checked data, calling nothing but what the allow-list names."""

    def __init__(self, form: GraphForm, tensors: Mapping[str, Tensor], where: str) -> None:
        self._form = form
        self._tensors = tensors
        self._where = where
        self._nodes: dict[str, fx.Node] = {}

    def graph(self) -> Graph:
        root, graph = nn.Module(), fx.Graph()
        for path, settings in sorted(self._form.modules.items()):
            assign(
                root,
                path,
                BatchNorm(settings.momentum, settings.eps)
                if settings.type == "BatchNorm"
                else Dropout(settings.p, settings.form),
            )
        held = self._put_tensors(root)
        for item in self._form.nodes:
            self._add(graph, item)
        graph.lint()
        module = fx.GraphModule(root, graph, class_name="QhwGraph")
        for names in self._form.shared:
            for alias in names[1:]:
                assign(module, alias, held[names[0]])
        return Graph(module.eval(), self._form.batch)

    def _put_tensors(self, root: nn.Module) -> dict[str, Tensor]:
        aliases = {names[0]: names for names in self._form.shared}
        held: dict[str, Tensor] = {}
        for name in (*self._form.parameters, *self._form.buffers):
            found = next((alias for alias in aliases.get(name, (name,)) if alias in self._tensors), None)
            if found is None:
                raise self._error(f"reads tensor '{name}', which tensors.safetensors lacks. Restore the file.")
            tensor = self._tensors[found]
            held[name] = nn.Parameter(tensor, tensor.is_floating_point()) if name in self._form.parameters else tensor
            assign(root, name, held[name])
        return held

    def _add(self, graph: fx.Graph, item: NodeForm) -> None:
        if item.name in self._nodes:
            raise self._error(f"two nodes are named '{item.name}'.")
        args = tuple(self._decode(a) for a in item.args)
        kwargs = {key: self._decode(v) for key, v in item.kwargs.items()}
        if item.op == "output":
            graph.output(args[0])
            return
        node = graph.create_node(item.op, self._target(item), args, kwargs, name=item.name)
        node.meta.update(item.meta.model_dump(exclude_none=True))
        if node.name != item.name:
            raise self._error(f"'{item.name}' cannot be the name of a node.")
        self._nodes[item.name] = node

    def _target(self, item: NodeForm) -> Any:
        target = item.target
        if item.op == "call_function":
            if not is_allowed(target):
                raise self._error(
                    f"calls '{target}', which is not on the list of operators that a saved graph may call. "
                    "Do not use this file."
                )
            if target.startswith("operator."):
                return BUILTINS[target.removeprefix("operator.")]
            _, packet, overload = target.split(".")
            return getattr(getattr(torch.ops.aten, packet), overload)
        known = {"get_attr": (*self._form.parameters, *self._form.buffers), "call_module": self._form.modules}
        if item.op in known and target not in known[item.op]:
            raise self._error(f"{item.name} uses '{target}', which the file does not describe.")
        return target

    def _error(self, text: str) -> CaptureError:
        return CaptureError(f"{self._where}: {_printable(text)}")

    def _decode(self, value: Any, depth: int = 0) -> Any:
        if depth > MAX_DEPTH:
            raise self._error("an argument is nested too deeply.")
        if isinstance(value, list):
            return [self._decode(v, depth + 1) for v in value]
        if not isinstance(value, dict):
            return value
        ((word, content),) = value.items()
        if word == "node":
            if content not in self._nodes:
                raise self._error(f"refers to '{content}', which is no node before it.")
            return self._nodes[content]
        if word == "tuple":
            return tuple(self._decode(v, depth + 1) for v in content)
        if word == "dict":
            return {key: self._decode(v, depth + 1) for key, v in content.items()}
        if word == "float":
            return {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}[content]
        if word == "device":
            return torch.device("cpu")
        tables: dict[str, Mapping[str, Any]] = {"dtype": DTYPES, "memory_format": FORMATS, "layout": LAYOUTS}
        return tables[word][content]
