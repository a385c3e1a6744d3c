# SPDX-License-Identifier: Apache-2.0
"""From a quantized model to an onnx.ModelProto: inputs and outputs by name, the opset, the batch axis."""

from collections.abc import Mapping
from typing import Any

import onnx
import torch
from onnx import helper
from torch import Tensor, fx

import qhw
from qhw.engine import QuantizedModel
from qhw.errors import ExportError
from qhw_plugins.onnx_context import DTYPES
from qhw_plugins.onnx_lowering import Lowering

__all__ = ["HIGHEST_OPSET", "LOWEST_OPSET", "build"]

LOWEST_OPSET = 13  # the first with DequantizeLinear per axis
HIGHEST_OPSET = 23  # the first with 4-bit floats

Varying = Mapping[fx.Node, tuple[bool, ...]]


def build(result: QuantizedModel, opset: int | None, batch: str | int, int4: bool) -> onnx.ModelProto:
    """The whole model, valid and with all shapes inferred.

    Args:
        result: Not changed.
        opset: The opset to write; None for the lowest that holds the model.
        batch: "dynamic", or a size.
        int4: Whether 4-bit codes go into the 4-bit types.

    Raises:
        ExportError: the opset is too low, an operator has no ONNX form, the batch size cannot be had.
    """
    varying = _varying(result)
    fixed = not any(any(varies) for varies in varying.values())
    own = result.float_graph.batch
    if fixed and own and batch not in ("dynamic", own):
        raise ExportError(
            f"exporter 'onnx_qdq': the model was captured for batches of {own}; got batch={batch}. "
            "Capture it with a dynamic batch, or leave batch= out."
        )
    lowering = _lowered(result, opset, varying, int4)
    lowering.decided.extend([f"batch: fixed to {own}, as the model was captured"] if fixed and own else [])
    b = lowering.builder
    infos = [_info(node.meta["name"], node, varying, batch) for node in _placeholders(result)]
    graph = helper.make_graph(
        b.nodes,
        "qhw",
        infos,
        [_info(name, node, varying, batch) for name, node in _outputs(result).items()],
        list(b.initializers.values()),
    )
    imports = [helper.make_opsetid("", b.opset)]
    model = helper.make_model(
        graph,
        producer_name="qhw",
        producer_version=qhw.__version__,
        opset_imports=imports,
        ir_version=helper.find_min_ir_version_for(imports),
    )
    facts = {"qhw.target": result.target.name, "qhw.decided": "\n".join(lowering.decided)}
    helper.set_model_props(model, {key: value for key, value in facts.items() if value})
    return model


def _lowered(result: QuantizedModel, wanted: int | None, varying: Varying, int4: bool) -> Lowering:
    """Build at the lowest opset the target takes; again at the one that turns out to be needed."""
    stated = result.target.artefact.opset_min if result.target.artefact is not None else None
    lowest = max(LOWEST_OPSET, stated) if isinstance(stated, int) else LOWEST_OPSET
    if wanted is not None and wanted < lowest and isinstance(stated, int):
        raise ExportError(
            f"exporter 'onnx_qdq': '{result.target.name}' takes opset {stated} or later (artefact.opset_min); got "
            f"{wanted}. Raise opset=, or leave it out."
        )
    opset = wanted or lowest
    while True:
        lowering = Lowering(result, opset, varying, int4)
        lowering.run(_outputs(result))
        needed = max(lowering.builder.needs, default=LOWEST_OPSET)
        if needed <= opset:
            return lowering
        if wanted is not None:
            what = lowering.builder.needs[needed]
            hint = " or store 4-bit codes in 8 bits with int4=False" if "int4" in what else ""
            raise ExportError(
                f"exporter 'onnx_qdq': {what} needs opset {needed} or later; got {wanted}. Raise opset={hint}."
            )
        opset = needed


def _placeholders(result: QuantizedModel) -> list[fx.Node]:
    return [node for node in result.module.graph.nodes if node.op == "placeholder"]


def _outputs(result: QuantizedModel) -> dict[str, fx.Node]:
    """Output name -> node: dict keys where there are some, else the name of the operator that is returned."""
    output = next(node for node in result.module.graph.nodes if node.op == "output")
    found: dict[str, fx.Node] = {}

    def visit(value: Any, name: str) -> None:
        if isinstance(value, fx.Node):
            wanted, number = name or _operator_name(value), 1
            while wanted in found or wanted in result.input_names:
                number += 1
                wanted = f"{name or _operator_name(value)}_{number}"
            found[wanted] = value
        elif isinstance(value, Mapping):
            for key, item in value.items():
                visit(item, f"{name}.{key}" if name else str(key))
        elif isinstance(value, tuple | list):
            for index, item in enumerate(value):
                visit(item, f"{name}.{index}" if name else "")

    visit(output.args[0], "")
    return found


def _operator_name(node: fx.Node) -> str:
    while "name" not in node.meta and node.all_input_nodes:  # a quantizer behind the operator
        node = node.all_input_nodes[0]
    return str(node.meta.get("name", node.name))


def _info(name: str, node: fx.Node, varying: Varying, batch: str | int) -> onnx.ValueInfoProto:
    dtype = str(node.meta["dtype"])
    if dtype not in DTYPES:
        raise ExportError(f"exporter 'onnx_qdq': '{name}' is {dtype}. Types there are: {', '.join(DTYPES)}.")
    shape: list[int | str] = list(node.meta["shape"])
    for axis, varies in enumerate(varying.get(node, ())):
        if varies and axis == 0:
            shape[axis] = "batch" if batch == "dynamic" else int(batch)
        elif varies:
            shape[axis] = f"{name}.{axis}"
    return helper.make_tensor_value_info(name, DTYPES[dtype], shape)


def _varying(result: QuantizedModel) -> dict[fx.Node, tuple[bool, ...]]:
    """Which sizes change with the batch: one run with a sample more than the example; none where the model refuses it.

    Sizes do not depend on values, so zeros serve as inputs.
    """
    graph = result.float_graph
    inputs = []
    for name, shape in graph.inputs.items():
        grown = (shape[0] + 1, *shape[1:]) if shape and shape[0] == graph.batch else shape
        inputs.append(torch.zeros(grown, dtype=getattr(torch, graph.input_dtypes[name])))
    recorder = _Recorder(result.module)
    try:
        with torch.no_grad():
            recorder.run(*inputs)
    except (RuntimeError, ValueError, IndexError, AssertionError):
        return {}
    return {
        node: tuple(a != b for a, b in zip(node.meta["shape"], shape, strict=True))
        for node, shape in recorder.shapes.items()
    }


class _Recorder(fx.Interpreter):
    """Runs the graph once and notes the shape of every value.

    Submodules, which change no shape, are left out: quantizers, dropout, and batch norm, which would take the zeros
    into its statistics when it is exported in training mode.
    """

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = self.fetch_args_kwargs_from_env(n)[0][0] if n.op == "call_module" else super().run_node(n)
        first = value[0] if isinstance(value, tuple | list) and value else value
        if isinstance(first, Tensor) and n.op not in ("get_attr", "output"):
            self.shapes[n] = tuple(first.shape)
        return value
