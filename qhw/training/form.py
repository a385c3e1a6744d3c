# SPDX-License-Identifier: Apache-2.0
"""The form in which a quantized model trains: its float graph, quantizers that learn, batch norms taken out again."""

import re
from typing import Any

import torch
from torch import Tensor, fx, nn

from qhw.decisions import QuantPlan
from qhw.engine import QuantizedModel, Work, insert_modules
from qhw.engine.quantizers import quantizer_of
from qhw.errors import TrainingError
from qhw.extension import Registry
from qhw.graph import Graph, QuantPoint
from qhw.graph.switching import BatchNorm
from qhw.numerics import FakeQuantizer, PerAxis, PerTensor, QParams, expand, legal_scale, quantize
from qhw.training.batch_norm import DoubleForward, KeptNorm, NormLayer, OperatorCall, SyncedBatchNorm
from qhw.training.bias import BiasQuantizer
from qhw.training.fusion import drop_repeats, drop_results, fuse_clips, fuse_norms

__all__ = ["TrainingForm"]

_HOLDER = "batch_norms"
_NUDGES = (2.0**-16, 2.0**-13, 2.0**-10, 2.0**-7, 2.0**-4)  # parts of the way from a tie to the code
_WIDE_BIAS = 32  # bits; rounding to such a grid is below that of float32


