# SPDX-License-Identifier: Apache-2.0
"""Operators that our tables lack: torch's own exporter translates each alone, and its nodes are taken over."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import torch
from onnx.inliner import inline_local_functions
from torch import fx, nn

from qhw.errors import ExportError
from qhw_plugins.onnx_context import Context, Value

__all__ = ["island"]


def island(c: Context, node: fx.Node) -> Value:
    """Nodes for one operator, by torch.onnx.export, which writes opset 18 or later.

    Args:
        c: The graph.
        node: The operator. Sizes that it computes with are computed inside; tensors are its inputs.

    Raises:
        ExportError: torch cannot translate it either; names the operator and the way out.
    """
    c.builder.require(18, str(node.target))
    if c.builder.opset < 18:  # the graph will be built again; any name will do
        return c.builder.constant(0.0, np.float32)
    module, inputs = _alone(node)
    model = _translated(module, inputs, c, node)
    return _take_over(c, node, model, [c.tensor(source) for source in inputs])


def _alone(node: fx.Node) -> tuple[fx.GraphModule, list[fx.Node]]:
    """A module that computes this operator from its input tensors."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    inputs: list[fx.Node] = []

    def copied(source: fx.Node) -> fx.Node:
        if source not in copies:
            if "shape" in source.meta:
                inputs.append(source)
                copies[source] = graph.placeholder(f"x{len(inputs)}")
            else:
                copies[source] = graph.node_copy(source, copied)
        return copies[source]

    # Inputs first: torch.export wants all of them before the first call.
    for source in _tensors_behind(node):
        copied(source)
    graph.output(graph.node_copy(node, copied))
    return fx.GraphModule(nn.Module(), graph), inputs


def _tensors_behind(node: fx.Node) -> Iterator[fx.Node]:
    seen: set[fx.Node] = set()
    for source in node.all_input_nodes:
        found = [source] if "shape" in source.meta else _tensors_behind(source)
        for tensor in found:
            if tensor not in seen:
                seen.add(tensor)
                yield tensor


def _translated(module: fx.GraphModule, inputs: list[fx.Node], c: Context, node: fx.Node) -> onnx.ModelProto:
    examples = tuple(torch.zeros(s.meta["shape"], dtype=getattr(torch, s.meta["dtype"])) for s in inputs)
    shapes = tuple(_dynamic(c.varying, source) for source in inputs)
    problem = ""
    with _quiet():
        try:
            program: Any = torch.onnx.export(
                module, examples, dynamo=True, opset_version=c.builder.opset, dynamic_shapes=shapes, verbose=False
            )
            return program.model_proto  # type: ignore[no-any-return]
        except Exception as error:
            # torch raises many kinds, with pages of text; the operator's name is what helps.
            problem = _first_cause(error)
    raise ExportError(
        f"exporter 'onnx_qdq': {c.name}: operator '{node.target}' has no ONNX form: {problem}. "
        "Replace it in the model, or choose another exporter."
    )


def _first_cause(error: BaseException) -> str:
    """The first line of the error that the others were raised from."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(". ") if lines else type(error).__name__


def _dynamic(varying: Mapping[fx.Node, tuple[bool, ...]], node: fx.Node) -> dict[int, Any] | None:
    axes = {axis: torch.export.Dim.DYNAMIC for axis, varies in enumerate(varying.get(node, ())) if varies}
    return axes or None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch's exporter prints its progress and warns of what does not concern the user."""
    log = logging.getLogger("torch.onnx")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(before)


def _take_over(c: Context, node: fx.Node, model: onnx.ModelProto, inputs: list[str]) -> Value:
    """Copy an island's nodes under names of this graph."""
    if model.functions:
        model = inline_local_functions(model)
    names = dict(zip((value.name for value in model.graph.input), inputs, strict=True))
    for tensor in model.graph.initializer:
        names[tensor.name] = c.builder.initializer(tensor.__deepcopy__(), f"{c.name}/{tensor.name}")
    for item in model.graph.node:
        if any(attribute.type == onnx.AttributeProto.GRAPH for attribute in item.attribute):
            raise ExportError(
                f"exporter 'onnx_qdq': {c.name}: operator '{node.target}' becomes '{item.op_type}' with a graph of its "
                "own, which is not supported. Replace it in the model."
            )
        copy = onnx.NodeProto()
        copy.CopyFrom(item)
        del copy.input[:], copy.output[:], copy.metadata_props[:]
        copy.input.extend(names.get(name, name) for name in item.input)
        for name in item.output:
            names[name] = c.builder.unique(f"{c.name}/{name}") if name else ""
        copy.output.extend(names[name] for name in item.output)
        copy.name = copy.output[0]
        copy.doc_string = ""
        c.builder.nodes.append(copy)
    found = [names[value.name] for value in model.graph.output]
    return found if len(found) > 1 else found[0]
