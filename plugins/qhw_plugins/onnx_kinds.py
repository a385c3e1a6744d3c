# SPDX-License-Identifier: Apache-2.0
"""ONNX operators as kinds and plain facts, named as qhw's graph names them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import onnx

from qhw.graph import KNOWN_KINDS

__all__ = ["attributes_of", "kind_of"]

_SAME_NAME = frozenset(KNOWN_KINDS) - {"DepthwiseConv", "ChannelShuffle", "Embedding", "Attention", "Rsqrt", "Silu"}
_RENAMED = {"LSTM": "Lstm", "GRU": "Gru", "LpNormalization": "L2Normalization", "Swish": "Silu"}
_GLOBAL = {"ReduceMean": "GlobalAveragePool", "ReduceMax": "GlobalMaxPool"}


def attributes_of(node: onnx.NodeProto) -> dict[str, Any]:
    """A node's attributes that are numbers, texts or lists of these."""
    found: dict[str, Any] = {}
    for item in node.attribute:
        if item.type == onnx.AttributeProto.FLOAT:
            found[item.name] = item.f
        elif item.type == onnx.AttributeProto.INT:
            found[item.name] = item.i
        elif item.type == onnx.AttributeProto.STRING:
            found[item.name] = item.s.decode("utf-8", "replace")
        elif item.type == onnx.AttributeProto.FLOATS:
            found[item.name] = list(item.floats)
        elif item.type == onnx.AttributeProto.INTS:
            found[item.name] = list(item.ints)
    return found


def kind_of(
    name: str,
    given: Mapping[str, Any],
    source: Sequence[int | None] | None,
    weight: Sequence[int] | None,
    constants: Sequence[Sequence[float] | None],
) -> tuple[str, dict[str, Any]]:
    """Kind and facts.

    Args:
        name: The ONNX operator; of a QOperator the one that it computes.
        given: Its attributes.
        source: Shape of its first operand; None where not known.
        weight: Shape of its constant operand; None where there is none.
        constants: Values of its inputs where they are small constants, else None; by position.
    """
    if name in ("Conv", "ConvTranspose"):
        return _conv(name, given, weight)
    if name == "Gemm":
        return _gemm(given, weight)
    if name == "MatMul":
        return _matmul(source, weight)
    if name in ("MaxPool", "AveragePool"):
        return name, _pool(name, given)
    if name in ("GlobalAveragePool", "GlobalMaxPool"):
        sizes = _spatial(source)
        return name, {} if sizes is None else {"kernel": sizes, "reduced_elements": math.prod(sizes)}
    if name.startswith("Reduce"):
        return _reduction(name, given, source, _numbers(constants, 1))
    if name in ("Relu", "Clip"):
        return _clip(name, given, constants)
    if name in ("Softmax", "LogSoftmax", "Concat", "Split", "Gather", "Flatten"):
        return name, _axis(name, given, source)
    kind = _RENAMED.get(name, name)
    facts = {
        "LeakyRelu": {"slope": given.get("alpha", 0.01)},
        "Elu": {"alpha": given.get("alpha", 1.0)},
        "Resize": {"mode": given.get("mode", "nearest")},
        "Pad": {"mode": given.get("mode", "constant")},
        "Gelu": {"approximate": given.get("approximate", "none")},
    }.get(kind, {})
    return (kind, facts) if kind in _SAME_NAME else ("Unknown", {})


def _conv(name: str, given: Mapping[str, Any], weight: Sequence[int] | None) -> tuple[str, dict[str, Any]]:
    if weight is None or len(weight) < 3:
        return name, {}
    rank, groups = len(weight) - 2, int(given.get("group", 1))
    transposed = name == "ConvTranspose"
    facts: dict[str, Any] = {
        "kernel": list(weight[2:]),
        "stride": _list(given.get("strides"), rank),
        "dilation": _list(given.get("dilations"), rank),
        "groups": max(groups, 1),
        "in_channels": weight[0] if transposed else weight[1] * groups,
        "out_channels": weight[1] * groups if transposed else weight[0],
        "padding": _padding(given, rank),
        "rank": len(weight),
    }
    if name == "Conv" and groups > 1 and groups == facts["in_channels"]:
        return "DepthwiseConv", facts
    return name, facts


