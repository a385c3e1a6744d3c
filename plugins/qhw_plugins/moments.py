# SPDX-License-Identifier: Apache-2.0
"""What can be told of a graph's channels without data: means, deviations and ranges, propagated from batch norms.

Channels are taken as independent and normal, clipped where the graph clips them. Zeros that convolutions and poolings
pad with are ignored.
"""

import math
import operator as python
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, fx

from qhw.decisions import Reason
from qhw.engine import MatrixForm
from qhw.errors import RangeError
from qhw.extension import AlgorithmOptions
from qhw.graph import MOVEMENT_KINDS, VIEW_KINDS, WEIGHTED_KINDS, Graph, Operator, Placement
from qhw.numerics import ChannelNormal
from qhw_plugins.batch_norm_folding import normal_of

_BINARY = ("Add", "Sub", "Mul", "Div", "Min", "Max")
# Pooling keeps the mean and has the standard deviation as an upper bound; so do interpolation and dropout.
_POOLS = ("AveragePool", "GlobalAveragePool", "ReduceMean", "MaxPool", "GlobalMaxPool", "ReduceMax", "Resize")


class InputOptions(AlgorithmOptions):
    """What may be said of the model's inputs."""

    input_mean: float = Field(0.0, allow_inf_nan=False, description="Mean of every channel of the model's inputs.")
    input_std: float = Field(
        1.0, ge=0.0, allow_inf_nan=False, description="Standard deviation of every channel of the model's inputs."
    )

    def inputs(self, graph: Graph) -> dict[str, ChannelNormal]:
        """The distribution of each float input of a model."""
        floats = [name for name, dtype in graph.input_dtypes.items() if dtype.startswith(("float", "bfloat"))]
        mean, std = _number(self.input_mean), _number(self.input_std)
        return {name: ChannelNormal(mean, std) for name in floats}

    def reason(self, algorithm: str, name: str) -> Reason:
        """That an input is taken as normalized, and how to say otherwise."""
        rule = (
            f"{name} is taken as normalized: mean {self.input_mean:g}, variance {self.input_std**2:g} "
            f"(--set {algorithm}.input_std=..., input_mean=...)"
        )
        return Reason(subject=f"{algorithm}.input_std", value=self.input_std, rule=rule)


@dataclass(frozen=True)
class Channels:
    """Channels of a value: clip(normal, low, high), one after another.

    Attributes:
        normal: Before clipping; one channel where `axis` is None.
        low: float64 [channels], -inf where nothing clips.
        high: float64 [channels].
        axis: Axis of the channels; None where all elements are alike.
    """

    normal: ChannelNormal
    low: Tensor
    high: Tensor
    axis: int | None

    @classmethod
    def of(cls, normal: ChannelNormal, axis: int | None) -> "Channels":
        """Channels that nothing clips."""
        infinite = torch.full_like(normal.mean, math.inf)
        return cls(normal, -infinite, infinite, axis)

    @property
    def moments(self) -> ChannelNormal:
        """Mean and standard deviation after clipping."""
        bounded = torch.isfinite(self.low) | torch.isfinite(self.high)
        return self.normal.clipped(self.low, self.high) if bool(bounded.any()) else self.normal

    def reach(self, alpha: float) -> tuple[Tensor, Tensor]:
        """Lowest and highest value of the channels within alpha standard deviations: float64 [], []."""
        low = torch.clamp(self.normal.mean - alpha * self.normal.std, self.low, self.high)
        high = torch.clamp(self.normal.mean + alpha * self.normal.std, self.low, self.high)
        return low.min(), high.max()

    def along(self, axis: int, channels: int) -> "Channels | None":
        """The same with this axis and number of channels; None where they are others."""
        if self.axis is None:
            return self.picked(torch.zeros(channels, dtype=torch.int64), axis)
        return self if (self.axis, len(self.low)) == (axis, channels) else None

    def picked(self, index: Tensor, axis: int | None) -> "Channels":
        """Channels by their numbers."""
        normal = ChannelNormal(self.normal.mean[index], self.normal.std[index])
        return Channels(normal, self.low[index], self.high[index], axis)

    def clipped(self, low: Tensor, high: Tensor) -> "Channels":
        """Clipped once more; bounds [] or [channels]."""
        new_low, new_high = (torch.clamp(bound, low, high).expand_as(self.low) for bound in (self.low, self.high))
        return Channels(self.normal, new_low, new_high, self.axis)

    def times(self, factor: Tensor) -> "Channels":
        """Times a factor [] or [channels]."""
        factor = factor.expand_as(self.low)
        ends = [torch.where(factor == 0, 0.0, bound * factor) for bound in (self.low, self.high)]
        return Channels(self.normal.scaled(factor), torch.minimum(*ends), torch.maximum(*ends), self.axis)

    def plus(self, offset: Tensor) -> "Channels":
        """Plus an offset [] or [channels]."""
        return Channels(self.normal.shifted(offset), self.low + offset, self.high + offset, self.axis)


