# SPDX-License-Identifier: Apache-2.0
"""Plain facts about an operator (kernel, stride, axis, bounds, ...), and the kind where the arguments decide it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

__all__ = ["argument", "conv_attributes", "macs_of", "narrowed", "shape_of", "target_name"]

_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin")
_GLOBAL = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}
_FIELDS: Mapping[str, Mapping[str, tuple[int, Any]]] = {
    "LeakyRelu": {"slope": (1, 0.01)},
    "Elu": {"alpha": (1, 1.0)},
    "Softplus": {"beta": (1, 1.0), "threshold": (2, 20.0)},
    "LayerNormalization": {"normalized_shape": (1, []), "eps": (4, 1e-5)},
    "GroupNormalization": {"groups": (1, 1), "eps": (4, 1e-5)},
    "InstanceNormalization": {"eps": (7, 1e-5)},
    "Pad": {"padding": (1, []), "mode": (2, "constant"), "value": (3, 0.0)},
    "Pow": {"exponent": (1, 2.0)},
}
_RECURRENT = frozenset(
    f"aten.{name}{form}" for name in ("lstm", "gru", "rnn_tanh", "rnn_relu") for form in (".input", "_cell.default")
)


def target_name(node: fx.Node) -> str:
    """`aten.conv2d.default` for a call of that overload, `operator.getitem` for the builtin, the path for a module."""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    if node.op == "call_function":
        return f"operator.{getattr(node.target, '__name__', node.target)}"
    return str(node.target)


def shape_of(node: object) -> tuple[int, ...]:
    """The example shape of a value; () where it has none."""
    return tuple(node.meta.get("shape", ())) if isinstance(node, fx.Node) else ()


def argument(node: fx.Node, position: int, name: str, default: Any) -> Any:
    """An argument by position or keyword, with the schema's default."""
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _list(value: Any, length: int) -> list[int]:
    if isinstance(value, int):
        return [value] * length
    items = list(value)
    return items * length if len(items) == 1 else items


def conv_attributes(node: fx.Node, kind: str) -> dict[str, Any]:
    """Facts of a convolution; lists have one entry per spatial dimension."""
    weight = shape_of(node.args[1])
    spatial = len(weight) - 2
    transposed = kind == "ConvTranspose"
    groups = argument(node, 6, "groups", 1)
    padding = argument(node, 4, "padding", 0)
    found = {
        "kernel": list(weight[2:]),
        "stride": _list(argument(node, 3, "stride", 1), spatial),
        "dilation": _list(argument(node, 7 if transposed else 5, "dilation", 1), spatial),
        "padding": padding if isinstance(padding, str) else _list(padding, spatial),
        "groups": groups,
        "in_channels": weight[0] if transposed else weight[1] * groups,
        "out_channels": weight[1] * groups if transposed else weight[0],
    }
    if transposed:
        return found | {"output_padding": _list(argument(node, 5, "output_padding", 0), spatial)}
    return found


def narrowed(node: fx.Node, kind: str, shape: Sequence[int]) -> tuple[str, dict[str, Any]]:
    """The kind, special where the arguments make it so, and the facts that limits and exporters read."""
    name = target_name(node)
    if kind == "Clip":
        return _clip(node, name)
    if kind == "Relu":
        return kind, {"minimum": 0.0}
    if kind in _REDUCTIONS:
        return _reduction(node, kind)
    if name.startswith("aten.adaptive_avg_pool"):
        return _adaptive_pool(node, name, kind)
    if kind in ("MaxPool", "AveragePool"):
        return kind, _pool(node, name, kind)
    if kind in ("Softmax", "LogSoftmax"):
        return kind, {"axis": argument(node, 1, "dim", -1) % max(len(shape), 1)}
    if kind == "Concat":
        stacked = {"stacked": True} if name == "aten.stack.default" else {}
        return kind, {"axis": argument(node, 1, "dim", 0) % max(len(shape), 1), **stacked}
    if kind == "Gelu":
        return kind, {"approximate": argument(node, 1, "approximate", "none")}
    if kind == "Resize":
        return kind, {"mode": name.split(".")[1].removeprefix("upsample_").rstrip("123d")}
    fields = _FIELDS.get(kind, {})
    found = {key: argument(node, position, key, default) for key, (position, default) in fields.items()}
    if kind == "Pad":
        found |= {"padding": list(argument(node, 1, "pad", [])), "value": argument(node, 3, "value", None) or 0.0}
    return kind, found