def _padding(given: Mapping[str, Any], rank: int) -> Any:
    """As many on both sides as one number per dimension; the words where ONNX has them."""
    word = str(given.get("auto_pad", "NOTSET"))
    if word.startswith("SAME"):
        return "same"
    if word == "VALID":
        return "valid"
    pads = given.get("pads")
    if not isinstance(pads, list) or len(pads) != 2 * rank:
        return [0] * rank
    return [max(before, after) for before, after in zip(pads[:rank], pads[rank:], strict=True)]


def _gemm(given: Mapping[str, Any], weight: Sequence[int] | None) -> tuple[str, dict[str, Any]]:
    plain = given.get("alpha", 1.0) == 1.0 and given.get("beta", 1.0) == 1.0 and not given.get("transA", 0)
    if not plain:
        return "Unknown", {}
    if weight is None or len(weight) != 2:
        return "Gemm", {}
    outer, inner = (0, 1) if given.get("transB", 0) else (1, 0)
    return "Gemm", {**_products(weight[inner], weight[outer]), "rank": 2}


def _matmul(source: Sequence[int | None] | None, weight: Sequence[int] | None) -> tuple[str, dict[str, Any]]:
    if weight is not None and len(weight) == 2:
        return "Gemm", _products(weight[0], weight[1])
    inner = source[-1] if source else (weight[-2] if weight is not None and len(weight) > 1 else None)
    return "MatMul", {} if inner is None else {"reduced_elements": inner}


def _products(inner: int, outer: int) -> dict[str, Any]:
    return {"in_channels": inner, "out_channels": outer, "reduced_elements": inner}


def _pool(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    kernel = given.get("kernel_shape")
    if not isinstance(kernel, list):
        return {}
    facts = {
        "kernel": list(kernel),
        "stride": _list(given.get("strides"), len(kernel)),
        "padding": _padding(given, len(kernel)),
        "reduced_elements": math.prod(kernel),
        "dilation": _list(given.get("dilations"), len(kernel)),
    }
    if name == "AveragePool":
        facts["count_include_pad"] = bool(given.get("count_include_pad", 0))
    return facts


def _reduction(
    name: str, given: Mapping[str, Any], source: Sequence[int | None] | None, listed: Sequence[float] | None
) -> tuple[str, dict[str, Any]]:
    kind = name if name in _SAME_NAME else "Unknown"
    axes = given.get("axes") if given.get("axes") is not None else listed
    facts: dict[str, Any] = {"keepdim": bool(given.get("keepdims", 1))}
    if not source:  # not known, or a scalar
        return kind, facts
    chosen = sorted(int(axis) % len(source) for axis in axes) if axes else list(range(len(source)))
    sizes = [source[axis] for axis in chosen]
    facts |= {"axes": chosen, "axis_rank": len(source)}
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes):
        facts["reduced_elements"] = math.prod(known)
    if kind in _GLOBAL and len(source) > 2 and chosen == list(range(2, len(source))):
        if len(known) == len(sizes):
            facts["kernel"] = known
        return _GLOBAL[kind], facts
    return kind, facts


def _clip(name: str, given: Mapping[str, Any], constants: Sequence[Any]) -> tuple[str, dict[str, Any]]:
    if name == "Relu":
        return "Relu", {"minimum": 0.0}
    ends = []
    for position, key in ((1, "min"), (2, "max")):
        listed = _numbers(constants, position)
        value = given.get(key, listed[0] if listed else None)
        ends.append(float(value) if value is not None and math.isfinite(value) and abs(value) < 1e38 else None)
    if ends[0] == 0 and ends[1] is None:
        return "Relu", {"minimum": 0.0}
    return "Clip", {"minimum": ends[0], "maximum": ends[1]}


def _axis(name: str, given: Mapping[str, Any], source: Sequence[int | None] | None) -> dict[str, Any]:
    axis = given.get("axis", {"Softmax": -1, "LogSoftmax": -1, "Flatten": 1}.get(name, 0))
    if source is None or not isinstance(axis, int) or not len(source):
        return {}
    return {"axis": axis % len(source), "axis_rank": len(source)}


def _spatial(source: Sequence[int | None] | None) -> list[int] | None:
    sizes = list(source[2:]) if source is not None else [None]
    known = [size for size in sizes if size is not None]
    return known if known and len(known) == len(sizes) else None


def _numbers(constants: Sequence[Any], position: int) -> Sequence[float] | None:
    found = constants[position] if position < len(constants) else None
    return found if found is not None and len(found) else None


def _list(value: Any, rank: int) -> list[int]:
    """One number per dimension; 1 where none is given."""
    items = list(value) if isinstance(value, list) and value else [1]
    return items * rank if len(items) == 1 else items