class TrainingForm(Work):
    """A result on its way to training. Algorithms of the stage `train` say here what learns.

    What is left unsaid stays as it is: a quantizer with a fixed scale, a batch norm that is folded.

    Args:
        result: The quantized model; not changed.
        plan: Its plan, with steps of training.
        registry: Plugins that know kinds of numbers; absent: all that are installed.

    Attributes:
        quantizers: Group of points -> the module that will quantize it.
        layers: Operator -> the module that computes it with its batch norm.
        origin: The float graph as the result had it.
        start: Group -> scale and zero point as the result had them.
    """

    def __init__(self, result: QuantizedModel, plan: QuantPlan, registry: Registry | None = None) -> None:
        self.origin = result.float_graph.copy()
        super().__init__(self.origin.copy(), result.target, plan, registry)
        self.start = result.encodings()
        self.qparams.update(self.start)
        self.folded_norms.update(result.folded_norms)
        self.quantizers: dict[str, FakeQuantizer] = {}
        self.layers: dict[str, NormLayer] = {}

    def set_quantizer(self, group: str, quantizer: FakeQuantizer) -> None:
        """Let a module quantize the points of a group.

        Raises:
            PlanError: no such group.
            TrainingError: the module is no FakeQuantizer, as which freezing reads its grid.
        """
        self.group(group)
        if not isinstance(quantizer, FakeQuantizer):
            raise TrainingError(f"{group}: must get a qhw.numerics.FakeQuantizer; got {type(quantizer).__name__}.")
        self.quantizers[group] = quantizer

    def shape(self, point: QuantPoint) -> tuple[int, ...]:
        """Shape of the tensor of an activation point, with the batch axis of the example."""
        return tuple(self.graph.node(point.tensor).meta["shape"])

    def holder_of(self, norm: str) -> str:
        """The operator whose weights hold a batch norm.

        Raises:
            TrainingError: it is not folded.
        """
        for placement in self.plan.operators:
            if placement.name == norm and placement.where == "folded" and placement.fused_into is not None:
                return placement.fused_into
        raise TrainingError(f"{norm}: is no batch norm that was folded. Leave it out, or plan again.")

    def weight_group(self, operator: str) -> str:
        """The group of an operator's weight.

        Raises:
            TrainingError: it is not quantized.
        """
        for point in self.plan.points:
            if point.role == "weight" and operator in (point.operator, *point.consumers):
                return point.group
        raise TrainingError(f"{operator}: its weight is not quantized, so its batch norm stays folded. Leave it out.")

    def keep_norm(self, operator: str) -> None:
        """Take the batch norm out of an operator with one scale per output channel, and let it normalize behind it.

        The function in eval mode and the weight codes stay; the scales become those of the weights without it.

        Raises:
            TrainingError: it had none, or is of a form that cannot be split, or its weight has its quantizer already.
        """
        group = self.weight_group(operator)
        found = self.qparams[group]
        if not isinstance(found.granularity, PerAxis) or found.granularity.axis != 0:
            raise TrainingError(f"{operator}: a batch norm is kept on scales per output channel only. Fold it.")
        if group in self.quantizers:
            raise TrainingError(
                f"{operator}: its weight has a quantizer already, on the scales with the batch norm. Let what keeps "
                "batch norms come first (prefer=)."
            )
        weight = self.graph.tensor(self.group(group)[0].tensor)
        codes = quantize(weight.detach(), found, name=group)
        norm, factor = self._unfold(operator)
        scale = legal_scale(found.scale.double() * factor, self.grid(group), "nearest")
        moved = QParams(scale, found.zero_point, found.quant_min, found.quant_max, found.granularity)
        self.qparams[group] = moved
        with torch.no_grad():
            weight.copy_(_on_codes(weight, codes, moved))
        self.layers[operator] = KeptNorm(self._call(operator), norm)

    def fold_each_step(self, operator: str, freeze_after: int | None = None) -> None:
        """Take the batch norm out of an operator, to be folded anew at each step of training.

        Args:
            operator: Its name.
            freeze_after: Steps after which running statistics serve; None: never.

        Raises:
            TrainingError: it had no batch norm, or is of a form that cannot be split.
        """
        group = self.weight_group(operator)
        norm, _ = self._unfold(operator)
        # The quantizer may be replaced until the form is built.
        self.layers[operator] = DoubleForward(self._call(operator), norm, self._quantizer(group), freeze_after)

    def _unfold(self, operator: str) -> tuple[SyncedBatchNorm, Tensor]:
        """The batch norm on its own; and what the weights were multiplied by to be without it: float64 [channels].

        With u = W x before and y = gamma (u - mean) / sigma + beta behind the batch norm, and the folded W~, b~:
            W = W~ sigma / gamma, mean = (beta - b~) sigma / gamma
        """
        record = self.folded_norms.get(operator)
        found = self.graph.operator(operator)
        if operator in self.layers:
            raise TrainingError(f"{operator}: its batch norm was taken out already. Take it out once.")
        if record is None:
            raise TrainingError(f"{operator}: no batch norm was folded into it. Leave it out, or quantize again.")
        _, args = self._arguments(operator)
        weight, bias = self.graph.tensor(str(found.weight)), self.graph.tensor(str(found.bias))
        if len(args) < 3 or found.weight_axis != 0:
            raise TrainingError(f"{operator}: its batch norm cannot be taken out of {found.kind}. Leave it out.")
        gamma, beta = record.normal.std, record.normal.mean
        # A channel with gamma 0 has weights 0: any factor does.
        factor = torch.where(gamma > 0, record.inner_std / gamma.clamp(min=1e-30), 1.0)
        with torch.no_grad():
            weight.copy_(weight.double() * expand(factor, PerAxis(0), tuple(weight.shape)))
        norm = SyncedBatchNorm(record.momentum, record.eps, self._norm_of(operator))
        norm.weight, norm.bias = nn.Parameter(gamma.float()), nn.Parameter(beta.float())
        norm.running_mean = ((beta - bias.detach().double()) * factor).float()
        norm.running_var = (record.inner_std.square() - record.eps).clamp(min=0).float()
        norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        return norm, factor

    def _norm_of(self, operator: str) -> str:
        """The name of the batch norm that was folded into an operator."""
        folded = (placement for placement in self.plan.operators if placement.fused_into == operator)
        return next((norm.name for norm in folded if norm.kind == "BatchNormalization"), operator)

    def _arguments(self, operator: str) -> tuple[fx.Node, tuple[Any, ...]]:
        node = self.graph.node(operator)
        return node, tuple(node.args)

    def _call(self, operator: str) -> OperatorCall:
        node, args = self._arguments(operator)
        # Plain lists: the compiler does not take those of fx.
        rest = tuple(list(value) if isinstance(value, list | tuple) else value for value in args[3:])
        return OperatorCall(node.target, rest, dict(node.kwargs))

    def build(self) -> tuple[fx.GraphModule, dict[str, str]]:
        """The module that trains, and the path of the quantizer of each group."""
        graph = self.graph
        paths: dict[str, str] = {}
        holder = nn.ModuleDict()
        _synchronize(graph)
        for name, layer in self.layers.items():
            key = re.sub(r"\W", "_", name)
            holder[key] = layer
            node, args = self._arguments(name)
            node.op, node.target, node.args, node.kwargs = "call_module", f"{_HOLDER}.{key}", args[:2], {}
            if isinstance(layer, DoubleForward):
                layer.quantizer = self._quantizer(self.weight_group(name))
                paths[self.weight_group(name)] = f"{_HOLDER}.{key}.quantizer"
        if self.layers:
            graph.module.add_module(_HOLDER, holder)
            _drop_unused(graph.module)
            graph.refresh()
        modules = self._modules()
        points = [point for point in self.plan.points if point.group not in paths]
        paths |= insert_modules(graph, points, lambda point: modules.get(point.group))
        drop_repeats(graph)
        fuse_clips(graph)
        fuse_norms(graph)
        drop_results(graph)
        return graph.module, paths

    def _modules(self) -> dict[str, nn.Module]:
        """Group -> its quantizer; none for biases that need none."""
        found: dict[str, nn.Module] = {}
        for point in self.plan.points:
            if point.role != "bias":
                found[point.group] = self._quantizer(point.group)
        for point in self.plan.points:
            module = self._bias_quantizer(point) if point.role == "bias" else None
            if module is not None:
                found[point.group] = module
        return found

    def _quantizer(self, group: str) -> FakeQuantizer:
        """What an algorithm gave the group, or a quantizer with a scale that stays."""
        if group not in self.quantizers:
            point = self.group(group)[0]
            self.quantizers[group] = quantizer_of(self.target, self.graph, point, self.qparams[group])
        return self.quantizers[group]

    def _bias_quantizer(self, point: QuantPoint) -> nn.Module | None:
        """A narrow bias is rounded; a wide one is as good as float, and behind a batch norm there is none yet."""
        rule = self.target.biases[point.format]
        if point.operator in self.layers or not isinstance(rule.bits, int) or rule.bits >= _WIDE_BIAS:
            return None
        if rule.scale == "own":
            return FakeQuantizer(self.qparams[point.group], name=point.name)
        weight = self._quantizer(self.weight_group(point.operator))
        if not isinstance(weight.granularity, PerTensor | PerAxis):
            return None
        return BiasQuantizer(rule.bits, (self._quantizer(self.input_group(point.operator)), weight))