def _clip(node: fx.Node, name: str) -> tuple[str, dict[str, Any]]:
    if name == "aten.relu6.default":
        low, high = 0.0, 6.0
    elif name == "aten.hardtanh.default":
        low, high = argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    elif name == "aten.clamp_max.default":
        low, high = None, argument(node, 1, "max", None)
    else:
        low, high = argument(node, 1, "min", None), argument(node, 2, "max", None)
    minimum, maximum = _finite(low), _finite(high)
    if minimum == 0 and maximum is None:
        return "Relu", {"minimum": 0.0}
    return "Clip", {"minimum": minimum, "maximum": maximum}


def _finite(bound: Any) -> float | None:
    """A bound as a float; None for one that does not bound."""
    return float(bound) if isinstance(bound, int | float) and math.isfinite(bound) else None


def _reduction(node: fx.Node, kind: str) -> tuple[str, dict[str, Any]]:
    source = shape_of(node.args[0])
    given = argument(node, 1, "dim", None) if target_name(node) != "aten.mean.default" else None
    listed = [given] if isinstance(given, int) else list(given or range(len(source)))
    axes = sorted(axis % max(len(source), 1) for axis in listed)
    found: dict[str, Any] = {
        "axes": axes,
        "axis_rank": len(source),
        "keepdim": bool(argument(node, 2, "keepdim", False)),
        "reduced_elements": math.prod(source[axis] for axis in axes),
    }
    if kind in _GLOBAL and len(source) > 2 and axes == list(range(2, len(source))):
        return _GLOBAL[kind], found | {"kernel": list(source[2:])}
    return kind, found


def _spatial(name: str) -> int:
    found = re.search(r"(\d)d\b", name)
    return int(found.group(1)) if found else 1


def _adaptive_pool(node: fx.Node, name: str, kind: str) -> tuple[str, dict[str, Any]]:
    """A pooling to a given size: global, or one kernel where the sizes divide; else its windows differ in size."""
    spatial = _spatial(name)
    source = shape_of(node.args[0])[-spatial:]
    sizes = [
        size if wanted is None else wanted for wanted, size in zip(_list(node.args[1], spatial), source, strict=True)
    ]
    if all(size == 1 for size in sizes):
        return "GlobalAveragePool", {"keepdim": True, "kernel": list(source), "reduced_elements": math.prod(source)}
    if any(size % wanted for size, wanted in zip(source, sizes, strict=True)):
        return "Unknown", {}
    kernel = [size // wanted for size, wanted in zip(source, sizes, strict=True)]
    return kind, {
        "kernel": kernel,
        "stride": list(kernel),
        "padding": [0] * spatial,
        "ceil_mode": False,
        "reduced_elements": math.prod(kernel),
    }


def _pool(node: fx.Node, name: str, kind: str) -> dict[str, Any]:
    spatial = _spatial(name)
    kernel = _list(node.args[1], spatial)
    found: dict[str, Any] = {
        "kernel": kernel,
        "stride": _list(argument(node, 2, "stride", None) or kernel, spatial),
        "padding": _list(argument(node, 3, "padding", 0), spatial),
        "reduced_elements": math.prod(kernel),
    }
    if kind == "MaxPool":
        found["dilation"] = _list(argument(node, 4, "dilation", 1), spatial)
        return found | {"ceil_mode": bool(argument(node, 5, "ceil_mode", False))}
    found["ceil_mode"] = bool(argument(node, 4, "ceil_mode", False))
    found["count_include_pad"] = bool(argument(node, 5, "count_include_pad", True))
    return found | {"divisor": argument(node, 6, "divisor_override", None)}


def macs_of(node: fx.Node, kind: str, shape: Sequence[int], attributes: Mapping[str, Any]) -> int:
    """Multiply-accumulates of the whole example batch; 0 for a kind that does not multiply tensors."""
    outputs = math.prod(shape)
    if kind in ("Conv", "DepthwiseConv"):
        taps = math.prod(attributes["kernel"])
        return int(outputs * taps * attributes["in_channels"] // attributes["groups"])
    if kind == "ConvTranspose":  # every input element meets every tap of every output channel of its group
        taps = math.prod(attributes["kernel"])
        return int(math.prod(shape_of(node.args[0])) * taps * attributes["out_channels"] // attributes["groups"])
    if kind in ("Gemm", "MatMul"):
        return int(outputs * attributes["reduced_elements"])
    if kind == "Attention":  # query x key, then scores x value
        query, key, value = (shape_of(a) for a in node.args[:3])
        return int(math.prod(query) * key[-2] + math.prod(query[:-1]) * key[-2] * value[-1])
    if target_name(node) in _RECURRENT:  # every step of every sample meets every matrix, of each layer and direction
        weights = node.args[2] if isinstance(node.args[2], list | tuple) else node.args[2:4]
        matrices = (dims for dims in map(shape_of, weights) if len(dims) == 2)
        return int(math.prod(shape_of(node.args[0])[:-1]) * sum(map(math.prod, matrices)))
    return 0