def channel_moments(
    graph: Graph, normals: Mapping[str, ChannelNormal], inputs: Mapping[str, ChannelNormal]
) -> dict[str, ChannelNormal]:
    """Mean and standard deviation of the channels of every value that can be told; one channel where all are alike.

    Args:
        graph: With batch norms or without.
        normals: Operator -> distribution of its output, which a batch norm tells (`Work.normals`).
        inputs: Model input -> its distribution, per channel of axis 1, or one for all.
    """
    return {name: channels.moments for name, channels in told_channels(graph, normals, inputs).items()}


def told_channels(
    graph: Graph, normals: Mapping[str, ChannelNormal], inputs: Mapping[str, ChannelNormal]
) -> dict[str, Channels]:
    """As `channel_moments`, with axis and bounds.

        W x + b:   mean = W E[x] + b, var = W^2 Var[x], summed over the taps
        clip:      bounds of the normal before it; clips in a row are exact
        x + y:     means and variances add
        pooling:   mean and standard deviation stay, an upper bound of the latter
        maximum pooling alike: its mean is above that, by how much depends on the correlation of neighbours

    Reference:
        Nagel et al., 2021, arXiv:2106.08295, section 3.4 (clipped normals); residual sums as Nagel et al., 2019,
        arXiv:1906.04721.
    """
    found = {name: Channels.of(normal, 1 if len(normal.mean) > 1 else None) for name, normal in inputs.items()}
    for operator in graph.operators:
        try:
            channels = _channels(graph, operator, normals, found)
        except RangeError:  # NaN or infinite weights: a survey tells nothing of them, the runner refuses them by name
            continue
        if channels is not None:
            found[operator.name] = channels
    return found


def folded_normals(graph: Graph, points: Placement) -> dict[str, ChannelNormal]:
    """What `Work.normals` will hold once the batch norms that a plan folds are folded; for `survey`."""
    folded = {operator.name for operator in points.operators if operator.where == "folded"}
    norms = [norm for norm in batch_norms(graph) if norm.name in folded]
    return {norm.inputs[0]: normal_of(graph, norm) for norm in norms}


def batch_norms(graph: Graph) -> list[Operator]:
    """Batch norms that keep running statistics, with finite scales and shifts."""
    norms = [operator for operator in graph.operators if operator.kind == "BatchNormalization"]
    return [norm for norm in norms if _has_statistics(graph, norm)]


def why_untold(graph: Graph, told: Mapping[str, Channels], value: str) -> Reason:
    """The first operator on the way to a value that nothing is known of."""
    operators = {operator.name: operator for operator in graph.operators}
    operator = operators.get(value)
    while operator is not None:
        before = next((name for name in operator.inputs if name in operators and name not in told), None)
        if before is None:
            kind = str(graph.node(operator.name).target) if operator.kind == "Unknown" else operator.kind
            if operator.kind == "BatchNormalization":
                kind = "BatchNormalization without finite running statistics"
            rule = f"behind {{value}} ({operator.name}) nothing is known of the channels without data"
            return Reason(subject=f"graph.{operator.name}.kind", value=kind, rule=rule)
        operator = operators[before]
    return Reason(subject=f"graph.{value}", value=None, rule=f"nothing is known of {value} without data")