def _on_codes(weight: Tensor, codes: Tensor, qparams: QParams) -> Tensor:
    """A weight whose codes are these, moved by float rounding where the quotient lies next to a tie."""
    scale = expand(qparams.scale, qparams.granularity, tuple(weight.shape))
    for part in _NUDGES:
        differs = quantize(weight, qparams) != codes
        if not bool(differs.any()):
            break
        weight = torch.where(differs, torch.lerp(weight, codes * scale, part), weight)
    return weight


def _synchronize(graph: Graph) -> None:
    """Let batch norms that are not folded count the batches of all processes, too."""
    for operator in graph.operators:
        path = str(operator.attributes.get("module", ""))
        norm = graph.module.get_submodule(path) if operator.kind == "BatchNormalization" else None
        if isinstance(norm, BatchNorm) and not isinstance(norm, SyncedBatchNorm):
            graph.module.set_submodule(path, SyncedBatchNorm.taking(norm, operator.name))


def _drop_unused(module: fx.GraphModule) -> None:
    """Take the biases out that no operator reads any more."""
    for node in list(module.graph.nodes):
        if node.op == "get_attr" and not node.users:
            module.graph.erase_node(node)
            name = str(node.target)
            if all(other.target != name for other in module.graph.nodes if other.op == "get_attr"):
                parent, _, leaf = name.rpartition(".")
                holder = module.get_submodule(parent)
                holder._parameters.pop(leaf, None)
                holder._buffers.pop(leaf, None)
