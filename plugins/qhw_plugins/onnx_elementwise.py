# SPDX-License-Identifier: Apache-2.0
"""ATen to ONNX: arithmetic, comparisons, activations, reductions."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import fx

from qhw_plugins.onnx_context import DTYPES, Context, NotCovered, Translation, Value, argument, shape_of

__all__ = ["TABLE", "clip_bounds"]


def _unary(kind: str, **attributes: Any) -> Translation:
    """One ONNX operator of one tensor; goes through a pending view, which it does not care about."""

    def translate(c: Context, node: fx.Node) -> Value | None:
        return along(c, node, lambda x: c.op(kind, x, **attributes))

    return translate


def along(c: Context, node: fx.Node, compute: Any) -> Value | None:
    """Compute element by element, before the view that the input still waits for, if any."""
    source = node.args[0]
    waiting = c.pending(source) if isinstance(source, fx.Node) else None
    if waiting is None:
        result: str = compute(c.tensor(source, node.meta["dtype"] if node.meta["dtype"].startswith("float") else ""))
        return result
    raw, finish = waiting
    c.set_pending(node, compute(raw), finish)
    return None


def _binary(kind: str, compare: bool = False, swap: bool = False) -> Translation:
    """Two tensors or a tensor and a number, in the type that torch promotes them to.

    A summand that is broadcast comes second: there onnxruntime 1.32 adds it to the zero points before the other,
    whether it keeps the layout or not; as the first, only where it keeps it.
    """

    def translate(c: Context, node: fx.Node) -> Value:
        left, right = node.args[0], node.args[1]
        dtype = _common(left, right) if compare else node.meta["dtype"]
        a, b = c.tensor(left, dtype), c.tensor(right, dtype)
        alpha = argument(node, 2, "alpha", 1) if kind in ("Add", "Sub") else 1
        if alpha != 1:
            scaled = c.op("Mul", a if swap else b, c.tensor(alpha, dtype), part="alpha")
            a, b = (scaled, b) if swap else (a, scaled)
        turned = swap or (kind == "Add" and alpha == 1 and _is_smaller(left, right))
        return c.op(kind, b, a) if turned else c.op(kind, a, b)

    return translate


def _is_smaller(left: Any, right: Any) -> bool:
    """Whether the first tensor has fewer elements, so that it is broadcast."""
    if not (isinstance(left, fx.Node) and isinstance(right, fx.Node)):
        return False
    return math.prod(shape_of(left)) < math.prod(shape_of(right))


def _common(*items: Any) -> str:
    """The type that operands are compared in."""
    dtypes = [item.meta["dtype"] for item in items if isinstance(item, fx.Node)]
    floats = [dtype for dtype in dtypes if dtype.startswith("float")]
    if not floats and any(isinstance(item, float) for item in items):
        return "float32"
    return str(max(floats or dtypes, key=lambda dtype: int("".join(filter(str.isdigit, dtype)) or 0)))


def _not_equal(c: Context, node: fx.Node) -> Value:
    dtype = _common(node.args[0], node.args[1])
    return c.op("Not", c.op("Equal", c.tensor(node.args[0], dtype), c.tensor(node.args[1], dtype), part="equal"))


def clip_bounds(node: fx.Node) -> tuple[float | None, float | None] | None:
    """The bounds that an activation clips to; None for another operator."""
    name = str(node.target)
    if node.op != "call_function":
        return None
    if name == "aten.relu.default":
        return 0.0, None
    if name == "aten.relu6.default":
        return 0.0, 6.0
    if name == "aten.hardtanh.default":
        return argument(node, 1, "min_val", -1.0), argument(node, 2, "max_val", 1.0)
    if name == "aten.clamp_max.default":
        return None, argument(node, 1, "max")
    if name in ("aten.clamp.default", "aten.clamp_min.default"):
        bounds = argument(node, 1, "min"), argument(node, 2, "max")
        return None if any(isinstance(bound, fx.Node) for bound in bounds) else bounds
    return None


def _clip(c: Context, node: fx.Node) -> Value | None:
    bounds = clip_bounds(node)
    if bounds is None:
        raise NotCovered("computed bounds")
    dtype = node.meta["dtype"]
    low, high = ("" if bound is None else c.tensor(bound, dtype) for bound in bounds)
    if (bounds[0] == 0 and bounds[1] is None) and dtype.startswith("float"):
        return along(c, node, lambda x: c.op("Relu", x))
    return along(c, node, lambda x: c.op("Clip", x, low, high))


def _gelu(c: Context, node: fx.Node) -> Value:
    x = c.tensor(node.args[0])
    half, one = c.tensor(0.5, "float32"), c.tensor(1.0, "float32")
    if argument(node, 1, "approximate", "none") == "tanh":
        cube = c.op("Mul", c.op("Mul", x, x, part="square"), x, part="cube")
        inner = c.op("Add", x, c.op("Mul", cube, c.tensor(0.044715, "float32"), part="cubic"), part="inner")
        curve = c.op(
            "Tanh", c.op("Mul", inner, c.tensor(math.sqrt(2 / math.pi), "float32"), part="scaled"), part="tanh"
        )
    else:
        curve = c.op("Erf", c.op("Div", x, c.tensor(math.sqrt(2), "float32"), part="scaled"), part="erf")
    return c.op("Mul", c.op("Mul", x, c.op("Add", curve, one, part="shifted"), part="product"), half)


def _mish(c: Context, node: fx.Node) -> Value:
    x = c.tensor(node.args[0])
    return c.op("Mul", x, c.op("Tanh", c.op("Softplus", x, part="softplus"), part="tanh"))


def _softplus(c: Context, node: fx.Node) -> Value:
    if argument(node, 1, "beta", 1) != 1:
        raise NotCovered("beta")
    return c.op("Softplus", c.tensor(node.args[0]))


def _elu(c: Context, node: fx.Node) -> Value:
    if argument(node, 2, "scale", 1) != 1 or argument(node, 3, "input_scale", 1) != 1:
        raise NotCovered("scale")
    return c.op("Elu", c.tensor(node.args[0]), alpha=float(argument(node, 1, "alpha", 1.0)))


def _gated(kind: str, **attributes: float) -> Translation:
    def translate(c: Context, node: fx.Node) -> Value:
        x = c.tensor(node.args[0])
        return c.op("Mul", x, c.op(kind, x, part="gate", **attributes))

    return translate


def _prelu(c: Context, node: fx.Node) -> Value:
    x, slope = node.args[0], c.tensor(node.args[1])
    rank = len(shape_of(x))
    if shape_of(node.args[1])[0] > 1 and rank > 2:
        slope = c.op("Reshape", slope, c.builder.ints([-1] + [1] * (rank - 2)), part="slope")
    return c.op("PRelu", c.tensor(x), slope)


def _softmax(kind: str) -> Translation:
    def translate(c: Context, node: fx.Node) -> Value:
        return c.op(kind, c.tensor(node.args[0], node.meta["dtype"]), axis=int(argument(node, 1, "dim", -1)))

    return translate


def reduce(c: Context, kind: str, x: str, axes: list[int] | None, keepdims: bool, part: str = "") -> str:
    """A reduction; its axes are an attribute up to opset 17, an input from 18 on (ReduceSum: 13)."""
    if axes is None:
        return c.op(kind, x, part=part, keepdims=int(keepdims))
    if c.builder.opset >= 18 or kind == "ReduceSum":
        return c.op(kind, x, c.builder.ints(axes), part=part, keepdims=int(keepdims))
    return c.op(kind, x, part=part, axes=axes, keepdims=int(keepdims))


def _reduction(kind: str) -> Translation:
    def translate(c: Context, node: fx.Node) -> Value:
        dims = argument(node, 1, "dim", None)
        dims = [dims] if isinstance(dims, int) else dims
        x = c.tensor(node.args[0], node.meta["dtype"])
        axes = [int(dim) for dim in dims] if dims else None
        return reduce(c, kind, x, axes, bool(argument(node, 2, "keepdim", False)))

    return translate


def _where(c: Context, node: fx.Node) -> Value:
    dtype = node.meta["dtype"]
    return c.op("Where", c.tensor(node.args[0]), c.tensor(node.args[1], dtype), c.tensor(node.args[2], dtype))


def _masked_fill(c: Context, node: fx.Node) -> Value:
    x, mask = node.args[:2]
    value: Any = node.args[2]
    dtype = node.meta["dtype"]
    number: Any = float(value) if dtype.startswith("float") and not isinstance(value, fx.Node) else value
    if isinstance(number, float) and dtype == "float32":
        number = (
            float(np.clip(number, -np.finfo(np.float32).max, np.finfo(np.float32).max))
            if np.isfinite(number)
            else number
        )
    return c.op("Where", c.tensor(mask), c.tensor(number, dtype), c.tensor(x, dtype))


def _cast(c: Context, node: fx.Node) -> Value:
    return c.op("Cast", c.tensor(node.args[0]), to=DTYPES[node.meta["dtype"]])


def _arg_max(c: Context, node: fx.Node) -> Value:
    dim = argument(node, 1, "dim", None)
    if dim is None:
        raise NotCovered("flattened")
    return c.op("ArgMax", c.tensor(node.args[0]), axis=int(dim), keepdims=int(argument(node, 2, "keepdim", False)))


_UNARY = {
    "sqrt": "Sqrt", "exp": "Exp", "log": "Log", "neg": "Neg", "abs": "Abs", "sigmoid": "Sigmoid", "tanh": "Tanh",
    "reciprocal": "Reciprocal", "sin": "Sin", "cos": "Cos", "erf": "Erf", "floor": "Floor", "sign": "Sign",
    "logical_not": "Not", "bitwise_not": "Not", "round": "Round",
}  # fmt: skip
_COMPARISONS = {"eq": "Equal", "gt": "Greater", "ge": "GreaterOrEqual", "lt": "Less", "le": "LessOrEqual"}

TABLE: Mapping[str, Translation] = {
    **{f"aten.{name}.default": _unary(kind) for name, kind in _UNARY.items()},
    **{f"aten.{n}.{o}": _binary(kind, compare=True) for n, kind in _COMPARISONS.items() for o in ("Scalar", "Tensor")},
    "aten.ne.Scalar": _not_equal,
    "aten.ne.Tensor": _not_equal,
    "aten.add.Tensor": _binary("Add"),
    "aten.add.Scalar": _binary("Add"),
    "aten.sub.Tensor": _binary("Sub"),
    "aten.sub.Scalar": _binary("Sub"),
    "aten.rsub.Scalar": _binary("Sub", swap=True),
    "aten.mul.Tensor": _binary("Mul"),
    "aten.mul.Scalar": _binary("Mul"),
    "aten.div.Tensor": _binary("Div"),
    "aten.div.Scalar": _binary("Div"),
    "aten.maximum.default": _binary("Max"),
    "aten.minimum.default": _binary("Min"),
    "aten.logical_and.default": _binary("And"),
    "aten.logical_or.default": _binary("Or"),
    "aten.pow.Tensor_Scalar": _binary("Pow"),
    "aten.pow.Tensor_Tensor": _binary("Pow"),
    "aten.rsqrt.default": lambda c, n: c.op("Reciprocal", c.op("Sqrt", c.tensor(n.args[0]), part="sqrt")),
    "aten.relu.default": _clip,
    "aten.relu6.default": _clip,
    "aten.hardtanh.default": _clip,
    "aten.clamp.default": _clip,
    "aten.clamp_min.default": _clip,
    "aten.clamp_max.default": _clip,
    "aten.leaky_relu.default": lambda c, n: along(
        c, n, lambda x: c.op("LeakyRelu", x, alpha=float(argument(n, 1, "negative_slope", 0.01)))
    ),
    "aten.prelu.default": _prelu,
    "aten.elu.default": _elu,
    "aten.hardsigmoid.default": _unary("HardSigmoid", alpha=1 / 6, beta=0.5),
    "aten.hardswish.default": _gated("HardSigmoid", alpha=1 / 6, beta=0.5),
    "aten.silu.default": _gated("Sigmoid"),
    "aten.mish.default": _mish,
    "aten.softplus.default": _softplus,
    "aten.gelu.default": _gelu,
    "aten.softmax.int": _softmax("Softmax"),
    "aten.log_softmax.int": _softmax("LogSoftmax"),
    "aten.mean.default": _reduction("ReduceMean"),
    "aten.sum.dim_IntList": _reduction("ReduceSum"),
    "aten.amax.default": _reduction("ReduceMax"),
    "aten.amin.default": _reduction("ReduceMin"),
    "aten.argmax.default": _arg_max,
    "aten.where.self": _where,
    "aten.where.ScalarOther": _where,
    "aten.where.ScalarSelf": _where,
    "aten.masked_fill.Scalar": _masked_fill,
    "aten.to.dtype": _cast,
    "aten._to_copy.default": _cast,
    "aten.to.dtype_layout": _cast,
    "aten.to.device": _cast,
    "aten.type_as.default": _cast,
}