def after_weights(operator: Operator, weight: Tensor, x: ChannelNormal) -> ChannelNormal:
    """Mean and standard deviation of weight * x, without bias.

    Output positions of a transposed convolution meet different taps; the moments are those over all positions.

    Args:
        operator: A Conv, DepthwiseConv, ConvTranspose or Gemm.
        weight: Of the operator's weight shape.
        x: Its input channels, independent of each other and from place to place.

    Returns:
        ChannelNormal: [out_channels].
    """
    form = MatrixForm(operator, tuple(weight.shape))
    rows = form.weight_rows(weight.double())  # [groups, outputs, inputs * taps]
    rows = rows.reshape(*rows.shape[:2], len(x.mean) // form.groups, -1)
    mean, variance = (part.reshape(form.groups, 1, -1, 1) for part in (x.mean, x.std.square()))
    phases = _phases(operator, rows.shape[-1])
    means = (rows * mean).sum(2) @ phases
    variances = (rows.square() * variance).sum(2) @ phases
    spread = variances.mean(-1) + means.var(-1, unbiased=False)
    return ChannelNormal(means.mean(-1).reshape(-1), spread.sqrt().reshape(-1))


def input_channels(graph: Graph, operator: Operator, told: Mapping[str, Channels]) -> Channels | None:
    """What is known of the input of an operator with weights, along its channels."""
    found = told.get(operator.inputs[0])
    if found is None:
        return None
    rank = len(_shape(graph, operator.inputs[0]))
    return found.along(_channel_axis(operator, rank), int(operator.attributes["in_channels"]))


def _channels(
    graph: Graph, operator: Operator, normals: Mapping[str, ChannelNormal], found: Mapping[str, Channels]
) -> Channels | None:
    kind = operator.kind
    if operator.name in normals:
        return Channels.of(normals[operator.name], _channel_axis(operator, len(operator.shape)))
    if kind == "BatchNormalization":
        return Channels.of(normal_of(graph, operator), 1) if _has_statistics(graph, operator) else None
    sources = [found[name] for name in operator.inputs if name in found]
    if not sources or len(sources) < len(operator.inputs) or operator.attributes.get("computed"):
        return None
    if kind in WEIGHTED_KINDS:
        return _weighted(graph, operator, found) if operator.weight is not None and len(sources) == 1 else None
    if kind in ("Relu", "Clip"):
        low, high = operator.attributes.get("minimum"), operator.attributes.get("maximum")
        return sources[0].clipped(
            _scalar(-math.inf if low is None else low), _scalar(math.inf if high is None else high)
        )
    if kind in _POOLS:
        return _pooled(operator, sources[0])
    if kind == "Concat":
        return _concatenated(graph, operator, sources)
    if kind == "Dropout" or kind == "Split":
        return sources[0]
    if kind in VIEW_KINDS or kind in MOVEMENT_KINDS:
        return _moved(graph, operator, sources[0])
    return _binary(graph, operator, sources) if kind in _BINARY else None


def _weighted(graph: Graph, operator: Operator, found: Mapping[str, Channels]) -> Channels | None:
    x = input_channels(graph, operator, found)
    if x is None:
        return None
    normal = after_weights(operator, graph.tensor(str(operator.weight)).detach(), x.moments)
    if operator.bias is not None:
        normal = normal.shifted(graph.tensor(operator.bias).detach().double())
    return Channels.of(normal, _channel_axis(operator, len(operator.shape)))


def _phases(operator: Operator, taps: int) -> Tensor:
    """Which taps an output position meets: float64 [taps, phases]; all of them but for a transposed convolution."""
    if operator.kind != "ConvTranspose":
        return torch.ones(taps, 1, dtype=torch.float64)
    facts = operator.attributes
    phase = torch.zeros((), dtype=torch.int64)
    for kernel, stride, dilation in zip(facts["kernel"], facts["stride"], facts["dilation"], strict=True):
        # MatrixForm reverses the taps.
        phase = phase[..., None] * stride + torch.arange(kernel).flip(0) * dilation % stride
    return F.one_hot(phase.reshape(-1), math.prod(facts["stride"])).double()


def _pooled(operator: Operator, x: Channels) -> Channels | None:
    facts = operator.attributes
    if facts.get("divisor"):
        x = x.times(_scalar(math.prod(facts["kernel"]) / facts["divisor"]))
    if operator.kind == "AveragePool" and facts.get("count_include_pad") and any(facts["padding"]):
        x = Channels(x.normal, x.low.clamp(max=0.0), x.high.clamp(min=0.0), x.axis)
    axes = facts.get("axes", [])
    if x.axis is None or not axes:
        return x
    if x.axis in axes:
        return None
    axis = x.axis if facts["keepdim"] else x.axis - sum(reduced < x.axis for reduced in axes)
    return Channels(x.normal, x.low, x.high, axis)


def _concatenated(graph: Graph, operator: Operator, sources: list[Channels]) -> Channels | None:
    axis = operator.attributes["axis"]
    if operator.attributes.get("stacked"):
        return None
    parts = [x.along(axis, _shape(graph, name)[axis]) for x, name in zip(sources, operator.inputs, strict=True)]
    known = [part for part in parts if part is not None]
    joined = _joined(known, axis)
    return joined if len(joined.low) == operator.shape[axis] else None


def _joined(parts: list[Channels], axis: int | None) -> Channels:
    normal = ChannelNormal(torch.cat([p.normal.mean for p in parts]), torch.cat([p.normal.std for p in parts]))
    return Channels(normal, torch.cat([p.low for p in parts]), torch.cat([p.high for p in parts]), axis)


def _moved(graph: Graph, operator: Operator, x: Channels) -> Channels | None:
    """Views and movements: the channels' numbers, from 1, go through the operator and are read from its result.

    0 stands for padding: a channel of it is the constant, and within a channel it widens the bounds and no more.
    """
    numbers = _sent_through(graph, operator, x)
    if numbers is None:
        return None
    constant = Channels.of(ChannelNormal(_number(0.0), _number(0.0)), None)
    if bool((numbers == 0).any()):
        value = _number(operator.attributes["value"])
        constant = constant.plus(value)
        x = Channels(x.normal, torch.minimum(x.low, value), torch.maximum(x.high, value), x.axis)
    table = _joined([constant, x], x.axis)
    for axis in range(1, numbers.dim()):  # channels in the batch axis would differ from batch to batch
        lines = numbers.movedim(axis, 0).flatten(1)
        highest = lines.amax(1)
        if bool(((lines == highest[:, None]) | (lines == 0)).all()):
            alike = bool((highest == highest[0]).all())
            return table.picked(highest[:1], None) if alike else table.picked(highest, axis)
    return None


def _sent_through(graph: Graph, operator: Operator, x: Channels) -> Tensor | None:
    """What a view or movement makes of channel numbers; None where its arguments are computed from data."""
    node: Any = graph.node(operator.name)
    if operator.kind == "Pad":
        numbers = _numbered(x, _shape(graph, operator.inputs[0])).double()  # torch reflects floats only
        return F.pad(numbers, operator.attributes["padding"], operator.attributes["mode"]).long()
    if operator.attributes.get("of_tuple"):
        return None
    if node.target is python.getitem:  # one part of a split, whose own shape is that of its first part
        whole = graph.operator(operator.inputs[0]).inputs[0]
        parts = _called(node.args[0], _numbered(x, _shape(graph, whole)))
        return None if parts is None else parts[node.args[1]]
    result: Tensor | None = _called(node, _numbered(x, _shape(graph, operator.inputs[0])))
    return result


def _numbered(x: Channels, shape: tuple[int, ...]) -> Tensor:
    """The number of its channel, from 1, at every element."""
    numbers = torch.arange(1, len(x.low) + 1)
    axis = len(shape) - 1 if x.axis is None else x.axis
    return numbers.reshape(-1, *(1,) * (len(shape) - axis - 1)).expand(shape).contiguous()


def _called(node: fx.Node, first: Tensor) -> Any:
    """The node's function of another first argument; sizes among its arguments are those of the example."""
    arguments, options = fx.map_arg((node.args[1:], dict(node.kwargs)), _static)
    if _Computed in _flat([arguments, list(options.values())]):
        return None
    return node.target(first, *arguments, **options)  # type: ignore[operator]


class _Computed:
    """Stands for an argument that depends on data or parameters."""


def _static(node: fx.Node) -> Any:
    target: Any = node.target
    if str(target) == "aten.sym_size.int":
        source, axis = node.args
        return _shape_of(source)[int(axis)]  # type: ignore[arg-type]
    if node.op != "call_function" or "shape" in node.meta:
        return _Computed
    arguments = fx.map_arg(node.args, _static)
    return _Computed if _Computed in _flat(arguments) else target(*arguments)


def _flat(arguments: Any) -> list[Any]:
    if isinstance(arguments, tuple | list):
        return [item for argument in arguments for item in _flat(argument)]
    return [arguments]


def _binary(graph: Graph, operator: Operator, sources: list[Channels]) -> Channels | None:
    """Sums, and operators with a constant; a product of two values is not told."""
    kind = operator.kind
    if len(sources) == 2:
        return _sum(graph, operator, *sources, sign=-1.0 if kind == "Sub" else 1.0) if kind in ("Add", "Sub") else None
    found = _constant(graph, operator, sources[0])
    if found is None:
        return None
    x, constant, is_first = found
    match kind:
        case "Add":
            return x.plus(constant)
        case "Sub":
            return x.times(_scalar(-1.0)).plus(constant) if is_first else x.plus(-constant)
        case "Mul":
            return x.times(constant)
        case "Min":
            return x.clipped(_scalar(-math.inf), constant)
        case "Max":
            return x.clipped(constant, _scalar(math.inf))
    return None if is_first or bool((constant == 0).any()) else x.times(1 / constant)


def _sum(graph: Graph, operator: Operator, x: Channels, y: Channels, *, sign: float) -> Channels | None:
    """x + sign y for independent values; exact for a value and itself."""
    first, second = operator.inputs
    if first == second:
        return x.times(_scalar(1.0 + sign))
    if len(_shape(graph, first)) != len(_shape(graph, second)):
        return None
    axis = x.axis if y.axis is None else y.axis
    if axis is not None:
        shapes = _shape(graph, first), _shape(graph, second)
        if shapes[0][axis] != shapes[1][axis]:
            return None
        a, b = x.along(axis, shapes[0][axis]), y.along(axis, shapes[0][axis])
    else:
        a, b = x, y
    if a is None or b is None:
        return None
    b = b.times(_scalar(sign))
    first_normal, second_normal = a.moments, b.moments
    std = (first_normal.std.square() + second_normal.std.square()).sqrt()
    return Channels(ChannelNormal(first_normal.mean + second_normal.mean, std), a.low + b.low, a.high + b.high, axis)


def _constant(graph: Graph, operator: Operator, x: Channels) -> tuple[Channels, Tensor, bool] | None:
    """The value aligned with the constant beside it, the constant [] or [channels], and whether that comes first."""
    rank = len(operator.shape)
    if operator.weight is not None:
        tensor = graph.tensor(operator.weight).detach().double()
        is_first = operator.attributes["weight_operand"] == 0
    else:
        first, second = graph.node(operator.name).args[:2]
        is_first = isinstance(first, int | float)
        tensor = torch.tensor(first if is_first else second, dtype=torch.float64)
    if len(_shape(graph, operator.inputs[0])) != rank or not bool(torch.isfinite(tensor).all()):
        return None
    axes = [rank - tensor.dim() + axis for axis, size in enumerate(tensor.shape) if size > 1]
    if not axes:
        return x, tensor.reshape(()), is_first
    aligned = x.along(axes[0], tensor.numel())
    return None if len(axes) > 1 or aligned is None else (aligned, tensor.flatten(), is_first)


def _has_statistics(graph: Graph, norm: Operator) -> bool:
    module: Any = graph.module.get_submodule(str(norm.attributes["module"]))
    given = [tensor for tensor in (module.weight, module.bias) if tensor is not None]
    is_finite = all(bool(torch.isfinite(tensor).all()) for tensor in given)
    return is_finite and module.running_mean is not None and module.running_var is not None


def _channel_axis(operator: Operator, rank: int) -> int:
    """Axis of the channels of an operator with weights, in its input and output alike."""
    return rank - 1 if operator.kind == "Gemm" else rank - 1 - len(operator.attributes["kernel"])


def _shape(graph: Graph, value: str) -> tuple[int, ...]:
    return _shape_of(graph.node(value))


def _shape_of(node: Any) -> tuple[int, ...]:
    return tuple(node.meta["shape"])


def _scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def _number(value: float) -> Tensor:
    """One channel."""
    return torch.tensor([value], dtype=torch.float64)
