# SPDX-License-Identifier: Apache-2.0
"""The walk over a quantized model's graph: each node becomes ONNX nodes, each quantizer a QDQ pair."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from onnx import helper
from torch import Tensor, fx

from qhw.engine import QuantizedModel
from qhw.errors import ExportError
from qhw.graph import ATEN_KINDS, VIEW_KINDS
from qhw.numerics import FakeQuantizer, PerAxis, PerGroup, QParams, quantize
from qhw_plugins import onnx_elementwise, onnx_layers, onnx_pooling, onnx_recurrent, onnx_shapes
from qhw_plugins.onnx_builder import Builder
from qhw_plugins.onnx_context import Context, NotCovered, Translation, argument
from qhw_plugins.onnx_encodings import dequantized, implies, int32_bias, quantized, storage_of
from qhw_plugins.onnx_islands import island

__all__ = ["Lowering"]

_TABLE: Mapping[str, Translation] = {
    **onnx_elementwise.TABLE,
    **onnx_layers.TABLE,
    **onnx_pooling.TABLE,
    **onnx_recurrent.TABLE,
    **onnx_shapes.TABLE,
}
_WITH_BIAS = ("aten.conv", "aten.linear.")
_SMALLEST_SCALE = 2.0**-126  # the smallest normal float32, as the engine's own bias scales


class Lowering:
    """One pass over the graph that the simulation runs, so that the artefact quantizes where the simulation does.

    Attributes:
        builder: What was built.
        decided: What the target leaves open and had to be decided here, one line each.
    """

    def __init__(
        self, result: QuantizedModel, opset: int, varying: Mapping[fx.Node, tuple[bool, ...]], int4: bool
    ) -> None:
        self.builder = Builder(opset)
        self.decided: list[str] = []
        self._module = result.module
        self._modules = dict(result.module.named_modules())
        self._context = Context(self.builder, varying)
        self._int4 = int4
        self._groups = {id(result.quantizer(group)): group for group in result.groups()}
        self._published: set[str] = set()

    def run(self, outputs: Mapping[str, fx.Node]) -> None:
        """Build the graph.

        Args:
            outputs: Output name -> the fx node it is.

        Raises:
            ExportError: an operator has no ONNX form, or a grid no ONNX type.
        """
        with torch.no_grad():
            for node in self._module.graph.nodes:
                self._context.enter(node)
                self._visit(node)
            for name, node in outputs.items():
                self._context.enter(node)
                self._publish(name, self._context.tensor(node))
        self.builder.prune(list(outputs))

    def _publish(self, name: str, value: str) -> None:
        """Give a value its public name, by renaming it where it is computed; an Identity where that cannot be."""
        b = self.builder
        computed = any(value in node.output for node in b.nodes)
        if not computed or value in self._published:
            if any(name in node.output for node in b.nodes):
                self._rename(name, b.unique(f"{name}/value"))
            b.nodes.append(helper.make_node("Identity", [value], [name], name=b.unique(f"{name}/output")))
        elif value != name:
            self._rename(name, b.unique(f"{name}/value"))
            self._rename(value, name)
        self._published.add(name)

    def _rename(self, old: str, new: str) -> None:
        for node in self.builder.nodes:
            for names in (node.input, node.output):
                for index, item in enumerate(names):
                    if item == old:
                        names[index] = new

    def _visit(self, node: fx.Node) -> None:
        c = self._context
        if node.op == "placeholder":
            c.set(node, self.builder.unique(node.meta["name"]))
        elif node.op == "get_attr":
            c.known[node] = _fetch(self._module, str(node.target))
        elif node.op == "call_module":
            self._visit_module(node)
        elif node.op == "call_function":
            self._visit_function(node)

    def _visit_module(self, node: fx.Node) -> None:
        c, module = self._context, self._modules[str(node.target)]
        if isinstance(module, FakeQuantizer):
            self._quantizer(node, module)
        elif type(module).__name__ == "Dropout":
            self._pass_through(node)
        elif type(module).__name__ == "BatchNorm":
            c.set(node, onnx_layers.batch_norm(c, node, module))
        else:
            raise ExportError(
                f"exporter 'onnx_qdq': {c.name}: no ONNX form for a module of type {type(module).__name__}. "
                "Replace it in the model."
            )

    def _visit_function(self, node: fx.Node) -> None:
        c, name = self._context, _target(node)
        if name.startswith("aten._assert"):
            return
        if all(source in c.known for source in node.all_input_nodes):  # no input decides it
            args: Any = fx.map_arg(node.args, c.known.__getitem__)
            kwargs: Any = fx.map_arg(node.kwargs, c.known.__getitem__)
            c.known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            return
        if self._is_implied(node):
            self._pass_through(node)
            return
        translate = _TABLE.get(name)
        c.replaced = self._integer_bias(node, name)
        c.replaced |= self._kept_from_fusion(node, name)
        try:
            value = translate(c, node) if translate is not None else island(c, node)
        except NotCovered:
            value = island(c, node)
        finally:
            c.replaced = {}
        if isinstance(value, str):
            value = self._again(node, value)
        if value is not None:
            c.set(node, value)

    def _again(self, node: fx.Node, value: str) -> str:
        """The codes once more behind a view: runtimes fuse an operator only with a DequantizeLinear right before it.

        Nothing changes: fl(fl(scale * n) / scale) rounds back to n.
        """
        quantizer = self._fake_quantizer(_before_views(node))
        if quantizer is None or all(user.op == "output" or _is_view(user) for user in node.users):
            return value
        return self._pair(value, quantizer, f"{self._context.name}/again", saturated=True)

    def _pass_through(self, node: fx.Node) -> None:
        """A node that is its input."""
        c, source = self._context, node.all_input_nodes[0]
        waiting = c.pending(source)
        if waiting is None:
            c.set(node, c.values(source))
        else:
            c.set_pending(node, *waiting)

    def _is_implied(self, node: fx.Node) -> bool:
        """A clip whose every reader is a quantizer that saturates no later."""
        bounds = onnx_elementwise.clip_bounds(node)
        if bounds is None or not node.users or not str(node.meta.get("dtype", "")).startswith("float"):
            return False
        readers = [self._fake_quantizer(user) for user in node.users]
        return all(q is not None and q.scale.dim() == 0 and implies(q.qparams, *bounds) for q in readers)

    def _fake_quantizer(self, node: Any) -> FakeQuantizer | None:
        module = self._modules.get(str(node.target)) if isinstance(node, fx.Node) and node.op == "call_module" else None
        return module if isinstance(module, FakeQuantizer) else None

    def _quantizer(self, node: fx.Node, module: FakeQuantizer) -> None:
        c, group, qparams = self._context, self._groups[id(module)], module.qparams
        source = node.all_input_nodes[0]
        if source in c.known:
            storage = storage_of(qparams, activation=False, int4=self._int4)
            if storage is None:
                raise _no_type(group, qparams)
            if storage.is_cast:
                c.known[node] = module(c.known[source])
                return
            codes = quantize(c.known[source], qparams, name=group)
            c.set(node, dequantized(self.builder, codes, qparams, storage, group, f"{group}/dequantized"))
            return
        name = f"{source.meta.get('name', group)}/dequantized"
        waiting = c.pending(source)
        if waiting is None:
            c.set(node, self._pair(c.tensor(source), module, name))
        else:
            raw, finish = waiting
            c.set_pending(node, self._pair(raw, module, name), lambda raw: self._again(node, finish(raw)))

    def _pair(self, x: str, module: FakeQuantizer, name: str, saturated: bool = False) -> str:
        """QuantizeLinear and DequantizeLinear, as a quantizer of an activation says."""
        group, qparams = self._groups[id(module)], module.qparams
        storage = storage_of(qparams, activation=True, int4=self._int4)
        if storage is None:
            raise _no_type(group, qparams)
        return quantized(self.builder, x, qparams, storage, group, name, saturated=saturated)

    def _kept_from_fusion(self, node: fx.Node, name: str) -> dict[fx.Node, str]:
        """An input behind a Clip that changes nothing, where onnxruntime 1.32 must not see the DequantizeLinear.

        Between a DequantizeLinear and a QuantizeLinear it quantizes a layer's float weights to int8 and a float bias
        to an int32 that may overflow, and makes a QLinearConv of weights in int32 that it then refuses.
        """
        if not name.startswith((*_WITH_BIAS, "aten.addmm")):
            return {}
        position = 1 if name.startswith("aten.addmm") else 0
        source, weight = node.args[position : position + 2]
        quantizer = self._fake_quantizer(weight)
        storage = None if quantizer is None else storage_of(quantizer.qparams, activation=False, int4=self._int4)
        if storage is not None and storage.elements is not None:
            return {}
        bias = node.args[0] if position else argument(node, 2, "bias")
        float_bias = bias in self._context.known and bias not in self._context.replaced
        if storage is not None and storage.name != "int32" and not float_bias:
            return {}
        x = self._context.tensor(source)
        if self.builder.dequantized_from(x) is None or not isinstance(source, fx.Node):
            return {}
        lowest = self.builder.constant(np.finfo(np.float32).min, np.float32)
        return {source: self._context.op("Clip", x, lowest, part="float")}

    def _integer_bias(self, node: fx.Node, name: str) -> dict[fx.Node, str]:
        """A float bias as int32 codes at input scale times weight scale, where both have one: QLinearConv and QGemm
        take no other. The rounding is half a step of the accumulator, far below a step of the result."""
        bias = argument(node, 2, "bias") if name.startswith(_WITH_BIAS) else None
        weight = self._fake_quantizer(node.args[1]) if bias is not None else None
        source = self._fake_quantizer(_before_views(node.args[0])) if bias is not None else None
        if weight is None or source is None or bias not in self._context.known:
            return {}
        if weight.qparams.elements is not None or source.qparams.elements is not None:  # sums of floats take a float
            return {}
        where = self._context.name
        scale = _bias_scale(node, name, source.scale, weight)
        if scale is None or source.scale.dim():
            self.decided.append(f"{where}: the bias stays float32: its weights have a scale per group of inputs")
            return {}
        codes, qparams, fits = int32_bias(self._context.known[bias], scale)
        if not fits:
            self.decided.append(f"{where}: the bias stays float32: it needs more than 32 bits at scale input*weight")
            return {}
        self.decided.append(f"{where}: the bias is int32 at scale input*weight; the target does not say how it is held")
        storage = storage_of(qparams, activation=False)
        if storage is None:
            raise _no_type(where, qparams)
        group = str(bias.target) if f"{bias.target}/codes" not in self.builder.initializers else f"{where}.bias"
        return {bias: dequantized(self.builder, codes, qparams, storage, group, f"{group}/dequantized")}


def _no_type(where: str, qparams: QParams) -> ExportError:
    held = f"codes [{qparams.quant_min}, {qparams.quant_max}]" if qparams.elements is None else qparams.elements.words
    return ExportError(f"exporter 'onnx_qdq': {where}: no ONNX type holds {held}. Use 16 bits or fewer.")


def _bias_scale(node: fx.Node, name: str, input_scale: Tensor, weight: FakeQuantizer) -> Tensor | None:
    """Input scale times weight scale: float32 [] or [out_channels]; None where the weight's is not per output."""
    scale = (input_scale * weight.scale).clamp(min=_SMALLEST_SCALE)
    if isinstance(weight.granularity, PerGroup):
        return None
    if isinstance(weight.granularity, PerAxis):
        transposed = name.startswith("aten.conv_transpose")
        if weight.granularity.axis != int(transposed):
            return None
        if transposed:  # weight [in, out / groups, *kernel]: each group of outputs has the same scales
            scale = scale.repeat(int(argument(node, 6, "groups", 1)))
    return scale


def _is_view(node: fx.Node) -> bool:
    """A view of one whole tensor: the same codes in another shape."""
    rule = ATEN_KINDS.get(_target(node)) if node.op == "call_function" else None
    return rule is not None and rule.kind in VIEW_KINDS - {"Split"} and not _target(node).startswith("operator")


def _before_views(node: Any) -> Any:
    """The value that views show, so that its quantizer is found through a Flatten."""
    while isinstance(node, fx.Node) and _is_view(node):
        node = node.args[0]
    return node


def _target(node: fx.Node) -> str:
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    return f"operator.{getattr(node.target, '__name__', node.target)}"


def _fetch(module: Any, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
